"""The programs that stand on this package: found by name, with a line where they cannot be had.

Each has an extra of its name in pyproject.toml, if it takes packages that this one does not.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence

from glm4v_jax.errors import ConfigError

STANDING_ON_THIS = ("convert", "train", "eval")
EXTRAS = ("train", "eval")
"""Those with an extra."""
TROUBLE = 2
"""Exit status where a program cannot be had, as for options that it does not know: 1 may be an answer."""


def main_of(name: str) -> Callable[..., int]:
    """`main` of a program.

    Args:
      name: one of `STANDING_ON_THIS`.

    Raises:
      ConfigError: packages of its extra are missing, or something else has its name.
    """
    found = importlib.util.find_spec(name)
    # Not imported to find out: somebody's script would run.
    if found is not None and found.submodule_search_locations is None:
        raise ConfigError(_hidden(name, found.origin))
    try:
        return importlib.import_module(f"{name}.commands").main
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == name:
            raise ConfigError(_hidden(name, None if found is None else found.origin)) from error
        if (line := missing(error, name)) is None:
            raise
        raise ConfigError(line) from error


def run_module(name: str, arguments: Sequence[str] | None = None) -> int:
    """`python -m NAME`; returns the exit status, `TROUBLE` after a line that says why it cannot be had."""
    try:
        main = main_of(name)
    except ConfigError as error:
        sys.stderr.write(f"{name}: error: {error}\n")
        return TROUBLE
    return main(arguments)


def missing(error: ModuleNotFoundError, program: str) -> str | None:
    """What to do about a package that a program has not found; None where no extra of it brings that."""
    root = (error.name or "").partition(".")[0]
    if program not in EXTRAS or root in ("", "glm4v_jax", *STANDING_ON_THIS):
        return None
    return f"found no package {root}; {program} needs the {program} extra: pip install '.[{program}]'"


def _hidden(name: str, place: str | None) -> str:
    where = f"{place}: has the name of" if place else f"{name}: found nothing in the place of"
    return f"{where} the package {name} of glm4v_jax, and hides it; rename it, or call from another directory"
