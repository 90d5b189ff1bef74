"""bench.rl at tiny sizes: what is shared, what is compared, and what is read from a job's metrics."""

import json

import pytest

from bench import rl
from glm4v_jax.tiny import TINY_CHECKPOINT
from train.log import METRICS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("stacked_layers")]


def test_a_group_that_shares_its_image_is_encoded_once(mesh):
    model = rl.Model(TINY_CHECKPOINT, rl.QUICK, mesh)
    found = rl.vision_work(model)
    n, groups = rl.QUICK.n, rl.QUICK.groups
    assert found["images_of_rollouts"] == [groups, n * groups] and found["passed"]
    assert found["patches_of_training"] == [36 * groups, 36 * n * groups]
    assert model.rollout("one prefill", 24, 3) > 0 and model.rollout("each its own", 24, 3) > 0


class Stub:
    """A model for which what is shared takes so much less time."""

    sizes = rl.QUICK

    def __init__(self, ratio):
        self.rollout_about_images = self.learn = lambda way: 1.0
        self.rollout = lambda way, prompt, answer: (ratio if "its own" in way else 1.0) * (1 + answer) * prompt


@pytest.mark.parametrize(("ratio", "handover", "compiles", "passed"), [
    (1.5, 0.02, 0, True), (1.4, 0.02, 0, False), (1.5, 0.03, 0, False), (1.5, 0.02, 1, False),
])  # fmt: skip
def test_a_run_passes_with_all_aims(tmp_path, monkeypatch, ratio, handover, compiles, passed):
    line = {"learned": 2, "groups": 3, "length": 9, "ratio_first_dev": 1e-6}
    phases = {"rollout": 0.5, "scoring": 0.0, "packing": 0.08, "learning": 0.42 - handover, "handover": handover}
    seconds = {f"seconds_{name}": share for name, share in phases.items()}

    def learn(config, log):
        lines = [{**line, **seconds, "step": 1, "compiles": 9}]
        lines += [{**line, **seconds, "step": number, "compiles": compiles} for number in (2, 3)]
        assert config.steps == rl.QUICK.steps and config.rl.samples == rl.QUICK.n
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / METRICS).write_text("".join(json.dumps(one) + "\n" for one in lines))

    monkeypatch.setattr(rl, "learn", learn)
    monkeypatch.setattr(rl, "Model", lambda *_: Stub(ratio))
    shared = {"ratios": {"patches": 2.0}, "patches": [1, 2], "aim": 2, "passed": True}
    monkeypatch.setattr(rl, "vision_work", lambda model: shared)
    figures = rl.run(rl.QUICK, 2, tmp_path)
    lines = [line for line in figures["lines"] if "ceiling" in line]
    assert [(line["prompt"], line["answer"]) for line in lines] == list(rl.QUICK.rollouts)
    for (
        line
    ) in lines:  # in units of the prompt: one of the two prefills takes `ratio`, decoding one a token but for one
        answer = line["answer"]
        assert line["ceiling"]["median"] == pytest.approx(ratio * (1 + answer) / (ratio + answer - 1))
    assert figures["passed"] == passed and json.loads(json.dumps(figures)) == figures
    job = figures["job"]
    assert job["steps"] == 2 and job["shares"]["rollout"] == pytest.approx(0.5 / 1.0)
    assert (job["answers_per_second"], job["seconds_per_step"]) == (pytest.approx(3 * 2 / 0.5), pytest.approx(1.0))
    assert job["compilations_after_the_first_step"] == 2 * compiles
    assert len((tmp_path / "problems.jsonl").read_text().splitlines()) == rl.QUICK.problems
    assert all(len(row) == len(table.columns) for table in rl.tables(figures) for row in table.rows)
