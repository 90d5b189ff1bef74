"""The plug-in for vLLM on TPUs (vLLM and tpu-inference 0.32.0): vLLM serves, and this package's model computes.

vLLM calls `register` in each of its processes, by the entry point group `vllm.general_plugins`. It imports neither vLLM
nor PyTorch nor JAX; `model` is imported when an engine looks for the class of a checkpoint of the family.

- `model`: the class that tpu-inference's runner loads and calls.
- `media`: images and videos of a step, from vLLM's tensors to vision features.
- `settings`: `--additional-config`, and what of vLLM's options is refused.
"""

import importlib.metadata
import importlib.util
import logging
import sys
from types import ModuleType
from typing import Any

VERSIONS = {"vllm-tpu": "0.32.0", "tpu-inference": "0.32.0"}
"""The releases that the plug-in is written for: what it replaces in tpu-inference is not part of an interface."""

CLASSES = ("Glm4vForConditionalGeneration", "GlmOcrForConditionalGeneration")
"""`architectures` of the dense models of the family that vLLM has processors for (vLLM 0.32's
`model_executor/models/registry.py`)."""

_LOADER = "tpu_inference.models.common.model_loader"
_TABLE, _LOOK_UP = "_MODEL_REGISTRY", "_get_model_architecture"

_log = logging.getLogger("vllm.glm4v_jax")  # a child of vLLM's logger, whose handlers it has


def register() -> None:
    """Have tpu-inference run models of the family by this package; the entry point of `vllm.general_plugins`.

    Where vLLM and tpu-inference have other versions than `VERSIONS`, it logs that, and vLLM's own classes serve. Where
    there is no tpu-inference, as for vLLM on GPUs, it does nothing. It may be called any number of times.

    >>> register()
    """
    found = {name: _version(name) for name in VERSIONS}
    if found["tpu-inference"] is None:
        return
    if found != VERSIONS:
        _serve_without(_listed(found), _listed(VERSIONS))
    elif (module := sys.modules.get(_LOADER)) is not None:
        _extend(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """Extends tpu-inference's loader when it is imported: to import it here would import JAX in every process."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find that module as the other finders do."""
        if name != _LOADER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _extend(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _extend(module: ModuleType) -> None:
    """Add the classes to the table of tpu-inference's loader, once anything is looked up in it."""
    table, look_up = getattr(module, _TABLE, None), getattr(module, _LOOK_UP, None)
    if not isinstance(table, dict) or not callable(look_up):
        _serve_without(f"no {_TABLE} and {_LOOK_UP} in {_LOADER}", "both")
    elif not hasattr(look_up, "glm4v_jax"):

        def with_family(config: Any) -> Any:
            # Only now: with several hosts, JAX must not start before Ray's workers are set up.
            from glm4v_jax.serve.vllm_plugin.model import Glm4vForVllm

            table.update(dict.fromkeys(CLASSES, Glm4vForVllm))
            return look_up(config)

        with_family.glm4v_jax = True  # type: ignore[attr-defined]
        setattr(module, _LOOK_UP, with_family)
        _log.info("glm4v_jax serves %s", " and ".join(CLASSES))


def _serve_without(found: str, expected: str) -> None:
    _log.warning(
        "glm4v_jax: found %s; expected %s: vLLM's own classes serve GLM-4V models. Install 'glm4v_jax[vllm-tpu]'.",
        found, expected,
    )  # fmt: skip


def _listed(versions: dict[str, Any]) -> str:
    return " and ".join(f"{name} {version or '(not installed)'}" for name, version in versions.items())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
