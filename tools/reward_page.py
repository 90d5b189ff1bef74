"""docs/leftmost.md and its figure from docs/leftmost.json, which `make rl ARGS=--all` measures.

python -m tools.reward_page
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import scipy.stats

from glm4v_jax.errors import counted
from tools.leftmost_digits import NEW, QUESTION, TIERS, Tier
from tools.line_chart import Line, Panel, draw

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "leftmost.json"
PAGE, FIGURE = DATA.with_suffix(".md"), ROOT / "docs" / "images" / "leftmost.svg"

LEARNS, UNIFORM, STILL, OTHERS, ANY = (
    "learns", "uniform draws", "learning rate 0", "rewards of another group", "any box is paid",
)  # fmt: skip
"""Arms of the study."""
NEW_AIM, SOLVED_AIM, CONTROL_RISE, ROLLOUTS = 0.65, 0.85, 0.1, 4500
"""At least so much of the new and of the known; at most so much more with others' rewards, and so many answers."""
COLORS = {LEARNS: "#1f77b4", UNIFORM: "#ff7f0e", STILL: "#7f7f7f", OTHERS: "#9467bd", ANY: "#d62728"}
_DRAWS = {LEARNS: "rlcs", UNIFORM: "uniform"}
"""Arms that differ in their draws alone -> mode of the curriculum."""
ANY_DIGIT = (1 + 1 / 2 + 1 / 3) / 3
"""Accuracy of reading one of the digits, whichever, without fault."""


class Step(NamedTuple):
    """A step of a job; `rollouts` and `updates` are those so far, `valid` is the fraction of its groups.

    A step without an update counts as one, as in the numbers of checkpoints.
    """

    rollouts: int
    updates: int
    reward: float
    valid: float


class Measured(NamedTuple):
    """Accuracy on held-out digits by tier, after so many rollouts."""

    rollouts: int
    accuracy: dict[Tier, float]

    @property
    def new(self) -> float:
        """The mean of what was never taught."""
        return float(np.mean([self.accuracy[tier] for tier in NEW]))


@dataclasses.dataclass(frozen=True)
class Run:
    """A job; `seconds` of CPU were for its training, `curve` begins with the packaged model."""

    arm: str
    seed: int
    seconds: float
    steps: tuple[Step, ...]
    curve: tuple[Measured, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        steps = {name: [getattr(step, name) for step in self.steps] for name in Step._fields}
        curve = [{"rollouts": one.rollouts, **one.accuracy} for one in self.curve]
        return {"arm": self.arm, "seed": self.seed, "seconds": self.seconds, "steps": steps, "curve": curve}

    @classmethod
    def of(cls, found: dict[str, Any]) -> Self:
        """Return what `as_json` has."""
        steps = tuple(itertools.starmap(Step, zip(*(found["steps"][name] for name in Step._fields), strict=True)))
        curve = tuple(Measured(one["rollouts"], {tier: one[tier] for tier in TIERS}) for one in found["curve"])
        return cls(found["arm"], found["seed"], found["seconds"], steps, curve)


@dataclasses.dataclass(frozen=True)
class Study:
    """All runs; `settings` in words, `held_out` questions of each tier."""

    settings: str
    held_out: int
    runs: tuple[Run, ...]

    def as_json(self) -> str:
        """Return it as JSON."""
        runs = [run.as_json() for run in self.runs]
        return json.dumps({"settings": self.settings, "held_out": self.held_out, "runs": runs}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `as_json` has returned."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(found["settings"], found["held_out"], tuple(map(Run.of, found["runs"])))


def table(runs: Sequence[Run]) -> str:
    """Return what the runs reached in Markdown, a line each, after the model that all begin with."""

    def row(name: str, seed: str, end: Measured, *last: str) -> list[str]:
        tiers = (f"{end.accuracy[tier]:.1%}" for tier in TIERS)
        return [name, seed, f"{end.rollouts:,}", *tiers, f"{end.new:.1%}", *last]

    return _markdown(
        ["run", "seed", "answers", *TIERS, "mean of the new", "reward, last step", "CPU s"],
        row("the packaged model", "", runs[0].curve[0], "", ""),
        *(row(r.arm, str(r.seed), r.curve[-1], f"{r.steps[-1].reward:.2f}", f"{r.seconds:.0f}") for r in runs),
    )


def paid(runs: Sequence[Run]) -> str:
    """Return in Markdown what a verifier that pays for any box paid, and how much of it was right."""
    run = next(run for run in runs if run.arm == ANY)
    rewards = {step.rollouts: f"{step.reward:.2f}" for step in run.steps}
    return _markdown(
        ["answers", *(f"{one.rollouts:,}" for one in run.curve)],
        ["reward", *(rewards.get(one.rollouts, "") for one in run.curve)],
        ["held-out accuracy", *(f"{one.new:.1%}" for one in run.curve)],
    )


def _markdown(columns: Sequence[str], *rows: Sequence[str]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def missed(runs: Sequence[Run]) -> list[str]:
    """Return what of the aims is not reached, one line each."""
    found = []
    for one in runs:
        name, base, end = f"{one.arm}, seed {one.seed}", one.curve[0], one.curve[-1]
        if one.arm == LEARNS:
            if end.new < NEW_AIM:
                found.append(f"{name}: found {end.new:.1%} of left1 to left3; expected at least {NEW_AIM:.0%}")
            if end.accuracy["reading"] < SOLVED_AIM:
                found.append(
                    f"{name}: found {end.accuracy['reading']:.1%} of reading; expected at least {SOLVED_AIM:.0%}"
                )
            if end.rollouts > ROLLOUTS:
                found.append(f"{name}: found {end.rollouts:,} answers; expected at most {ROLLOUTS:,}")
        if one.arm == STILL and end.accuracy != base.accuracy:
            found.append(f"{name}: found {end.accuracy}; expected no change from {base.accuracy}")
        # Where any box is paid, the answer becomes a digit of the image, which is the leftmost one now and then.
        highest = {OTHERS: base.new + CONTROL_RISE, ANY: NEW_AIM / 2}.get(one.arm, 1.0)
        if end.new > highest:
            found.append(f"{name}: found {end.new:.1%}; expected at most {highest:.1%}")
        if one.arm == ANY and one.steps[-1].reward < 0.9:
            found.append(f"{name}: found reward {one.steps[-1].reward:.2f}; expected at least 0.9: it is easy to get")
    return found


class Interval(NamedTuple):
    """A mean over seeds with its 95 % interval, of Student's t."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return that of some values, at least two."""
        error = float(np.std(values, ddof=1)) / len(values) ** 0.5
        return cls(float(np.mean(values)), float(scipy.stats.t.ppf(0.975, len(values) - 1)) * error)

    def __str__(self) -> str:
        return f"{self.mean:.1%} ± {100 * self.half:.1f}"


def compared(runs: Sequence[Run]) -> str:
    """Return the curriculum beside uniform draws in Markdown, by numbers of answers."""
    both, grid = _both(runs), _grid(runs)

    def row(arm: str) -> list[str]:
        values = [[_at(run, count) for run in both[arm]] for count in grid]
        values.append([valid_share(run) for run in both[arm]])
        values.append([run.curve[-1].accuracy["reading"] for run in both[arm]])
        return [_DRAWS[arm], *(str(Interval.of(some)) for some in values)]

    columns = ["draws", *(f"{count:,} answers" for count in grid), "valid groups", "reading"]
    return _markdown(columns, *map(row, _DRAWS))


def verdict(runs: Sequence[Run]) -> str:
    """Return in words which draws were better, by the differences of runs of the same seed."""
    both, grid, found = _both(runs), _grid(runs), []

    def average(run: Run) -> float:
        return float(np.mean([_at(run, rollouts) for rollouts in np.linspace(0, grid[-1], 50)]))

    for name, of in (("at the end", lambda run: _at(run, grid[-1])), ("on average over the answers", average)):
        gain = Interval.of([of(one) - of(other) for one, other in zip(both[LEARNS], both[UNIFORM], strict=True)])
        words = "no difference beyond chance" if abs(gain.mean) <= gain.half else "better" if gain.mean > 0 else "worse"
        found.append(f"{name}, {100 * gain.mean:+.1f} ± {100 * gain.half:.1f} points ({words})")
    return "; ".join(found)


def valid_share(run: Run) -> float:
    """Return the fraction of a run's groups that could be learned from."""
    return float(np.mean([step.valid for step in run.steps]))


def _both(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs with the curriculum and without, of the same seeds in the same order."""
    found = {arm: sorted((r for r in runs if r.arm == arm), key=lambda r: r.seed) for arm in _DRAWS}
    shared = {run.seed for run in found[LEARNS]} & {run.seed for run in found[UNIFORM]}
    return {arm: [run for run in some if run.seed in shared] for arm, some in found.items()}


def _grid(runs: Sequence[Run]) -> list[int]:
    """Numbers of answers that all of both have reached."""
    least = min(run.curve[-1].rollouts for some in _both(runs).values() for run in some)
    return [round(least * part / 4) for part in range(1, 5)]


def _at(run: Run, rollouts: float) -> float:
    """The accuracy of the new after so many answers, between two measurements in proportion."""
    return float(np.interp(rollouts, [one.rollouts for one in run.curve], [one.new for one in run.curve]))


def figure(runs: Sequence[Run]) -> str:
    """Return the curves as SVG."""

    def curve(run: Run, name: str, of: Callable[[Measured], float], *, is_dashed: bool = False) -> Line:
        return Line(name, COLORS[run.arm], [(one.rollouts, of(one)) for one in run.curve], is_dashed=is_dashed)

    def new(one: Measured) -> float:
        return one.new

    own = [run for run in runs if run.arm == LEARNS]
    controls = [run for run in runs if run.arm in (STILL, OTHERS, ANY)]
    tiers = [
        Line(tier, color, [(one.rollouts, one.accuracy[tier]) for one in own[0].curve])
        for tier, color in zip(TIERS, ("#1f77b4", "#2ca02c", "#17becf", "#222222"), strict=True)
    ]
    any_box = next(run for run in runs if run.arm == ANY)
    panels = [
        Panel(
            "Held-out accuracy of what was never taught",
            [curve(run, "" if run.seed else f"learns, {len(own)} seeds", new, is_dashed=run.seed > 0) for run in own]
            + [curve(run, {STILL: "rate 0", OTHERS: "others", ANY: "any box"}[run.arm], new) for run in controls],
        ),
        Panel(f"By task, seed {own[0].seed}", tiers),
        Panel(
            "A verifier that pays for any box",
            [
                Line("reward", COLORS[ANY], [(step.rollouts, step.reward) for step in any_box.steps], is_dashed=True),
                curve(any_box, "held-out accuracy", new),
            ],
        ),
        Panel("Draws: mean of the seeds, 95 % interval", [_mean_line(runs, arm) for arm in _DRAWS]),
    ]
    return draw(panels)


def _mean_line(runs: Sequence[Run], arm: str) -> Line:
    some = _both(runs)[arm]
    grid = [0.0, *(float(x) for x in np.linspace(0, _grid(runs)[-1], 9)[1:])]
    found = [(x, Interval.of([_at(run, x) for run in some])) for x in grid]
    band = [(x, max(0.0, one.mean - one.half), min(1.0, one.mean + one.half)) for x, one in found]
    return Line(_DRAWS[arm], COLORS[arm], [(x, one.mean) for x, one in found], band)


_ARMS = {
    LEARNS: """\
- **learns** is the job: {settings}.""",
    STILL: """\
- **learning rate 0** samples and scores alike, and changes nothing: what it began with, to the digit.""",
    OTHERS: """\
- **rewards of another group**: each answer has the reward of an answer to another problem.""",
    ANY: """\
- **any box is paid**: a verifier that does not look at what is in the box. Its reward rises to 1, and its accuracy
  does not follow: a curve of rewards alone does not show what is learned. It learns to give one digit as its answer,
  and some of these are right. No job file can name such a verifier; the
  test at the start of every job refuses it, and the control goes around the test (`learn(control=)`):""",
}
"""What is said about each."""
TEXT = """\
# Learning by reward, shown

Written by `python -m tools.reward_page` from `docs/leftmost.json`, which `make rl ARGS=--all` measures; change that
program, not this page.

The packaged [tiny model](tiny.md) reads one digit in an image. Nobody taught it to answer "{question}"
about an image of one, two or three digits: `left1`, `left2`, `left3`. Jobs with [`[rl]`](guides/reward.md), through
`glm4v train`, learn it from answers that a rule finds right or wrong. Here they are asked about {held_out}
held-out digits a task, greedily; `reading` is what the model could do before.

![Accuracy by the number of sampled answers: it rises with rewards of its own, far less where any box is paid, and not \
with the other controls](images/leftmost.svg)

## What it learns

{table}

Reading a digit of the image without fault, whichever, gives {any_digit:.0%} of left1 to left3 on average: what is
above that is knowing the place.

{arms}

{paid}

`make rl` takes the first two seeds and the controls; a training takes about {minutes}. It fails where
the mean of left1 to left3 ends below {new_aim:.0%} or reading below {solved_aim:.0%} after at most {most:,} answers,
where others' rewards raise it by more than {rise:.0f} points, or where paying for any box brings it above half of
{new_aim:.0%}. Of these aims the runs of this page miss:

{missed}

## Why these settings

What was in the way, in the order in which it was found, and the mean of left1 to left3 at the end, by seed, of runs
that were taken once. A line has the changes of those above it, too; the last five are other ways.
Of five seeds four reach the aim: it is still in part a matter of chance which thought is paid for first.

| changed | 0 | 1 | 2 | 3 | 4 |
| --- | --- | --- | --- | --- | --- |
| 2 updates from any number of groups; temperature 1; thoughts cut at 16 tokens, and their answers rewarded | 76.7% | \
41.7% | 73.9% | | |
| an update waits for 8 groups (`min_groups`) | 36.7% | 49.7% | 70.8% | 40.6% | 36.4% |
| pass rates of the curriculum follow the latest answers | 0.3% | 35.6% | 68.9% | 39.7% | 65.8% |
| answers that are cut, at 20 tokens, have no reward | | 38.6% | | 77.8% | |
| 4 groups are enough; temperature 1.5: the settings of this page | 73.6% | 67.8% | 65.3% | 44.4% | 66.7% |
| as the line above, but 35 steps of up to 8 groups, 1 update a step | | 59.4% | | 67.2% | |
| as this page, temperature 2 | | | | 53.9% | |
| learning rate 1e-3, temperature 1, 8 groups | | 39.7% | | 58.9% | |
| cut at 12 tokens, 4 groups, temperature 1; 1.5 | | 44.4%; 36.4% | | | |
| as this page, but the 8 answers to a problem count as 3.3 independent ones for the rate of its domain | 63.9% | \
39.4% | 75.0% | | |

- The first steps have two or three groups of different rewards. Two updates from two groups, each as long as any of
  Adam's, cost seed 1 what the model could do: after 944 answers reading was at 76%, left1 at 8%.
- Then the curriculum drew left1 long after it was learned: it took the mean of all answers so far for its pass rate.
- One run had rewards of 0.9, and 0.3% on held-out digits: it had learned thoughts that only the limit ended, and the
  questions here have no limit. With `truncated = "zero"` that is not paid.
- At temperature 1 the model settles for the first thought that is paid for, often that of another task, "Only one
  digit", with the same answer eight times: few groups then have different rewards.
- Where a domain has few problems, estimated pass rates are nearer the true ones if the answers to one problem do not
  count as independent. Here a domain has 200 or more: other problems were drawn, 33.3% of the groups had different
  rewards instead of 33.6%, and the aim was missed. The curriculum counts them as independent.

## Curriculum and uniform draws

Problems drawn by what is known of their pass rates (`mode = "rlcs"`), and all alike (`"uniform"`). The problems are the
same, and half of them, `reading`, are solved from the start; {seeds} seeds each. The mean of left1 to left3 after as
many answers, the fraction of groups whose rewards differ, and what was left of `reading` at the end, with intervals of
95 %, of Student's t over the seeds.

{compared}

The curriculum less uniform draws, seed by seed: {verdict}.
Of its groups {ratio:.2f} times as many could be learned from.
{all_minutes:.0f} CPU minutes for all trainings on this page.
"""


def page(study: Study) -> str:
    """Return the page."""
    both = _both(study.runs)
    shares = {arm: float(np.mean([valid_share(run) for run in some])) for arm, some in both.items()}
    order = list(_ARMS)
    shown = [run for run in study.runs if run.arm in order]
    shown.sort(key=lambda run: (order.index(run.arm), run.seed))
    minutes = [run.seconds / 60 for run in study.runs]
    names = {run.arm for run in shown}
    arms = "\n".join(text.format(settings=study.settings) for arm, text in _ARMS.items() if arm in names)
    return TEXT.format(
        question=QUESTION, held_out=study.held_out, table=table(shown), paid=paid(study.runs), any_digit=ANY_DIGIT,
        arms=arms, new_aim=NEW_AIM, solved_aim=SOLVED_AIM, rise=100 * CONTROL_RISE, most=ROLLOUTS,
        minutes=counted(round(float(np.mean(minutes))), "CPU minute"), all_minutes=sum(minutes),
        missed="\n".join(f"- {line}" for line in missed(study.runs)) or "- none", seeds=len(both[LEARNS]),
        compared=compared(study.runs), verdict=verdict(study.runs), ratio=shares[LEARNS] / shares[UNIFORM],
    )  # fmt: skip


def write(data: Path = DATA) -> None:
    """Write the page and its figure beside their figures in JSON."""
    study = Study.read(data)
    data.with_suffix(".md").write_text(page(study), encoding="utf-8")
    drawn = data.parent / FIGURE.relative_to(DATA.parent)
    drawn.parent.mkdir(exist_ok=True)
    drawn.write_text(figure(study.runs), encoding="utf-8")


if __name__ == "__main__":
    write()
