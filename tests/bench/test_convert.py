"""bench.convert: sizes, and a whole run on a small checkpoint."""

import sys

import pytest

from bench import convert, report
from convert.synth import load_config
from glm4v_jax.checkpoints.hf_write import tensor_shapes
from glm4v_jax.config.model import Glm4vConfig


def nbytes(config: Glm4vConfig) -> int:
    total = 0
    for shape in tensor_shapes(config).values():
        count = 2
        for length in shape:
            count *= length
        total += count
    return total


@pytest.mark.parametrize("gigabytes", [1, 4, 4.7, 10, 20.585554944, 100])
def test_the_checkpoint_is_as_large_as_asked_for(gigabytes):
    size = nbytes(convert.model_config(gigabytes))
    assert size >= min(gigabytes * 1e9, 20_585_554_944)
    assert size < gigabytes * 1e9 + convert.LAYER_BYTES or gigabytes < 5


def test_the_whole_9b_has_a_result_of_its_own(tmp_path, monkeypatch, capsys):
    """It takes much of a disk, and a smaller run must not replace it."""
    monkeypatch.setattr(convert, "run", lambda *_: {"parameters": 1, "tensor_bytes": 1, "passed": True})
    monkeypatch.setattr(convert, "rows", lambda _: [])
    write = report.write_result
    monkeypatch.setattr(report, "write_result", lambda name, figures: write(name, figures, tmp_path))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for options, name in (([], "convert"), (["--full"], "convert_full")):
        monkeypatch.setattr(sys, "argv", ["convert", *options])
        assert convert.main() == 0
        assert capsys.readouterr().out.endswith(f"written to {name}.json\n")


def test_memory_of_a_process_is_its_own(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    command = [sys.executable, "-c", "x = b'1' * (300 << 20)"]
    found = convert.measure(command, tmp_path / "source", tmp_path / "target")
    assert 300 << 20 < found["peak_bytes"] < 350 << 20
    assert convert.measure([sys.executable, "-c", ""], tmp_path, tmp_path)["peak_bytes"] < 50 << 20


def test_a_whole_run(tmp_path):
    figures = convert.run(load_config("tiny"), tmp_path)
    assert figures["tensor_bytes"] == 2_688_192 and figures["parameters"] == 1_344_096
    assert [each["direction"] for each in figures["directions"]] == ["to-orbax", "to-hf"]
    assert all(each["ratio"] > 0 and each["peak_bytes"] > 0 for each in figures["directions"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "config.json", "orbax"]
    assert report.table("", range(7), convert.rows(figures)).row_count == 3
