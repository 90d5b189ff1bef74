"""The jitted programs of generation: prefill, and a decoding loop that stays on the device."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from glm4v_jax import mesh
from glm4v_jax.cache import KVCache
from glm4v_jax.decoder import TextDecoder
from glm4v_jax.generate.config import SamplingParams
from glm4v_jax.generate.sampling import mark_seen, sample, seen_from_prompt, step_keys
from glm4v_jax.nn import Linear
from glm4v_jax.programs import Flat, score


class Sampling(NamedTuple):
    """How next tokens are chosen; constant while a batch is generated."""

    params: SamplingParams
    keys: Key[Array, " B"]
    eos: Int[Array, " E"]
    """ids that end a row; -1 ends none"""
    pad: Int[Array, ""]
    """what finished rows go on with"""


class State(NamedTuple):
    """Where the generation of a batch stands."""

    tokens: Int[Array, " B"]
    """the newest token of each row: chosen, but not yet in the cache"""
    cache: KVCache
    deltas: Int[Array, " B"]
    """position minus slot of each row's new tokens"""
    seen: Bool[Array, "B V"]
    done: Bool[Array, " B"]
    step: Int[Array, ""]
    """new tokens so far"""


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(
    text: Flat[TextDecoder],
    head: Flat[Linear] | None,
    embeds: Float[Array, "B T D"],
    input_ids: Int[Array, "B T"],
    position_ids: Int[Array, "3 B T"],
    segment_ids: Int[Array, "B T"],
    cache: KVCache,
    deltas: Int[Array, " B"],
    sampling: Sampling,
) -> State:
    """Left-aligned prompts -> a filled cache and the first new token. Rows of padding are done from the start."""
    decoder = text.module
    hidden, written, _ = decoder(embeds, position_ids, segment_ids, cache)
    assert written is not None
    segment_ids = mesh.reshard(segment_ids, "batch", "length")
    lengths = jnp.sum(segment_ids > 0, axis=1).astype(jnp.int32)
    cache = written._replace(length=lengths)
    hidden = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 1))(hidden, jnp.maximum(lengths - 1, 0))
    seen = seen_from_prompt(mesh.reshard(input_ids, "batch", "length"), segment_ids, decoder.config.vocab_size)
    state = State(lengths, cache, mesh.reshard(deltas, "batch"), seen, lengths == 0, jnp.zeros((), jnp.int32))
    return _choose(decoder, head, hidden, state, sampling)


@functools.partial(jax.jit, static_argnames="num_steps", donate_argnames="state")
def decode(
    text: Flat[TextDecoder],
    head: Flat[Linear] | None,
    state: State,
    sampling: Sampling,
    num_steps: int,
    limit: Int[Array, ""],
) -> tuple[Int[Array, "B K"], Int[Array, ""], State]:
    """Up to min(num_steps, limit) more tokens of every row; stops early when all rows are done.

    Returns:
      The tokens, of which only the first so many columns were made; how many; the new state.
    """
    decoder = text.module

    def go_on(carry: tuple[Array, Array, State]) -> Array:
        i, _, state = carry
        return (i < jnp.minimum(num_steps, limit)) & ~jnp.all(state.done)

    def step(carry: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        i, out, state = carry
        token = state.tokens[:, None]
        position = jnp.broadcast_to((state.cache.length + state.deltas)[None, :, None], (3, *token.shape))
        hidden, cache, _ = decoder(decoder.embed_tokens(token), position, jnp.ones_like(token), state.cache)
        assert cache is not None
        state = _choose(decoder, head, hidden, state._replace(cache=cache), sampling)
        return i + 1, jax.lax.dynamic_update_index_in_dim(out, state.tokens, i, 1), state

    out = jnp.zeros_like(state.tokens)[:, None] + jnp.zeros((1, num_steps), jnp.int32)
    count, out, state = jax.lax.while_loop(go_on, step, (jnp.zeros((), jnp.int32), out, state))
    return out, count, state


def _choose(
    decoder: TextDecoder, head: Flat[Linear] | None, hidden: Float[Array, "B 1 D"], state: State, sampling: Sampling
) -> State:
    """Choose the next token of each row from its last hidden state."""
    scores = score(decoder, None if head is None else head.module, hidden)
    scores = mesh.reshard(scores[:, 0], "batch", None)
    params = SamplingParams(*(mesh.reshard(jnp.asarray(p), "batch") for p in sampling.params))
    keys = step_keys(mesh.reshard(sampling.keys, "batch"), state.step)
    tokens = sample(scores, params, state.seen, keys)
    tokens = jnp.where(state.done, sampling.pad, tokens)
    done = state.done | jnp.any(tokens[:, None] == sampling.eos[None], axis=1)
    return state._replace(tokens=tokens, seen=mark_seen(state.seen, tokens), done=done, step=state.step + 1)
