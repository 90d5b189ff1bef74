"""A profile of some steps of a job, for TensorBoard or Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from glm4v_jax.errors import counted

_SKIPPED = 2
"""Steps before the profile: the first compiles, the second still waits for its data."""


class Profiler:
    """Profile steps from the third one of a run on; `with` stops it, however the steps end."""

    def __init__(self, directory: Path, count: int, log: Callable[[str], None]):
        """Prepare for `count` steps, 0 for none; `log` is called with a message if the run has fewer."""
        self._directory, self._count, self._log = directory, count, log
        self._waiting, self._seen, self._is_on = _SKIPPED, 0, False

    def before_step(self) -> None:
        """Call this before every step."""
        if self._waiting:
            self._waiting -= 1
        elif self._seen < self._count and not self._is_on:
            jax.profiler.start_trace(str(self._directory))
            self._is_on = True

    def after_step(self, metrics: Any) -> None:
        """Call this when a step is under way; waits for its metrics if it is the last one of the profile."""
        if not self._is_on:
            return
        self._seen += 1
        if self._seen == self._count:
            jax.block_until_ready(metrics)
            self._stop()

    def end(self) -> None:
        """Call this when all steps are computed."""
        self._stop()
        if self._seen < self._count:
            found = f"has only {counted(self._seen, 'step')}" if self._seen else "was not written"
            self._log(f"the profile {found}: it begins after the first {_SKIPPED} steps, and the run has ended")

    def _stop(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
