"""ScreenSpot: where an answer clicks, and whether that is within the element."""

import pytest

from eval.metrics import METRICS
from eval.metrics.metric import Score
from eval.metrics.points import click

ITEM = {"boxes": [[20, 10, 120, 60]], "width": 200, "height": 100}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[[100, 200, 300, 400]]", (200, 300)), ("(200, 300)", (200, 300)),
        ("left_click(start_box='[200,300]')", (200, 300)), ("pyautogui.click(x=200, y=300)", (200, 300)),
        ('{"x": 200, "y": 300}', (200, 300)), ("x: 200; y: 300", (200, 300)), ("x=200, y=3000", None),
        ("200 300", None),
    ],
)  # fmt: skip
def test_clicks_are_centres_of_boxes_or_points(text, place):
    assert click(text) == place


@pytest.mark.parametrize(
    ("name", "text", "score"),
    [
        ("screenspot", "[100,100]", (1, [20, 10], {})), ("screenspot", "[600,600]", (1, [120, 60], {})),
        ("screenspot", "[99,100]", (0, [pytest.approx(19.8), 10], {})),
        ("screenspot", "[600,601]", (0, [120, pytest.approx(60.1)], {})),
        ("screenspot-unit", "[0.1, 0.6]", (1, [20, 60], {})), ("screenspot-pixel", "[120, 60]", (1, [120, 60], {})),
        ("screenspot", "I cannot", (0, None, {})),
    ],
)  # fmt: skip
def test_edges_are_within_the_element(name, text, score):
    assert METRICS[name].score(text, ITEM) == score


def test_figures_by_platform_and_kind():
    rows = [("ios", "text", 1.0), ("Android", "icon", 0.0), ("windows", "text", 1.0), ("gitlab", "icon", 0.0)]
    scores = [({"data_source": source, "data_type": kind}, Score(value, [])) for source, kind, value in rows]
    assert METRICS["screenspot"].aggregate(scores) == {
        "score": 0.5, "group/desktop-text": 1.0, "group/mobile-icon": 0.0, "group/mobile-text": 1.0,
        "group/web-icon": 0.0,
    }  # fmt: skip
