"""What the table of compiled training steps says of their figures."""

import pytest

from bench import aot, aot_train

COMPILED = {
    "program": "full, 4 x 8,192, remat full", "topology": "v5e:2x4", "mesh": {"fsdp": 4, "kv": 2}, "seconds": 61.2,
    "arguments": 7.5, "temporaries": 5.25, "peak": 11.5, "hbm": 16, "received": 40.04,
    "collectives": {"all-gather": [12, 2], "all-reduce": [0, 3]},
}  # fmt: skip
COUNTS = {
    "model_flops": 8 * 197e12, "recomputed_flops": 8 * 65e12, "dot_flops": 0.0, "least_sent": 20e9,
    "kernels": {"splash_mha_fwd_segmented_residuals": 80, "splash_mha_dq": 40},
}  # fmt: skip


def test_floors_of_a_step():
    """A second of a v5e's products, a tenth of one of its links, and its state read and written."""
    line = aot_train.finished(COMPILED, COUNTS)
    assert line["fits"] and not aot_train.finished(COMPILED | {"peak": 16.5}, COUNTS)["fits"]
    assert line["floor_ms"] == pytest.approx({"bandwidth": 2 * 7.5 * 2**30 / 819e6, "FLOP/s": 1000, "links": 100})


def test_rows_of_a_step():
    row = aot_train.row(aot_train.finished(COMPILED, COUNTS) | {"passed": True})
    cells = dict(zip(aot_train.COLUMNS[:9], row, strict=False))
    assert cells["mesh"] == "fsdp=4 kv=2" and cells["in the layer loop"] == "12 all-gather" and cells["peak"] == "11.50"
    assert row[9:] == ("2 all-gather, 3 all-reduce", "40.0", "20.0", "262.0", "197.0", "80", "1000 (FLOP/s)",
                       "[green]pass[/green]")  # fmt: skip
    assert len(row) == len(aot_train.COLUMNS)


def test_tables_are_apart():
    """Every step has a row in the second table."""
    line = aot_train.finished(COMPILED, COUNTS) | {"passed": True}
    (columns, programs), (steps, rows) = aot._tables([line])
    assert columns == aot.COLUMNS and steps == aot_train.COLUMNS and not programs and len(rows) == 1
    assert [case[0] for case in aot.CASES].count("train") == len(aot_train.CASES)
