"""The jitted programs of generation, over B rows (slots) of which each runs one sequence.

`prefill` writes a chunk of tokens after what a row's cache holds: of a prompt, or of a conversation's next turn.
`copy_rows` gives a row what another holds, for prompts that begin alike.
`choose_first` chooses the first tokens after them, of all rows at once, and `decode` many more, in a loop on the
device.

B: rows, n: rows of a chunk, T: its tokens, S: cache slots of a row, V: vocabulary, D: hidden size, P: pool size.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from glm4v_jax.config.checks import CacheDtype
from glm4v_jax.config.generation import GenerationConfig, SamplingParams
from glm4v_jax.devices import mesh
from glm4v_jax.devices.stored_programs import stored
from glm4v_jax.generate.cache_rows import can_stay, put, put_chunk, put_rows, take, take_rows
from glm4v_jax.generate.constraints import Constraints, banned, biased, processed, pushed
from glm4v_jax.generate.sampling import choose, largest, mark_seen, penalised, row_keys, step_keys, warped
from glm4v_jax.generate.token_masks import TokenMasks, allowed_tokens, is_held, placed, restricted
from glm4v_jax.model.attention.attend import FEW_QUERIES
from glm4v_jax.model.decoder import TextDecoder
from glm4v_jax.model.glm4v import embed_with_vision, score
from glm4v_jax.model.kv_cache import KVCache, init_cache
from glm4v_jax.model.nn import Linear
from glm4v_jax.model.runtime import Flat, compute_dtype

MAX_DRAFT = FEW_QUERIES - 1
"""Tokens of a draft at most: with the newest token as many as a decoder takes without copying the cache."""
# Programs are compiled for these numbers of top log probabilities.
_TOPS = (0, 5, 20, 64)


class RowState(NamedTuple):
    """State of each row besides its tokens; every field is [B, ...]."""

    token: Int[Array, " B"]
    """the newest token, not yet in the cache"""
    delta: Int[Array, " B"]
    """rope delta: position minus cache slot of new tokens"""
    done: Bool[Array, " B"]
    step: Int[Array, " B"]
    """new tokens so far"""
    limit: Int[Array, " B"]
    """the most new tokens"""
    eos: Int[Array, "B E"]
    """tokens that end the row; -1 ends none"""
    seed: Int[Array, " B"]
    number: Int[Array, " B"]
    """number of the row in its request: rows of one seed sample differently"""
    params: SamplingParams

    @classmethod
    def free(cls, batch: int, num_eos: int) -> "RowState":
        """Host arrays of free rows, all done, greedy."""
        zeros = np.zeros(batch, np.int32)
        return cls(
            token=zeros, delta=zeros.copy(), done=np.ones(batch, np.bool_), step=zeros.copy(), limit=zeros.copy(),
            eos=np.full((batch, num_eos), -1, np.int32), seed=np.zeros(batch, np.uint32),
            number=np.zeros(batch, np.uint32), params=SamplingParams.of(GenerationConfig(), batch),
        )  # fmt: skip


class SlotsState(NamedTuple):
    """State of B rows, donated from dispatch to dispatch."""

    cache: KVCache
    seen: Bool[Array, "B V"]
    """tokens of the prompt and of the sequence so far, for the repetition penalty"""
    hidden: Float[Array, "B 1 D"]
    """of the last token of each prompt, for `choose_first`"""
    row: RowState


class PrefillChunk(NamedTuple):
    """Tokens to prefill in n rows, padded on the right to T.

    Attributes:
      keep: slots of each row's cache that stay; the chunk is written after them.
      vision_index: -1 for text, otherwise the index in the pool of the merged token that goes there.
    """

    input_ids: Int[Array, "n T"]
    position_ids: Int[Array, "3 n T"]
    segment_ids: Int[Array, "n T"]
    vision_index: Int[Array, "n T"]
    keep: Int[Array, " n"]


class Variant(NamedTuple):
    """What a program that chooses tokens is compiled for.

    Attributes:
      top: number of top log probabilities to return; None for no log probabilities at all.
      scores, logits: whether to return these of the whole vocabulary.
      processors: functions of the user (`GenerationConfig.logits_processor`).
      draft: tokens that prompt lookup drafts for a decode step; None for decoding one by one.
      of_draws: whether log probabilities are of the distribution that tokens are drawn from, and not the model's.
    """

    top: int | None = None
    scores: bool = False
    logits: bool = False
    processors: tuple[Callable[..., Any], ...] = ()
    draft: int | None = None
    of_draws: bool = False

    @classmethod
    def of(cls, config: GenerationConfig) -> "Variant":
        """The programs for requests with these options."""
        top = None if config.logprobs is None else next(top for top in _TOPS if top >= config.logprobs)
        whole = config.return_dict_in_generate
        draft = config.prompt_lookup_num_tokens
        return cls(
            top, whole and config.output_scores, whole and config.output_logits, config.logits_processor,
            None if draft is None else min(draft, MAX_DRAFT), top is not None and config.logprobs_of == "sampling",
        )  # fmt: skip

    @property
    def untold(self) -> "Variant":
        """The programs that return no log probabilities."""
        return self._replace(top=None, of_draws=False)


_PLAIN = Variant()


class Chosen(NamedTuple):
    """Chosen tokens, and what their `Variant` asks for.

    Attributes:
      logprobs, top_tokens, top_logprobs: log probabilities before penalty, temperature and top-k/p cuts, or after.
      scores, logits: what tokens were chosen from, after everything and before it.
    """

    tokens: Int[Array, "*B"]
    logprobs: Float[Array, "*B"] | None = None
    top_tokens: Int[Array, "*B N"] | None = None
    top_logprobs: Float[Array, "*B N"] | None = None
    scores: Float[Array, "*B V"] | None = None
    logits: Float[Array, "*B V"] | None = None


_Carry = tuple[Array, Chosen, SlotsState, Array | None]


class Decoded(NamedTuple):
    """Result of a dispatch of `decode`.

    Attributes:
      chosen: [B, K]; of row b the first n columns are valid, n being the growth of its `step`.
      step, done: [B], of the rows after the dispatch.
      steps: runs of the decoder, where they are not as many as the tokens of the row that got most.
    """

    chosen: Chosen
    step: Int[Array, " B"]
    done: Bool[Array, " B"]
    steps: Int[Array, ""] | None = None


@functools.partial(jax.jit, static_argnums=(1, 2, 3), static_argnames=("stacked", "cache_dtype"))
def init_state(
    text: Flat[TextDecoder], batch: int, capacity: int, num_eos: int, *, stacked: bool, cache_dtype: CacheDtype = "auto"
) -> SlotsState:
    """`batch` free rows of `capacity` cache slots, all done."""
    config, dtype = text.module.config, compute_dtype(text)
    row = place_row(RowState.free(batch, num_eos))
    seen = mesh.reshard(jnp.zeros((batch, config.vocab_size), jnp.bool_), "batch", "vocab")
    hidden = mesh.reshard(jnp.zeros((batch, 1, config.hidden_size), dtype), "batch", None, None)
    cache = init_cache(config, batch, capacity, dtype if cache_dtype == "auto" else cache_dtype, stacked=stacked)
    return SlotsState(cache, seen, hidden, row)


@stored()
@functools.partial(jax.jit, donate_argnames="state")
def prefill(
    text: Flat[TextDecoder],
    state: SlotsState,
    slots: Int[Array, " n"] | None,
    chunk: PrefillChunk,
    seen: Bool[Array, "n V"],
    pool: Float[Array, "P D"],
) -> SlotsState:
    """Run a chunk of tokens through the decoder, after what the cache of their rows holds.

    The caller ensures that `keep[i] + T` slots exist.

    Args:
      text: the decoder.
      state: of all B rows.
      slots: one row of each of the n shards of the batch, counted within its shard; -1 for none of the shard. None:
        the chunk is for all B rows.
      chunk: the tokens.
      seen: all tokens of the prompts.
      pool: merged vision tokens that `chunk.vision_index` refers to.

    Returns:
      The state; after the last chunk of a prompt, its row is ready for `choose_first`.
    """
    decoder, cache = text.module, state.cache
    segment_ids = mesh.reshard(chunk.segment_ids, "batch", "length")
    keep = mesh.reshard(chunk.keep, "batch")
    # Where nothing else copies, a row of thousands of slots would be a quarter of a short chunk's time.
    in_place = slots is not None and can_stay(cache)
    if slots is None:
        old = cache
    elif in_place:
        old = cache._replace(segments=take(cache.segments, slots, 0), length=take(cache.length, slots, 0))
    else:
        old = take_rows(cache, slots)
    kept = mesh.reshard(jnp.arange(cache.capacity)[None], None, None) < keep[:, None]
    rewound = old._replace(segments=jnp.where(kept, old.segments, 0), length=keep)
    embeds = embed_with_vision(decoder, chunk.input_ids, pool, chunk.vision_index)
    rows = slots if in_place else None
    hidden, written, _ = decoder(embeds, chunk.position_ids, segment_ids, rewound, rows=rows)
    assert written is not None
    count = jnp.sum(segment_ids > 0, axis=1).astype(jnp.int32)
    written = written._replace(length=keep + count)
    # A sum of one, in place of a slice, which would need all tokens of a row in one place.
    is_last = jnp.arange(hidden.shape[1]) == jnp.maximum(count - 1, 0)[:, None]
    last = jnp.sum(jnp.where(is_last[..., None], hidden, 0), axis=1, keepdims=True, dtype=hidden.dtype)
    seen = mesh.reshard(seen, "batch", "vocab")
    last = mesh.reshard(last.astype(state.hidden.dtype), "batch", None, None)
    if slots is not None:
        written = put_chunk(cache, slots, written, keep, segment_ids.shape[1], in_place=in_place)
        seen, last = put(state.seen, slots, seen, 0), put(state.hidden, slots, last, 0)
    return state._replace(cache=written, seen=seen, hidden=last)


@stored()
@functools.partial(jax.jit, donate_argnames="state")
def copy_rows(
    state: SlotsState,
    sources: Int[Array, " n"],
    targets: Int[Array, " n"],
    keep: Int[Array, " n"],
    seen: Bool[Array, "n V"],
) -> SlotsState:
    """Give one row of each of the n shards of the batch what another row of its shard holds of a prompt.

    Args:
      state: of all B rows.
      sources, targets: the rows, counted within their shard; -1 for none. A row may be both: it is rewound.
      keep: slots that are kept.
      seen: all tokens of the prompts.

    Returns:
      The state; a row that keeps its source's whole prompt is ready for `choose_first`.
    """
    cache = state.cache
    keep = mesh.reshard(keep, "batch")
    old = take_rows(cache, sources)
    kept = mesh.reshard(jnp.arange(cache.capacity)[None], None, None) < keep[:, None]
    rewound = old._replace(segments=jnp.where(kept, old.segments, 0), length=keep)
    return state._replace(
        cache=put_rows(cache, targets, rewound),
        seen=put(state.seen, targets, mesh.reshard(seen, "batch", "vocab"), 0),
        hidden=put(state.hidden, targets, take(state.hidden, sources, 0), 0),
    )


@stored("variant")
@functools.partial(jax.jit, static_argnames="variant", donate_argnames=("seen", "old"))
def choose_first(
    text: Flat[TextDecoder],
    head: Flat[Linear] | None,
    hidden: Float[Array, "B 1 D"],
    seen: Bool[Array, "B V"],
    old: RowState,
    rows: Bool[Array, " B"],
    row: RowState,
    constraints: Constraints | None = None,
    masks: TokenMasks | None = None,
    *,
    variant: Variant = _PLAIN,
) -> tuple[Bool[Array, "B V"], RowState, Chosen]:
    """Choose the first token of rows whose prompts are in the cache, and start them.

    The cache is no argument, so that caches of all sizes have one program.

    Args:
      text, head: the model.
      hidden, seen, old: `hidden`, `seen` and `row` of the state of all rows, as `prefill` returns it.
      rows: the rows to start; the others stay as they are.
      row: of all B; `token` is ignored, and no token is chosen for a row that is done.
      constraints: of all rows, with the tokens of prompts alone; None if no row has any.
      masks: of all rows; None if none of those to start has a grammar.
      variant: what to return, and how to choose.

    Returns:
      `seen` and `row` of the state, and the tokens, [B].
    """
    rows = mesh.reshard(rows, "batch")

    def chosen_from(new: Array, old: Array) -> Array:
        return jnp.where(rows.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    row = jax.tree.map(chosen_from, place_row(row), old)
    only_these = row._replace(done=row.done | ~rows)
    logits = _logits(text.module, head, hidden)
    masks = placed(masks)
    allowed = None if masks is None else allowed_tokens(masks, only_these.step * 0, logits.shape[1])
    (begun, seen), chosen = choose_from(logits, only_these, seen, constraints, variant, allowed)
    return seen, begun._replace(done=chosen_from(begun.done, row.done)), chosen


@stored("num_steps", "variant")
@functools.partial(jax.jit, static_argnames=("num_steps", "variant"), donate_argnames="state")
def decode(
    text: Flat[TextDecoder],
    head: Flat[Linear] | None,
    state: SlotsState,
    limit: Int[Array, ""],
    idle: Int[Array, ""],
    constraints: Constraints | None = None,
    masks: TokenMasks | None = None,
    *,
    num_steps: int,
    variant: Variant = _PLAIN,
) -> tuple[Decoded, SlotsState, Constraints | None]:
    """Up to min(num_steps, limit) more tokens of every row that is not done; stops early when `idle` rows are done.

    Rows may choose what `masks` allow, and get no more tokens than these say.
    """
    decoder, begun, masks = text.module, state.row.step, placed(masks)

    def waiting(row: RowState) -> RowState:
        """The rows, done where they only wait for the next dispatch."""
        return row if masks is None else row._replace(done=row.done | is_held(masks, row.step - begun, row.token))

    def is_running(carry: _Carry) -> Array:
        i, _, state, _ = carry
        more = (i < jnp.minimum(num_steps, limit)) & (jnp.sum(state.row.done) < idle)
        return more if masks is None else more & ~jnp.all(waiting(state.row).done)

    def step(carry: _Carry) -> _Carry:
        i, out, state, tokens = carry
        cache, row = state.cache, waiting(state.row)
        token = row.token[:, None]
        position = jnp.broadcast_to((cache.length + row.delta)[None, :, None], (3, *token.shape))
        # A row that is done writes into the slot after its last one, over and over, and never attends to it. So does
        # one that is being prefilled: the next chunk begins there.
        segment_ids = jnp.where(row.done, 0, 1)[:, None]
        hidden, written, _ = decoder(decoder.embed_tokens(token), position, segment_ids, cache)
        assert written is not None
        written = written._replace(length=jnp.where(row.done, cache.length, written.length))
        known = constraints
        if known is not None and tokens is not None:
            longer = pushed(tokens, row.token)
            tokens = longer if masks is None else jnp.where(row.done[:, None], tokens, longer)
            known = known._replace(tokens=tokens)
        logits = _logits(decoder, head, hidden)
        allowed = None if masks is None else allowed_tokens(masks, row.step - begun, logits.shape[1])
        (chosen_row, seen), chosen = choose_from(logits, row, state.seen, known, variant, allowed)
        if masks is not None:
            chosen_row = chosen_row._replace(done=jnp.where(row.done, state.row.done, chosen_row.done))
        out = jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 1), out, chosen)
        return i + 1, out, state._replace(cache=written, seen=seen, row=chosen_row), tokens

    out = room(state, num_steps, variant)
    # Of the constraints the loop carries the tokens alone: the rest never changes.
    tokens = None if constraints is None else constraints.tokens
    _, out, state, tokens = jax.lax.while_loop(is_running, step, (jnp.zeros((), jnp.int32), out, state, tokens))
    if constraints is not None:
        constraints = constraints._replace(tokens=tokens)
    # Copies: the state is donated to the next dispatch, perhaps before these have been read.
    return Decoded(out, jnp.copy(state.row.step), jnp.copy(state.row.done)), state, constraints


def room(state: SlotsState, num_steps: int, variant: Variant) -> Chosen:
    """Zeros for what `num_steps` steps choose."""
    zero = (state.row.token * 0)[:, None]
    out = Chosen(zero + jnp.zeros((1, num_steps), jnp.int32))
    if variant.top is not None:
        many = out.tokens[..., None] + jnp.zeros((1, 1, variant.top), jnp.int32)
        floats = out.tokens.astype(jnp.float32), many.astype(jnp.float32)
        out = out._replace(logprobs=floats[0], top_tokens=many, top_logprobs=floats[1])
    if variant.scores or variant.logits:
        whole = (state.seen * 0.0)[:, None] + jnp.zeros((1, num_steps, 1))  # sharded like the logits
        out = out._replace(scores=whole if variant.scores else None, logits=whole if variant.logits else None)
    return out


@stored()
@functools.partial(jax.jit, donate_argnames="state")
def stop(state: SlotsState, rows: Bool[Array, " B"]) -> SlotsState:
    """End these rows."""
    done = state.row.done | mesh.reshard(rows, "batch")
    return state._replace(row=state.row._replace(done=done))


@functools.partial(jax.jit, static_argnames="num_eos")
def grow_eos(eos: Int[Array, "B E"], num_eos: int) -> Int[Array, "B num_eos"]:
    """Room for more end tokens."""
    return jnp.pad(eos, ((0, 0), (0, num_eos - eos.shape[1])), constant_values=-1)


@stored()
@functools.partial(jax.jit, donate_argnames="pool")
def store_features(
    pool: Float[Array, "P D"], features: Float[Array, "M U D"], starts: Int[Array, " M"], count: Int[Array, ""]
) -> Float[Array, "P D"]:
    """Write the merged tokens of the first `count` images or videos of a wave into the pool, which is donated.

    What `encode_media.run_wave` returns has entries after the last token of each; they are written too, and overwritten
    by the next. The caller ensures that there is room from `starts` on.
    """

    def write(i: Array, pool: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(pool, features[i].astype(pool.dtype), starts[i], axis=0)

    return jax.lax.fori_loop(0, count, write, pool)


def _logits(decoder: TextDecoder, head: Flat[Linear] | None, hidden: Float[Array, "B 1 D"]) -> Num[Array, "B V"]:
    """Of the next token of each row, from its last hidden state."""
    logits = score(decoder, None if head is None else head.module, hidden)
    return mesh.reshard(logits[:, 0], "batch", "vocab")


def choose_from(
    logits: Num[Array, "B V"],
    row: RowState,
    seen: Bool[Array, "B V"],
    constraints: Constraints | None,
    variant: Variant,
    allowed: Bool[Array, "B V"] | None = None,
) -> tuple[tuple[RowState, Bool[Array, "B V"]], Chosen]:
    """Choose the next token of each row from its logits, one that is `allowed`; rows that are done keep theirs."""
    # Greedy for a row that is done: sampling would cost time for nothing.
    params = row.params._replace(do_sample=row.params.do_sample & ~row.done)

    constrained = None if constraints is None else constrain(logits, row, seen, constraints, variant)

    def scores() -> Array:
        scores = penalised(logits, params, seen) if constrained is None else constrained
        return scores if allowed is None else restricted(scores, allowed, logits)

    tokens = choose(scores, params, step_keys(row_keys(row.seed, row.number), row.step))
    tokens = jnp.where(row.done, row.token, tokens)
    step = jnp.where(row.done, row.step, row.step + 1)
    done = row.done | jnp.any(tokens[:, None] == row.eos, axis=1) | (step >= row.limit)
    chosen = Chosen(tokens)
    if variant.top is not None:
        of_tokens = warped(scores(), row.params) if variant.of_draws else logits.astype(jnp.float32)
        logprobs = jax.nn.log_softmax(of_tokens, axis=-1)
        # A comparison instead of a gather, which would need an explicit output sharding.
        of_token = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == tokens[:, None], logprobs, 0.0), axis=-1)
        if variant.top:
            best, ids = (jnp.flip(x, axis=-1) for x in largest(logprobs, variant.top))
        else:  # from arrays of rows, as zeros would not be sharded like them
            best, ids = of_token[:, None][:, :0], tokens[:, None][:, :0]
        chosen = chosen._replace(logprobs=of_token, top_tokens=ids, top_logprobs=best)
    if variant.scores:
        chosen = chosen._replace(scores=warped(scores(), params))
    if variant.logits:
        chosen = chosen._replace(logits=logits.astype(jnp.float32))
    return (row._replace(token=tokens, done=done, step=step), mark_seen(seen, tokens)), chosen


def constrain(
    scores: Num[Array, "B V"], row: RowState, seen: Bool[Array, "B V"], constraints: Constraints, variant: Variant
) -> Float[Array, "B V"]:
    """Apply the repetition penalty, constraints and the user's functions, in the reference's order."""
    scores = penalised(biased(scores.astype(jnp.float32), constraints), row.params, seen)
    scores = banned(scores, constraints, row.step, row.eos)
    return processed(scores, constraints.tokens, variant.processors)


def place_row(row: RowState) -> RowState:
    """Shard the rows' state over the batch."""
    return jax.tree.map(lambda x: mesh.reshard(jnp.asarray(x), "batch", *(None,) * (jnp.ndim(x) - 1)), row)
