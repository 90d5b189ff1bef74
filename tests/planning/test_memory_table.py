"""What each device of a mesh holds."""

import json

import jax
import pytest
from helpers_mesh import GROUPED, write_grouped

from glm4v_jax.checkpoints.load import load_runtime
from glm4v_jax.checkpoints.plan import device_bytes
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.hardware import GIB
from glm4v_jax.errors import ConfigError
from glm4v_jax.planning.memory_table import COLUMNS, cache_bytes, describe, smallest_fit
from glm4v_jax.planning.mesh_presets import PRESETS, sizes_for
from glm4v_jax.planning.parameter_layout import mesh_text
from glm4v_jax.tiny import TINY_CHECKPOINT

RELEASED = Glm4vConfig.glm4_1v_9b()
ROWS, CAPACITY = 3, 42


def test_one_device_holds_the_released_model():
    found = describe(RELEASED, {})
    assert found.num_devices == 1
    assert found.weight_bytes == 20_585_554_944 == 2 * 10_292_777_472
    assert {part: sizes[0] // 2 for part, sizes in found.parts().items()} == {
        "embedding": 620_756_992,
        "decoder layers": 8_158_760_960,
        "last norm": 4_096,
        "head": 620_756_992,
        "ViT": 892_498_432 - 185_081_856,
        "merger": 185_081_856,
        "cache": 40 * 2 * 2 * 4096 * 128,
    }
    assert all(total == device for total, device in found.parts().values())
    assert found.share is None


@pytest.mark.parametrize(("scheme", "gigabytes"), [("none", 20.6), ("int8", 10.3), ("int4", 6.5)])
def test_quantised_weights_are_counted_as_they_will_be(scheme, gigabytes):
    found = describe(RELEASED, {}, scheme=scheme)
    assert found.weight_bytes / 1e9 == pytest.approx(gigabytes, abs=0.25)
    if scheme == "int8":
        model = Glm4vConfig.from_pretrained(TINY_CHECKPOINT)
        assert describe(model, {}, dtype="float32", scheme=scheme).weight_bytes == device_bytes(
            jax.tree.leaves(load_runtime(TINY_CHECKPOINT, dtype="float32", quantize=scheme).module)
        )


def test_groups_that_do_not_divide_by_the_mesh_are_refused():
    message = r"mesh kv=2,q=2: 214 groups of inputs of .*\.down\.kernel in int4 are not divisible by mesh axes kv x q"
    with pytest.raises(ConfigError, match=message):
        describe(RELEASED, dict(kv=2, q=2), scheme="int4")
    assert describe(RELEASED, dict(kv=2), scheme="int4").precision == "int4 and bfloat16"
    # No more than two devices can share the groups of each kernel.
    assert smallest_fit(RELEASED, "latency", 2 * GIB, scheme="int4") is None
    assert smallest_fit(RELEASED, "latency", 5 * GIB, scheme="int4").num_devices == 2


def test_eight_devices_share_the_released_model():
    found = describe(RELEASED, dict(kv=2, q=4), rows=8, capacity=4096, memory=16 * GIB)
    held = {(one.part, one.name): one for one in found.weights}
    gate_up = held["decoder layers", "mlp.gate_up.kernel"]
    assert (gate_up.count, gate_up.shape, gate_up.axes) == (40, (4096, 2, 13696), ("-", "-", "kv+q"))
    assert gate_up.device_bytes * 8 == gate_up.nbytes == 2 * 40 * 4096 * 2 * 13696
    assert held["ViT", "blocks.attn.qkv.kernel"].axes == ("-", "-", "kv", "-")
    assert held["merger", "proj.kernel"].device_bytes == held["merger", "proj.kernel"].nbytes
    assert (found.cache.shape, found.cache.axes) == ((40, 8, 2, 4096, 128), ("-", "-", "kv", "-", "-"))
    assert found.cache.device_bytes * 2 == found.cache.nbytes == 2 * 2 * 40 * 8 * 2 * 4096 * 128
    assert found.device_bytes == found.weight_bytes + found.cache.device_bytes
    assert found.share == pytest.approx(found.device_bytes / 2**34)


def test_rows_are_padded_and_slots_sharded():
    found = describe(RELEASED, dict(data=2, fsdp=2, kv=2, seq=4), rows=5, capacity=4095)
    assert (found.rows, found.capacity) == (5, 4095)
    assert found.cache.shape == (40, 8, 2, 4096, 128)
    assert found.cache.axes == ("-", "data+fsdp", "kv", "seq", "-")
    assert found.cache.device_bytes * 32 == found.cache.nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_bytes_are_those_of_the_dtype(dtype):
    one, other = describe(RELEASED, dict(kv=2), dtype=dtype), describe(RELEASED, dict(kv=2), dtype="float32")
    assert one.device_bytes * (1 if dtype == "float32" else 2) == other.device_bytes


def test_an_int8_cache_has_its_scales():
    one, other = (
        describe(RELEASED, dict(kv=2), rows=8, capacity=65_536, cache_dtype=dtype) for dtype in ("auto", "int8")
    )
    assert other.cache.device_bytes == one.cache.device_bytes * (1 + 4 / 128) / 2
    assert other.weights == one.weights and other.to_dict()["cache_dtype"] == "int8"
    assert "5.16 GiB of a cache in int8 of 8 x 65536 slots, together" in other.summary()
    assert cache_bytes(RELEASED, {"kv": 2}, 8, 65_536, "int8") == other.cache.device_bytes


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(rows=0), "rows: found 0; expected at least 1"),
        (dict(capacity=-1), "capacity: found -1; expected at least 1"),
        (dict(sizes=dict(kv=4)), "mesh kv=4: kv_heads of 2 is not divisible by mesh axes kv of 4 devices"),
    ],
)
def test_invalid_numbers_and_meshes_are_refused(options, problem):
    with pytest.raises(ConfigError, match=problem):
        describe(RELEASED, **{"sizes": {}, **options})


def test_training_holds_float32_weights_gradients_and_two_moments():
    found = describe(RELEASED, dict(fsdp=8), is_training=True, memory=80 * GIB)
    trained, frozen = 10_292_777_472 - (892_498_432 - 185_081_856), 892_498_432 - 185_081_856
    parts = {part: total for part, (total, _) in found.parts().items()}
    assert parts["gradients"] == 4 * trained and parts["optimizer state"] == 8 * trained and "cache" not in parts
    assert sum(parts.values()) == 16 * trained + 2 * frozen
    assert found.weight_bytes < found.device_bytes < 80 * GIB and found.fits
    assert found.summary().startswith("mesh fsdp=8: a device holds ")
    assert "of gradients and" in found.summary() and "for full fine-tuning with AdamW" in found.summary()


def test_the_bytes_for_training_are_those_of_a_job(mesh):
    """Weights and moments of a state before the first step, as `glm4v train` makes it by default."""
    import jax

    from glm4v_jax import Glm4v
    from train.optimizers import OptimizerConfig, group_of, make_optimizer
    from train.state import init_state, split

    config = Glm4vConfig.from_dict(GROUPED)

    def make():
        model = Glm4v.init(config, dtype="float32")
        params, frozen = split(model, lambda path: group_of(path) != "vision")
        return init_state(params, make_optimizer(OptimizerConfig(), 10, model)), frozen

    state, frozen = jax.eval_shape(make)

    def nbytes(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.ndim)

    found = describe(config, {}, dtype="float32", is_training=True)
    assert found.weight_bytes == nbytes(state.params) + nbytes(frozen)
    assert found.parts()["optimizer state"][0] == nbytes(state.opt_state)
    assert found.parts()["gradients"][0] == nbytes(state.params)


def test_the_smallest_mesh_that_fits():
    found = smallest_fit(RELEASED, "train", 16 * GIB, is_training=True)
    assert found.fits and found.num_devices == 16
    one_less = sizes_for("train:15", RELEASED, memory=16 * GIB)
    assert not describe(RELEASED, one_less, memory=16 * GIB, is_training=True).fits
    assert mesh_text(smallest_fit(RELEASED, "latency", 80 * GIB).sizes) == "data=1"
    assert smallest_fit(RELEASED, "latency", GIB // 2) is None


def test_a_cache_alone():
    assert cache_bytes(RELEASED, {"kv": 2}, 8, 4096, "bfloat16") == 2 * 2 * 40 * 8 * 4096 * 128


@pytest.fixture(scope="module")
def on_eight():
    return describe(RELEASED, dict(kv=2, q=4), rows=8, memory=16 * GIB)


def test_the_table_has_parts_with_their_arrays(on_eight):
    table = on_eight.table()
    assert len(table) == len(on_eight.parts()) + len(on_eight.weights) + 1
    assert all(len(row) == len(COLUMNS) for row in table)
    gate_up = next(row for row in table if row[1] == "mlp.gate_up.kernel x 40")
    assert gate_up[2:] == ("4096x2x13696", "- - kv+q", "8.36 GiB", "1.04 GiB")


def test_the_summary_is_one_line(on_eight):
    assert on_eight.summary() == (
        "mesh kv=2,q=4: a device holds 2.69 GiB of weights and 640.00 MiB of a cache of 8 x 4096 slots, together "
        "3.31 GiB in bfloat16, 20.7% of 16.00 GiB"
    )


def test_json_has_the_same_numbers(on_eight):
    content = json.loads(json.dumps(on_eight.to_dict()))
    assert content["mesh"] == dict(data=1, fsdp=1, kv=2, q=4, seq=1) and content["num_devices"] == 8
    assert content["device_bytes"] == on_eight.device_bytes == content["weight_bytes"] + content["cache_bytes"]
    assert content["weight_bytes"] == sum(one["device_bytes"] for one in content["arrays"] if one["part"] != "cache")
    assert content["parts"]["cache"]["device_bytes"] == content["cache_bytes"]
    assert content["share"] == on_eight.share and content["memory"] == 2**34


def test_the_bytes_are_those_on_devices(tmp_path, run_on_devices):
    write_grouped(tmp_path)
    config = Glm4vConfig.from_dict(GROUPED)
    cases = run_on_devices(held_by_devices, tmp_path)
    assert cases.keys() == PRESETS.keys()
    for preset, case in cases.items():
        sizes = sizes_for(preset, config, 8)
        assert case["mesh"] == mesh_text(sizes)
        for cache_dtype, held in zip(("auto", "int8"), case["caches"], strict=True):
            options = dict(rows=ROWS, capacity=CAPACITY, dtype="float32", cache_dtype=cache_dtype)
            found = describe(config, sizes, **options)
            assert case["weights"] == [found.weight_bytes] * 8, case
            assert held == [found.cache.device_bytes] * 8, case


def held_by_devices(directory):
    import numpy as np

    from glm4v_jax import Glm4vForConditionalGeneration
    from glm4v_jax.devices.mesh import data_shards, use_mesh
    from glm4v_jax.model.kv_cache import init_cache
    from glm4v_jax.planning.mesh_presets import mesh_for

    devices, cases = jax.devices()[:8], {}

    def on_devices(arrays):
        held = dict.fromkeys(devices, 0)
        for array in jax.tree.leaves(arrays):
            for shard in array.addressable_shards:
                held[shard.device] += shard.data.nbytes
        return list(held.values())

    config = Glm4vConfig.from_pretrained(directory)
    for preset in PRESETS:
        mesh = mesh_for(preset, config, devices=devices)
        model = Glm4vForConditionalGeneration.from_pretrained(directory, mesh=mesh)
        with use_mesh(mesh):
            rows, capacity = (
                -(-number // shards) * shards
                for number, shards in ((ROWS, data_shards()), (CAPACITY, mesh.shape["seq"]))
            )
            caches = [init_cache(config.text_config, rows, capacity, dtype) for dtype in (np.float32, np.int8)]
        cases[preset] = {
            "mesh": mesh_text(mesh.shape), "weights": on_devices(model.module),
            "caches": [on_devices((cache.k, cache.v)) for cache in caches],
        }  # fmt: skip
    return cases
