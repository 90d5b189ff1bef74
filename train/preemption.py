"""SIGTERM, with which a machine announces that it will be taken away: every process of a job learns of it.

`with Stopping(mesh)` keeps SIGTERM from ending the process.
"""

import signal
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from glm4v_jax.devices.distributed import any_of, several


class Stopping:
    """Whether any process has been asked to stop; all of them ask at the same places, and get the same answer."""

    def __init__(self, mesh: Mesh):
        """Begin without a signal; `mesh` has devices of all processes."""
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._is_signalled = False
        # Results of the last two calls of `ask`.
        self._answers: list[Any] = [False, False]

    def ask(self) -> None:
        """Ask all processes, after a step that is under way, without waiting."""
        answer: Any = self._is_signalled
        if several():
            flags = jax.make_array_from_callback((self._sharding.mesh.size,), self._sharding, self._flag)
            answer = _any(flags)
        self._answers = [self._answers[1], answer]

    def is_asked(self) -> bool:
        """Return the answer; of several processes, to the call of `ask` before the last one, whose step is done."""
        return bool(np.asarray(self._answers[0])) if several() else self._is_signalled

    def is_asked_now(self) -> bool:
        """Ask all processes, and wait for them."""
        return any_of(self._is_signalled)

    def __enter__(self) -> "Stopping":
        self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._is_signalled = True

    def _flag(self, index: Any) -> np.ndarray:
        del index
        return np.array([self._is_signalled])


@jax.jit
def _any(flags: Bool[Array, "D"]) -> Bool[Array, ""]:
    return jnp.any(flags)
