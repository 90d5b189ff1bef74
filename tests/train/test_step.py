"""The training step against torch and the reference: loss, gradients, AdamW; micro-batches, bad steps, groups."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import CONFIGS, Prompts, assert_close, assert_gradients_equal, export, to_torch

from glm4v_jax import make_batch
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import ConfigError
from train.data.packing import TrainBatch
from train.loss import cross_entropy
from train.optimizers import OptimizerConfig, group_of, kernel_dimensions, learning_rate, make_optimizer
from train.state import Layout, init_state, split
from train.step import loss_sums, make_step

pytestmark = [pytest.mark.usefixtures("mesh"), pytest.mark.slow]

CONFIG = Glm4vConfig.from_dict(CONFIGS["base"])
# The reference does not take pictures and videos in one batch.
ROWS = [[11], [2, ("image", (4, 6)), 3, ("image", (2, 2)), 8], [30]]
VIDEO_ROWS = [[3, ("video", (2, 4, 2)), 4], [9]]
MAX_GRAD_NORM = 100.0
CONSTANT = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0, weight_decay=0.01, clip_norm=None)


def example(rows=ROWS, seed=1):
    """A batch, and the same for the reference."""
    prompts = Prompts(CONFIG, rows, padding="right", seed=seed)
    labels = np.where(prompts.real & (prompts.input_ids != CONFIG.image_token_id), prompts.input_ids, -100)
    batch, _ = make_batch(config=CONFIG, **prompts.inputs)
    targets = np.full(batch.input_ids.shape, -100, np.int32)
    targets[:, : labels.shape[1] - 1] = labels[:, 1:]
    return TrainBatch(batch, targets, (targets >= 0).astype(np.float32)), prompts.inputs | {"labels": labels}


def stacked(*batches):
    """Micro-batches of one step."""
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)


@pytest.fixture(scope="module")
def steps():
    """(optimizer, layout) -> its jitted step, which most tests of this file share."""
    return {}


@pytest.fixture
def started(checkpoints, steps):
    """(optimizer, what is trained) -> the step, the state before it, what is frozen, and the layout."""

    def start(config=CONSTANT, is_trained=lambda path: True):
        model = load_model(checkpoints("base"), CONFIG)
        params, frozen = split(model, is_trained)
        layout, optimizer = Layout.of(model), make_optimizer(config, 10, model)
        key = repr(config), tuple(params)
        if key not in steps:
            steps[key] = make_step(layout, optimizer, dtype=jnp.float32, remat="none", max_grad_norm=MAX_GRAD_NORM)
        return steps[key], init_state(params, optimizer), frozen, layout

    return start


def their_step(model, inputs):
    model.model.rope_deltas = None
    loss = model(**to_torch(inputs)).loss
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize(("rows", "chunk"), [(ROWS, 7), (VIDEO_ROWS, 1024)])
def test_loss_and_gradients_equal(checkpoints, theirs, rows, chunk):
    """Text, images and a video; logits in chunks of a few tokens, or all at once."""
    reference, model = theirs("base"), load_model(checkpoints("base"), CONFIG)
    batch, inputs = example(rows)
    reference.zero_grad(set_to_none=True)
    expected = their_step(reference, inputs)

    def loss(model):
        sums = loss_sums(model, batch, chunk=chunk)
        return sums.loss / sums.weight

    found, gradient = jax.jit(jax.value_and_grad(loss))(model)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert_gradients_equal(export(gradient, CONFIG), reference)


def test_adamw_equals_torch(started, theirs):
    """Ten steps on five batches, decay on kernels and tables alone."""
    torch = pytest.importorskip("torch")
    import copy

    reference = copy.deepcopy(theirs("base"))
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    plain = [p for p in reference.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": CONSTANT.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=CONSTANT.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    step, state, frozen, layout = started()
    for number in range(10):
        batch, inputs = example(seed=number % 5)
        optimizer.zero_grad()
        expected = their_step(reference, inputs)
        optimizer.step()
        state, metrics = step(state, frozen, stacked(batch))
        np.testing.assert_allclose(metrics.loss, expected, rtol=1e-4)
    found = export(layout.model(state.params, frozen, jnp.float32), CONFIG)
    for name, parameter in reference.named_parameters():
        moved = np.linalg.norm(found[name] - parameter.detach().numpy())
        if "k_proj.bias" in name:
            # It moves all scores of a query alike, but for the rotation: most of its gradient is rounding, which Adam
            # makes into steps like any other.
            assert moved <= 10 * CONSTANT.learning_rate * np.sqrt(parameter.numel())
        else:
            assert moved <= 1e-4 * np.linalg.norm(found[name]), name
    assert int(state.step) == 10 and not int(state.skipped)


def test_micro_batches_weigh_as_one_batch(started):
    """Rows of different numbers of targets, one by one and all at once: every target counts alike."""
    whole, _ = example()
    text, _ = example([[5], [40], [20], [33]])
    step, state, frozen, _ = started()
    together, metrics = step(state, frozen, stacked(text))
    parts = [jax.tree.map(lambda x, i=i: x[:, i : i + 2] if x.ndim == 3 else x[i : i + 2], text) for i in (0, 2)]
    step, state, frozen, _ = started()
    apart, others = step(state, frozen, stacked(*parts))
    np.testing.assert_allclose(metrics.loss, others.loss, rtol=1e-6)
    assert float(metrics.weight) == float(others.weight) == float(text.weights.sum())
    np.testing.assert_allclose(metrics.update.grad_norm, others.update.grad_norm, rtol=1e-5)
    assert parts[0].weights.sum() != parts[1].weights.sum() and whole.batch.vision is not None
    for path, value in together.params.items():
        # Adam divides by the gradient's own size: what is nearly 0 in it may come out with either sign.
        moment = np.abs(np.asarray(optax.tree.get(together.opt_state, "mu")[path]))
        sure = moment > 1e-3 * moment.max()
        if not sure.any():
            assert "visual" in path  # nothing was seen
            continue
        assert_close(np.asarray(value)[sure], np.asarray(apart.params[path])[sure], tolerance=1e-5)


def test_weights_of_zero_count_for_nothing(checkpoints):
    batch, _ = example()
    half = batch.weights * (np.arange(batch.weights.shape[1]) % 2)
    model = load_model(checkpoints("base"), CONFIG)
    sums = jax.jit(loss_sums)(model, batch._replace(weights=half))
    other = np.where(half > 0, batch.targets, -100)
    again = jax.jit(loss_sums)(model, TrainBatch(batch.batch, other, half))
    assert float(sums.loss) == float(again.loss) and float(sums.weight) == half.sum()
    none = jax.jit(loss_sums)(model, batch._replace(weights=0 * half))
    assert float(none.loss) == float(none.weight) == 0


def test_accuracy_is_the_fraction_of_most_likely_tokens(checkpoints):
    batch, _ = example()
    model = load_model(checkpoints("base"), CONFIG)
    hidden = jax.jit(lambda model: model(batch.batch))(model)
    likeliest = np.asarray(jnp.argmax(model.logits(hidden), axis=-1))
    share = float(((likeliest == batch.targets) * batch.weights).sum())
    sums = jax.jit(cross_entropy)(model, hidden, batch.targets, batch.weights)
    assert float(sums.correct) == share
    right = jax.jit(cross_entropy)(model, hidden, likeliest, batch.weights)
    assert float(right.correct) == float(right.weight)


def test_no_array_of_all_logits_is_made(checkpoints):
    """Neither forward nor backward: none with a dimension of the vocabulary has all tokens of a row besides."""
    model = load_model(checkpoints("base"), CONFIG)
    hidden = jnp.zeros((2, 48, CONFIG.text_config.hidden_size))
    targets, weights = np.zeros((2, 48), np.int32), np.ones((2, 48), np.float32)

    def loss(hidden):
        return cross_entropy(model, hidden, targets, weights, chunk=8).loss

    shapes = re.findall(r"tensor<([\dx]+)xf32>", jax.jit(jax.grad(loss)).lower(hidden).as_text())
    vocabulary = str(CONFIG.text_config.vocab_size)
    sizes = {math.prod(map(int, shape.split("x"))) for shape in shapes if vocabulary in shape.split("x")}
    assert 2 * 8 * int(vocabulary) in sizes
    assert max(sizes - {int(vocabulary) * CONFIG.text_config.hidden_size}) < 2 * 48 * int(vocabulary)


@pytest.mark.parametrize("bad", ["nan", "spike"])
def test_a_bad_step_changes_nothing(started, bad):
    step, state, frozen, _ = started()
    batch, _ = example()
    if bad == "nan":
        batch = batch._replace(weights=batch.weights * np.float32("nan"))
    else:  # of a weight that is nearly nothing in all
        signs = np.where(np.cumsum(batch.weights.ravel()) % 2, 1, -0.9999).reshape(batch.weights.shape)
        batch = batch._replace(weights=np.float32(signs) * batch.weights)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    for number in (1, 2):
        state, metrics = step(state, frozen, stacked(batch))
        assert bool(metrics.update.is_skipped)
        assert bad == "nan" or (np.isfinite(metrics.loss) and MAX_GRAD_NORM < metrics.update.grad_norm < np.inf)
        assert (int(state.step), int(state.skipped), int(state.streak)) == (number, number, number)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves((state.params, state.opt_state)), strict=True):
        np.testing.assert_array_equal(one, other)
    if bad == "nan":
        state, metrics = step(state, frozen, stacked(example()[0]))
        assert not bool(metrics.update.is_skipped) and (int(state.skipped), int(state.streak)) == (2, 0)
        # Nor does one without a target, as where all its rows have become unreadable, and it is not a bad state's.
        before = jax.tree.map(np.asarray, (state.params, state.opt_state))
        state, metrics = step(state, frozen, stacked(batch._replace(weights=np.zeros_like(batch.weights))))
        assert bool(metrics.update.is_skipped) and (int(state.skipped), int(state.streak)) == (3, 0)
        for one, other in zip(jax.tree.leaves(before), jax.tree.leaves((state.params, state.opt_state)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_frozen_parameters_are_not_in_the_state(started):
    groups = ("merger", "llm")
    step, state, frozen, _ = started(is_trained=lambda path: group_of(path) in groups)
    assert {group_of(path) for path in frozen} == {"vision"} and {group_of(path) for path in state.params} == set(
        groups
    )
    before = {path: np.asarray(value) for path, value in state.params.items()}
    state, _ = step(state, frozen, stacked(example()[0]))
    assert all(np.abs(np.asarray(value) - before[path]).max() > 0 for path, value in state.params.items())


def test_a_model_with_everything_frozen_is_refused(started):
    with pytest.raises(ConfigError, match="no parameter to train"):
        started(is_trained=lambda path: False)


def test_groups_have_their_own_learning_rates(started):
    """A tenth for the ViT is a tenth of what it would have moved; none for the merger."""
    config = dataclasses.replace(CONSTANT, group_learning_rates={"vision": 1e-4, "merger": 0.0})
    moved = []
    for each in (CONSTANT, config):
        step, state, frozen, _ = started(each)
        before = {path: np.asarray(value) for path, value in state.params.items()}
        state, _ = step(state, frozen, stacked(example()[0]))
        moved.append({path: np.asarray(value) - before[path] for path, value in state.params.items()})
    shares = {"vision": 0.1, "merger": 0.0, "llm": 1.0}
    for path, whole in moved[0].items():
        np.testing.assert_allclose(moved[1][path], shares[group_of(path)] * whole, atol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_adafactor_and_muon_reduce_the_loss(started, name):
    step, state, frozen, _ = started(dataclasses.replace(CONSTANT, name=name, clip_norm=1.0))
    losses = []
    for _ in range(6):
        state, metrics = step(state, frozen, stacked(example()[0]))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.05 and int(state.skipped) == 0


def test_muon_knows_inputs_from_outputs(checkpoints):
    dims = kernel_dimensions(load_model(checkpoints("base"), CONFIG))
    o_proj = dims["language_model.layers.stacked.self_attn.o_proj.kernel"]
    assert (o_proj.reduction_axis, o_proj.output_axis) == ((1, 2, 3), (4,))
    head = dims["lm_head.kernel"]
    assert (head.reduction_axis, head.output_axis) == ((0,), (1,))
    assert not any("norm" in path or "embed_tokens" in path for path in dims)


def test_schedules_warm_up_and_decay():
    config = OptimizerConfig(learning_rate=1.0, warmup=0.1, final_share=0.1)
    rate = learning_rate(config, 100)
    assert [round(float(rate(step)), 6) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert float(rate(100)) == pytest.approx(0.1)
    assert float(rate(55)) == pytest.approx(0.1 + 0.9 * 0.5)
    linear = learning_rate(dataclasses.replace(config, schedule="linear", warmup=0, final_share=0.0), 100)
    assert [round(float(linear(step)), 6) for step in (0, 25, 100)] == [1.0, 0.75, 0.0]
    constant = learning_rate(dataclasses.replace(config, schedule="constant", warmup=5), 100)
    assert [round(float(constant(step)), 6) for step in (0, 4, 99)] == [0.2, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="sgd"), "name: found 'sgd'; expected one of 'adamw', 'adafactor', 'muon'"),
        (dict(learning_rate=0.0), "learning_rate: found 0.0; expected a number above 0"),
        (dict(group_learning_rates={"vit": 1e-4}), "group_learning_rates: found {'vit': 0.0001}; expected"),
        (dict(group_learning_rates={"llm": -1e-4}), "group_learning_rates: found {'llm': -0.0001}; expected"),
        (dict(schedule="step"), "schedule: found 'step'"),
        (dict(clip_norm=0.0), "clip_norm: found 0.0"),
        (dict(weight_decay=-1.0), "weight_decay: found -1.0"),
    ],
)
def test_invalid_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**options)


def test_a_warm_up_longer_than_the_training_is_refused():
    with pytest.raises(ConfigError, match=r"warmup: found 11\.0; expected at most 10 steps"):
        make_optimizer(OptimizerConfig(warmup=11), 10, None)
