"""Prompt lookup: what an answer copies from its prompt, or from itself, comes several tokens to a decode step.

Where the newest tokens have occurred before, what followed them there is the draft of what follows now. One run of the
decoder scores a draft, and as many of its tokens are kept as decoding one by one would choose, with the keys that it
would use: a draft changes when tokens come, and not which. Everything is data of a loop on the device.

B: rows, S: cache slots of a row, V: vocabulary, K: tokens of a draft, W: columns for the tokens of a dispatch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from glm4v_jax.devices import mesh
from glm4v_jax.generate.constraints import Constraints, pushed
from glm4v_jax.generate.device_steps import Chosen, Decoded, SlotsState, Variant, choose_from, room
from glm4v_jax.model.decoder import TextDecoder
from glm4v_jax.model.glm4v import score
from glm4v_jax.model.nn import Linear, gather_tokens
from glm4v_jax.model.runtime import Flat

# How many of the newest tokens must have occurred before, or too many drafts would be wrong; and how many are compared
# to choose among places.
_LEAST, _MOST = 2, 8


class _Loop(NamedTuple):
    """What the loop carries."""

    out: Chosen
    steps: Int[Array, ""]
    """runs of the decoder so far"""
    state: SlotsState
    known: Int[Array, "B S"] | None
    """`Constraints.tokens`, which begin with nothing where `history` begins with the prompt"""
    history: Int[Array, "B S"]
    draft: Int[Array, "B K"]
    found: Bool[Array, " B"]
    """rows with a draft; none of those that are done"""


@jax.jit
def remember(
    history: Int[Array, "B S"] | None, rows: Bool[Array, " B"], tokens: Int[Array, "B S"]
) -> Int[Array, "B S"]:
    """Set the tokens of the prompts of these rows; `history` may be None or have fewer columns."""
    tokens = mesh.reshard(tokens, "batch", None)
    if history is None:
        return tokens
    history = jnp.pad(history, ((0, 0), (0, tokens.shape[1] - history.shape[1])))
    return jnp.where(mesh.reshard(rows, "batch")[:, None], tokens, history)


@functools.partial(jax.jit, static_argnames=("num_steps", "variant"), donate_argnames=("state", "history"))
def decode(
    text: Flat[TextDecoder],
    head: Flat[Linear] | None,
    state: SlotsState,
    limit: Int[Array, ""],
    idle: Int[Array, ""],
    constraints: Constraints | None,
    history: Int[Array, "B S"],
    *,
    num_steps: int,
    variant: Variant,
) -> tuple[Decoded, SlotsState, Constraints | None, Int[Array, "B S"]]:
    """Decode as `device_steps.decode` does, until a row has got min(num_steps, limit) tokens or a few more.

    The caller ensures that every row has K = `variant.draft` slots more than its tokens need: drafts are written there.

    Args:
      text, head, state, limit, idle, constraints, num_steps, variant: see `device_steps.decode`.
      history: the tokens of each row; those after its prompt are filled in here.

    Returns:
      The tokens, [B, num_steps + K]; the state, the constraints, the history.
    """
    begun, num_draft = state.row.step, variant.draft
    assert num_draft is not None

    def is_running(loop: _Loop) -> Array:
        row = loop.state.row
        return (jnp.max(row.step - begun) < jnp.minimum(num_steps, limit)) & (jnp.sum(row.done) < idle)

    def step(loop: _Loop, count: int) -> _Loop:
        loop = _verify(text.module, head, loop, loop.draft[:, :count], begun, constraints, variant)
        return loop._replace(steps=loop.steps + 1)._replace(**_look_up(loop.state, loop.history, num_draft))

    def several(loop: _Loop) -> _Loop:
        # Single steps where no row has a draft: scoring a draft in vain takes longer where arithmetic is not free.
        loop = jax.lax.while_loop(lambda x: is_running(x) & ~jnp.any(x.found), lambda x: step(x, 0), loop)
        return jax.lax.while_loop(lambda x: is_running(x) & jnp.any(x.found), lambda x: step(x, num_draft), loop)

    # The newest token is not known to the host when it sends the prompt.
    history = _put(history, state.cache.length, state.row.token, ~state.row.done)
    out = room(state, num_steps + num_draft, variant)
    known = None if constraints is None else constraints.tokens
    drafts = _look_up(state, history, num_draft)
    loop = _Loop(out, jnp.zeros((), jnp.int32), state, known, history, drafts["draft"], drafts["found"])
    out, steps, state, known, history, *_ = jax.lax.while_loop(is_running, several, loop)
    if constraints is not None:
        constraints = constraints._replace(tokens=known)
    # Copies, as in `device_steps.decode`.
    return Decoded(out, jnp.copy(state.row.step), jnp.copy(state.row.done), steps), state, constraints, history


def _verify(
    decoder: TextDecoder,
    head: Flat[Linear] | None,
    loop: _Loop,
    draft: Int[Array, "B K"],
    begun: Int[Array, " B"],
    constraints: Constraints | None,
    variant: Variant,
) -> _Loop:
    """Run the decoder on the newest token and the draft of each row, and choose tokens as long as the draft has them.

    Keys of tokens that were not chosen stay after the row's last slot, where nobody sees them and the next are written.
    """
    cache, before = loop.state.cache, loop.state.row
    tokens = jnp.concatenate([before.token[:, None], draft], axis=1)
    count = tokens.shape[1]
    positions = (cache.length + before.delta)[:, None] + jnp.arange(count)[None]
    segment_ids = jnp.broadcast_to(jnp.where(before.done, 0, 1)[:, None], tokens.shape)
    hidden, written, _ = decoder(
        decoder.embed_tokens(tokens), jnp.broadcast_to(positions[None], (3, *tokens.shape)), segment_ids, cache
    )
    assert written is not None
    logits = score(decoder, None if head is None else head.module, gather_tokens(hidden))
    logits = mesh.reshard(logits, "batch", None, "vocab")
    # What comes after the last token of a draft agrees with nothing.
    expected = jnp.pad(draft, ((0, 0), (0, 1)), constant_values=-1)

    def more(carry: tuple) -> Array:
        i, agrees, *_ = carry
        return (i < count) & jnp.any(agrees)

    def take(carry: tuple) -> tuple:
        i, agrees, out, row, seen, known, history = carry
        limits = constraints
        if limits is not None:
            known = jnp.where(agrees[:, None], pushed(known, row.token), known)
            limits = limits._replace(tokens=known)
        halted = row._replace(done=~agrees)
        (chosen_row, seen), chosen = choose_from(_column(logits, i), halted, seen, limits, variant)
        here = (jnp.arange(out.tokens.shape[1])[None] == (row.step - begun)[:, None]) & agrees[:, None]
        out = jax.tree.map(lambda x, new: jnp.where(_like(here, x), new[:, None], x), out, chosen)
        history = _put(history, cache.length + i + 1, chosen_row.token, agrees)
        row = chosen_row._replace(done=jnp.where(agrees, chosen_row.done, row.done))
        agrees &= ~row.done & (row.token == _column(expected, i))
        return i + 1, agrees, out, row, seen, known, history

    carry = (jnp.zeros((), jnp.int32), ~before.done, loop.out, before, loop.state.seen, loop.known, loop.history)
    _, _, out, row, seen, known, history = jax.lax.while_loop(more, take, carry)
    written = written._replace(length=cache.length + row.step - before.step)
    state = loop.state._replace(cache=written, seen=seen, row=row)
    return loop._replace(out=out, state=state, known=known, history=history)


def _look_up(state: SlotsState, history: Int[Array, "B S"], count: int) -> dict[str, Array]:
    """`draft` of each row, and whether one was `found`.

    Of the places where the newest tokens occurred before, it is taken from that with most of them, and of equal ones
    from the last. A draft that reaches the end continues from its beginning, as text that repeats itself does.
    """

    def of_row(tokens: Int[Array, " S"], length: Int[Array, ""]) -> tuple[Array, Array]:
        at = jnp.arange(len(tokens))
        equal, common = jnp.ones(len(tokens), jnp.bool_), jnp.zeros(len(tokens), jnp.int32)
        for back in range(_MOST):
            newest = tokens[jnp.maximum(length - 1 - back, 0)]
            equal &= (jnp.roll(tokens, back) == newest) & (at >= back)
            common += equal
        common = jnp.where(at < length - 1, common, 0)
        longest = jnp.max(common)
        last = jnp.max(jnp.where(common == longest, at, 0))
        period = jnp.maximum(length - 1 - last, 1)
        return tokens[last + 1 + jnp.arange(count) % period], longest >= _LEAST

    rows = mesh.spec("batch")
    run = jax.shard_map(jax.vmap(of_row), in_specs=(rows, rows), out_specs=(rows, rows), check_vma=False)
    draft, found = run(history, state.cache.length + 1)
    return {"draft": draft, "found": found & ~state.row.done}


def _put(
    history: Int[Array, "B S"], at: Int[Array, " B"], tokens: Int[Array, " B"], rows: Bool[Array, " B"]
) -> Int[Array, "B S"]:
    """Write a token of each of these rows."""
    return jnp.where((jnp.arange(history.shape[1])[None] == at[:, None]) & rows[:, None], tokens[:, None], history)


def _column(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)


def _like(mask: Bool[Array, "B W"], x: Array) -> Array:
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))
