"""Log probabilities of generated tokens: arrays, of which a token's become an object where somebody asks for them."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np


class TokenLogprob(NamedTuple):
    """Log probability of a token, by default under the model, before repetition penalty, temperature and cuts.

    `GenerationConfig.logprobs_of` says under which distribution.

    logprob: None for a token that the engine inserted (the end of a thought whose budget is used up).
    top: the most likely tokens with their log probabilities, best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLogprobs(Sequence[TokenLogprob]):
    """Log probabilities of n tokens, a sequence of `TokenLogprob`; rollouts of reinforcement learning have millions.

    >>> found = TokenLogprobs.of([TokenLogprob(5, -0.5, ()), TokenLogprob(7, None, ())])
    >>> found.values.tolist(), found.is_sampled.tolist(), found[0]
    ([-0.5, nan], [True, False], TokenLogprob(token=5, logprob=-0.5, top=()))

    Attributes:
      tokens: int32 [n].
      values: float32 [n], NaN for tokens that the engine inserted.
      is_sampled: bool [n], False for those.
      top_tokens: int32 [n, k], the most likely tokens, best first.
      top_values: float32 [n, k], their log probabilities.
    """

    tokens: np.ndarray
    values: np.ndarray
    is_sampled: np.ndarray
    top_tokens: np.ndarray
    top_values: np.ndarray

    @classmethod
    def sampled(cls, tokens: np.ndarray, values: np.ndarray, top_tokens: np.ndarray, top_values: np.ndarray) -> Self:
        """Log probabilities of tokens that were all sampled."""
        return cls(tokens, values, np.ones(len(tokens), np.bool_), top_tokens, top_values)

    @classmethod
    def inserted(cls, tokens: Sequence[int]) -> Self:
        """Those of tokens that were not sampled, without top ones."""
        n = len(tokens)
        return cls(
            np.asarray(tokens, np.int32), np.full(n, np.nan, np.float32), np.zeros(n, np.bool_),
            np.zeros((n, 0), np.int32), np.zeros((n, 0), np.float32),
        )  # fmt: skip

    @classmethod
    def of(cls, entries: Sequence[TokenLogprob]) -> Self:
        """The arrays of some tokens, all with as many top ones."""
        tops = [entry.top for entry in entries]
        shape = len(tops), len(tops[0]) if tops else 0
        return cls(
            np.array([entry.token for entry in entries], np.int32),
            np.array([np.nan if entry.logprob is None else entry.logprob for entry in entries], np.float32),
            np.array([entry.logprob is not None for entry in entries], np.bool_),
            np.array([[token for token, _ in top] for top in tops], np.int32).reshape(shape),
            np.array([[value for _, value in top] for top in tops], np.float32).reshape(shape),
        )

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """Those of one part after the other; where a part has fewer top tokens, there is room for as many."""
        parts = list(parts) or [cls.inserted(())]
        if len(parts) == 1:
            return parts[0]
        top = max(part.top_tokens.shape[1] for part in parts)

        def wide(array: np.ndarray) -> np.ndarray:
            return array if array.ndim == 1 else np.pad(array, ((0, 0), (0, top - array.shape[1])))

        columns = zip(*map(_arrays, parts), strict=True)
        return cls(*(np.concatenate([wide(array) for array in column]) for column in columns))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(*(array[index] for array in _arrays(self)))
        token = int(self.tokens[index])
        if not self.is_sampled[index]:
            return TokenLogprob(token, None, ())
        top = zip(self.top_tokens[index].tolist(), self.top_values[index].tolist(), strict=True)
        return TokenLogprob(token, float(self.values[index]), tuple(top))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


def _arrays(entries: TokenLogprobs) -> tuple[np.ndarray, ...]:
    return entries.tokens, entries.values, entries.is_sampled, entries.top_tokens, entries.top_values
