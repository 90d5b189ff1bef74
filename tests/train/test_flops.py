"""Operations of a step: by hand, against what a traced step multiplies, and what devices can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import AXES, spec, use_mesh
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.lora import LoraConfig, add_lora, is_lora
from train.compile_for_topology import Shapes, count_products, least_sent, step_program
from train.flops import Work, attended, recomputed_flops, step_flops, work_of
from train.optimizers import group_of
from train.state import split

pytestmark = pytest.mark.slow

CONFIG = Glm4vConfig.tiny()
SHAPES = Shapes(2, 48, 1, 64)
DOWN, HEAD = 2 * 96 * 64, 64 * 320
WORK = Work(tokens=96.0, pairs=4656.0, patches=64.0, patch_pairs=4096.0)


def leaves(config=CONFIG, is_trained=lambda path: True, lora=None):
    """Abstract leaves, trained and frozen."""

    def make():
        model = Glm4v.init(config)
        return split(model if lora is None else add_lora(model, lora), is_trained)

    with use_mesh():
        return jax.eval_shape(make)


def kernels(path):
    params, _ = leaves()
    return sum(leaf.size for name, leaf in params.items() if name.startswith(path) and name.endswith("kernel"))


def test_places_and_pairs_of_segments():
    """Segments of 3, 2 and 1 places, padding before, between and behind: 6 + 3 + 1 pairs."""
    segments = np.array([[[1, 1, 1, 0, 2, 2, 0], [0, 0, 1, 0, 0, 0, 0]]], np.int32)
    assert [float(x) for x in attended(jnp.asarray(segments))] == [6, 10]
    work = work_of(segments, segments)
    assert [float(x) for x in work] == [6, 10, 6, 9 + 4 + 1]
    assert [float(x) for x in work_of(segments)] == [6, 10, 0, 0]


def test_operations_of_full_training_are_those_counted_by_hand():
    """Three passes through every kernel, two through the one that patches meet: nothing asks for their gradient."""
    patch, blocks = kernels("visual.patch_embed"), kernels("visual.blocks")
    merged, text = kernels("visual.merger") + kernels("visual.downsample"), kernels("language_model") + kernels("lm")
    assert (patch, text) == (1176 * 32, 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96) + 64 * 320)
    by_hand = 2 * (2 * patch * 64 + 3 * (blocks * 64 + merged * 16 + text * 96))
    by_hand += 3 * 4 * (2 * 64 * 4656 + 2 * 32 * 4096)
    assert step_flops(CONFIG, *leaves(), WORK) == by_hand


def test_the_9b_is_six_operations_a_parameter_and_token():
    config = Glm4vConfig.glm4_1v_9b()
    params, frozen = leaves(config)
    text = Work(tokens=32768.0, pairs=0.0)
    size = sum(leaf.size for path, leaf in params.items() if not path.startswith(("visual", "language_model.embed")))
    assert step_flops(config, params, frozen, text) == pytest.approx(6 * size * 32768, rel=1e-3)
    assert 9.2e9 < size + params["language_model.embed_tokens.embedding"].size < 9.5e9


@pytest.mark.parametrize(
    ("trained", "remat"),
    [("all", "none"), ("all", "full"), ("all", "attention"), ("all", "dots"), ("merger", "full"), ("llm", "none"),
     ("lora", "full")],
)  # fmt: skip
def test_a_traced_step_multiplies_as_much(trained, remat):
    """To the last operation, with what the plain attention of a CPU does in the place of what is counted."""
    lora = LoraConfig(rank=4) if trained == "lora" else None
    freeze = {"all": (), "merger": ("vision",)}.get(trained, ("vision", "merger"))
    found = []
    with use_mesh() as mesh:
        model = jax.eval_shape(lambda: Glm4v.init(CONFIG))
        step_program(CONFIG, SHAPES, lora=lora, freeze=freeze, remat=remat, report=found.append).trace(model, mesh)
    (counts,) = found
    every = leaves(CONFIG, is_lora if lora else lambda path: group_of(path) not in freeze, lora)
    assert counts.model_flops == step_flops(CONFIG, *every, SHAPES.work)
    # All pairs of the one block that a row is: two products forward, and seven backward, where scores are made twice.
    text, vision = 2 * 2 * 64 * (2 * 48 * 48), 2 * 2 * 32 * 64**2
    attention = text * (9 + 2 * (remat == "full")) + vision * (9 + 2 * (remat == "full") if trained == "all" else 2)
    position_table = 2 * 64 * 25 * 32 * (2 if trained == "all" else 1)
    no_pairs = SHAPES.work._replace(pairs=0.0, patch_pairs=0.0)
    products = step_flops(CONFIG, *every, no_pairs) + recomputed_flops(CONFIG, *every, no_pairs, remat)
    assert counts.dot_flops == products + attention + position_table


def test_remat_full_recomputes_attention_once():
    """The difference of the two policies is one pass of attention."""
    full, kept = (recomputed_flops(CONFIG, *leaves(), WORK, remat) for remat in ("full", "attention"))
    assert full - kept == 4 * (2 * 64 * 4656 + 2 * 32 * 4096)


def test_kernels_are_counted_by_their_loops():
    def twice(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, None, length=5)[0]

    x = jnp.zeros((4, 4))
    flops, kernels = count_products(jax.jit(jax.grad(lambda x: twice(x).sum())).trace(x).jaxpr)
    assert (flops, kernels) == (3 * 5 * 2 * 4**3, {})


@pytest.mark.parametrize(
    ("sizes", "trained", "expected"),
    [
        # Three quarters of the kernel three times, twice gathered and once summed; of the head, gathered once, twice.
        (dict(fsdp=4), ("down", "head"), 2 * 0.75 * (3 * DOWN + 2 * HEAD)),
        # Nothing below the head is trained: its kernel is wanted for the forward pass alone.
        (dict(fsdp=4), ("head",), 2 * 0.75 * (DOWN + 2 * HEAD)),
        (dict(fsdp=4), ("down",), 2 * 0.75 * (3 * DOWN + HEAD)),
        # Two replicas sum a half each, there and back.
        (dict(data=2, fsdp=2), ("down", "head"), 2 * 0.5 * (3 * DOWN + 2 * HEAD) + 2 * 2 * 0.5 * 0.5 * (DOWN + HEAD)),
        # Half of each kernel, and the states of a row of 48 tokens, eight times in two layers.
        (dict(fsdp=2, kv=2), ("down", "head"), 0.5 * 2 * 0.5 * (3 * DOWN + 2 * HEAD) + 16 * 0.5 * 2 * 48 * 64),
    ],
)  # fmt: skip
def test_least_sent_counts_gathers_and_reductions(sizes, trained, expected):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES))

    def leaf(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec(*axes)))

    every = {
        "down": ("language_model.layers.stacked.mlp.down.kernel", leaf((2, 96, 64), None, "mlp", "embed")),
        "head": ("lm_head.kernel", leaf((64, 320), "embed", "vocab")),
    }
    params = dict(every[name] for name in trained)
    frozen = dict(every[name] for name in every if name not in trained)
    frozen["language_model.norm.scale"] = leaf((64,), None)
    assert least_sent(CONFIG, params, frozen, Shapes(2, 48)) == expected
