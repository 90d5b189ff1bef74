"""Which groups are learned from, and what their rewards say about each answer."""

import numpy as np
import pytest

from glm4v_jax.errors import DataError
from glm4v_jax.inputs.prompt import Prompt
from train.rl.groups import Group, Rollout, most_balanced, num_samples


def rollout(n=2, sampled=True):
    return Rollout(np.arange(n, dtype=np.int32), np.zeros(n, np.float32), np.full(n, sampled), "stop")


def group(rewards, key="a", **options):
    return Group(key, Prompt.of_text([1]), tuple(rollout(**options) for _ in rewards), np.array(rewards))


def test_advantages_are_deviations_from_the_mean_of_the_group():
    rewards = [1.0, 0.0, 0.0, 0.5]
    np.testing.assert_allclose(group(rewards).advantages("mean"), np.array(rewards) - 0.375)
    found = group(rewards).advantages()
    assert found.mean() == pytest.approx(0, abs=1e-7) and found.std() == pytest.approx(1)
    assert not group([0.3, 0.3]).advantages().any() and not group([0.3, 0.3]).advantages("mean").any()


def test_groups_that_say_nothing_are_dropped():
    """All right, all wrong, all about equal, or nothing that was sampled."""
    valid = group([1, 0], "valid")
    others = [group([1, 1]), group([0, 0]), group([0.7, 0.7 + 1e-9]), group([1, 0], sampled=False)]
    assert most_balanced([*others, valid], 9) == [valid]
    assert not any(one.is_valid for one in others)


def test_the_most_balanced_are_kept_whatever_their_order():
    rates = {"d": 0.25, "a": 0.75, "c": 0.5, "b": 0.125}
    groups = [group([1.0] * int(8 * rate) + [0.0] * (8 - int(8 * rate)), key) for key, rate in rates.items()]
    for order in (groups, groups[::-1]):
        assert [one.key for one in most_balanced(order, 2)] == ["a", "c"]  # of equally balanced ones the least key
        assert [one.key for one in most_balanced(order, 9)] == ["a", "b", "c", "d"]


def test_answers_that_are_masked_are_not_learned_from():
    one = Group("a", Prompt.of_text([1]), (rollout(), rollout().masked()), np.array([1.0, 0.0]))
    assert num_samples([one, group([0, 1])]) == 3 and one.is_valid


@pytest.mark.parametrize("rewards", [[1.0], [1.0, float("nan")], [[1.0, 0.0]]])
def test_rewards_that_fit_no_answers_are_named(rewards):
    with pytest.raises(DataError, match=r"a: rewards: found .*; expected 2 finite numbers"):
        Group("a", Prompt.of_text([1]), (rollout(), rollout()), np.array(rewards))
