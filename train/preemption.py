"""SIGTERM, with which a machine that is taken away announces it, heard by all processes of a job."""

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
    """Whether any process has been asked to stop; all of them ask at the same places, and hear the same.

    Inside `with`, SIGTERM does not end the process, but is kept for them to hear of.
    """

    def __init__(self, mesh: Mesh):
        """Hear nothing yet; `mesh` has devices of all processes."""
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._is_asked = False
        # What the last two calls of `ask` come to.
        self._answers: list[Any] = [False, False]

    def ask(self) -> None:
        """Ask all processes, behind a step that is under way: nobody waits."""
        answer: Any = self._is_asked
        if several():
            flags = jax.make_array_from_callback((self._sharding.mesh.size,), self._sharding, self._flag)
            answer = _any(flags)
        self._answers = [self._answers[1], answer]

    def is_heard(self) -> bool:
        """Of several processes, what was found at the call of `ask` before the last one, whose step is done."""
        return bool(np.asarray(self._answers[0])) if several() else self._is_asked

    def is_asked_now(self) -> bool:
        """Ask all processes, and wait for them."""
        return any_of(self._is_asked)

    def __enter__(self) -> "Stopping":
        self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._is_asked = True

    def _flag(self, index: Any) -> np.ndarray:
        del index
        return np.array([self._is_asked])


@jax.jit
def _any(flags: Bool[Array, "D"]) -> Bool[Array, ""]:
    return jnp.any(flags)
