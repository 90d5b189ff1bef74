"""A profile of some steps of a job, for TensorBoard or Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_BEFORE = 2
"""Steps that are not looked at: the first compiles, the second still waits for its data."""


class Profiler:
    """Looks at the steps from the third one of a run on; `with` ends it, however the steps end."""

    def __init__(self, directory: Path, count: int, tell: Callable[[str], None]):
        """Begin later.

        Args:
          directory: to write into.
          count: of steps; 0 for none.
          tell: called with a line where there are not so many.
        """
        self._directory, self._count, self._tell = directory, count, tell
        self._waiting, self._seen, self._is_on = _BEFORE, 0, False

    def before_step(self) -> None:
        """Called before every step."""
        if self._waiting:
            self._waiting -= 1
        elif self._seen < self._count and not self._is_on:
            jax.profiler.start_trace(str(self._directory))
            self._is_on = True

    def after_step(self, metrics: Any) -> None:
        """Called when a step is under way; its metrics are waited for if it is the last one to be looked at."""
        if not self._is_on:
            return
        self._seen += 1
        if self._seen == self._count:
            jax.block_until_ready(metrics)
            self._stop()

    def end(self) -> None:
        """There are no more steps, and what has been done is computed."""
        self._stop()
        if self._seen < self._count:
            found = f"of {self._seen} steps alone" if self._seen else "not written"
            self._tell(f"the profile is {found}: this run was over; it begins behind the first {_BEFORE} steps")

    def _stop(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
