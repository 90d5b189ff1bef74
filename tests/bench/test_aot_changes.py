"""What `make aot` finds worse than the committed table, on small tables."""

import json
import sys

import pytest

from bench import aot, report
from bench.aot_changes import missing, regressions

LINE = {
    "program": "decode B=8 S=4,096", "topology": "v5e:2x4", "mesh": {"kv": 2, "q": 4},
    "arguments": 2.874, "temporaries": 0.006, "outputs": 0.0, "peak": 2.893, "received": 0.0136, "estimated_ms": 8.4,
    "collectives": {"all-reduce": [2, 4], "all-gather": [0, 7]}, "copies": [["bf16[8,4096]", False]],
}  # fmt: skip
OTHER = LINE | {"topology": "v5e:2x2", "mesh": {"kv": 2, "q": 2}}


def test_equal_and_better_tables_have_no_regression():
    better = LINE | {"temporaries": 0.001, "estimated_ms": 7.0, "collectives": {"all-reduce": [2, 4]}, "copies": []}
    assert regressions([LINE, OTHER], [OTHER, LINE]) == regressions([LINE], [better]) == []


def test_differences_of_two_runs_are_tolerated():
    assert regressions([LINE], [LINE | {"estimated_ms": 8.4 * 1.0002, "temporaries": 0.0061}]) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"temporaries": 0.3}, "temporaries: found 0.3 GiB; expected at most 0.006"),
        ({"arguments": 3.0}, "arguments: found 3 GiB; expected at most 2.874"),
        ({"peak": 3.1}, "peak: found 3.1 GiB; expected at most 2.893"),
        ({"received": 0.02}, "received: found 0.02 GB; expected at most 0.0136"),
        ({"estimated_ms": 9.0}, "estimated: found 9 ms; expected at most 8.4"),
        ({"collectives": {"all-reduce": [3, 4]}}, "all-reduce in the layer loop: found 3; expected at most 2"),
        ({"collectives": {"all-to-all": [0, 1]}}, "all-to-all elsewhere: found 1; expected at most 0"),
        (
            {"copies": [*LINE["copies"], ["s8[40,4096]", True]]},
            "copies: found 2 (bf16[8,4096], s8[40,4096]); expected at most 1",
        ),
    ],
)
def test_what_is_worse_is_named_with_both_figures(change, fault):
    assert regressions([OTHER, LINE], [LINE | change, OTHER]) == [
        f"decode B=8 S=4,096 on v5e:2x4 kv=2 q=4: {fault}, as in the table"
    ]


def test_lines_and_figures_that_one_table_lacks_are_not_compared():
    older = {name: value for name, value in LINE.items() if name != "estimated_ms"}
    assert regressions([older], [LINE, OTHER]) == regressions([LINE], [older]) == []


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The committed table of one decode program, which compiles to what `found` says."""
    known = LINE | {
        "seconds": 14.0, "hbm": 15.75, "held": 1.2, "floor_ms": [3.1, 0.1], "beside": 0.4, "megacycles": 12.2,
        "fits": True,
    }  # fmt: skip
    path = tmp_path / "aot.json"
    path.write_text(json.dumps({"machine": {"jax": "0"}, "programs": [known | {"copies": [], "passed": True}],
        "not_compiled": []}))  # fmt: skip
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return path, known | {"copies": []}


def run(monkeypatch, found, *arguments):
    monkeypatch.setattr(aot, "in_process", lambda module, number: found)
    monkeypatch.setattr(sys, "argv", ["aot", "--only", "decode (8, 4096) on v5e:2x4", *arguments])
    return aot.main()


def test_a_worse_program_fails_and_leaves_the_table_until_it_is_accepted(table, monkeypatch, capsys):
    path, line = table
    before = path.read_text()
    assert run(monkeypatch, line) == 0
    assert run(monkeypatch, line | {"estimated_ms": 9.0}) == 1
    assert "estimated: found 9 ms; expected at most 8.4" in capsys.readouterr().out and path.read_text() == before
    assert run(monkeypatch, line | {"estimated_ms": 9.0}, "--accept") == 0
    (written,) = json.loads(path.read_text())["programs"]
    assert written["estimated_ms"] == 9.0 and written["passed"]


def test_an_accepted_part_replaces_its_own_lines_and_keeps_the_verdict_of_the_others(table, monkeypatch):
    path, line = table
    failed = line | {"program": "prefill", "case": "another", "passed": False}
    broken = [{"case": "a third", "error": "out of memory"}]
    committed = json.loads(path.read_text())
    committed["programs"].insert(0, failed)

    def accepted(found, not_compiled=()):
        path.write_text(json.dumps(committed | {"not_compiled": [*not_compiled]}))
        status = run(monkeypatch, found, "--accept")
        return status, json.loads(path.read_text())

    status, written = accepted(line, broken)
    assert status == 1 and not written["passed"] and written["not_compiled"] == broken
    assert [one["program"] for one in written["programs"]] == ["prefill", "decode B=8 S=4,096"]
    committed["programs"] = [failed | {"passed": True}, *written["programs"][1:]]
    status, written = accepted(line | {"program": "decode anew"})
    assert status == 0 and written["passed"]
    assert [one["program"] for one in written["programs"]] == ["prefill", "decode anew"]


def test_a_program_that_is_not_compiled_any_more_or_has_another_name_is_named(table, monkeypatch, capsys):
    _, line = table
    assert run(monkeypatch, line, "--accept") == 0  # the table knows the case of each line
    assert run(monkeypatch, line | {"program": "decode anew"}) == 1
    assert "decode B=8 S=4,096 on v5e:2x4 kv=2 q=4: found no such program; expected it" in capsys.readouterr().out
    assert missing([LINE, OTHER], [LINE]) == [
        "decode B=8 S=4,096 on v5e:2x2 kv=2 q=2: found no such program; expected it, as in the table"
    ]
    assert missing([LINE | {"case": "a"}, OTHER], [], {"b"}) == []


def test_a_description_of_no_case_is_an_error(table, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, table[1], "--only", "decoding")
    assert "--only: found 'decoding'" in capsys.readouterr().err
