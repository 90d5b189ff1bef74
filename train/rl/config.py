"""The tables of a job file for learning by reward: `[rl]` and those below it."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta

from glm4v_jax.config.checks import Fraction, Natural, Positive, PositiveNumber, fault, raise_faults, validate

Kind = Literal["math", "units", "chart", "counting", "ocr", "vqa", "grounding", "gui", "choice", "video"]
"""What a verifier compares; see `train.rl.rules`."""

FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "math": ("tolerance", "symbolic", "seconds", "judge"),
    "units": ("tolerance", "symbolic", "seconds", "judge"),
    "chart": ("tolerance",),
    "counting": (),
    "ocr": (),
    "vqa": ("seconds", "judge"),
    "grounding": ("threshold",),
    "gui": ("tolerance",),
    "choice": (),
    "video": ("seconds", "judge"),
}
"""Fields of `VerifierConfig` that only some kinds have."""

DEFAULTS: Mapping[str, float] = {"math": 1e-6, "units": 1e-6, "chart": 0.05, "gui": 0.14}
"""The tolerance of a kind; that of `gui` is Android in the Wild's (arXiv 2307.10088, section 5.1)."""

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifierConfig:
    """How the answers of a domain are verified.

    >>> VerifierConfig(kind="chart", tolerance=0.1).tolerance
    0.1

    Attributes:
      kind: the rule.
      tolerance: of numbers: the relative error up to which they are equal; of `gui`: the distance of two points, as a
        fraction of the screen, up to which they are the same place. By default that of the kind, see `DEFAULTS`.
      threshold: of `grounding`: the least IoU at which a box counts as found.
      symbolic: of `math` and `units`: compare expressions with math-verify where texts and numbers differ.
      seconds: of math-verify or the judge for one answer; after that its process is killed, and the reward is 0.
      judge: "MODULE:FUNCTION", called as (answer, reference) -> a number from 0 to 1 where the rule finds no equality.
      boxed: an answer needs exactly one box; otherwise it has at most one, and counts as a whole where it has none.
      one_language: a text with long parts in both Chinese and English has reward 0.
    """

    kind: Kind
    tolerance: PositiveNumber | None = None
    threshold: Annotated[float, Meta(gt=0, le=1)] | None = None
    symbolic: bool | None = None
    seconds: PositiveNumber | None = None
    judge: str | None = None
    boxed: bool = True
    one_language: bool = True

    def __post_init__(self) -> None:
        validate(self)
        known = FIELDS[self.kind]
        faults = [
            fault(name, getattr(self, name), f"none for kind {self.kind!r}")
            for name in ("tolerance", "threshold", "symbolic", "seconds", "judge")
            if getattr(self, name) is not None and name not in known
        ]
        if self.judge is not None and not _CALLABLE.fullmatch(self.judge):
            faults.append(fault("judge", self.judge, "MODULE:FUNCTION"))
        raise_faults(faults)

    @property
    def is_symbolic(self) -> bool:
        """Whether math-verify compares what the rule finds different; it does unless a job says otherwise."""
        return "symbolic" in FIELDS[self.kind] and self.symbolic is not False

    @property
    def limit(self) -> float:
        """Seconds for one answer of math-verify or the judge."""
        return 5.0 if self.seconds is None else self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the rollouts of a step are generated.

    Attributes:
      engine_mesh: "same" as the job's, or axes over the same devices, such as "data=2,kv=2,q=4".
      slots: how many answers are generated at a time.
      think_budget: the most tokens of a thought. With 0 every answer begins with an empty thought: a model that thinks
        learns to answer without one.
      answer_budget: the most tokens after it.
      temperature: of the draws, and of the distribution whose probabilities are learned.
      top_p, top_k: must be 1 and 0, no cut. The tokens that a cut keeps change with the weights, and the ratio of a
        sampled token that is no longer among them would be 0.
    """

    engine_mesh: str = "same"
    slots: Positive = 64
    think_budget: Natural = 8192
    answer_budget: Positive = 1024
    temperature: PositiveNumber = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Natural = 0

    def __post_init__(self) -> None:
        validate(self)
        expected = (
            "{}, no cut: its tokens change with the weights, and the model would have to be cut alike in training"
        )
        raise_faults(
            [
                fault(name, getattr(self, name), expected.format(only))
                for name, only in {"top_p": 1, "top_k": 0}.items()
                if getattr(self, name) != only
            ]
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest rollout."""
        return self.think_budget + self.answer_budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which problems a step draws; see `train.rl.curriculum`.

    Attributes:
      mode: "rlcs" prefers problems of which some rollouts are right and some wrong; "uniform" draws all alike.
      floor: the least fraction of the draws for every tier and every domain.
      tiers: of equal widths of the pass rate.
      prior: the rate that is expected of a problem before its own rollouts counts as this many of them.
      memory: the fraction of its earlier counts that a problem keeps when it is drawn again; likewise a domain with a
        level.
      expansion_decay: of the moving average of the expansion, by which more problems are drawn than are needed.
      expansion_most: its cap.
      max_empty: the job ends after this many steps in a row without a group to learn from.
    """

    mode: Literal["rlcs", "uniform"] = "rlcs"
    floor: Annotated[float, Meta(ge=0, lt=1)] = 0.05
    tiers: Annotated[int, Meta(ge=1, le=100)] = 5
    prior: PositiveNumber = 4.0
    memory: Fraction = 0.5
    expansion_decay: Annotated[float, Meta(ge=0, lt=1)] = 0.7
    expansion_most: Annotated[float, Meta(ge=1)] = 4.0
    max_empty: Positive = 20

    def __post_init__(self) -> None:
        validate(self)
        if self.floor * self.tiers > 1:
            raise_faults([fault("floor", self.floor, f"at most {1 / self.tiers:g} for {self.tiers} tiers")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Learning by reward.

    Attributes:
      verifiers: domain -> how its answers are verified.
      prompts: groups of a step that are learned from.
      samples: rollouts of a group.
      updates: optimizer steps for the rollouts of `prompts` groups, in proportion fewer for fewer groups; all but the
        first one are off-policy. The schedule of the learning rate has this many for every step of the job, and of a
        step with fewer its last ones count.
      min_groups: the fewest groups whose rewards differ that an optimizer step is taken from, by default half of
        `prompts`; fewer wait for those of the next steps, which the same weights sample. Adam's steps are equally long
        whatever the gradient, and one from a few groups is mostly noise.
      clip_low, clip_high: the ratio counts from 1 - clip_low to 1 + clip_high.
      average: the objective is a mean over rollouts ("sample"), or over tokens ("token").
      advantage: rewards less their mean in the group, divided by their deviation ("mean_std"), or not ("mean").
      max_ratio_drift: the job ends where the mean of |ratio - 1| before the first update of a step is larger; by
        default 1e-3 where the model computes in float32, and 2e-2 in bfloat16.
      truncated: of rollouts at the limit: "force" closes the thought and rewards the answer; "mask" does not learn from
        them; "zero" gives them reward 0.
      allow_choice: allow verifiers of kind "choice", whose answers can be guessed.
      max_failures: the job ends where verifiers fail for a larger fraction of the rollouts of a step.
      sampling, curriculum: see there.
    """

    verifiers: dict[str, VerifierConfig]
    prompts: Positive = 64
    samples: Annotated[int, Meta(ge=2)] = 16
    updates: Positive = 1
    min_groups: Positive | None = None
    clip_low: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    clip_high: PositiveNumber = 0.28
    average: Literal["sample", "token"] = "sample"
    advantage: Literal["mean_std", "mean"] = "mean_std"
    max_ratio_drift: PositiveNumber | None = None
    truncated: Literal["force", "mask", "zero"] = "force"
    allow_choice: bool = False
    max_failures: Fraction = 0.01
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    curriculum: CurriculumConfig = dataclasses.field(default_factory=CurriculumConfig)

    def __post_init__(self) -> None:
        validate(self)
        faults = []
        if not self.verifiers:
            faults.append("verifiers: found none; expected one for each domain of the data")
        if not self.allow_choice:
            faults += [
                f"verifiers.{domain}.kind: found 'choice'; expected questions without options: a guess is right "
                "one time in four; allow_choice = true allows it"
                for domain, verifier in self.verifiers.items()
                if verifier.kind == "choice"
            ]
        if (self.min_groups or 0) > self.prompts:
            faults.append(fault("min_groups", self.min_groups, f"at most prompts, {self.prompts}"))
        raise_faults(faults)

    @property
    def least_groups(self) -> int:
        """How many groups an optimizer step waits for."""
        return -(-self.prompts // 2) if self.min_groups is None else self.min_groups
