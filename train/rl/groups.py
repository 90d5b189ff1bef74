"""Sampled answers to one prompt, their rewards, and what the rewards say about each: its advantage. Knows no JAX."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, Self

import numpy as np

from glm4v_jax.config.checks import fault
from glm4v_jax.errors import DataError
from glm4v_jax.generate.completion import Completion, FinishReason
from glm4v_jax.inputs.prompt import Prompt

AdvantageName = Literal["mean_std", "mean"]

MIN_STD = 1e-4
"""Rewards of a smaller standard deviation say nothing: of a reward such as an IoU no two are equal to the last bit."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """An answer as it was sampled: tokens stay tokens, for a text may be encoded to others.

    >>> Rollout.of(Completion(0, "", (), 3, "length", logprobs=())).num_sampled
    0

    Attributes:
      tokens: int32 [n], the token that ends it included.
      logprobs: float32 [n], of the distribution that each was drawn from; where none was, anything.
      is_sampled: bool [n], False for tokens that the engine inserted: they are context, and not learned.
      finish: why it ended.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    is_sampled: np.ndarray
    finish: FinishReason

    @classmethod
    def of(cls, completion: Completion) -> Self:
        """Take a completion that was asked for with `logprobs=0, logprobs_of="sampling"`; else a GenerationError."""
        tokens = np.asarray(completion.tokens, np.int32)
        return cls(tokens, completion.logprob_array, completion.is_sampled, completion.finish_reason)

    def masked(self) -> Self:
        """Return the same answer with nothing to learn from."""
        return dataclasses.replace(self, is_sampled=np.zeros_like(self.is_sampled))

    @property
    def num_sampled(self) -> int:
        """How many tokens are learned from."""
        return int(np.count_nonzero(self.is_sampled))

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The sampled answers to one prompt.

    >>> answer = Rollout(np.array([5, 6], np.int32), np.zeros(2, np.float32), np.ones(2, bool), "stop")
    >>> group = Group("a", Prompt.of_text([1, 2]), (answer, answer), np.array([1.0, 0.0]))
    >>> group.advantages().tolist(), group.is_valid
    ([1.0, -1.0], True)

    Attributes:
      key: of the problem.
      prompt: as the engine was given it.
      rollouts: the answers.
      rewards: float64 [rollouts].
    """

    key: str
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: np.ndarray

    def __post_init__(self) -> None:
        rewards = np.asarray(self.rewards, np.float64)
        if rewards.shape != (len(self.rollouts),) or not np.isfinite(rewards).all():
            found = rewards.tolist()
            raise DataError(f"{self.key}: " + fault("rewards", found, f"{len(self.rollouts)} finite numbers"))
        object.__setattr__(self, "rewards", rewards)

    @property
    def is_valid(self) -> bool:
        """Whether its rewards differ, and at least one of its answers can be learned from."""
        return bool(self.rewards.std() >= MIN_STD) and any(one.num_sampled for one in self.rollouts)

    def advantages(self, kind: AdvantageName = "mean_std") -> np.ndarray:
        """Return float32 [rollouts]: rewards above the group's mean.

        "mean_std" divides by the deviation of the group's own, as in GRPO (arXiv 2402.03300); "mean" does not, as in
        Dr. GRPO (arXiv 2503.20783).
        """
        above = self.rewards - self.rewards.mean()
        scale = self.rewards.std() if kind == "mean_std" else 1.0
        return (above / scale if scale >= MIN_STD else np.zeros_like(above)).astype(np.float32)


def most_balanced(groups: Iterable[Group], count: int) -> list[Group]:
    """Return the valid groups whose mean reward is nearest 1/2, at most `count`, in the order of their keys.

    They have the most to say: the variance of a reward of 0 or 1 is largest there. Of equally near ones those of the
    least keys are taken, so that it does not depend on the order in which answers came.
    """
    valid = [group for group in groups if group.is_valid]
    nearest = sorted(valid, key=lambda group: (round(abs(float(group.rewards.mean()) - 0.5), 9), group.key))
    return sorted(nearest[:count], key=lambda group: group.key)


def num_samples(groups: Sequence[Group]) -> int:
    """How many answers are learned from."""
    return sum(rollout.num_sampled > 0 for group in groups for rollout in group.rollouts)
