"""From the logits of one position to the next token, as transformers 4.57.1 does it.

Order and thresholds are those of `GenerationMixin._get_logits_processor` and `generation/logits_process.py`:
repetition penalty, then, in rows that sample, temperature, top-k, top-p, min-p. Options are traced arrays with one
value a row, so that rows may differ and a change of an option compiles nothing.

B: rows, V: vocabulary, W: candidates. Logits may be sharded over V: each shard gives its candidates, and whole rows are
gathered only where those do not decide (a large or no top-k together with top-p).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Num, Shaped

from glm4v_jax.config.generation import SamplingParams

# top-k up to this (the reference's default is 50) needs the largest scores only: `lax.top_k` of 64 takes 0.2 ms where
# sorting a row of V = 151,552 takes 34 ms on a CPU core.
_WINDOW = 64

# Of these at a time whole rows of the vocabulary are sorted.
_FEW_ROWS = 8


def warped(logits: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B V"]:
    """Return the scores of rows that sample after temperature and cuts, those of the others as they were."""
    do_sample, temperature, _, _, min_p, _ = (jnp.asarray(param)[:, None] for param in params)
    scores = logits / jnp.where(do_sample, temperature, 1.0)
    cut_score, cut_id = _cuts(scores, params)
    ids = jnp.arange(scores.shape[-1])[None]
    kept = (scores > cut_score[:, None]) | ((scores == cut_score[:, None]) & (ids >= cut_id[:, None]))
    scores = jnp.where(kept, scores, -jnp.inf)

    probabilities = jax.nn.softmax(scores, axis=-1)
    floor = min_p * jnp.max(probabilities, axis=-1, keepdims=True)
    scores = jnp.where(probabilities < floor, -jnp.inf, scores)
    return jnp.where(do_sample, scores, logits)


def sample(
    logits: Num[Array, "B V"], params: SamplingParams, seen: Bool[Array, "B V"], keys: Key[Array, "B"]
) -> Int[Array, "B"]:
    """Choose the next token of each row, int32: sampled with that row's key, or the first maximum if it is greedy."""
    return choose(lambda: penalised(logits, params, seen), params, keys)


def choose(scores: Callable[[], Float[Array, "B V"]], params: SamplingParams, keys: Key[Array, "B"]) -> Int[Array, "B"]:
    """Choose as `sample` does, from scores before temperature and cuts.

    A function gives them, and not an array: they are cheaper to compute again for sampling than to keep.
    """
    do_sample = jnp.asarray(params.do_sample)
    greedy = jnp.argmax(scores(), axis=-1).astype(jnp.int32)

    def drawn() -> Int[Array, "B"]:
        logits = warped(scores(), params)
        # `jax.random.categorical` is this, but draws the noise of the whole vocabulary on every device of a mesh.
        part = None if jax.typeof(logits).sharding.mesh.empty else jax.P(_spec(logits)[1])
        draw = functools.partial(jax.random.gumbel, shape=logits.shape[1:], dtype=logits.dtype, out_sharding=part)
        tokens = jnp.argmax(logits + jax.vmap(draw)(keys), axis=-1).astype(jnp.int32)
        return jnp.where(do_sample, tokens, greedy)

    # Top-k, top-p and sampling take longer than a small model's layers.
    return lax.cond(jnp.any(do_sample), drawn, lambda: greedy)


def penalised(logits: Num[Array, "B V"], params: SamplingParams, seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """Return the logits in float32, those of `seen` tokens made smaller by the repetition penalty."""
    logits, penalty = logits.astype(jnp.float32), jnp.asarray(params.repetition_penalty)[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def row_keys(seeds: Int[Array, "*B"] | int, numbers: Int[Array, "B"]) -> Key[Array, "B"]:
    """Return one key a row, which depends on its request's seed and its number in the request alone."""
    seeds = jnp.broadcast_to(jnp.asarray(seeds), jnp.shape(numbers))
    return jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)


def step_keys(keys: Key[Array, "B"], step: Int[Array, "*B"] | int) -> Key[Array, "B"]:
    """Return the keys of generation step `step`, a scalar or one number a row, counted in new tokens."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, 0 if jnp.ndim(step) else None))(keys, step)


def mark_seen(seen: Bool[Array, "B V"], tokens: Int[Array, "B"]) -> Bool[Array, "B V"]:
    """Return `seen` with one more token in each row."""
    # A comparison where a scatter would do: it is a fraction of the softmax's cost, and any sharding suits it.
    return seen | (jnp.arange(seen.shape[-1])[None] == tokens[:, None])


def _cuts(scores: Float[Array, "B V"], params: SamplingParams) -> tuple[Float[Array, "B"], Int[Array, "B"]]:
    """Return the least (score, id) of each row that top-k and top-p keep, in the order of scores, then ids.

    Where the cut of top-p falls among equal scores, torch's unstable sort keeps any of them, and this the higher ids.
    """
    top_k, top_p = jnp.asarray(params.top_k), jnp.asarray(params.top_p)
    from_sorted = jax.vmap(_cut)

    def from_all() -> tuple[Float[Array, "B"], Int[Array, "B"]]:
        return _of_a_few_rows(_cut_of_all, scores, top_k, top_p)

    if scores.shape[-1] <= _WINDOW:
        return from_all()

    ascending, ids = largest(scores, _WINDOW)
    cut_score, cut_id, threshold = from_sorted(ascending, ids, top_k, top_p)
    idle = ~jnp.asarray(params.do_sample) | ((top_k == 0) & (top_p == 1))
    # Above the smallest candidate the window is complete; at it, ties may lie outside, unless it is ruled out already.
    complete = ((top_k > 0) & (threshold > ascending[:, 0])) | jnp.isneginf(ascending[:, 0])
    return lax.cond(jnp.all(idle | complete), lambda: (cut_score, cut_id), from_all)


def _cut_of_all(
    scores: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> tuple[Float[Array, "B"], Int[Array, "B"]]:
    ids = jnp.zeros_like(scores, jnp.int32) + jnp.arange(scores.shape[-1])[None]  # sharded like the scores
    return jax.vmap(_cut)(*lax.sort((scores, ids), num_keys=1), top_k, top_p)[:2]


def _of_a_few_rows(function: Callable[..., Any], scores: Float[Array, "B V"], *arrays: Shaped[Array, "B"]) -> Any:
    """Apply a function of whole rows to a few of each device's at a time: to sort a row takes 1.7 MiB, 64 110 MiB."""
    first, (rows, names) = jax.typeof(scores).sharding, _spec(scores)
    count = first.shard_shape(scores.shape)[0]
    if count <= _FEW_ROWS:
        return function(_gathered(scores), *arrays)
    few = max(n for n in range(1, _FEW_ROWS + 1) if count % n == 0)

    def local(*arrays: Array) -> Any:
        def of_group(group: Sequence[Array]) -> Any:
            scores, *others = group
            return function(scores if names is None else lax.all_gather(scores, names, axis=1, tiled=True), *others)

        groups = [x.reshape(-1, few, *x.shape[1:]) for x in arrays]
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lax.map(of_group, groups))

    if first.mesh.empty:
        return local(scores, *arrays)
    arrays = tuple(jax.sharding.reshard(x, jax.P(rows)) for x in arrays)
    specs = (jax.P(rows, names), *[jax.P(rows)] * len(arrays))
    return jax.shard_map(local, in_specs=specs, out_specs=jax.P(rows), check_vma=False)(scores, *arrays)


def largest(scores: Float[Array, "B V"], n: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """Return the `n` largest scores of each row and their ids, ascending; of equal ones the least ids, ascending."""
    vocab_size = scores.shape[1]
    shards = _vocab_shards(scores)
    if shards == 1:
        # Stable, so that equal scores stay in the order of ids. Nothing else may slice the result of `top_k`: XLA would
        # then sort the whole row to get it.
        return lax.sort(tuple(lax.top_k(_gathered(scores), n)), num_keys=1)
    rows, names = _spec(scores)
    width = vocab_size // shards

    def of_part(scores: Array) -> tuple[Array, Array]:
        # Of matrices, as XLA sorts whole rows on a TPU where an array has more dimensions.
        best, ids = lax.top_k(scores, min(n, width))
        found = best, ids + width * lax.axis_index(names)
        return tuple(lax.all_gather(x, names, axis=1, tiled=True) for x in found)

    of_parts = jax.shard_map(of_part, in_specs=jax.P(rows, names), out_specs=jax.P(rows), check_vma=False)
    best, ids = of_parts(scores)
    # Two keys would put the higher of equal scores' ids last, which are those to drop: it is the negative that counts.
    ascending, descending_ids = lax.sort((best, -ids), num_keys=2)
    ascending, ids = ascending[:, -n:], -descending_ids[:, -n:]
    return lax.sort((ascending, ids), num_keys=2)


def _spec(scores: Array) -> tuple:
    spec = jax.typeof(scores).sharding.spec
    return (*spec, *(None,) * (2 - len(spec)))


def _vocab_shards(scores: Array) -> int:
    names = _spec(scores)[1]
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in (names if isinstance(names, tuple) else (names,)) if name is not None)


def _gathered(scores: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Whole rows, on every device that has a part of them."""
    rows, names = _spec(scores)
    return scores if names is None else jax.sharding.reshard(scores, jax.P(rows, None))


def _cut(
    scores: Float[Array, "W"], ids: Int[Array, "W"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> tuple[Float[Array, ""], Int[Array, ""], Float[Array, ""]]:
    """Return score and id of the first survivor among ascending candidates, and the threshold of top-k (-inf: off)."""
    width = scores.shape[0]
    threshold = jnp.where(top_k > 0, scores[width - jnp.clip(top_k, 1, width)], -jnp.inf)
    below = jnp.sum(scores < threshold)

    probabilities = jax.nn.softmax(jnp.where(scores < threshold, -jnp.inf, scores))
    improbable = jnp.minimum(jnp.sum(jnp.cumsum(probabilities) <= 1 - top_p), width - 1)
    first = jnp.where(top_p < 1, jnp.maximum(below, improbable), below)
    # With both options off this is position 0, the least of all, or of the window: keep what lies below it as well.
    off = (top_k == 0) & (top_p == 1)
    return jnp.where(off, -jnp.inf, scores[first]), jnp.where(off, 0, ids[first]), threshold
