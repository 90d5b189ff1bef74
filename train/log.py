"""What every step of a job came to: a line of JSON each, and lines for a person."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax

from train.config import TrainConfig
from train.optimizers import learning_rate
from train.step import Metrics


class Log:
    """Appends to a file of lines; what it has of steps behind the one that a job goes on from is taken out."""

    def __init__(self, path: Path, config: TrainConfig, step: int, tell: Callable[[str], None]):
        """Go on behind a step.

        Args:
          path: of the file.
          config: of the job.
          step: the last one that counts.
          tell: called with a line for a person, every `config.log_every` steps.
        """
        self._path, self._every, self._steps, self._tell = path, config.log_every, config.steps, tell
        self._rate: optax.Schedule = learning_rate(config.optimizer, config.steps)
        self._since = time.perf_counter()
        kept = [line for line in read_log(path) if line["step"] <= step]
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        aside.replace(path)

    def add(self, step: int, metrics: Metrics, more: dict[str, Any]) -> None:
        """Write a step down; waits until it is computed."""
        seconds = time.perf_counter() - self._since
        self._since = time.perf_counter()
        line = {
            "step": step,
            "loss": float(metrics.loss),
            "accuracy": float(metrics.accuracy),
            "targets": float(metrics.weight),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(self._rate(step - 1)),
            "is_skipped": bool(metrics.is_skipped),
            "seconds": round(seconds, 4),
            **more,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if step % self._every == 0 or step == self._steps:
            self._tell(
                f"step {step} of {self._steps}: loss {line['loss']:.4f}, accuracy {line['accuracy']:.1%}, "
                f"gradients {line['grad_norm']:.3g}, {seconds:.2f} s{', skipped' if line['is_skipped'] else ''}"
            )


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a job's metrics; none where there is no file, and without the last one if it was cut off."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
