"""Which tokens a row may choose next, as arrays of the device: what grammars (`grammar.py`) ask of decode steps.

A row with a grammar takes the tokens that the grammar forces and one of its choice, and then waits for the next
dispatch, while other rows continue.

B: rows, V: vocabulary, W: words of 32 bits, F: forced tokens, P: tokens of a pause.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from glm4v_jax.devices import mesh

_FORCED = 16
_PAUSES = 2
_ANY = int(np.iinfo(np.int32).max)
_STEPS = 4


class Turn(NamedTuple):
    """What a row may do in one dispatch; by default whatever it likes.

    Attributes:
      allowed: bits of the tokens that may come after the forced ones, uint32 [W]; None for any token.
      forced: tokens that come first.
      most: how many tokens may come, the forced ones included.
      pause: tokens after which no more come.
    """

    allowed: np.ndarray | None = None
    forced: tuple[int, ...] = ()
    most: int = _ANY
    pause: tuple[int, ...] = ()

    @classmethod
    def of(cls, allowed: np.ndarray | None, forced: tuple[int, ...]) -> "Turn":
        """The forced tokens, as many as a dispatch takes, and after the last of them one that is allowed, if any is."""
        if len(forced) > _FORCED or allowed is None:
            return cls(allowed, forced[:_FORCED], len(forced[:_FORCED]))
        return cls(allowed, forced, len(forced) + 1)


HELD = Turn(most=0)
"""Nothing: what the row has chosen is not known yet."""


def steps_beside(turns: Iterable[Turn], rows: int) -> int:
    """Decode steps of a dispatch of `rows` rows: the more of them wait for its end, the fewer.

    >>> steps_beside([Turn.of(np.zeros(1, np.uint32), ())], 8), steps_beside([HELD] * 8, 8), steps_beside([], 8) > 99
    (3, 1, True)
    """
    waiting = [turn.most for turn in turns if turn.most != _ANY]
    return max(*waiting, _STEPS * (rows - len(waiting)) // rows, 1) if waiting else _ANY


class TokenMasks(NamedTuple):
    """The turns of all rows; a row without one may do whatever it likes."""

    allowed: UInt32[Array, "B W"]
    forced: Int[Array, "B F"]
    most: Int[Array, " B"]
    pause: Int[Array, "B P"]


def masks_of(turns: Mapping[int, Turn], batch: int, vocab: int) -> TokenMasks | None:
    """Host arrays of `batch` rows: row -> its turn; None if there is no turn, so that the ordinary programs run."""
    if not turns:
        return None
    made = TokenMasks(
        allowed=np.full((batch, -(-vocab // 32)), 0xFFFFFFFF, np.uint32),
        forced=np.full((batch, _FORCED), -1, np.int32),
        most=np.full(batch, _ANY, np.int32),
        pause=np.full((batch, _PAUSES), -1, np.int32),
    )
    width = made.allowed.shape[1]
    for row, turn in turns.items():
        if turn.allowed is not None:
            made.allowed[row] = 0  # rows of logits that are no token of the tokenizer are never allowed
            made.allowed[row, : len(turn.allowed)] = turn.allowed[:width]
        made.forced[row, : len(turn.forced)] = turn.forced
        made.most[row] = turn.most
        made.pause[row, : len(turn.pause)] = turn.pause
    return made


def placed(masks: TokenMasks | None) -> TokenMasks | None:
    """Shard over the batch."""
    if masks is None:
        return None
    return TokenMasks(*(mesh.reshard(jnp.asarray(x), "batch", *(None,) * (jnp.ndim(x) - 1)) for x in masks))


def is_held(masks: TokenMasks, taken: Int[Array, " B"], newest: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Whether rows wait for the next dispatch, after `taken` tokens of this one."""
    return (taken >= masks.most) | jnp.any(newest[:, None] == masks.pause, axis=1)


def allowed_tokens(masks: TokenMasks, taken: Int[Array, " B"], vocab: int) -> Bool[Array, "B V"]:
    """The tokens that rows may choose after `taken` tokens of this dispatch."""
    words = masks.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]
    allowed = ((words & 1) > 0).reshape(words.shape[0], -1)[:, :vocab]
    at = jnp.arange(_FORCED)[None] == taken[:, None]
    forced = jnp.max(jnp.where(at, masks.forced, -1), axis=1)[:, None]
    return mesh.reshard(jnp.where(forced >= 0, jnp.arange(vocab)[None] == forced, allowed), "batch", "vocab")


def restricted(
    scores: Float[Array, "B V"], allowed: Bool[Array, "B V"], logits: Num[Array, "B V"]
) -> Float[Array, "B V"]:
    """Set what is not allowed to -inf; where bans leave nothing else, they give way."""
    kept = jnp.where(allowed, scores, -jnp.inf)
    nothing = jnp.all(jnp.isneginf(kept), axis=1, keepdims=True)
    return jnp.where(nothing & allowed, logits.astype(jnp.float32), kept)
