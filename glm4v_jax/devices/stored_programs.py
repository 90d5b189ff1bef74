"""Executables of jitted functions beside JAX's persistent cache: a later process runs them without tracing.

JAX's cache saves compiling alone: a function is traced and lowered to find its key. For the tiny model that is three
quarters of the time to the first token of an image. Here the key is made of what a trace depends on: this package's
sources, versions, JAX's settings, devices, cores, static arguments, and the shapes, dtypes and shardings of the others.

Off until `use_stored_programs`: a process that patches modules, as tests do, would store what its key does not say.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import pickle
import platform
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import numpy as np

from glm4v_jax.devices.cache_bound import with_bound
from glm4v_jax.devices.program_limit import COMPILED, OTHER_PROGRAMS

_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TF_XLA_FLAGS")
_SOURCES = pathlib.Path(__file__).parents[1]
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_logger = logging.getLogger(__name__)
_is_used = False
_useless: set[str] = set()
"""Names of files that cannot be read here."""

_Program: TypeAlias = concurrent.futures.Future[jax.stages.Compiled | None]


def use_stored_programs() -> None:
    """Store and read executables from now on, if JAX's persistent cache is used and this is the only process of a job.

    The command line calls this. It takes effect on CPUs alone. The files lie in the directory of JAX's cache, under its
    bound; where it has none, in a directory below it that has one (`cache_bound`): every change of a source adds some.
    Like JAX's own they are code: whoever can write there runs programs as this user.
    """
    global _is_used
    _is_used = True
    _loaded_sources()


def is_used() -> bool:
    """Whether executables are stored in this process."""
    return _is_used and _is_possible()


def stored(*static: str) -> Callable[[Any], "StoredProgram"]:
    """Decorate a jitted function, whose static arguments have these names and are given by name."""
    return lambda jitted: StoredProgram(jitted, static)


class Kinds(tuple[Hashable, ...]):
    """What a trace depends on of several arguments; hashed once, so that those of a model can be kept beside it."""

    _hash: int
    is_traced: bool
    """whether one of them is being traced, or is no array"""

    @classmethod
    def of(cls, leaves: Iterable[Any]) -> "Kinds":
        """Describe these arrays."""
        kinds = cls(map(_kind, leaves))
        kinds.is_traced = None in kinds
        kinds._hash = tuple.__hash__(kinds)
        return kinds

    def __hash__(self) -> int:
        return self._hash


class WithKinds:
    """An argument with many arrays, which never change, and which it describes once."""

    leaves: list[Any]

    @functools.cached_property
    def kinds(self) -> Kinds:
        """Of its arrays."""
        return Kinds.of(self.leaves)


class StoredProgram:
    """A jitted function whose executables are stored; attributes such as `lower` are those of the function.

    >>> double = StoredProgram(jax.jit(lambda x: 2 * x))
    >>> double(np.float32(3)).item()
    6.0
    """

    def __init__(self, jitted: Any, static: tuple[str, ...] = ()):
        functools.update_wrapper(self, jitted)
        self._jitted, self._static = jitted, static
        self._lock = threading.Lock()
        self._programs: dict[Hashable, _Program] = {}
        OTHER_PROGRAMS.append(self._programs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function as `jax.jit` would."""
        call = self._described(args, kwargs) if is_used() else None
        if call is None:
            return self._jitted(*args, **kwargs)
        # Without a result a file was of no use, which the second call does not read again.
        program = self._program(call, args, kwargs).result() or self._program(call, args, kwargs).result()
        assert program is not None
        return program(*args, **call.dynamic)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Trace the program that a call with such arguments will run, and compile it in another thread, or read it."""
        call = self._described(args, kwargs) if is_used() else None
        if call is not None:
            self._program(call, args, kwargs, _threads().submit)

    def _described(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Call | None":
        dynamic = {name: value for name, value in kwargs.items() if name not in self._static}
        leaves, tree = jax.tree.flatten((args, dynamic))
        parts = (
            arg.kinds if isinstance(arg, WithKinds) else Kinds.of(jax.tree.leaves(arg)) for arg in (*args, dynamic)
        )
        kinds = tuple(parts)
        if any(part.is_traced for part in kinds):  # inside another program
            return None
        static = tuple((name, kwargs[name]) for name in self._static if name in kwargs)
        return _Call(dynamic, leaves, (tree, kinds, static, _trace_context()))

    def _program(
        self,
        call: "_Call",
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Callable[[Callable[[], None]], Any] = lambda work: work(),
    ) -> "_Program":
        """The program, which may still be read or compiled; the result is None if what was read is of no use here."""
        with self._lock:
            known = self._programs.get(call.key)  # at once: `drop_programs` clears them in any thread
            if known is not None:
                return known
            program = self._programs[call.key] = _Program()
        try:
            name = self._file_name(call)
            data = None if name is None or name in _useless else _from_cache(name)
            if name is not None and data is not None:
                get = functools.partial(self._read, call, name, data)
            else:
                get = functools.partial(self._compiled, self._jitted.lower(*args, **kwargs), name)
        except BaseException:
            self._programs.pop(call.key, None)
            raise

        def work() -> None:
            try:
                found = get()
                if found is None:
                    self._programs.pop(call.key, None)
                program.set_result(found)
            except BaseException as error:
                self._programs.pop(call.key, None)
                program.set_exception(error)

        run(work)
        return program

    def _read(self, call: "_Call", name: str, data: bytes) -> jax.stages.Compiled | None:
        """The executable in the cache; None if it is of no use here."""
        from jax.experimental import serialize_executable

        start = time.perf_counter()
        function = f"jit({self._jitted.__name__})"
        jax.monitoring.record_scalar(COMPILED, 0, fun_name=function)  # as where JAX reads from its cache
        try:
            executable, outputs = pickle.loads(zlib.decompress(data))
            devices = _devices(call.leaves)
            return serialize_executable.deserialize_and_load(
                executable, call.key[0], jax.tree.structure(outputs), devices[0].client, devices
            )
        except Exception as error:  # cut off, or written by something else
            _logger.log(
                logging.DEBUG if _useless else logging.WARNING,  # one line, however many there are
                "%s-cache in the cache of programs: found %s; expected an executable; it is compiled again", name,
                error,
            )  # fmt: skip
            _useless.add(name)
            _remove(name)
            return None
        finally:
            jax.monitoring.record_event_duration_secs(COMPILED, time.perf_counter() - start, fun_name=function)

    def _compiled(self, lowered: jax.stages.Lowered, name: str | None) -> jax.stages.Compiled:
        """The executable, compiled and stored."""
        from jax.experimental import serialize_executable

        cache = _cache()
        if name is None or cache is None:
            return lowered.compile()
        compiled = _compiled_anew(lowered, name)
        if _sources() != _loaded_sources():  # edited since: the modules in memory are neither these nor those
            return compiled
        try:
            executable, _, tree = serialize_executable.serialize(compiled)
            outputs = jax.tree.unflatten(tree, [0] * tree.num_leaves)
            cache.put(name, zlib.compress(pickle.dumps((executable, outputs)), 1))
        except Exception as error:  # a backend that cannot, a full disk
            _logger.debug("%s is not stored: %s", self._jitted.__name__, error)
        return compiled

    def _file_name(self, call: "_Call") -> str | None:
        """The key in the cache; None where what the program depends on has no text of its own, such as a function."""
        tree, kinds, static, context = call.key
        own = [repr(part) for part in context if type(part).__name__ != "AxisEnv"]
        devices = [(repr(device), device.device_kind) for device in _devices(call.leaves)]
        text = repr((_machine(devices[0][1]), devices, str(tree), kinds, static, own))
        if _ADDRESS.search(text):
            return None
        name = self._jitted.__name__
        return f"glm4v_{name}-{hashlib.sha256(text.encode()).hexdigest()}"


def _compiled_anew(lowered: jax.stages.Lowered, name: str) -> jax.stages.Compiled:
    """Compile past JAX's cache, which would keep the same once more.

    XLA for CPUs does not serialise whole what it has read ("Function not found" when that runs): there a pass to
    be left out, which does not exist, gives the program a key of its own.
    """
    from jax._src import config

    is_cpu = jax.default_backend() == "cpu"
    with config.persistent_cache_min_compile_time_secs(float("inf")):
        return lowered.compile({"xla_disable_hlo_passes": name} if is_cpu else None)


class _Call(NamedTuple):
    """Arguments of a call: those that are not static by name, the leaves of all, and all that a trace depends on."""

    dynamic: dict[str, Any]
    leaves: list[Any]
    key: tuple[Any, tuple[Kinds, ...], tuple[Any, ...], tuple[Any, ...]]


def _kind(leaf: Any) -> Hashable:
    """What a trace depends on of an argument; None for one that is being traced, or is no array."""
    if isinstance(leaf, jax.core.Tracer):
        return None
    if isinstance(leaf, jax.Array):
        # Not `aval`: JAX 0.12 compares it by identity, and a result of an executable that was read has one of its own.
        return leaf.shape, leaf.dtype, leaf.weak_type, leaf.format if _has_layouts() else leaf.sharding
    return (leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray | np.generic) else None


def _devices(leaves: list[Any]) -> list[jax.Device]:
    """The devices that a program runs on, in their order."""
    shardings = [leaf.sharding for leaf in leaves if isinstance(leaf, jax.Array)]
    for sharding in shardings:
        if isinstance(sharding, jax.sharding.NamedSharding):
            return list(sharding.mesh.devices.flat)
    return sorted(shardings[0].device_set, key=lambda device: device.id) if shardings else jax.devices()[:1]


def _trace_context() -> tuple[Any, ...]:
    """JAX's settings that traces depend on: those of this thread, the mesh and its rules among them."""
    from jax._src import config  # where it is used: a release that moves it breaks no import of this package

    return cast(tuple[Any, ...], config.trace_context())


def _cache() -> Any:
    """JAX's persistent cache, with `get` and `put`; None if it is not used, or this JAX has another."""
    if not jax.config.jax_enable_compilation_cache or not jax.config.jax_compilation_cache_dir:
        return None
    try:
        from jax._src import compilation_cache

        _trace_context()
        return with_bound(compilation_cache._get_cache(jax.devices()[0].client))
    except Exception as error:
        _logger.debug("programs are not stored: %s", error)
        return None


def _from_cache(name: str) -> bytes | None:
    """What JAX's cache has under this name; None where it cannot be read: that costs a compilation, and no request."""
    cache = _cache()
    try:
        data: bytes | None = None if cache is None else cache.get(name)
    except Exception as error:  # a lock held for long, or a full disk: a bounded cache notes when a file was used
        _logger.debug("%s is not read from the cache of programs: %s", name, error)
        return None
    return data


def _remove(name: str) -> None:
    """Remove a file of JAX's cache, which replaces none."""
    path = getattr(_cache(), "path", None)
    if path is not None:
        with contextlib.suppress(OSError):
            (path / f"{name}-cache").unlink()


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """Compilers: a program takes one core for most of the time."""
    return concurrent.futures.ThreadPoolExecutor(_cores(), thread_name_prefix="compile")


@functools.cache
def _is_possible() -> bool:
    # On accelerators this has not been run yet; JAX's own cache works there as before.
    if "xla_disable_hlo_passes" in os.environ.get("XLA_FLAGS", ""):  # `_compiled_anew` would set them anew
        return False
    if next(_SOURCES.rglob("*.py"), None) is None:  # bytecode alone, whose changes the key would not show
        return False
    return jax.default_backend() == "cpu" and jax.process_count() == 1 and _cache() is not None


@functools.cache
def _has_layouts() -> bool:
    """Whether arrays lie in several orders here."""
    return jax.default_backend() != "cpu"


def _sources() -> str:
    """A hash of this package's sources on disk."""
    sources = hashlib.sha256()
    for path in sorted(_SOURCES.rglob("*.py")):
        sources.update(path.read_bytes())
    return sources.hexdigest()


@functools.cache
def _loaded_sources() -> str:
    """The hash when this process enabled `use_stored_programs`, near the import of the modules."""
    return _sources()


def _cores() -> int | None:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@functools.cache
def _machine(device_kind: str) -> str:
    """Everything outside of the call that decides what is compiled: code, versions, settings, processor and cores."""
    versions: Mapping[str, Any] = {
        name: getattr(sys.modules.get(name), "__version__", None) for name in ("jax", "jaxlib", "flax", "numpy")
    }
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    client = jax.devices()[0].client
    # XLA divides the work of an operation among as many threads as there are when it compiles.
    processor = [platform.machine(), platform.processor(), _cores()]
    if client.platform == "cpu" and (info := pathlib.Path("/proc/cpuinfo")).exists():
        lines = info.read_text().partition("\n\n")[0].splitlines()
        processor += [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    environment = [os.environ.get(name) for name in _ENVIRONMENT]
    known = (_loaded_sources(), sys.version, versions, sorted(settings.items()), environment, processor)
    return repr((*known, client.platform, client.platform_version, device_kind))
