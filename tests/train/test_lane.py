"""What comes of a record: a disk is asked again, and whatever goes wrong is named by the record."""

import types

import pytest

from glm4v_jax.errors import DataError
from train import lane
from train.lane import Encoder


class Flaky:
    """Records that a disk gives after so many refusals."""

    def __init__(self, refusals, error=None):
        self.refusals, self.error = refusals, error or OSError("stale file handle")

    def __getitem__(self, number):
        if self.refusals:
            self.refusals -= 1
            raise self.error
        return types.SimpleNamespace(source=f"data.jsonl:{number + 1}")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(lane, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(lane, "encode", lambda record, *others: record.source)


def test_a_disk_is_asked_again():
    assert Encoder(Flaky(2), None, None, None)(3).sample == "data.jsonl:4"
    assert Encoder(Flaky(3), None, None, None)(3).error == "stale file handle"
    missing = Flaky(1, FileNotFoundError("no such file"))
    assert Encoder(missing, None, None, None)(3).error == "no such file" and not missing.refusals


def test_what_nobody_expects_is_named_by_the_record(monkeypatch):
    def broken(record, *others):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(lane, "encode", broken)
    encoder = Encoder(Flaky(0), None, None, None)
    assert encoder(3).error == "data.jsonl:4: ZeroDivisionError: division by zero"
    with pytest.raises(DataError, match=r"row 3: found data\.jsonl:4: ZeroDivisionError: .*; expected what it was"):
        encoder.again(3)
    with pytest.raises(DataError, match="row 0: found row 0: IndexError: "):
        Encoder([], None, None, None).again(0)
