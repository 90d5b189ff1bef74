"""The functional module: gradients against the reference's, layouts, golden results, dropout, low precision."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_paths import GOLDEN
from reference import CONFIGS, Prompts, assert_close, export, to_torch

from glm4v_jax import Glm4v, Glm4vForConditionalGeneration, make_batch
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.hf.forward import causal_lm_loss
from glm4v_jax.model.params import num_params

MODEL_GOLDEN = GOLDEN / "model"

pytestmark = pytest.mark.usefixtures("mesh")

ROWS = [[11], [2, ("image", (4, 6)), 3, ("image", (2, 2)), 8]]
VIDEO_ROWS = [[3, ("video", (2, 4, 2)), 4], [9]]


def config_of(name):
    return Glm4vConfig.from_dict(CONFIGS[name])


@functools.partial(jax.jit, static_argnums=3)
def loss_and_gradient(model, batch, labels, remat="none"):
    def loss(model):
        return causal_lm_loss(model.logits(model(batch, remat=remat)), labels)

    return jax.value_and_grad(loss)(model)


def training_example(name, rows, seed):
    """A batch, its labels in the batch's shape, and the same for the reference."""
    prompts = Prompts(config_of(name), rows, padding="right", seed=seed)
    labels = np.where(prompts.real & (prompts.input_ids != prompts.config.image_token_id), prompts.input_ids, -100)
    batch, _ = make_batch(config=prompts.config, **prompts.inputs)
    padded = np.full(batch.input_ids.shape, -100, np.int32)
    padded[:, : labels.shape[1]] = labels
    return batch, padded, prompts.inputs | {"labels": labels}


def their_gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    model.model.rope_deltas = None
    loss = model(**to_torch(inputs)).loss
    loss.backward()
    gradients = {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "stacked"),
    [
        ("base", ROWS, True),
        ("base", VIDEO_ROWS, False),
        ("odd", ROWS, True),
        ("tester", ROWS, True),
        ("mha", ROWS, True),
    ],
)
def test_gradients_equal(checkpoints, theirs, name, rows, stacked):
    """All parameters, the ViT's first ones among them."""
    reference = theirs(name)
    model = load_model(checkpoints(name), config_of(name), stacked=stacked)
    batch, labels, inputs = training_example(name, rows, seed=1)
    expected_loss, expected = their_gradients(reference, inputs)
    loss, gradient = loss_and_gradient(model, batch, labels)
    found = export(gradient, config_of(name))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        norm = np.linalg.norm(value)
        assert norm > 0, tensor
        assert abs(np.linalg.norm(found[tensor]) - norm) <= 1e-4 * norm, tensor
        # A gradient passes every layer twice, and sums over all tokens terms that cancel.
        assert np.abs(found[tensor] - value).max() <= 1e-4 * np.abs(value).max(), tensor


@pytest.mark.slow
def test_recomputed_gradients_equal(checkpoints):
    model = load_model(checkpoints("base"), config_of("base"))
    batch, labels, _ = training_example("base", ROWS, seed=1)
    # Without the default spelt out: it would be another program than that of `test_gradients_equal`.
    loss, plain = loss_and_gradient(model, batch, labels)
    loss_again, saved = loss_and_gradient(model, batch, labels, "attention")
    np.testing.assert_allclose(loss, loss_again, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        assert_close(one, other)


def test_layouts_are_the_same_model(checkpoints):
    stacked = load_model(checkpoints("base"), config_of("base"))
    per_layer = load_model(checkpoints("base"), config_of("base"), stacked=False)
    same = functools.partial(jax.tree.map, lambda x, y: np.testing.assert_array_equal(x, y))
    same(stacked.unstacked(), per_layer)
    same(per_layer.stacked(), stacked)
    batch, _, _ = training_example("base", ROWS, seed=2)
    run = jax.jit(lambda model, batch: model.logits(model(batch)))
    assert_close(run(stacked, batch), run(per_layer, batch), batch.segment_ids > 0)


def test_the_released_model_has_its_number_of_parameters():
    abstract = jax.eval_shape(lambda: Glm4v.init(Glm4vConfig.glm4_1v_9b(), dtype=jnp.bfloat16))
    assert num_params(abstract) == 10_292_777_472
    assert num_params(abstract.visual) == 892_498_432
    assert num_params(abstract.language_model) == 8_779_522_048
    zeros = jax.eval_shape(lambda: Glm4v.zeros(Glm4vConfig.glm4_1v_9b(), dtype=jnp.bfloat16))
    assert jax.tree.structure(zeros) == jax.tree.structure(abstract)
    same = jax.tree.map(lambda x, y: (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding), zeros, abstract)
    assert all(jax.tree.leaves(same))


def test_packed_rows_do_not_see_each_other(checkpoints):
    """Two prompts in one row, told apart by segment ids: each as if alone."""
    config = config_of("base")
    model = load_model(checkpoints("base"), config)
    parts = [make_batch(config=config, length=24, **Prompts(config, [row], seed=3).inputs)[0] for row in ([24], [24])]
    ids = np.concatenate([part.input_ids for part in parts], axis=1)
    packed = parts[0]._replace(
        input_ids=ids,
        segment_ids=np.repeat([[1, 2]], 24, axis=1).astype(np.int32),
        position_ids=np.concatenate([part.position_ids for part in parts], axis=2),
    )
    run = jax.jit(lambda model, batch: model(batch))
    expected = np.concatenate([run(model, part) for part in parts], axis=1)
    assert_close(run(model, packed), expected)


@pytest.mark.slow
def test_dropout_needs_a_key(checkpoints):
    config = dict(CONFIGS["base"])
    config["text_config"] = config["text_config"] | {"attention_dropout": 0.3}
    config["vision_config"] = config["vision_config"] | {"attention_dropout": 0.3}
    plain = load_model(checkpoints("base"), config_of("base"))
    model = load_model(checkpoints("base"), Glm4vConfig.from_dict(config))
    batch, _, _ = training_example("base", ROWS, seed=4)
    run = jax.jit(lambda model, batch, key: model(batch, dropout_key=key))
    quiet, real = run(plain, batch, None), batch.segment_ids > 0
    assert_close(run(model, batch, None), quiet, real)
    one, again, other = (np.asarray(run(model, batch, jax.random.key(seed))) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert np.abs(one - other)[real].max() > 0.01 and np.abs(one - quiet)[real].max() > 0.01


def test_bfloat16_is_as_near_as_the_references(checkpoints, theirs):
    """Both round after each operation, in different places: ours may be half as much again further from float32."""
    from helpers_transformers import import_transformers

    transformers = import_transformers()
    import torch

    low = transformers.Glm4vForConditionalGeneration.from_pretrained(
        checkpoints("base"), attn_implementation="eager", dtype=torch.bfloat16
    ).eval()
    prompts = Prompts(config_of("base"), [ROWS[1]], seed=5)
    inputs = to_torch(prompts.inputs)
    with torch.no_grad():
        theirs("base").model.rope_deltas = None
        exact = theirs("base")(**inputs).logits.numpy()
        reference = low(**inputs).logits.float().numpy()
    model = load_model(checkpoints("base"), config_of("base"), dtype="bfloat16")
    batch, _ = make_batch(config=prompts.config, **prompts.inputs)
    found = jax.jit(lambda model, batch: model.logits(model(batch)))(model, batch)
    assert found.dtype == jnp.bfloat16
    found = np.asarray(found, np.float32)[:, : exact.shape[1]]
    ours, others = (np.sqrt(np.mean((x - exact) ** 2)) for x in (found, reference))
    assert 0 < ours <= 1.5 * others


@pytest.fixture(scope="module")
def stacked(checkpoints, mesh):
    """name -> our model with the weights of `checkpoints(name)`, its layers stacked."""
    return functools.cache(lambda name: Glm4vForConditionalGeneration.from_pretrained(checkpoints(name), stacked=True))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(MODEL_GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_results_equal_the_golden_ones(stacked, path):
    """What the reference computed once; this comparison needs neither torch nor transformers.

    Of stacked layers, as on every accelerator; `test_layouts_are_the_same_model` and `tests/hf` compare the others.
    """
    name, case = path.stem.split("-")
    described = json.loads((MODEL_GOLDEN / "cases.json").read_text(encoding="utf-8"))[case]
    rows = [[tuple(part) if isinstance(part, list) else part for part in row] for row in described["rows"]]
    prompts = Prompts(config_of(name), rows, padding=described["padding"], seed=described["seed"])
    model = stacked(name)
    with np.load(path) as golden:
        out = model(**prompts.inputs)
        assert np.array_equal(prompts.input_ids, golden["input_ids"])
        positions, deltas = model.model.get_rope_index(
            prompts.input_ids, prompts.image_grid_thw, prompts.video_grid_thw, prompts.attention_mask
        )
        assert np.array_equal(positions, golden["position_ids"]) and np.array_equal(deltas, golden["rope_deltas"])
        assert_close(np.asarray(out.logits)[prompts.real][:: 30 if case == "long" else 3], golden["logits"])
        if "features" in golden:
            features = []
            if prompts.pixel_values is not None:
                features += model.get_image_features(prompts.pixel_values, prompts.image_grid_thw)
            if prompts.pixel_values_videos is not None:
                features += model.get_video_features(prompts.pixel_values_videos, prompts.video_grid_thw)
            assert_close(np.concatenate(features)[::2], golden["features"])
        if "tokens" in golden:
            new = golden["tokens"].shape[1]
            tokens = model.generate(**prompts.inputs, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
            assert np.array_equal(tokens[:, -new:], golden["tokens"])


def test_golden_cases_are_all_there():
    assert {path.stem.split("-")[1] for path in MODEL_GOLDEN.glob("*.npz")} == {
        "text", "picture", "pictures", "video", "mixed", "long"
    }  # fmt: skip
