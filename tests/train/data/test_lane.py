"""What comes of a record: a disk is asked again, and whatever goes wrong is named by the record."""

import errno
import re
import types

import pytest

from glm4v_jax.errors import DataError
from train.config import DataConfig
from train.data import lane
from train.data.lane import Counts, Encoder, Lane
from train.data.packing import Packer


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
    assert Encoder(Flaky(3), None, None, None)(3).error == "row 3: stale file handle"
    missing = Flaky(1, FileNotFoundError("no such file"))
    assert Encoder(missing, None, None, None)(3).error == "row 3: no such file" and not missing.refusals


def test_a_file_that_cannot_be_read_is_named_by_its_record(monkeypatch):
    def unreadable(record, *others):
        raise OSError(errno.EIO, "Input/output error", "cat.png")

    monkeypatch.setattr(lane, "encode", unreadable)
    assert Encoder(Flaky(0), None, None, None)(3).error == "data.jsonl:4: cat.png: Input/output error"


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


class Long:
    """A sample of 100 tokens, as far as a packer sees."""

    source = "data.jsonl:1"

    def __len__(self):
        return 100


@pytest.mark.parametrize(
    ("found", "message", "counts"),
    [
        (DataError("no picture"), "found no sample in 3 rows, a whole pass; the last: no picture", Counts(skipped=3)),
        (None, "found no sample in 3 rows, a whole pass; the last: is too long", Counts(dropped=3)),
        (Long(), "data.jsonl:1: found 100 tokens; expected at most 8, a row", Counts(skipped=3)),
    ],
)
def test_a_pass_without_a_sample_ends_a_lane(monkeypatch, found, message, counts):
    def made(*args):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(lane, "encode", made)
    told = []
    records = [types.SimpleNamespace(source="data.jsonl") for _ in range(3)]
    options = dict(index=0, count=1, threads=1, seed=0, tell=told.append)
    fruitless = Lane(Encoder(records, None, None, None), Packer(rows=1, length=8), DataConfig(("x",)), **options)
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        next(fruitless)
    assert fruitless.counts == counts and len(told) == counts.skipped
