"""What is sampled is what is learned from: ratios of 1 before any update, and again after one; steps of any packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm4v_jax.generate.feature_pool import FeaturePool
from train.rl.groups import Group, Rollout
from train.rl.loss import Objective, PolicySums, policy_loss
from train.rl.step import PolicyStep
from train.state import init_state

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def sampled(learner):
    """Answers about images, texts and a video; some whose thought was closed; and one with a token of an image."""
    from helpers_rl import messages

    groups = learner.groups([*map(messages, range(20)), messages(20, video=True)])
    forced = learner.groups([messages(21), messages(22)], think_budget=3, answer_budget=12, seed=1)
    return groups + forced + [planted(learner, groups[1])]


def planted(learner, group):
    """Answers that follow a token of an image, and the begin of a video, that were not drawn here."""
    config = learner.config
    inserted = [config.image_token_id, 5, config.video_start_token_id, config.image_token_id]
    (found,) = learner.groups([group.prompt.extended(inserted)])
    rollouts = tuple(
        Rollout(
            np.concatenate([np.array(inserted, np.int32), one.tokens]),
            np.concatenate([np.full(4, np.nan, np.float32), one.logprobs]),
            np.concatenate([np.zeros(4, bool), one.is_sampled]),
            "length",
        )
        for one in found.rollouts
    )
    return Group("planted", group.prompt, rollouts, found.rewards)


def assert_ratios_are_one(learner, params, groups, mean=2e-6, most=2e-4):
    _, sums = learner.sums(params, learner.batches(groups))
    assert float(sums.tokens) == sum(one.num_sampled for group in groups for one in group.rollouts)
    assert float(sums.deviation / sums.tokens) <= mean and float(sums.largest) <= most
    return sums


def test_ratios_are_one_before_any_update(learner, sampled):
    assert sum(len(one) - one.num_sampled for one in sampled[-2].rollouts) > 0  # which closed a thought
    assert {len(group.prompt.media) for group in sampled} == {0, 1}
    sums = assert_ratios_are_one(learner, learner.params, sampled)
    assert float(sums.tokens) >= 2000 and float(sums.low) == float(sums.high) == 0
    assert abs(float(sums.divergence)) <= 1e-4 and 0 < float(sums.entropy / sums.tokens) < np.log(800)


def test_ratios_are_one_at_other_temperatures(learner, sampled):
    """Where the objective has the temperature of the draws, and only there."""
    groups = learner.groups([group.prompt for group in sampled[:21]], temperature=0.7, seed=2)
    objective = dataclasses.replace(learner.objective, temperature=0.7)

    @jax.jit
    def sums_of(params, frozen, batch):
        model, batch = learner.layout.model(params, frozen, np.float32), jax.tree.map(lambda x: x[0], batch)
        return policy_loss(model, model(batch.batch), batch, objective)

    sums = PolicySums.zero()
    for batch in (batches := learner.batches(groups)):
        sums = sums.plus(sums_of(learner.params, learner.frozen, batch))
    assert float(sums.tokens) >= 2000
    assert float(sums.deviation / sums.tokens) <= 2e-6 and float(sums.largest) <= 2e-4
    _, others = learner.sums(learner.params, batches[:1])
    assert float(others.deviation / others.tokens) > 0.05


@pytest.fixture
def restored(learner):
    """Afterwards the engine has the first weights again."""
    yield
    learner.engine.update(learner.handover(learner.params))


@pytest.mark.parametrize("is_forgotten", [True, False])
def test_weights_arrive_with_the_features_of_images_seen_before(learner, sampled, restored, monkeypatch, is_forgotten):
    """After a step that moves the ViT too; without forgetting what the old one saw, they do not."""
    prompts = [group.prompt for group in sampled[:4]]
    learner.groups(prompts, samples=2)
    state, metrics = learner.take(learner.state(), sampled[:4])
    assert not bool(metrics.update.is_skipped) and float(metrics.ratio_dev) <= 2e-6
    moved = {
        path
        for path, x in state.params.items()
        if np.abs(np.asarray(x) - np.asarray(learner.params[path])).max() > 1e-4
    }
    assert any("visual" in path for path in moved) and any("language_model" in path for path in moved)
    if not is_forgotten:
        monkeypatch.setattr(FeaturePool, "use", lambda self, runtime: setattr(self, "_runtime", runtime))
    learner.engine.update(learner.handover(state.params))
    groups = learner.groups(prompts, seed=3)
    if is_forgotten:
        assert_ratios_are_one(learner, state.params, groups)
        # Those that were drawn before are from another distribution by now.
        _, sums = learner.sums(state.params, learner.batches(sampled[:4]))
        assert float(sums.deviation / sums.tokens) > 1e-3 and float(sums.divergence) > 0
    else:
        with pytest.raises(AssertionError):
            assert_ratios_are_one(learner, state.params, groups)


def test_nothing_is_compiled_after_the_first_step(learner, sampled, restored, lowerings):
    """Whatever the number of groups and the lengths of answers: sampling, learning, and handing over."""
    prompts = [group.prompt for group in sampled[:8]]
    state, _ = learner.take(learner.state(), sampled[:2])
    learner.engine.update(learner.handover(state.params))
    learner.groups(prompts)
    with lowerings() as lowered:
        for number, length in enumerate((1, 4, 10, 20)):
            groups = learner.groups(prompts[: 1 + number * 3 % 8], samples=2, seed=number, max_new_tokens=length)
            state, metrics = learner.take(state, groups)
            learner.engine.update(learner.handover(state.params))
            assert float(metrics.ratio_dev) <= 2e-6
    assert not lowered and int(state.step) == 5


def assert_equal(found, expected, tolerance):
    """Gradients relative to the largest of each leaf; sums to what they are sums of, which may cancel out."""
    for part, least in zip(zip(found, expected, strict=True), (1e-3, 1.0), strict=True):
        for one, other in zip(*map(jax.tree.leaves, part), strict=True):
            one, other = np.asarray(one), np.asarray(other)
            assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), least)


def test_how_a_step_is_cut_changes_nothing(learner, sampled):
    """All groups in one micro-batch, in two and in four, each in another order; answers to one prompt apart."""
    groups = [cut(group, (12, 5, 9, 3)) for group in sampled[2:6]]
    (whole,) = learner.batches(groups)
    expected = learner.sums(learner.params, [whole])
    for count in (2, 4):
        parts = [learner.batches(groups[i::count][::-1]) for i in reversed(range(count))]
        assert [len(part) for part in parts] == [1] * count
        assert_equal(learner.sums(learner.params, [part[0] for part in parts]), expected, 1e-6)


def test_an_answer_twice_as_long_moves_nothing_else(learner, sampled):
    """Its weights add up to those of the short one, and the gradients of the others are what they were."""
    group, other = (cut(one, (6, 6, 6, 6)) for one in sampled[1:3])
    longer = cut(sampled[1], (12, 6, 6, 6))
    (gradients, sums), (alone, _) = (
        learner.sums(learner.params, learner.batches(some)) for some in ([group, other], [group])
    )
    (changed, _), (changed_alone, _) = (
        learner.sums(learner.params, learner.batches(some)) for some in ([longer, other], [longer])
    )
    rest, changed_rest = (
        jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), *pair)
        for pair in ((gradients, alone), (changed, changed_alone))
    )
    scale = {path: np.abs(np.asarray(x)).max() for path, x in gradients.items()}
    for path, value in rest.items():
        assert np.abs(value - changed_rest[path]).max() <= 2e-6 * max(scale[path], 1e-3), path
    for some in ([group], [longer]):
        (batch,) = learner.batches(some)
        assert float(np.asarray(batch.weights).sum()) == pytest.approx(4, rel=1e-6)
    assert float(sums.tokens) == 48


def cut(group, lengths):
    """The group with answers of at most these lengths."""
    rollouts = tuple(
        Rollout(one.tokens[:n], one.logprobs[:n], one.is_sampled[:n], "length")
        for one, n in zip(group.rollouts, lengths, strict=True)
    )
    return dataclasses.replace(group, rollouts=rollouts)


def test_the_learning_rate_goes_by_the_position_and_moments_by_the_updates_taken():
    """As in `optax.adam` with a constant rate, that of the position; a count of the schedule's own is passed over."""
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    params, gradients = {"a": jnp.ones(3)}, {"a": jnp.array([1.0, -2.0, 3.0])}
    step = PolicyStep(None, optax.adam(schedule), Objective(), learning_rate=schedule)
    state, expected = init_state(params, optax.adam(schedule)), {"a": np.ones(3)}
    moments = optax.scale_by_adam().init(params)
    for position in (3, 9):
        state, metrics = step.update(state, gradients, PolicySums.zero(), jnp.float32(2), jnp.int32(position))
        halves = jax.tree.map(lambda x: x / 2, gradients)
        moved, moments = optax.scale_by_adam().update(halves, moments)
        expected["a"] = expected["a"] - (1 - position / 10) * np.asarray(moved["a"])
        assert float(metrics.update.learning_rate) == pytest.approx(1 - position / 10)
        np.testing.assert_allclose(state.params["a"], expected["a"], rtol=1e-6)
