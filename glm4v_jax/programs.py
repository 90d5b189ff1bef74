"""The jitted programs, over flattened modules.

A module crosses the border of `jax.jit` as the list of its leaves: flattening a tree of NNX objects at every call would
cost more than a decoding step of a small model. Models of equal structure share compiled programs.
"""

import functools
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from glm4v_jax import mesh
from glm4v_jax.batch import VisionRows
from glm4v_jax.cache import KVCache
from glm4v_jax.decoder import Record, Recorded, TextDecoder
from glm4v_jax.generate.config import SamplingParams
from glm4v_jax.generate.sampling import mark_seen, sample, seen_from_prompt, step_keys
from glm4v_jax.model import embed_with_vision
from glm4v_jax.nn import Linear
from glm4v_jax.vision import VisionEncoder

M = TypeVar("M")


class Structure:
    """A tree structure that hashes in no time: `_structure` makes equal ones the same object."""

    def __init__(self, treedef: Any):
        self.treedef = treedef


@functools.cache
def _structure(treedef: Any) -> Structure:
    return Structure(treedef)


class Flat(NamedTuple, Generic[M]):
    """A module as the programs take it; `leaves` are arrays on their devices."""

    structure: Structure
    leaves: list[Array]

    @classmethod
    def of(cls, module: M) -> "Flat[M]":
        """Flatten a module."""
        leaves, treedef = jax.tree.flatten(module)
        return cls(_structure(treedef), leaves)

    @property
    def module(self) -> M:
        """The module itself, around the same arrays."""
        return jax.tree.unflatten(self.structure.treedef, self.leaves)


def _flat_jit(function: Any = None, **options: Any) -> Any:
    """`jax.jit` for functions whose first arguments are modules: callers pass `Flat`s in their place.

    `modules` says how many there are. The wrapped function's other arguments are given by position.
    """
    if function is None:
        return functools.partial(_flat_jit, **options)
    modules = options.pop("modules", 1)
    static = tuple(range(modules)) + tuple(2 * modules + i for i in options.pop("static", ()))
    donated = tuple(2 * modules + i for i in options.pop("donated", ()))

    def flattened(*args: Any) -> Any:
        structures, leaves, rest = args[:modules], args[modules : 2 * modules], args[2 * modules :]
        parts = (s.treedef.unflatten(x) if s is not None else None for s, x in zip(structures, leaves, strict=True))
        return function(*parts, *rest)

    flattened.__name__ = flattened.__qualname__ = function.__name__
    program = jax.jit(flattened, static_argnums=static, donate_argnums=donated)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        flats, rest = args[:modules], args[modules:]
        structures = [flat.structure if flat is not None else None for flat in flats]
        leaves = [flat.leaves if flat is not None else [] for flat in flats]
        return program(*structures, *leaves, *rest)

    return call


@_flat_jit(static=(1,))
def encode(visual: VisionEncoder, rows: VisionRows, num_tokens: int) -> Float[Array, "N D"]:
    """Packed patches -> [num_tokens, D] merged tokens, flattened, replicated and padded with zeros.

    `num_tokens` comes from a coarse bucket set, so that prompt lengths and picture sizes do not multiply into programs.
    """
    features = mesh.reshard(visual(rows), None, None, None)
    flat = features.reshape(-1, features.shape[-1])
    return jnp.pad(flat, ((0, num_tokens - flat.shape[0]), (0, 0)))


@_flat_jit
def embed(
    text: TextDecoder,
    input_ids: Int[Array, "B T"],
    features: Float[Array, "N D"] | None,
    vision_index: Int[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """See `model.embed_with_vision`."""
    return embed_with_vision(text, input_ids, features, vision_index)


@_flat_jit(static=(4,))
def forward(
    text: TextDecoder,
    embeds: Float[Array, "B T D"],
    position_ids: Int[Array, "3 B T"],
    segment_ids: Int[Array, "B T"],
    cache: KVCache | None,
    record: Record,
    dropout_key: Array | None,
) -> tuple[Float[Array, "B T D"], KVCache | None, Recorded]:
    """See `TextDecoder.__call__`; the cache is not donated, the caller may go on from it twice."""
    return text(embeds, position_ids, segment_ids, cache, record=record, dropout_key=dropout_key)


@_flat_jit(modules=2)
def logits(text: TextDecoder, head: Linear | None, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Scores over the vocabulary; the head is None where it is tied to the embedding."""
    return head(hidden) if head is not None else text.embed_tokens.attend(hidden)


@jax.jit
def causal_lm_loss(scores: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean cross entropy of the next token over the labels that are not -100, float32 (`ForCausalLMLoss`)."""
    labels = mesh.reshard(labels[:, 1:], "batch", "length")
    scores = mesh.reshard(scores[:, :-1].astype(jnp.float32), "batch", "length", None)
    counted = labels != -100
    log_z = jax.nn.logsumexp(scores, axis=-1)
    # A comparison in place of a gather: it fuses into the sum, and suits a vocabulary in shards.
    chosen = jnp.sum(jnp.where(jnp.arange(scores.shape[-1]) == labels[..., None], scores, 0.0), axis=-1)
    return jnp.sum(jnp.where(counted, log_z - chosen, 0.0)) / jnp.sum(counted)


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


@_flat_jit(modules=2, donated=(4,))
def prefill(
    text: TextDecoder,
    head: Linear | None,
    embeds: Float[Array, "B T D"],
    input_ids: Int[Array, "B T"],
    position_ids: Int[Array, "3 B T"],
    segment_ids: Int[Array, "B T"],
    cache: KVCache,
    deltas: Int[Array, " B"],
    sampling: Sampling,
) -> State:
    """Left-aligned prompts -> a filled cache and the first new token. Rows of padding are done from the start."""
    hidden, written, _ = text(embeds, position_ids, segment_ids, cache)
    assert written is not None
    segment_ids = mesh.reshard(segment_ids, "batch", "length")
    lengths = jnp.sum(segment_ids > 0, axis=1).astype(jnp.int32)
    cache = written._replace(length=lengths)
    hidden = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 1))(hidden, jnp.maximum(lengths - 1, 0))
    seen = seen_from_prompt(mesh.reshard(input_ids, "batch", "length"), segment_ids, text.config.vocab_size)
    state = State(lengths, cache, mesh.reshard(deltas, "batch"), seen, lengths == 0, jnp.zeros((), jnp.int32))
    return _choose(text, head, hidden, state, sampling)


@_flat_jit(modules=2, static=(2,), donated=(0,))
def decode(
    text: TextDecoder,
    head: Linear | None,
    state: State,
    sampling: Sampling,
    num_steps: int,
    limit: Int[Array, ""],
) -> tuple[Int[Array, "B K"], Int[Array, ""], State]:
    """Up to min(num_steps, limit) more tokens of every row; stops early when all rows are done.

    Returns:
      The tokens, of which only the first so many columns were made; how many; the new state.
    """

    def go_on(carry: tuple[Array, Array, State]) -> Array:
        i, _, state = carry
        return (i < jnp.minimum(num_steps, limit)) & ~jnp.all(state.done)

    def step(carry: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        i, out, state = carry
        token = state.tokens[:, None]
        position = jnp.broadcast_to((state.cache.length + state.deltas)[None, :, None], (3, *token.shape))
        hidden, cache, _ = text(text.embed_tokens(token), position, jnp.ones_like(token), state.cache)
        assert cache is not None
        state = _choose(text, head, hidden, state._replace(cache=cache), sampling)
        return i + 1, jax.lax.dynamic_update_index_in_dim(out, state.tokens, i, 1), state

    out = jnp.zeros_like(state.tokens)[:, None] + jnp.zeros((1, num_steps), jnp.int32)
    count, out, state = jax.lax.while_loop(go_on, step, (jnp.zeros((), jnp.int32), out, state))
    return out, count, state


def _choose(
    text: TextDecoder, head: Linear | None, hidden: Float[Array, "B 1 D"], state: State, sampling: Sampling
) -> State:
    """Choose the next token of each row from its last hidden state."""
    scores = head(hidden) if head is not None else text.embed_tokens.attend(hidden)
    scores = mesh.reshard(scores[:, 0], "batch", None)
    params = SamplingParams(*(mesh.reshard(jnp.asarray(p), "batch") for p in sampling.params))
    keys = step_keys(mesh.reshard(sampling.keys, "batch"), state.step)
    tokens = sample(scores, params, state.seen, keys)
    tokens = jnp.where(state.done, sampling.pad, tokens)
    done = state.done | jnp.any(tokens[:, None] == sampling.eos[None], axis=1)
    return state._replace(tokens=tokens, seen=mark_seen(state.seen, tokens), done=done, step=state.step + 1)
