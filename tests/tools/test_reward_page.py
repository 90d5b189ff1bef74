"""The page about learning by reward: it is made of its figures, and aims that are missed are named."""

import xml.etree.ElementTree

import numpy as np
import pytest

from bench.line_chart import HEIGHT, WIDTH, Line, Panel, draw
from tools.leftmost_digits import TIERS
from tools.reward_page import (
    ANY,
    DATA,
    FIGURE,
    LEARNS,
    OTHERS,
    STILL,
    UNIFORM,
    Interval,
    Measured,
    Run,
    Step,
    Study,
    figure,
    missed,
    page,
    table,
    valid_share,
    verdict,
)  # fmt: skip

BASE = Measured(0, dict(zip(TIERS, (0.2, 0.1, 0.0, 0.95), strict=True)))


def made(arm, seed, new, reading=0.9, reward=0.8, valid=0.5):
    """A run of two steps that ends with these figures."""
    end = Measured(4000, dict(zip(TIERS, (new, new, new, reading), strict=True)))
    return Run(arm, seed, 80.0, (Step(2000, 2, 0.1, valid), Step(4000, 4, reward, valid)), (BASE, end))


RUNS = (
    made(LEARNS, 0, 0.7), made(LEARNS, 1, 0.72),
    Run(STILL, 0, 50.0, (Step(4000, 4, 0.1, 0.5),), (BASE, BASE)),
    made(OTHERS, 0, 0.15), made(ANY, 0, 0.0, reward=1.0),
    made(UNIFORM, 1, 0.64, valid=0.25), made(UNIFORM, 0, 0.6, valid=0.25),
)  # fmt: skip


@pytest.mark.parametrize("path", [DATA.with_suffix(".md"), FIGURE], ids=["page", "figure"])
def test_the_page_and_its_figure_are_what_the_program_writes(path):
    study = Study.read(DATA)
    assert path.read_text(encoding="utf-8") == (figure(study.runs) if path == FIGURE else page(study))


def test_the_runs_of_the_page_reach_the_aims_and_the_controls_do_not():
    """Where any box is paid, the answer becomes a digit, which may be right: far less often than where that is paid."""
    study = Study.read(DATA)
    said = (DATA.with_suffix(".md")).read_text(encoding="utf-8")
    assert not missed(study.runs) and "miss:\n\n- none\n" in said
    ends = {(run.arm, run.seed): run.curve[-1].new for run in study.runs}
    assert ends[ANY, 0] < 0.5 * min(ends[LEARNS, seed] for seed in range(3))
    assert all(sum(run.arm == arm for run in study.runs) >= 3 for arm in (LEARNS, UNIFORM))
    assert {STILL, OTHERS, ANY} <= {run.arm for run in study.runs}


def test_figures_are_read_as_they_were_written(tmp_path):
    study = Study("as it is", 120, RUNS)
    (tmp_path / "study.json").write_text(study.as_json())
    assert Study.read(tmp_path / "study.json") == study


def test_missed_aims_are_named():
    assert missed(RUNS) == []
    bad = {
        "left1 to left3": made(LEARNS, 0, 0.6), "reading": made(LEARNS, 0, 0.7, reading=0.8),
        "no change": made(STILL, 0, 0.0), "at most 20.0%": made(OTHERS, 0, 0.25),
        "reward 0.50": made(ANY, 0, 0.1, reward=0.5), "at most 32.5%": made(ANY, 0, 0.33, reward=1.0),
    }  # fmt: skip
    for words, run in bad.items():
        (line,) = missed([run])
        assert words in line and line.startswith(run.arm)


def test_the_tables_have_the_figures():
    assert "| the packaged model |  | 0 | 20.0% | 10.0% | 0.0% | 95.0% | 10.0% |" in table(RUNS)
    assert "| learns | 1 | 4,000 | 72.0% | 72.0% | 72.0% | 90.0% | 72.0% | 0.80 | 80 |" in table(RUNS)
    text = page(Study("as it is", 120, RUNS))
    assert (
        "| held-out accuracy | 10.0% | 0.0% |" in text
        and "| uniform | 23.0%" in text
        and "2.00 times as many" in text
        and "is the job: as it is." in text
    )


def test_runs_of_a_seed_are_compared_with_each_other():
    """0.70 - 0.60 and 0.72 - 0.64: 9 points, give or take 12.7 times their standard error of 1."""
    assert "at the end, +9.0 ± 12.7 points (no difference beyond chance)" in verdict(RUNS)
    assert valid_share(RUNS[-1]) == 0.25
    found = Interval.of([0.1, 0.2, 0.3])
    assert found.mean == pytest.approx(0.2) and found.half == pytest.approx(4.303 * 0.1 / np.sqrt(3), rel=1e-3)


def test_a_chart_puts_points_where_they_belong():
    line = Line("a < b", "#000000", [(0, 0), (1500, 1)], band=[(0, 0, 0.5), (1500, 0.5, 1)])
    root = xml.etree.ElementTree.fromstring(
        draw([Panel("one", [line]), Panel("two", [line]), Panel("three", [line])], "made")
    )
    assert root.get("viewBox") == f"0 0 {2 * WIDTH} {2 * HEIGHT}"
    panels = root.findall("{*}g")
    assert [panel.get("transform") for panel in panels] == [
        f"translate({x} {y})" for x, y in ((0, 0), (440, 0), (0, 300))
    ]
    (x1, y1), (x2, y2) = (map(float, at.split(",")) for at in panels[0].find("{*}polyline").get("points").split())
    assert x1 < x2 <= WIDTH and 0 < y2 < y1 < HEIGHT and len(panels[0].find("{*}polygon").get("points").split()) == 4
    texts = [text.text for text in panels[0].findall("{*}text")]
    assert "a < b" in texts and "100%" in texts and [t for t in texts if t in ("0", "500", "1,000", "1,500")]
