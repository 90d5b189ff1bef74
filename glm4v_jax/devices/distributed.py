"""Several processes as one program: TPU pods, Slurm, GKE, or machines where somebody starts it by hand.

Every process runs the same program on the host and holds some of the mesh's devices, so all of them must come to the
same decisions: `agree` checks what they were given, `to_host` reads what their devices hold together. Only the first
process writes text, and what ends one of them ends all (`failure`).
"""

import contextlib
import functools
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm4v_jax import errors
from glm4v_jax.devices import coordination
from glm4v_jax.devices.failure import print_error, report_with, watch
from glm4v_jax.devices.launchers import launcher
from glm4v_jax.errors import ConfigError, MessageError, counted, one_line

START_SECONDS = 300
"""How long processes wait for each other to start."""
HEARTBEAT_SECONDS = 25
"""A process that is not heard of for this time counts as dead, and the others end."""

_SHUTDOWN_SECONDS = 60
_SILENT_SECONDS = 10
"""How long processes wait for each other without a word."""
_PAUSE = 0.05
_COUNT = "glm4v_jax/count"


def init_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = START_SECONDS,
    tell: Callable[[str], None] = print_error,
) -> bool:
    """Join the other processes of this program; call it before anything else of JAX.

    Without arguments, Cloud TPU, Slurm, Open MPI and Kubernetes say how many processes there are and which this is; see
    `jax.distributed.initialize`. Where none of them is found, this is the only process.

    From here on an exception that nobody catches ends all processes, and so does the death of one of them. `sys.exit`
    ends this one alone, while the others may wait for it; `failure.fail` ends all.

    Args:
      coordinator: HOST:PORT of the first process, where its port is free.
      num_processes: how many there are; 1 joins nobody, whatever the environment says.
      process_id: which this is, from 0.
      timeout: seconds to wait for the others.
      tell: what to do with the message that a process ends with, its own or another's; by default it is printed on
        standard error.

    Returns:
      Whether there are several.

    Raises:
      ConfigError: the arguments contradict each other or the other processes', the coordinator cannot be reached, or
        JAX has been used already.
    """
    if num_processes == 1 and process_id in (None, 0):
        return False
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    known = launcher()
    if known is None:
        if all(value is None for value in given.values()):
            return False
        if missing := [name for name, value in given.items() if value is None]:
            raise ConfigError(
                f"{', '.join(missing)}: found nothing; expected coordinator (HOST:PORT), num_processes and process_id "
                "together, outside of Cloud TPU, Slurm, Open MPI and Kubernetes"
            )
    _check_arguments(coordinator, num_processes, process_id)
    if has_joined():
        raise ConfigError("init_distributed: found processes that have joined already; expected one call")
    # The service for preemptions would catch SIGTERM, and the process would not end.
    jax.config.update("jax_enable_preemption_service", False)
    note = threading.Timer(_SILENT_SECONDS, _say_waiting, (timeout,))
    note.daemon = True
    note.start()
    try:
        if coordinator is not None and process_id is not None:
            _check_coordinator(coordinator, process_id, timeout)
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )  # fmt: skip
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        if coordinator is None and num_processes is None and process_id is None:
            return False  # it looked like a launcher, but says nothing of processes
        raise ConfigError(f"processes of {known or coordinator}: found {error}; expected to join them") from error
    except RuntimeError as error:
        raise ConfigError(
            f"processes of {known or coordinator}: found {' '.join(str(error).split())}; expected to join them"
        ) from error
    finally:
        note.cancel()
    report_with(tell)
    if coordination.process_count() == 1:
        return False
    watch()
    _check_count(timeout)
    return True


def has_joined() -> bool:
    """Whether `init_distributed` has found others, from its call until `leave`."""
    return jax.distributed.is_initialized()


def leave() -> None:
    """Wait for the others to come to their end too, and part."""
    jax.distributed.shutdown()


def several() -> bool:
    """Whether there are other processes, so that what this one decides by itself they would not know of."""
    return jax.process_count() > 1


def spans_processes(mesh: Mesh) -> bool:
    """Whether several processes hold devices of a mesh, so that all of them must run its programs."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def is_first() -> bool:
    """Whether this is the process that writes text; the only one always is."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """A tree of device arrays in NumPy, each as a whole.

    Where processes hold parts of them they put them together, so all of them must call this.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    split = [leaf for leaf in leaves if not (leaf.is_fully_addressable or leaf.is_fully_replicated)]
    if split:
        tree = _gather(split[0].sharding.mesh)(tree)
    return jax.tree.map(np.asarray, tree)


def agree(name: str, given: Any = None, error: str | None = None) -> str | None:
    """Check that all processes were given the same; every one of them calls this at the same place of the program.

    What was given, which has a name in the error, is compared by its `repr`; `error` is why this process cannot use it.
    Returns the first of the processes' errors; MessageError if what they were given is not the same in all of them.
    """
    if not several():
        return error
    everyone = gathered([hashlib.blake2b(repr(given).encode(), digest_size=16).hexdigest(), error])
    errors = [(process, error) for process, (_, error) in enumerate(everyone) if error is not None]
    if errors:
        process, message = errors[0]
        return message if len(errors) == len(everyone) else f"{message} (in process {process})"
    if (different := next((i for i, one in enumerate(everyone) if one != everyone[0]), None)) is not None:
        raise MessageError(
            f"{name}: found another in process {different} than in process 0; expected the same in all processes"
        )
    return None


@contextlib.contextmanager
def errors_of_all() -> Iterator[None]:
    """Raise an error of the body in all processes; each runs it by itself, without waiting for another.

    It is for what comes before they compute together, such as reading files. Where a caller caught the error of one
    process, the others would wait for it without end. All processes call this.

    >>> with errors_of_all():
    ...     raise ConfigError("steps: found 0; expected at least 1")
    Traceback (most recent call last):
      ...
    glm4v_jax.errors.ConfigError: steps: found 0; expected at least 1

    Raises:
      Glm4vError: an error of the first process that has one, of the same class, or of the closest one in `errors`; in
        that process, the error itself.
    """
    try:
        yield
    except BaseException as error:  # an interrupt too: the others are waiting
        gathered([[kind.__name__ for kind in type(error).__mro__], one_line(error) or type(error).__name__])
        raise
    for process, found in enumerate(gathered(None)):
        if found is not None:
            kinds, message = found
            kind = next((getattr(errors, kind) for kind in kinds if hasattr(errors, kind)), errors.Glm4vError)
            raise kind(f"{message} (in process {process})")


def check_devices(mesh: Mesh) -> None:
    """Check that every process holds devices of a mesh: one without any could not run its programs.

    Raises:
      ConfigError: some hold none.
    """
    holders = {device.process_index for device in mesh.devices.flat}
    if idle := sorted(set(range(jax.process_count())) - holders):
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        raise ConfigError(
            f"mesh {sizes or 'of one device'}: found no device of process {idle[0]}; expected some of each of "
            f"{jax.process_count()} processes, which have {counted(jax.device_count(), 'device')}"
        )


def shared(values: np.ndarray) -> np.ndarray:
    """The first process's values, in all of them; the shapes must be equal."""
    return np.asarray(multihost_utils.broadcast_one_to_all(values)) if several() else values


def any_of(flag: bool) -> bool:
    """Whether it is so in any process; all of them call this."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if several() else flag


def gathered(value: Any) -> list[Any]:
    """What JSON can say, from every process, in their order; all of them call this."""
    if not several():
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(own.size))
    # Each size is a program to compile: in learning by reward it was one a step.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: own.size] = own
    everyone = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(text[:size])) for text, size in zip(everyone, sizes, strict=True)]


def _say_waiting(seconds: int) -> None:
    print(f"waiting for the other processes to start, for up to {seconds} s", file=sys.stderr, flush=True)  # noqa: T201


def _check_arguments(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"coordinator: found {coordinator!r}; expected HOST:PORT")
    if num_processes is not None and num_processes < 1:
        raise ConfigError(f"num_processes: found {num_processes}; expected at least 1")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        last = "" if num_processes is None else f" to {num_processes - 1}, for num_processes={num_processes}"
        raise ConfigError(f"process_id: found {process_id}; expected 0{last}")


def _check_coordinator(coordinator: str, process_id: int, timeout: int) -> None:
    """Find beforehand what JAX would end the process for without saying why."""
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    if process_id == 0:
        try:
            with socket.create_server(("", int(port))):
                return
        except OSError as error:
            raise ConfigError(
                f"coordinator: found port {port} in use ({error.strerror}); expected one that is free"
            ) from error
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=max(1, min(10, timeout))):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"coordinator: found nobody at {coordinator} for {timeout} s ({error.strerror or error}); expected "
                    "the process with process_id 0"
                ) from error
        time.sleep(_PAUSE)


def _check_count(timeout: int) -> None:
    """Check that all processes were started with the same number: they would wait for each other for ever."""
    count = coordination.process_count()
    if coordination.process_index() == 0:
        coordination.put(_COUNT, str(count))
    first = coordination.wait_for(_COUNT, timeout)
    if first != str(count):
        raise ConfigError(f"num_processes: found {count}; expected {first}, as process 0 was started with")


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    """A program that replicates a whole tree in one dispatch; `process_allgather` runs one for each array."""
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
