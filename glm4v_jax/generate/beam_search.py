"""Beam search: the likeliest M continuations of each prompt, as `_beam_search` of transformers finds them.

Beams are rows of the batch. After every decode step the rows that are kept, with their caches, are gathered from those
that they continue. `search` is the host's side; the rest are programs of the device.

B: prompts, M: beams of each, R = B * M: rows, L: new tokens at most, C: candidates, V: vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.devices import mesh
from glm4v_jax.devices.distributed import to_host
from glm4v_jax.generate.cache_rows import map_cache
from glm4v_jax.generate.constraints import Constraints, pushed
from glm4v_jax.generate.device_steps import Chosen, RowState, SlotsState, Variant, constrain, place_row, room
from glm4v_jax.generate.prefill_chunks import Start
from glm4v_jax.generate.sampling import largest, mark_seen, penalised
from glm4v_jax.generate.slots import MAX_STEPS, SCORED_STEPS, Slots
from glm4v_jax.inputs.vision_rows import bucket
from glm4v_jax.model.decoder import TextDecoder
from glm4v_jax.model.glm4v import score
from glm4v_jax.model.nn import Linear
from glm4v_jax.model.runtime import Flat

# Of beams that do not exist, and added to those that must not be chosen.
_NEVER = -1e9
_MIN_TOKENS = 32


class Beams(NamedTuple):
    """Beams of each prompt, best first.

    Attributes:
      tokens: after the prompt; of beams that are not as long, the padding token.
      parents: the beam of the step before that each token continues; -1 where there is no token.
      scores: sums of log probabilities; of finished beams, divided by length ** length_penalty.
    """

    tokens: Int[Array, "B M L"]
    parents: Int[Array, "B M L"]
    scores: Float[Array, "B M"]


class SearchOptions(NamedTuple):
    """What a search depends on and its program does not.

    Attributes:
      limit: the most new tokens.
      eos: tokens that end a beam.
      length_penalty: exponent of the length.
      early_stopping: 0 for False, 1 for True, 2 for "never".
    """

    limit: Int[Array, ""]
    eos: Int[Array, " E"]
    length_penalty: Float[Array, ""]
    early_stopping: Int[Array, ""]


class SearchState(NamedTuple):
    """State of a search, donated from dispatch to dispatch."""

    slots: SlotsState
    """of R rows, M after each other for each prompt"""
    constraints: Constraints | None
    """of R rows"""
    running: Beams
    finished: Beams
    is_finished: Bool[Array, "B M"]
    is_open: Bool[Array, " B"]
    """whether better beams may still come"""
    step: Int[Array, ""]
    """new tokens so far"""
    is_over: Bool[Array, ""]


def search(slots: Slots, starts: Mapping[int, Start], config: GenerationConfig) -> tuple[Beams, list[Chosen]]:
    """Search from prompts, by row from 0 on; no other rows of the slots are used, which cannot be used again.

    Returns the best beams, and what their rows were chosen from, [R, n, ...] of each dispatch; in NumPy.
    """
    limit = max(start.limit for start in starts.values())
    options = SearchOptions(
        np.int32(limit), np.array(config.eos_token_id, np.int32), np.float32(config.length_penalty),
        np.int32(2 if config.early_stopping == "never" else config.early_stopping),
    )  # fmt: skip
    text, head, variant = slots.runtime.text, slots.runtime.head, slots.variant
    most = SCORED_STEPS if variant.scores or variant.logits else MAX_STEPS
    # The reference takes a padding token 0 for none.
    padding = np.int32(config.pad_token_id or (*config.eos_token_id, 0)[0])
    begun = slots.prefill(starts)
    with slots.runtime.on_mesh():
        length = bucket(limit, _MIN_TOKENS)
        state, first = _begin(
            text, head, *begun, options, padding, num_beams=config.num_beams, length=length, variant=variant
        )
        del begun
        made, is_over, blocks = to_host((state.step, state.is_over, [first]))
        while not is_over:
            state, found = _continue(text, head, state, options, num_steps=most, variant=variant)
            step, is_over, chosen = to_host(found)
            blocks.append(jax.tree.map(lambda x, count=step - made: x[:, :count], chosen))
            made = step
    return to_host(state.finished), blocks


@functools.partial(jax.jit, static_argnames=("num_beams", "length", "variant"))
def _begin(
    text: Flat[TextDecoder],
    head: Flat[Linear] | None,
    state: SlotsState,
    row: RowState,
    constraints: Constraints | None,
    options: SearchOptions,
    padding: Int[Array, ""],
    *,
    num_beams: int,
    length: int,
    variant: Variant,
) -> tuple[SearchState, Chosen]:
    """Make M rows of each whose prompt is in the cache, and choose their first tokens; `row` is of all B."""
    slots = _map_rows(lambda x, axis: _repeat(x, num_beams, axis), state._replace(row=place_row(row)))
    shape = (len(row.done), num_beams)
    empty = mesh.reshard(jnp.zeros((*shape, length), jnp.int32), "batch", None, None)
    none = Beams(empty + padding, empty - 1, mesh.reshard(jnp.full(shape, _NEVER), "batch", None))
    # A prompt's rows are equal as yet: the first alone counts.
    running = none._replace(scores=jnp.where(jnp.arange(num_beams)[None] == 0, 0.0, none.scores))
    is_used = ~mesh.reshard(row.done, "batch")
    is_finished = ~is_used[:, None] & (none.scores < 0)
    step, is_over = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.bool_)
    constraints = jax.tree.map(lambda x: _repeat(x, num_beams, 0), constraints)
    begun = SearchState(slots, constraints, running, none, is_finished, is_used, step, is_over)
    begun, chosen = _extended(text.module, head, begun, options, variant)
    return begun, jax.tree.map(lambda x: x[:, None], chosen)


@functools.partial(jax.jit, static_argnames=("num_steps", "variant"), donate_argnames="state")
def _continue(
    text: Flat[TextDecoder],
    head: Flat[Linear] | None,
    state: SearchState,
    options: SearchOptions,
    *,
    num_steps: int,
    variant: Variant,
) -> tuple[SearchState, tuple[Int[Array, ""], Bool[Array, ""], Chosen]]:
    """Up to `num_steps` more tokens; also returns how many there are, whether the search is over, and the `Chosen`."""
    decoder, begun = text.module, state.step

    def is_running(carry: tuple[SearchState, Chosen]) -> Array:
        state, _ = carry
        return ~state.is_over & (state.step - begun < num_steps)

    def step(carry: tuple[SearchState, Chosen]) -> tuple[SearchState, Chosen]:
        state, out = carry
        cache, row = state.slots.cache, state.slots.row
        token = row.token[:, None]
        position = jnp.broadcast_to((cache.length + row.delta)[None, :, None], (3, *token.shape))
        hidden, written, _ = decoder(decoder.embed_tokens(token), position, jnp.ones_like(token), cache)
        assert written is not None
        hidden = mesh.reshard(hidden, "batch", None, None)
        state = state._replace(slots=state.slots._replace(cache=written, hidden=hidden))
        if (known := state.constraints) is not None:
            state = state._replace(constraints=known._replace(tokens=pushed(known.tokens, row.token)))
        i = state.step - begun
        state, chosen = _extended(decoder, head, state, options, variant)
        return state, jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 1), out, chosen)

    state, out = jax.lax.while_loop(is_running, step, (state, room(state.slots, num_steps, variant)))
    # Copies: the state is donated to the next dispatch.
    return state, (jnp.copy(state.step), jnp.copy(state.is_over), out)


def _extended(
    decoder: TextDecoder,
    head: Flat[Linear] | None,
    state: SearchState,
    options: SearchOptions,
    variant: Variant,
) -> tuple[SearchState, Chosen]:
    """One more token of each beam, chosen from the last hidden states, and what it was chosen from."""
    slots, num_beams = state.slots, state.running.tokens.shape[1]
    logits = score(decoder, None if head is None else head.module, slots.hidden)
    logits = mesh.reshard(logits[:, 0], "batch", "vocab")
    # What the reference applies to logits elsewhere, it applies to log probabilities here.
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    constraints = state.constraints
    if constraints is None:
        logprobs = penalised(logprobs, slots.row.params, slots.seen)
    else:
        logprobs = constrain(logprobs, slots.row, slots.seen, constraints, variant)
    # As many as it takes for M of them not to be end tokens.
    count = num_beams * max(2, 1 + len(options.eos))
    best, ids = largest(logprobs, min(count, logprobs.shape[-1]))

    scored = logprobs if variant.scores else None
    chosen = Chosen(slots.row.token, scores=scored, logits=logits.astype(jnp.float32) if variant.logits else None)
    rows, same = mesh.spec("batch"), mesh.spec()
    select = jax.shard_map(
        functools.partial(_select, count=count), in_specs=(rows, rows, rows, same, same), out_specs=rows,
        check_vma=False,
    )  # fmt: skip
    beams = (state.running, state.finished, state.is_finished, state.is_open)
    (running, finished, is_finished, is_open), parents, token, is_stuck = select(best, ids, beams, state.step, options)
    slots = _map_rows(lambda x, axis: _gather(x, parents, axis), slots)
    row = slots.row._replace(token=token, step=slots.row.step + 1)
    slots = slots._replace(row=row, seen=mark_seen(slots.seen, token))
    if constraints is not None:
        constraints = constraints._replace(tokens=_gather(constraints.tokens, parents, 0))
    is_over = ((options.early_stopping == 1) & jnp.all(is_finished)) | jnp.all(is_stuck)
    state = SearchState(slots, constraints, running, finished, is_finished, is_open, state.step + 1, is_over)
    return state, chosen


def _select(
    best: Float[Array, "R C"], ids: Int[Array, "R C"], beams: tuple, step: Array, options: SearchOptions, *, count: int
) -> tuple[tuple, Int[Array, "B M"], Int[Array, " R"], Bool[Array, " B"]]:
    """Choose the beams that continue and those that are finished, from the best next tokens of each beam; of one shard.

    Returns:
      What `beams` are now; which beams the running ones continue; their new tokens; whether no beam can continue.
    """
    running, finished, is_finished, is_open = beams
    batch, num_beams, _ = running.tokens.shape
    sums = best.reshape(batch, num_beams, -1) + running.scores[..., None]
    sums, chosen = jax.lax.top_k(sums.reshape(batch, -1), count)
    parents = chosen // best.shape[-1]
    tokens = jnp.take_along_axis(ids.reshape(batch, -1), chosen, axis=1)
    ends = jnp.any(tokens[..., None] == options.eos, axis=-1) | (step + 1 >= options.limit)

    def extended(of: Int[Array, "B M"]) -> tuple[Array, Array]:
        """Tokens and parents of the running beams, with the candidates of these numbers at their ends."""
        here = jnp.arange(running.tokens.shape[-1]) == step
        new, old = (jnp.take_along_axis(x, of, axis=1) for x in (tokens, parents))
        longer = jnp.take_along_axis(running.tokens, old[..., None], axis=1)
        before = jnp.take_along_axis(running.parents, old[..., None], axis=1)
        return jnp.where(here, new[..., None], longer), jnp.where(here, old[..., None], before)

    # Running: the best candidates that are not finished.
    sums_on, of = jax.lax.top_k(jnp.where(ends, sums + _NEVER, sums), num_beams)
    running_on = Beams(*extended(of), sums_on)
    parent, token = (jnp.take_along_axis(x, of, axis=1) for x in (parents, tokens))

    # Finished: of the best M candidates those that end, beside those that did before.
    lengths = jnp.where((options.early_stopping == 2) & (options.length_penalty > 0), options.limit, step + 1)
    scores = sums[:, :num_beams] / ((step + 1).astype(jnp.float32) ** options.length_penalty)
    is_full = (options.early_stopping == 1) & jnp.all(is_finished, axis=1)
    may_finish = ends[:, :num_beams] & (is_open & ~is_full)[:, None]
    first = jnp.broadcast_to(jnp.arange(num_beams), (batch, num_beams))
    fresh = Beams(*extended(first), jnp.where(may_finish, scores, scores + _NEVER))
    pairs = (finished, is_finished), (fresh, may_finish)
    both = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *pairs)
    _, of = jax.lax.top_k(both[0].scores, num_beams)
    finished, is_finished = jax.tree.map(lambda x: jax.vmap(lambda row, of: row[of])(x, of), both)

    # Whether a running beam may still become better than the finished: a guess of the reference's, but for "never".
    hoped = running_on.scores[:, :1] / (lengths.astype(jnp.float32) ** options.length_penalty)
    to_beat = jnp.where(is_finished, jnp.min(finished.scores, axis=1, keepdims=True), _NEVER)
    is_open &= jnp.any(hoped > to_beat, axis=1)
    is_stuck = jnp.all(ends, axis=1) | ~is_open
    return (running_on, finished, is_finished, is_open), parent, token.reshape(-1), is_stuck


def _map_rows(function: Callable[[Array, int], Array], slots: SlotsState) -> SlotsState:
    """Map (array, axis of the rows) -> array over everything that rows have."""
    cache = map_cache(function, slots.cache)
    rest = jax.tree.map(lambda x: function(x, 0), slots._replace(cache=None))  # type: ignore[arg-type]
    return rest._replace(cache=cache)


def _repeat(x: Array, count: int, axis: int) -> Array:
    """[..., B, ...] -> [..., B * count, ...]; every device its own rows."""
    spec = mesh.spec_of(x)
    run = jax.shard_map(lambda x: jnp.repeat(x, count, axis=axis), in_specs=(spec,), out_specs=spec, check_vma=False)
    return run(x)


def _gather(x: Array, parents: Int[Array, "B M"], axis: int) -> Array:
    """Row `parents[b, m]` of those of prompt b, for each b and m: [..., R, ...] -> [..., R, ...]."""

    def local(x: Array, parents: Array) -> Array:
        batch, num_beams = parents.shape
        rows = (parents + jnp.arange(batch)[:, None] * num_beams).reshape(-1)
        return jnp.take(x, rows, axis=axis, mode="clip")

    # The beams of a prompt are on one device: nothing is sent.
    spec = mesh.spec_of(x)
    run = jax.shard_map(local, in_specs=(spec, mesh.spec("batch")), out_specs=spec, check_vma=False)
    return run(x, parents)
