"""`make rl`: its controls pay for what they say, its jobs are those of a user, and a short run of it works."""

import json

import pytest

from tools import reward_study
from tools.leftmost_digits import TIERS
from tools.reward_page import ANY, LEARNS, UNIFORM
from tools.reward_study import ALL, ARMS, QUICK, SAMPLES, SHORT, UPDATES, Size, any_box, other_groups, write_job
from train.config import load_config
from train.rl import handover
from train.rl.verifiers import Reward

pytest.importorskip("sklearn")


def test_the_controls_give_other_rewards():
    right, wrong, none = Reward(1.0, "3", "right"), Reward(0.0, "4", "wrong"), Reward(0.0, None, "no box")
    assert [one.value for one in any_box([], [right, wrong, none])] == [1.0, 1.0, 0.0]
    groups = [Reward(float(number), None, "right") for number in (0, 1, 2) for _ in range(SAMPLES)]
    assert [one.value for one in other_groups([], groups)] == [1.0] * SAMPLES + [2.0] * SAMPLES + [0.0] * SAMPLES


@pytest.mark.parametrize("name", ARMS)
def test_the_jobs_are_valid_and_stay_below_their_number_of_answers(tmp_path, name):
    config = load_config(write_job(tmp_path, ARMS[name], 3, QUICK))
    assert config.rl is not None and set(config.rl.verifiers) == set(TIERS) and config.seed == 3
    size = Size()
    assert size.steps * size.prompts * config.rl.curriculum.expansion_most * SAMPLES <= 4500
    assert config.rl.curriculum.mode == ("uniform" if name == UNIFORM else "rlcs")


def test_all_has_runs_of_the_same_seeds():
    assert set(SHORT) < set(ALL) and len(set(ALL)) == len(ALL)
    assert len({tuple(seed for arm, seed in sorted(ALL) if arm == name) for name in (LEARNS, UNIFORM)}) == 1


@pytest.mark.slow
def test_a_short_run_learns_is_measured_and_is_not_repeated(tmp_path, monkeypatch, capsys):
    """What answers held-out digits is `score_tiny.answers`, which has tests of its own; here it knows one in two."""
    said = "<think></think><answer><|begin_of_box|>{}<|end_of_box|></answer>"

    def answers(engine, asked):
        return [said.format(one.answer if number % 2 else "none") for number, one in enumerate(asked)]

    monkeypatch.setattr(reward_study, "answers", answers)
    monkeypatch.setattr(reward_study, "SHORT", [(ANY, 0)])
    monkeypatch.setattr(handover, "platform", lambda: "gpu")  # layers stay stacked, and compile in the time of one
    reward_study.main(["--quick", "--out", str(tmp_path)])
    first = capsys.readouterr().out
    kept = json.loads((tmp_path / "any_box_is_paid-0" / "run.json").read_text())["run"]
    rollouts, updates = kept["steps"]["rollouts"], kept["steps"]["updates"]
    assert f"| any box is paid | 0 | {rollouts[-1]} | 50.0% | 50.0% | 50.0% | 50.0% | 50.0% |" in first
    assert len(rollouts) == QUICK.steps and 0 < updates[0] <= updates[-1] <= 2 * UPDATES
    assert [one["rollouts"] for one in kept["curve"]] == [0, *(rollouts if updates[0] < updates[-1] else rollouts[-1:])]
    monkeypatch.setattr(reward_study, "Measure", lambda count: None)
    reward_study.main(["--quick", "--out", str(tmp_path)])
    assert capsys.readouterr().out == first
