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

from bench.line_chart import Line, Panel, Style, draw
from bench.page import fill
from bench.report import ROOT, Table
from glm4v_jax.errors import counted
from tools.leftmost_digits import NEW, QUESTION, TIERS, Tier

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

    columns = ("run", "seed", "answers", *TIERS, "mean of the new", "reward, last step", "CPU s")
    rows = [row(r.arm, str(r.seed), r.curve[-1], f"{r.steps[-1].reward:.2f}", f"{r.seconds:.0f}") for r in runs]
    return str(Table("", columns, [row("the packaged model", "", runs[0].curve[0], "", ""), *rows]))


def paid(runs: Sequence[Run]) -> str:
    """Return in Markdown what a verifier that pays for any box paid, and how much of it was right."""
    run = next(run for run in runs if run.arm == ANY)
    rewards = {step.rollouts: f"{step.reward:.2f}" for step in run.steps}
    rows = [
        ("reward", *(rewards.get(one.rollouts, "") for one in run.curve)),
        ("held-out accuracy", *(f"{one.new:.1%}" for one in run.curve)),
    ]
    return str(Table("", ("answers", *(f"{one.rollouts:,}" for one in run.curve)), rows))


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
    return str(Table("", columns, [row(arm) for arm in _DRAWS]))


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

    def curve(run: Run, name: str, of: Callable[[Measured], float], style: Style = "solid") -> Line:
        return Line(name, COLORS[run.arm], [(one.rollouts, of(one)) for one in run.curve], style=style)

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
            [curve(run, "", new, "dashed") if run.seed else curve(run, f"learns, {len(own)} seeds", new) for run in own]
            + [curve(run, {STILL: "rate 0", OTHERS: "others", ANY: "any box"}[run.arm], new) for run in controls],
        ),
        Panel(f"By task, seed {own[0].seed}", tiers),
        Panel(
            "A verifier that pays for any box",
            [
                Line("reward", COLORS[ANY], [(step.rollouts, step.reward) for step in any_box.steps], style="dashed"),
                curve(any_box, "held-out accuracy", new),
            ],
        ),
        Panel("Draws: mean of the seeds, 95 % interval", [_mean_line(runs, arm) for arm in _DRAWS]),
    ]
    return draw(panels, "Accuracy by the number of sampled answers")


def _mean_line(runs: Sequence[Run], arm: str) -> Line:
    some = _both(runs)[arm]
    grid = [0.0, *(float(x) for x in np.linspace(0, _grid(runs)[-1], 9)[1:])]
    found = [(x, Interval.of([_at(run, x) for run in some])) for x in grid]
    band = [(x, max(0.0, one.mean - one.half), min(1.0, one.mean + one.half)) for x, one in found]
    return Line(_DRAWS[arm], COLORS[arm], [(x, one.mean) for x, one in found], band)


def page(study: Study) -> str:
    """Return the page."""
    both = _both(study.runs)
    shares = {arm: float(np.mean([valid_share(run) for run in some])) for arm, some in both.items()}
    order = (LEARNS, STILL, OTHERS, ANY)
    shown = sorted((run for run in study.runs if run.arm in order), key=lambda run: (order.index(run.arm), run.seed))
    minutes = [run.seconds / 60 for run in study.runs]
    return fill(
        ROOT / "tools" / "templates" / "leftmost.md", study=study, question=QUESTION, shown=shown,
        arms={run.arm for run in shown}, minutes=counted(round(float(np.mean(minutes))), "CPU minute"),
        all_minutes=sum(minutes), seeds=len(both[LEARNS]), ratio=shares[LEARNS] / shares[UNIFORM],
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
