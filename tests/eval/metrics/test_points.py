"""ScreenSpot: where an answer clicks, and whether that is within the element."""

import pytest

from eval.metrics import METRICS
from eval.metrics.metric import Score
from eval.metrics.points import click
from eval.tasks import find_task

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


CORNER = ITEM | {"boxes": [[0, 0, 30, 30]]}


@pytest.mark.parametrize(
    ("task", "text", "item", "value"),
    [
        # As `parse_float_sequence_within` and `compute_center_accuracy` of lmms-eval, tasks/screenspot/utils_rec.py,
        ("lmms-eval", "(0.1, 0.1, 0.6, 0.6)", ITEM, 1), ("lmms-eval", "[100, 100, 600, 600]", ITEM, 1),
        ("lmms-eval", "[0.5, 0.5, 0.8, 0.8]", ITEM, 0), ("lmms-eval", "[0.3, 0.3]", ITEM, 0),
        ("lmms-eval", "[-0.3, 0.1, 0.6, 0.6]", ITEM, 1), ("lmms-eval", "I cannot", CORNER, 1),
        # and `parse_bbox_aguvis` and `evaluate_point` of VLMEvalKit, vlmeval/dataset/GUI/screenspot.py, have it.
        ("vlmevalkit", "pyautogui.click(x=119, y=59)", ITEM, 1),
        ("vlmevalkit", "pyautogui.click(x=120, y=59)", ITEM, 0), ("vlmevalkit", "[40, 30]", ITEM, 0),
        ("vlmevalkit", "x=0.3, y=0.3", ITEM, 1), ("vlmevalkit", "x=20,y=10", ITEM, 0),
        ("vlmevalkit", "x=1.2.3, y=1", CORNER, 0), ("vlmevalkit", "I cannot", CORNER, 1),
        ("vlmevalkit", "x=0, y=0", ITEM | {"boxes": [[-1, -1, 9, 9]]}, 1),
    ],
)  # fmt: skip
def test_clicks_of_harnesses(task, text, item, value):
    assert METRICS[find_task(f"screenspot@{task}").metric].score(text, item).value == value


def test_figures_by_platform_and_kind():
    rows = [("ios", "text", 1.0), ("Android", "icon", 0.0), ("windows", "text", 1.0), ("gitlab", "icon", 0.0)]
    scores = [({"data_source": source, "data_type": kind}, Score(value, [])) for source, kind, value in rows]
    assert METRICS["screenspot"].aggregate(scores) == {
        "score": 0.5, "group/desktop-text": 1.0, "group/mobile-icon": 0.0, "group/mobile-text": 1.0,
        "group/web-icon": 0.0,
    }  # fmt: skip
