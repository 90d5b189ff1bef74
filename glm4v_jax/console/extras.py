"""The extras of this package: which packages each brings, and which brings one that is missing."""

import contextlib
import importlib.metadata
import re


def missing(error: ModuleNotFoundError, program: str) -> str | None:
    """What to do about a package that a program did not find; None if no extra brings it."""
    root = (error.name or "").partition(".")[0]
    bringing = [extra for extra, packages in extras().items() if root in map(module_of, packages)]
    if not bringing:
        return None
    extra = program if program in bringing else bringing[0]
    return f"found no package {root}; expected that of the {extra} extra: pip install 'glm4v_jax[{extra}]'"


_MODULES = {
    "scikit-image": "skimage", "scikit-learn": "sklearn", "scikit-video": "skvideo", "tensorboardx": "tensorboardX",
}  # fmt: skip
"""Packages that are imported by another name."""


def module_of(package: str) -> str:
    """The name that a package is imported by."""
    return _MODULES.get(package.lower(), package.replace("-", "_"))


def extras() -> dict[str, list[str]]:
    """Extra -> the packages that it brings, without those of other extras that it includes."""
    every = _required()
    own = {extra: [package for package in packages if package not in every[""]] for extra, packages in every.items()}
    return {extra: packages for extra, packages in own.items() if extra and packages}


def requirements() -> list[str]:
    """The packages that this one needs without any extra, decoders apart."""
    return [package for package in _required()[""] if package not in ("decord", "av")]


def _required() -> dict[str, list[str]]:
    """Extra -> packages, with "" for no extra, from the metadata of this package; nothing where there is none."""
    found: dict[str, list[str]] = {"": []}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("glm4v_jax") or ():
            package, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)", line)
            if package is not None and module_of(package[0]) != "glm4v_jax":
                found.setdefault("" if extra is None else extra[1], []).append(package[0])
    return found
