"""Whole steps: a reward rises, a step can be taken again, and one that has nothing to learn changes nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers_rl import messages

from glm4v_jax.errors import DataError
from glm4v_jax.inputs.prompt import Prompt
from train.rl.config import RLConfig, SamplingConfig, VerifierConfig
from train.rl.cycle import Cycle, DriftError
from train.rl.problems import Problem
from train.rl.rollouts import Answers, seed_of
from train.rl.verifiers import Reward

CONFIG = RLConfig(
    verifiers={"digits": VerifierConfig(kind="counting")}, prompts=6, samples=8, max_ratio_drift=2e-6,
    sampling=SamplingConfig(think_budget=0, answer_budget=6),
)  # fmt: skip


def sevens(texts):
    return [Reward(float("7" in text), None, "right" if "7" in text else "wrong") for _, text in texts]


def every_other(texts):
    return [Reward(1.0, "7", "right") if number % 2 else Reward(0.0, "8", "wrong") for number in range(len(texts))]


@pytest.fixture
def cycle(learner):
    """Afterwards the engine has the first weights again."""
    yield Cycle(
        learner.engine, learner.step, learner.handover, learner.frozen, CONFIG, learner.batch, learner.config,
        learner.mesh,
    )  # fmt: skip
    learner.engine.update(learner.handover(learner.params))


@pytest.fixture(scope="module")
def problems():
    return [
        Problem(tuple(messages(number)), {"answer": 7}, "digits", None, f"problem {number}", f"data.jsonl:{number + 1}")
        for number in range(8)
    ]


@pytest.mark.slow
def test_a_reward_rises(learner, cycle, problems):
    state, lines = learner.state(), []
    for number in range(4):
        state, found = cycle(state, problems, sevens, seed_of(0, number), number + 1)
        lines.append(found.metrics())
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.3
    line = lines[0]
    assert 0 < line["valid"] <= 1 and line["groups"] == 8 and line["learned"] <= 6
    assert line["forced"] == 0 and line["seconds_rollout"] > 0 and line["entropy"] > 0
    assert np.isfinite([value for name, value in line.items() if name != "learning_rate"]).all()


@pytest.mark.slow
def test_a_step_taken_again_is_the_same_to_the_last_bit(learner, cycle, problems):
    """From what is saved between two steps: the state alone."""
    state, _ = cycle(learner.state(), problems, sevens, seed_of(0, 0), 1)
    saved = jax.tree.map(np.asarray, state)
    found, results = [], []
    for _ in range(2):
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), saved, state)
        learner.engine.update(learner.handover(state.params))
        state, result = cycle(state, problems, sevens, seed_of(0, 1), 2)
        found.append(jax.tree.map(np.asarray, state))
        results.append([one.completions for one in result.answers])
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert [[one.tokens for one in of] for of in results[0]] == [[one.tokens for one in of] for of in results[1]]


@pytest.mark.slow
def test_where_no_rewards_differ_nothing_is_learned(learner, cycle, problems):
    state = learner.state()
    before = jax.tree.map(np.asarray, state)
    state, found = cycle(state, problems[:2], lambda texts: [Reward(1.0, None, "right")] * len(texts), 0, 1)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state))
    assert not found.updates and not found.learned and found.metrics()["all_right"] == 1


@pytest.mark.slow
def test_too_few_groups_wait_for_those_of_the_next_step(learner, cycle, problems):
    cycle.config = dataclasses.replace(CONFIG, min_groups=4)
    state = learner.state()
    before = jax.tree.map(np.asarray, state)
    state, first = cycle(state, problems[:3], every_other, 0, 1)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state))
    assert not first.updates and not first.learned and first.metrics()["waiting"] == 3
    state, second = cycle(state, problems[3:5], every_other, 1, 2)
    assert [group.key for group in second.learned] == [problem.key for problem in problems[:5]]
    assert len(second.updates) == 1 and int(state.step) == 1 and not cycle.waiting
    assert second.metrics()["ratio_first_dev"] < 2e-6  # of all five


@pytest.mark.slow
def test_of_fewer_groups_there_are_fewer_updates_up_to_the_same_learning_rate(learner, cycle, problems):
    """Of a step's three in the schedule the last ones: so the last step has the last of all."""
    cycle.config = dataclasses.replace(CONFIG, updates=3, min_groups=1)
    positions = []

    def step(*arguments):
        positions.append(arguments[-1])
        return learner.step(*arguments)

    cycle.step = step
    for count, expected in ((1, [14]), (4, [13, 14])):
        _, found = cycle(learner.state(), problems[:count], every_other, 0, step=5)
        assert len(found.updates) == len(expected) and positions == expected
        positions.clear()
        learner.engine.update(learner.handover(learner.params))


@pytest.mark.slow
def test_a_model_that_is_not_the_one_that_sampled_is_an_error(learner, cycle, problems):
    state = learner.state()
    state = state._replace(params=jax.jit(lambda params: jax.tree.map(lambda x: x * 1.01, params))(state.params))
    with pytest.raises(DriftError, match=r"rl.max_ratio_drift: found a mean \|ratio - 1\| of 0\.\d+ before the first"):
        cycle(state, problems, sevens, 0, 1)


@pytest.mark.slow
def test_a_prompt_that_leaves_no_room_in_a_row_is_named(learner, cycle, problems):
    cycle.batch = dataclasses.replace(cycle.batch, length=16)
    with pytest.raises(DataError, match=r"data.jsonl:[12]: found a prompt of \d+ tokens; expected at most 10: a row"):
        cycle(learner.state(), problems, sevens, 0, 1)


def test_what_becomes_of_answers_that_were_cut():
    from glm4v_jax.generate.completion import Completion
    from glm4v_jax.generate.token_logprobs import TokenLogprob

    said = (TokenLogprob(5, -1.0, ()), TokenLogprob(6, -1.0, ()))
    whole = Completion(0, "", (5, 6), 1, "stop", logprobs=said)
    answers = Answers(Prompt.of_text([1]), (whole, dataclasses.replace(whole, finish_reason="length")))
    rewards, sampled = {}, {}
    for truncated in ("force", "mask", "zero"):
        group = answers.group("a", [1.0, 1.0], truncated)
        rewards[truncated], sampled[truncated] = group.rewards.tolist(), [one.num_sampled for one in group.rollouts]
    assert rewards == {"force": [1, 1], "mask": [1, 1], "zero": [1, 0]}
    assert sampled == {"force": [2, 2], "mask": [2, 0], "zero": [2, 2]}
