"""`glm4v doctor`: what a bug report needs to say about a machine and an installation."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import sys
from typing import Any

from glm4v_jax import __version__
from glm4v_jax.cli.cache import cache_directory
from glm4v_jax.console.extras import extras, requirements
from glm4v_jax.console.options import DEFAULT_MODEL
from glm4v_jax.console.program import JsonOptions
from glm4v_jax.console.table import print_table
from glm4v_jax.devices.compilation_cache import cache_files, size_bound
from glm4v_jax.devices.hardware import missing_device
from glm4v_jax.devices.memory import Memory, cgroup_memory, device_free, host_memory
from glm4v_jax.errors import ConfigError, counted, one_line
from glm4v_jax.files import decimal_size, size_text, to_json

PLUGINS = ("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin", "libtpu")
"""Packages with JAX's native code; those of a machine's devices are installed."""
DECODERS = ("decord", "av")
VARIABLES = ("CUDA_", "GLM4V_", "HF_HOME", "HF_HUB_CACHE", "JAX_", "LIBTPU_", "NVIDIA_", "TPU_", "XLA_")
"""Beginnings of names of environment variables that matter."""


@dataclasses.dataclass(kw_only=True)
class Doctor(JsonOptions):
    """Show versions, devices, memory, caches, extras and decoders: what a bug report needs.

    No model is loaded, and nothing is sent anywhere.
    """

    def run(self) -> None:
        """Look, and print."""
        found: dict[str, Any] = {
            "glm4v_jax": __version__,
            "python": f"{platform.python_version()}, {sys.executable}",
            "system": platform.platform(),
            "packages": {name: _version(name) for name in (*requirements(), *PLUGINS)},
            "devices": _devices(),
            "memory": [dataclasses.asdict(memory) for memory in (host_memory(), cgroup_memory()) if memory],
            "cache": _cache(),
            "extras": {
                extra: [package for package in packages if _version(package) is None]
                for extra, packages in extras().items()
            },
            "decoders": {name: _version(name) for name in DECODERS},
            "model": DEFAULT_MODEL,
            "hub": _hub(),
            "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
        }
        if self.as_json:
            print(to_json(found))
        else:
            print_table(("", ""), _rows(found), header=False)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    """The devices that JAX finds; or why it finds none."""
    if (line := missing_device()) is not None:
        return {"error": line}
    import jax

    listed = []
    for device in jax.local_devices():
        memory = device_free(device)
        listed.append({
            "id": device.id, "platform": device.platform, "kind": device.device_kind,
            "free": None if memory is None else memory.free, "total": None if memory is None else memory.total,
        })  # fmt: skip
    return {"backend": jax.default_backend(), "count": jax.device_count(), "local": listed}


def _cache() -> dict[str, Any]:
    """The cache of compiled programs; or why there is none."""
    try:
        directory, bound = cache_directory(), size_bound()
        files = cache_files(directory)
        nbytes = sum(path.stat().st_size for path in files)
    except (ConfigError, OSError) as error:
        return {"error": one_line(error)}
    return {"directory": str(directory), "files": len(files), "bytes": nbytes, "max_bytes": bound}


def _hub() -> dict[str, Any]:
    """The local Hugging Face cache, and the models of this family that it has."""
    from huggingface_hub import constants

    directory = pathlib.Path(constants.HF_HUB_CACHE)
    names = [path.name.removeprefix("models--").replace("--", "/") for path in sorted(directory.glob("models--*"))]
    return {"directory": str(directory), "models": [name for name in names if "glm" in name.lower()]}


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of a table."""
    rows = [(name, found[name]) for name in ("glm4v_jax", "python", "system")]
    rows.append(("packages", _pairs(found["packages"])))
    devices = found["devices"]
    if "error" in devices:
        rows.append(("devices", devices["error"]))
    else:
        rows.append(("devices", f"{devices['count']} of {devices['backend']}"))
    for device in devices.get("local", ()):
        memory = ""
        if device["total"] is not None:
            memory = f", {_memory(Memory('', device['free'], device['total']))}"
        rows.append(("", f"{device['id']}: {device['kind']}{memory}"))
    rows += [(memory["place"], _memory(Memory(**memory))) for memory in found["memory"]]
    cache = found["cache"]
    if "error" in cache:
        rows.append(("compiled programs", cache["error"]))
    else:
        files = counted(cache["files"], "file")
        rows.append(("compiled programs", f"{cache['directory']}: {files}, {size_text(cache['bytes'], 1)}"))
    for extra, missing in found["extras"].items():
        rows.append((f"extra {extra}", f"missing: {', '.join(missing)}" if missing else "complete"))
    rows.append(("decoders", _pairs(found["decoders"])))
    rows.append(("default model", found["model"]))
    rows.append(("Hugging Face", f"{found['hub']['directory']}: {', '.join(found['hub']['models']) or 'no GLM model'}"))
    rows += [(f"${name}", value) for name, value in found["environment"].items()]
    return rows


def _pairs(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())


def _memory(memory: Memory) -> str:
    total = "" if memory.total is None else f" of {decimal_size(memory.total, 1)}"
    return f"{decimal_size(memory.free, 1)} free{total}"
