"""Attention on meshes: a cache whose slots lie in shards is what one device writes, sees and grows; and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm4v_jax.devices import mesh
from glm4v_jax.errors import GenerationError
from glm4v_jax.model import kv_cache
from glm4v_jax.model.attention.attend import Dropout, Mask, attend, attend_cached, attend_with_weights

B, K, G, S, H = 2, 2, 4, 48, 8
MESHES = [dict(seq=4), dict(data=2, kv=2, q=2, seq=2)]
LENGTHS = {4: [1, 5, 12, 13, 20, 48], 2: [1, 24, 25, 48]}
"""Size of axis seq -> new tokens: fewer than a shard of 12 or 24 slots has, as many, more, and as many as all have."""
QUANTIZED = (1, 13, 25)
"""Those that are also written to, and attend to, a cache of integers."""


expected_of = jax.jit(attend_with_weights, static_argnames="causal")
quantized = jax.jit(kv_cache.quantize_side)
dequantized = jax.jit(kv_cache.dequantize_side, static_argnums=1)


@pytest.fixture(scope="module")
def report(run_on_devices):
    """(what, its mesh) -> what came of it."""
    return run_on_devices(results)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("what", ["write", "attend", "grow"])
def test_every_mesh_equals_one_device(report, what, sizes):
    case = report[what, str(sizes)]
    assert case["worst"] <= (1e-6 if what == "attend" else 0)
    assert case["split"] == sizes["seq"]


def test_slots_that_do_not_divide_are_refused(report):
    assert report["error", "{}"] == "capacity: found 47 slots; expected a multiple of mesh axis seq, 4"


def test_shards_drop_independently_and_replicas_alike(report):
    case = report["dropout", "{'kv': 2, 'q': 2}"]
    assert case["equal_heads"] == 0  # all heads have the same queries, keys and values
    assert case["worst_replica"] == 0


def starts(t):
    """First slots of the rows: borders of shards, before and after them."""
    last = S - t
    return [np.array(pair) for pair in ((0, last), (last // 2, 11), (12, 1), (last, 23)) if max(pair) <= last]


def written(sizes):
    """The largest difference between what is written and what should be, over all lengths and starts."""
    random = np.random.RandomState(0)
    worst = 0.0
    with mesh.use_mesh(mesh.make_mesh(**sizes)):
        spec = mesh.spec("layers", "batch", "kv_heads", "slots", None)
        old = random.standard_normal((3, B, K, S, H)).astype(np.float32)
        placed = jax.device_put(old, spec)
        split = S // placed.addressable_shards[0].data.shape[3]
        write = jax.jit(kv_cache.write_layers)
        integers = quantized(placed)
        for t in LENGTHS[sizes["seq"]]:
            new = random.standard_normal((3, B, K, t, H)).astype(np.float32)
            for start in starts(t):
                expected = old.copy()
                for row, at in enumerate(start):
                    expected[:, row, :, at : at + t] = new[:, row]
                found = write(placed, jnp.asarray(new), jnp.asarray(start))
                worst = np.maximum(worst, np.abs(np.asarray(found) - expected).max())  # which keeps NaN
                if t in QUANTIZED:
                    found = write(integers, quantized(jnp.asarray(new)), jnp.asarray(start))
                    worst = np.maximum(worst, differing(found, quantized(jnp.asarray(expected))))
    return worst, split


def differing(found, expected):
    """The largest difference of two trees."""
    return np.max(
        [
            np.abs(np.asarray(x) - np.asarray(y)).max()
            for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True)
        ]
    )


def attended(sizes):
    """The largest difference of attention, in shares of the largest magnitude; rows hold padding on either side."""
    random = np.random.RandomState(1)
    worst = 0.0

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    with mesh.use_mesh(mesh.make_mesh(**sizes)):
        places = [mesh.spec("batch", None, "kv_heads", "q_groups", None), mesh.spec("batch", "kv_heads", "slots", None)]
        cached = draw(B, K, S, H), draw(B, K, S, H)
        held = (np.arange(S) >= 2).astype(np.int32) * np.ones((B, 1), np.int32)
        run = jax.jit(attend_cached)
        for t in LENGTHS[sizes["seq"]][:-1]:
            q, new = draw(B, t, K, G, H), (draw(B, K, t, H), draw(B, K, t, H))
            segments = np.ones((B, t), np.int32)
            segments[1, t // 2 + 1 :] = 0
            for start in starts(t):
                seen = np.where(np.arange(S) < start[:, None], held, 0)
                sides = tuple(jax.device_put(x, places[1]) for x in cached), tuple(map(jnp.asarray, new))
                found = run(jax.device_put(q, places[0]), *sides, segments, seen)
                keys = [np.concatenate(sides, axis=2).swapaxes(1, 2) for sides in zip(cached, new, strict=True)]
                mask = Mask(segments, np.concatenate([seen, segments], axis=1), np.full(B, S))
                with mesh.use_mesh(mesh.make_mesh()):
                    expected, _ = expected_of(*map(jnp.asarray, (q, *keys)), mask, causal=True)
                    expected = np.asarray(expected)
                worst = np.maximum(worst, np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
                if t in QUANTIZED:
                    integers = jax.tree.map(quantized, sides)
                    found = run(jax.device_put(q, places[0]), *integers, segments, seen)
                    floats = (tuple(dequantized(x, jnp.float32) for x in pair) for pair in integers)
                    expected = np.asarray(run(jax.device_put(q, places[0]), *floats, segments, seen))
                    worst = np.maximum(worst, np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
    return worst


def grown(sizes):
    """The largest difference of a cache of twice and thrice the slots."""
    random = np.random.RandomState(2)
    worst = 0.0
    with mesh.use_mesh(mesh.make_mesh(**sizes)):
        old = random.standard_normal((3, B, K, S, H)).astype(np.float32)
        side = jax.device_put(old, mesh.spec("layers", "batch", "kv_heads", "slots", None))
        segments = jax.device_put(np.ones((B, S), np.int32), mesh.spec("batch", None))
        for capacity in (2 * S, 3 * S):
            whole = kv_cache.KVCache(quantized(side), side, segments, segments[:, 0])
            larger = jax.jit(kv_cache.grow, static_argnums=1)(whole, capacity)
            assert larger.k.integers.sharding.spec == larger.v.sharding.spec == side.sharding.spec
            expected = np.pad(old, [(0, capacity - S if axis == 3 else 0) for axis in range(5)])
            both = larger.k, larger.v
            worst = np.maximum(worst, differing(both, (quantized(jnp.asarray(expected)), expected)))
            assert np.asarray(larger.segments).sum() == B * S
    return worst


def dropped():
    """How many pairs of equal heads drop alike; and the largest difference between devices that hold the same."""
    random = np.random.RandomState(3)
    t, heads = 16, K * G
    with mesh.use_mesh(mesh.make_mesh(kv=2, q=2)):
        q = np.repeat(random.standard_normal((1, t, 1, 1, H)), heads, axis=2).astype(np.float32)
        k, v = (np.repeat(random.standard_normal((1, t, 1, H)), heads, axis=2).astype(np.float32) for _ in range(2))
        mask = Mask(np.ones((1, t), np.int32), np.ones((1, t), np.int32))

        @jax.jit
        def run(q, k, v):
            return attend(q, k, v, mask, causal=False, dropout=Dropout(jax.random.key(0), 0.5))

        grouped = q.reshape(1, t, K, G, H), k[:, :, :K], v[:, :, :K]
        places = [mesh.spec("batch", None, "kv_heads", "q_groups", None), mesh.spec("batch", None, "kv_heads", None)]
        out = run(*(jax.device_put(x, places[min(i, 1)]) for i, x in enumerate(grouped)))
        each = np.asarray(out).reshape(t, heads, H).swapaxes(0, 1)
        equal = sum(np.array_equal(each[i], each[j]) for i in range(heads) for j in range(i))
        # The ViT's heads, which are split over kv alone.
        places = [mesh.spec("rows", None, "heads", None, None), mesh.spec("rows", None, "heads", None)]
        out = run(*(jax.device_put(x, places[min(i, 1)]) for i, x in enumerate((q, k, v))))
        shards = {}
        for shard in out.addressable_shards:
            shards.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        worst = np.max([np.abs(same - held[0]).max() for held in shards.values() for same in held])
    return {"equal_heads": equal, "worst_replica": worst}


def refusal():
    """What is said about 47 slots."""
    from reference import CONFIGS

    from glm4v_jax.config.model import Glm4vConfig

    with mesh.use_mesh(mesh.make_mesh(seq=4)):
        try:
            kv_cache.init_cache(Glm4vConfig.from_dict(CONFIGS["base"]).text_config, 1, 47, jnp.float32)
        except GenerationError as error:
            return str(error)
    return None


def results():
    found = {("dropout", str(dict(kv=2, q=2))): dropped(), ("error", "{}"): refusal()}
    for sizes in MESHES:
        worst, split = written(sizes)
        for what, value in (("write", worst), ("attend", attended(sizes)), ("grow", grown(sizes))):
            found[what, str(sizes)] = {"worst": value, "split": split}
    return found
