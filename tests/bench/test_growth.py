"""The growth page: slopes are those of the figures, interrupted runs continue, what grows too fast fails."""

import doctest
import json
import sys
import xml.etree.ElementTree

import pytest

from bench import growth, growth_chart, growth_series, line_chart, report
from bench.growth_series import SERIES, Panel, Series

PANEL = Panel("Made", "things", "bytes")
NAME = "{http://www.w3.org/2000/svg}"


def grows(name, power, most=1.0, sizes=(1, 2, 4, 8, 16)):
    """A series whose figures grow with a power of their sizes."""
    return Series(PANEL, name, sizes, lambda size: lambda: 3.0 * size**power, most)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Measures these series, and returns the exit status and what is kept."""
    (tmp_path / "aot.json").symlink_to(report.RESULTS / "aot.json")  # which a series reads
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(growth.page, "write", lambda name: None)

    def measured(*series, options=()):
        monkeypatch.setattr(growth, "SERIES", series)
        monkeypatch.setattr(sys, "argv", ["it", *options])
        status = growth.main()
        path = tmp_path / "growth.json"
        return status, json.loads(path.read_text())["series"] if path.exists() else {}

    return measured


def test_docstring_examples():
    assert not any(doctest.testmod(module).failed for module in (growth, growth_series, line_chart))


def test_slopes_are_exponents_of_the_larger_half():
    assert growth.slope([1, 2, 4, 8, 16], [9, 9, 16, 64, 256]) == pytest.approx((2, 0))
    assert growth.slope([1, 2, 4], [5, 5, 5]) == pytest.approx((0, 0))
    k, error = growth.slope([1, 2, 4], [1, 2, 8])
    assert k == pytest.approx(1.5) and error > 0.2


def test_a_sum_is_taken_apart():
    assert growth.asymptotes([1, 2, 4], [3, 8, 24]) == pytest.approx((2, 1))
    assert growth.asymptotes([1, 2, 4], [1, 4, 16]) == pytest.approx((0, 1))
    assert growth.asymptotes([1, 2, 4], [5, 8, 12])[1] == 0


def test_what_grows_too_fast_fails(run):
    assert run(grows("even", 1), grows("much", 2, most=2))[0] == 0
    status, kept = run(grows("even", 1), grows("fast", 1.3))
    assert status == 1
    assert {key: found["passed"] for key, found in kept.items()} == {"Made: even": True, "Made: fast": False}


def test_an_interrupted_run_continues(run):
    calls = []

    def work(size):
        calls.append(size)
        return lambda: float(size)

    def stop(size):
        raise KeyboardInterrupt

    first = Series(PANEL, "first", (1, 2, 4), work)
    with pytest.raises(KeyboardInterrupt):
        run(first, Series(PANEL, "second", (1, 2, 4), stop))
    assert calls == [1, 2, 4]
    _, kept = run(first, grows("second", 1))
    assert calls == [1, 2, 4] and list(kept) == ["Made: first", "Made: second"]
    run(first, grows("second", 1), options=["--only", "first"])
    assert calls == [1, 2, 4] * 2


@pytest.mark.slow
def test_real_work_is_measured_at_small_sizes(run):
    names = ("Images", "Packing", "Data", "Text", "Temporaries of programs: ViT", "Decode step", "Video")
    series = [one for one in SERIES if one.key.startswith(names)]
    status, kept = run(*series, options=["--tiny"])
    assert len(series) == 15 and status == 0 and not kept


def test_every_series_has_a_key_of_its_own_and_a_color():
    assert len({one.key for one in SERIES}) == len(SERIES)
    panels = [one.panel for one in SERIES]
    assert all(panels.count(panel) <= len(growth_chart.COLORS) for panel in panels)
    assert all(list(one.sizes) == sorted(one.sizes) and len(one.sizes) >= 3 for one in growth_series.SERIES)


def test_the_chart_is_what_the_program_draws():
    assert growth_chart.CHART.read_text(encoding="utf-8") == growth_chart.chart()
    root = xml.etree.ElementTree.fromstring(growth_chart.chart())
    texts = [text.text for text in root.iter(f"{NAME}text")]
    results = report.read("growth")["series"]
    assert all(f"{one.name}: {results[one.key]['slope']:.2f}" in texts for one in SERIES)
    solid = [line for line in root.iter(f"{NAME}polyline") if line.get("stroke-width")]
    assert len(solid) == len(SERIES)
    for line in root.iter(f"{NAME}polyline"):
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert all(
            line_chart.LEFT - 0.1 <= x <= line_chart.WIDTH - line_chart.RIGHT + 0.1
            and line_chart.TOP - 0.1 <= y <= line_chart.HEIGHT - line_chart.BOTTOM + 0.1
            for x, y in points
        )
