"""Curves of a job: what is drawn, where, and how it is called."""

import json

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from train.log import EVALUATIONS, METRICS
from train.plot import draw_metrics

BLUE, ORANGE, GREEN = (34, 85, 136), (204, 85, 17), (34, 136, 51)


@pytest.fixture
def said(monkeypatch):
    """The texts of a drawing."""
    texts, write = [], PIL.ImageDraw.ImageDraw.text

    def text(self, place, text, **options):
        texts.append(text)
        return write(self, place, text, **options)

    monkeypatch.setattr(PIL.ImageDraw.ImageDraw, "text", text)
    return texts


def drawn(folder, metrics, evaluations=()):
    for name, lines in ((METRICS, metrics), (EVALUATIONS, evaluations)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_metrics(folder, pytest.fail)
    return sorted(path.name for path in folder.glob("*.png"))


def places(path, color):
    """(x, y) of the pixels of a color, [N, 2]."""
    pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
    return np.argwhere((pixels == color).all(axis=-1))[:, ::-1]


def test_loss_held_out_loss_and_learning_rate_are_drawn_over_steps(tmp_path, said):
    metrics = [{"step": step, "loss": 4.0 - step / 75, "learning_rate": 1e-4} for step in range(1, 151)]
    metrics[7]["loss"] = None  # was not finite
    assert drawn(tmp_path, metrics, [{"step": 10, "loss": 3.5}, {"step": 150, "loss": 2.25}]) == ["loss.png"]
    title = f"{tmp_path.name}: loss 2, held-out 2.25 after 150 steps"
    for text in (title, "loss", "learning rate", "step", "20", "140", "moving average", "held-out data", "0.0001"):
        assert text in said
    loss, held_out, rate = (places(tmp_path / "loss.png", color) for color in (BLUE, ORANGE, GREEN))
    assert loss[:, 0].min() < 100 and loss[:, 0].max() > 900  # from the first step to the last
    left, right = (held_out[held_out[:, 0] < 300], held_out[(held_out[:, 0] > 920)])
    assert left[:, 1].mean() < right[:, 1].mean()  # it falls
    assert np.ptp(rate[:, 1]) <= 4 and rate[:, 1].min() > loss[:, 1].max()  # a level line below the loss


def test_a_job_that_learns_by_reward_has_its_rewards_drawn(tmp_path, said):
    lines = [{"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.5, "loss": 0.0, "learning_rate": 1e-6}]
    assert drawn(tmp_path, lines) == ["reward.png"]
    assert f"{tmp_path.name}: reward 0.5 after 2 steps" in said and "moving average" not in said
    rewards = places(tmp_path / "reward.png", BLUE)
    assert rewards[rewards[:, 0] < 200][:, 1].mean() > rewards[rewards[:, 0] > 800][:, 1].mean()  # it rises


@pytest.mark.parametrize(
    ("losses", "ticks"),
    [
        ([2.3456], ["1", "2.5", "4"]),
        ([0.6, 1.4], ["0.6", "1", "1.4"]),
        ([2.31, 2.29, 2.33], ["2.29", "2.31", "2.33"]),
    ],
)
def test_a_short_job_has_marked_values_at_its_steps_between_ticks(tmp_path, said, losses, ticks):
    metrics = [{"step": 9 + n, "loss": loss, "learning_rate": 0.6 + 0.8 * (n % 2)} for n, loss in enumerate(losses)]
    assert drawn(tmp_path, metrics) == ["loss.png"]
    assert set(ticks) <= set(said)  # of the loss
    assert {text for text in said if text.isdecimal() and int(text) > 4} == {str(line["step"]) for line in metrics}
    for color, (top, bottom) in ((BLUE, (52, 392)), (GREEN, (432, 552))):
        found = places(tmp_path / "loss.png", color)
        assert found[:, 1].min() >= top - 5 and found[:, 1].max() <= bottom + 5
        for x in np.linspace(92, 936, len(losses)) if len(losses) > 1 else [514]:
            assert np.ptp(found[abs(found[:, 0] - x) <= 4][:, 1]) >= 6  # a dot, not a line of two pixels


@pytest.mark.parametrize(("lines", "names"), [([], []), ([{"step": 1, "loss": 2.0}], ["loss.png"])])
def test_little_or_nothing_is_no_error(tmp_path, lines, names):
    assert drawn(tmp_path, lines) == names


def test_a_drawing_that_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "loss.png").mkdir()
    told = []
    draw_metrics(tmp_path, told.append)
    assert len(told) == 1 and str(tmp_path / "loss.png") in told[0]
