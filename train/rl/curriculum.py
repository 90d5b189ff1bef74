"""Which problems a step draws: those of which some rollouts are right and some wrong, as far as is known.

The idea is Reinforcement Learning with Curriculum Sampling (arXiv 2507.01006, section 5.3.2): problems in tiers by pass
rate, offline and online, weighted towards the middle; and more of them drawn than needed, by a moving average of what
share had a signal. The report does not disclose its formulas; these are ours:

- The pass rate of a problem is a Beta posterior of its own, whose prior counts as `prior` rollouts. The mean of the
  prior is the offline rate, its odds multiplied by those of the latest rollouts of problems of the same domain and
  level, and divided by the odds that the offline rates of these gave: it follows a model that learns. Where there are
  no offline rates it is the rate of these rollouts. Earlier rollouts, of a problem as of a domain and level, fade by
  `memory` when there are new ones. A problem's own are among those of its domain and level, as in all estimates that
  shrink data towards their mean; without them it would be worse. But they count as independent, which rollouts of one
  problem are not: the rate of a problem that is alone in its domain and level is off by up to 0.08, of one among five
  by 0.02.
- Its weight is the expected p (1 - p). Tiers are equal parts of the mean of p. Weights of tiers and domains below their
  floor are raised until all have it: solved problems are forgotten otherwise, and hard ones never met.
- A step draws each problem at most once, with probabilities in proportion to the weights, by systematic sampling over
  tiers and then domains: a tier has its share of every step to within one problem.

A draw depends on the state, the seed and the step alone. The state is JSON, and resumes bit for bit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from glm4v_jax.errors import ConfigError, DataError
from train.rl.config import CurriculumConfig

_SURE = 0.02
"""Prior means stay this far from 0 and 1, or their problems would never be drawn again."""
_ROUNDS = 200


class Outcome(NamedTuple):
    """What became of a problem that was drawn: the mean reward of its rollouts, and whether they teach anything."""

    key: str
    mean: float
    samples: int
    is_valid: bool


class Curriculum:
    """The problems of a job with what is known of their pass rates.

    >>> rates = {"easy": 1.0, "half": 0.5, "hard": 0.0}
    >>> curriculum = Curriculum(list(rates), ["it"] * 3, CurriculumConfig(), prompts=1, rates=rates)
    >>> [sum(curriculum.draw(step) == [number] for step in range(1000)) for number in range(3)]
    [80, 853, 67]
    >>> curriculum.update([Outcome("half", 1.0, 8, False)])
    >>> curriculum.pass_rates().round(2).tolist(), round(curriculum.expansion, 2)
    ([0.98, 0.97, 0.16], 1.9)
    """

    def __init__(
        self,
        keys: Sequence[str],
        domains: Sequence[str],
        config: CurriculumConfig,
        *,
        prompts: int,
        seed: int = 0,
        levels: Sequence[str | None] | None = None,
        rates: Mapping[str, float] | None = None,
    ):
        """Start with the priors alone; `keys`, `domains` and `levels` are of each problem.

        `rates`: key -> offline pass rate, of those that have one. ConfigError if there are more domains than the floor
        has room for.
        """
        self._keys, self._config, self._prompts, self._seed = list(keys), config, prompts, seed
        self._numbers = {key: number for number, key in enumerate(self._keys)}
        self._names = sorted(set(domains))
        if config.floor * len(self._names) > 1:
            raise ConfigError(
                f"rl.curriculum.floor: found {config.floor:g} for {len(self._names)} domains; expected at most "
                f"{1 / len(self._names):.3g}"
            )
        places = {name: place for place, name in enumerate(self._names)}
        self._domains = np.array([places[domain] for domain in domains], np.int64)
        alike = list(zip(domains, levels if levels is not None else [None] * len(self._keys), strict=True))
        similar = {group: place for place, group in enumerate(dict.fromkeys(alike))}
        self._similar = np.array([similar[group] for group in alike], np.int64)
        self._rates = _offline(self._keys, self._similar, rates or {})
        self._right, self._tried = np.zeros(len(self._keys)), np.zeros(len(self._keys))
        self._recent = np.zeros((3, len(similar)))  # of each domain and level: right, right by the offline rates, tried
        self.expansion = 1.0
        self.num_empty = 0
        """Steps in a row without a group to learn from."""

    def draw(self, step: int) -> list[int]:
        """Return the numbers of the problems of a step, in ascending order."""
        count = min(math.ceil(self._prompts * self.expansion), len(self._keys))
        random = np.random.default_rng([self._seed, step])
        shares = self._shares()
        order = np.lexsort((random.random(len(self._keys)), self._domains, self.tiers()))
        return sorted(order[_systematic(_at_most_once(shares, count)[order], random)].tolist())

    def update(self, outcomes: Sequence[Outcome]) -> None:
        """Take what became of all problems that a step has drawn.

        Raises:
          DataError: `max_empty` steps in a row had no group to learn from; the message has the pass rates by tier.
        """
        config = self._config
        drawn = [self._numbers[outcome.key] for outcome in outcomes]
        self._recent[:, np.unique(self._similar[drawn])] *= config.memory
        for number, (_, mean, samples, _) in zip(drawn, outcomes, strict=True):
            self._recent[:, self._similar[number]] += samples * np.array([mean, self._rates[number], 1.0])
            self._right[number] = config.memory * self._right[number] + mean * samples
            self._tried[number] = config.memory * self._tried[number] + samples
        valid = sum(outcome.is_valid for outcome in outcomes)
        ratio = min(len(outcomes) / valid, config.expansion_most) if valid else config.expansion_most
        self.expansion = config.expansion_decay * self.expansion + (1 - config.expansion_decay) * ratio
        self.num_empty = 0 if valid else self.num_empty + 1
        if self.num_empty >= config.max_empty:
            tiers = ", ".join(f"{count:,} at {rate:.0%}" for count, rate in self.by_tier() if count)
            raise DataError(
                f"rl: found {self.num_empty} steps in a row in which the rollouts of each problem had the same reward; "
                f"expected some that differ. Pass rates by tier: {tiers}"
            )

    def pass_rates(self) -> np.ndarray:
        """Return the mean of each problem's posterior, float64 [N]."""
        right, wrong = self._posterior()
        return right / (right + wrong)

    def tiers(self) -> np.ndarray:
        """Return the tier of each problem, int64 [N], from 0 for the hardest."""
        count = self._config.tiers
        return np.minimum((self.pass_rates() * count).astype(np.int64), count - 1)

    def by_tier(self) -> list[tuple[int, float]]:
        """Return the number of problems of each tier, and their mean pass rate; NaN where there are none."""
        rates, tiers = self.pass_rates(), self.tiers()
        found = [rates[tiers == tier] for tier in range(self._config.tiers)]
        return [(len(some), float(some.mean()) if len(some) else math.nan) for some in found]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON."""
        seen = np.flatnonzero(self._tried).tolist()
        counts = {self._keys[number]: [float(self._right[number]), float(self._tried[number])] for number in seen}
        more = {"recent": self._recent.tolist(), "expansion": self.expansion, "num_empty": self.num_empty}
        return {"counts": counts, **more}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state` has returned; DataError if it is of other problems."""
        unknown = next((key for key in state["counts"] if key not in self._numbers), None)
        if unknown is not None:
            raise DataError(f"curriculum of the checkpoint: found key {unknown!r}; expected keys of the job's problems")
        self._right[:] = self._tried[:] = 0
        for key, (right, tried) in state["counts"].items():
            self._right[self._numbers[key]], self._tried[self._numbers[key]] = right, tried
        if "recent" in state:
            self._recent[:] = state["recent"]
        else:  # earlier versions took all counts
            of_all = (self._right, self._rates * self._tried, self._tried)
            self._recent[:] = [np.bincount(self._similar, one, self._recent.shape[1]) for one in of_all]
        self.expansion, self.num_empty = float(state["expansion"]), int(state["num_empty"])

    def _posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """The parameters of each problem's Beta distribution, of right and of wrong rollouts."""
        right, expected, tried = self._recent
        shift = _logit((right + 1) / (tried + 2)) - _logit((expected + 1) / (tried + 2))
        mean = np.clip(1 / (1 + np.exp(-_logit(self._rates) - shift[self._similar])), _SURE, 1 - _SURE)
        prior = self._config.prior
        return prior * mean + self._right, prior * (1 - mean) + self._tried - self._right

    def _shares(self) -> np.ndarray:
        """The share of each problem in the draws, which sum up to 1."""
        if self._config.mode == "uniform":
            return np.full(len(self._keys), 1 / len(self._keys))
        right, wrong = self._posterior()
        total = right + wrong
        weights = right * wrong / (total * (total + 1))
        tiers, count = self.tiers(), len(self._names)
        cells = tiers * count + self._domains
        sums = np.bincount(cells, weights, minlength=self._config.tiers * count) / weights.sum()
        raised = _with_floors(sums.reshape(self._config.tiers, count), self._config.floor).ravel()
        factor = np.divide(raised, sums, out=np.zeros_like(sums), where=sums > 0)
        shares = weights / weights.sum() * factor[cells]
        return shares / shares.sum()


def _offline(keys: Sequence[str], similar: np.ndarray, rates: Mapping[str, float]) -> np.ndarray:
    """Offline pass rates; where a problem has none, the mean of those of its domain and level, or else 1/2."""
    found = np.clip(np.array([rates.get(key, math.nan) for key in keys]), _SURE, 1 - _SURE)
    is_known = ~np.isnan(found)
    known = np.bincount(similar[is_known], found[is_known], similar.max(initial=-1) + 1)
    count = np.bincount(similar[is_known], minlength=len(known))
    means = np.divide(known, count, out=np.full(len(known), 0.5), where=count > 0)
    return np.where(is_known, found, means[similar])


def _logit(x: np.ndarray) -> np.ndarray:
    """The logarithm of the odds."""
    return np.log(x / (1 - x))


def _with_floors(shares: np.ndarray, floor: float) -> np.ndarray:
    """Raise rows and columns of [tiers, domains] that have less than a floor, unless they are empty, to have it."""
    for _ in range(_ROUNDS):
        is_done = True
        for axis in (0, 1):
            sums = shares.sum(axis=axis)
            low = (sums > 0) & (sums < floor * (1 - 1e-9))
            if not low.any():
                continue
            is_done = False
            rest = (1 - floor * low.sum()) / (1 - sums[low].sum()) if not low.all() else 1.0
            scale = np.where(low, floor / np.where(sums > 0, sums, 1), max(rest, 0.0))
            shares = shares * (scale[None, :] if axis == 0 else scale[:, None])
        if is_done:
            break
    return shares / shares.sum()


def _at_most_once(shares: np.ndarray, count: int) -> np.ndarray:
    """Return the probability that each problem is drawn, in proportion to its share, at most 1; the sum is `count`."""
    certain = np.zeros(len(shares), bool)
    while True:
        left = count - certain.sum()
        chances = np.where(certain, 1.0, shares * (left / max(shares[~certain].sum(), 1e-300)))
        more = ~certain & (chances >= 1)
        if not more.any():
            return chances
        certain |= more


def _systematic(chances: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw places with their chances: those that are certain, and of the others each that a comb of width 1 meets."""
    certain = np.flatnonzero(chances >= 1)
    others = np.flatnonzero(chances < 1)
    ends = np.cumsum(chances[others])
    count = round(float(ends[-1])) if len(ends) else 0
    met = np.searchsorted(ends, random.random() + np.arange(count), side="right")
    return np.concatenate([certain, others[np.unique(np.minimum(met, len(others) - 1))]]) if count else certain
