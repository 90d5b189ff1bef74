"""Metrics of steps and evaluations: one JSON line each, log lines for a person, and trackers."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from glm4v_jax.devices.distributed import gathered, is_first
from glm4v_jax.files import naming_file, replacing, to_json
from train.config import TrainConfig
from train.evaluate import Evaluation
from train.flops import Work
from train.step import Metrics
from train.trackers import Trackers

METRICS, EVALUATIONS = "metrics.jsonl", "eval.jsonl"
_GROUPS = {METRICS: "train", EVALUATIONS: "eval"}
"""File -> what trackers have before the names of its figures."""


class JobLog:
    """Append lines about steps to files of a job, and send their figures to its trackers.

    Lines of steps after the one that a job resumes from are removed first. Only the first process writes.
    """

    def __init__(
        self, directory: Path, config: TrainConfig, step: int, log: Callable[[str], None], names: Sequence[str]
    ):
        """Resume the files of these names after step `step`; `log` is called with log lines for a person."""
        self._directory, self._config, self._log = directory, config, log
        self._trackers = Trackers(config, directory, step, log)
        if is_first():
            for name in names:
                truncate(directory / name, step)

    def write(self, name: str, line: Mapping[str, Any], *, ensure_ascii: bool = True) -> None:
        """Append a line to a file, and send it to the trackers if it is one of metrics or evaluations."""
        if not is_first():
            return
        path = self._directory / name
        # A tokenizer can produce unpaired surrogates, which UTF-8 cannot hold.
        with naming_file(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(to_json(line, ensure_ascii=ensure_ascii) + "\n")
        if (group := _GROUPS.get(name)) is not None:
            self._trackers.write(group, line)

    def log_step(self, step: int, line: str) -> None:
        """Log a line about a step, every `config.log_every` steps and after the last."""
        if step % self._config.log_every == 0 or step == self._config.steps:
            self._log(f"step {step} of {self._config.steps}: {line}")

    def close(self) -> None:
        """Close the trackers."""
        self._trackers.close()


class MetricsLog(JobLog):
    """The metrics of steps and evaluations.

    A step's metrics are read when the next one is under way, so that devices do not wait for the host.

    step, streak, grad_norm: of the last step that was read: its number, how many skipped steps in a row end with it,
      and the norm of its gradients.
    """

    def __init__(
        self,
        directory: Path,
        config: TrainConfig,
        step: int,
        flops: Callable[[Work], float],
        peak: float | None,
        log: Callable[[str], None],
        compiled: Sequence[float] = (),
    ):
        """Resume after step `step`; `log` is called with a log line every `config.log_every` steps.

        `flops` returns the operations of a step with some work, and `peak` is the FLOP/s of all devices together, None
        if unknown. Seconds of programs in `compiled` so far (`compile_times`) count for no step.
        """
        super().__init__(directory, config, step, log, (METRICS, EVALUATIONS))
        self._flops, self._peak = flops, peak
        self._pending: tuple[int, Metrics, Mapping[str, Any]] | None = None
        self.step, self.streak, self.grad_norm = step, 0, 0.0
        self._compiled = compiled
        self._begin()

    def _begin(self) -> None:
        """Begin to time a step."""
        self._since, self._compiled_before = time.perf_counter(), sum(self._compiled)

    def add(self, step: int, metrics: Metrics, rows: Mapping[str, Any]) -> None:
        """Take the metrics of a step that is under way, and write those of the one before it once it is computed.

        `rows` are more fields of its line, about the rows that this process has read.
        """
        self.flush()
        self._pending = step, metrics, rows

    def flush(self) -> None:
        """Wait for the last step, and write its metrics."""
        if self._pending is None:
            return
        step, metrics, rows = self._pending
        self._pending = None
        found = jax.device_get(metrics)
        compiled = sum(self._compiled) - self._compiled_before
        seconds = max(time.perf_counter() - self._since - compiled, 1e-9)
        self._begin()
        update = found.update
        self.step, self.streak, self.grad_norm = step, int(update.streak), float(update.grad_norm)
        tokens, patches = int(found.work.tokens), int(found.work.patches)
        flops, batch = self._flops(found.work), self._config.batch
        line = {
            "step": step,
            "loss": float(found.loss),
            "accuracy": float(found.accuracy),
            **({} if found.margin is None else {"margin": float(found.margin)}),
            "targets": float(found.weight),
            "grad_norm": self.grad_norm,
            "learning_rate": float(update.learning_rate),
            "is_skipped": bool(update.is_skipped),
            "samples": int(found.samples),
            **rows,
            "tokens": tokens,
            "padding": 1 - tokens / batch.tokens,
            "vision_padding": 1 - patches / batch.patches if batch.patches else None,
            "flops": flops,
            "seconds": round(seconds, 4),
            "compile_seconds": round(compiled, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": None if self._peak is None else round(flops / seconds / self._peak, 4),
        }
        self.write(METRICS, line)
        margin = "" if found.margin is None else f", margin {float(found.margin):.3g}"
        mfu = "" if line["mfu"] is None else f", MFU {line['mfu']:.1%}"
        self.log_step(
            step,
            f"loss {line['loss']:.4f}, accuracy {line['accuracy']:.1%}{margin}, gradient norm {self.grad_norm:.3g}, "
            f"{seconds:.2f} s, {line['tokens_per_second']:,.0f} tokens/s{mfu}, padding {line['padding']:.1%}"
            f"{', skipped' if line['is_skipped'] else ''}",
        )

    def evaluated(self, step: int, found: Evaluation, seconds: float) -> None:
        """Write an evaluation; its time does not count for the next step."""
        fields = dataclasses.asdict(found)
        if found.margin is None:
            del fields["margin"]
        self.write(EVALUATIONS, {"step": step, **fields, "seconds": round(seconds, 3)})
        score = "" if found.score is None else f", score {found.score:.1%}"
        score += "" if found.margin is None else f", margin {found.margin:.3g}"
        self._log(f"evaluation after step {step}: loss {found.loss:.4f}, accuracy {found.accuracy:.1%}{score}")
        self._begin()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a job's metrics: none if there is no file, and without a last line that was cut off."""
    if not path.exists():
        return []
    lines = []
    # A last line may end within a character. Answers have some at which `splitlines` would break them.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def read_evaluations(directory: Path) -> dict[int, dict[str, float]]:
    """Return step -> `Evaluation.metrics` for every evaluation of a job; all processes get what the first one reads."""
    lines = gathered(read_log(directory / EVALUATIONS) if is_first() else [])[0]
    names = ("loss", "score")
    return {line["step"]: {name: line[name] for name in names if line.get(name) is not None} for line in lines}


def truncate(path: Path, step: int) -> None:
    """Remove the lines after a step from a file of metrics."""
    kept = [line for line in read_log(path) if line["step"] <= step]
    if not kept and not path.exists():
        return
    with replacing(path) as aside:
        aside.write_text("".join(to_json(line) + "\n" for line in kept), encoding="utf-8")
