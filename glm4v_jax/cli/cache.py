"""`glm4v cache`: which compiled programs are kept, and an end to them."""

import collections
import dataclasses
import datetime
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from glm4v_jax.devices.compilation_cache import (
    DIRECTORY,
    CachedProgram,
    cached_programs,
    clear,
    size_bound,
    user_directory,
)
from glm4v_jax.errors import ConfigError
from glm4v_jax.files import size_text

_SHOWN = 12
"""Names of programs in the table; of what else is in the directory, half as many."""


@dataclasses.dataclass
class Cache:
    """Show the compiled programs that are kept from one call to the next, or clear them.

    The directory is $JAX_COMPILATION_CACHE_DIR, or glm4v_jax/xla in the user's cache directory. A program that is not
    there is compiled again: clearing costs time and nothing else.
    """

    clear: bool = False
    """Delete the programs. Files that JAX did not write stay."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object: bytes, and seconds since 1970."""

    debug: bool = False
    """Show the whole traceback of an error."""

    def run(self) -> None:
        """Looks, deletes if asked to, and prints."""
        directory = _directory()
        programs = cached_programs(directory)
        left = clear(directory) if self.clear else None
        if self.as_json:
            print(json.dumps(_as_object(directory, programs, left)))
        elif left is None:
            _print_programs(directory, programs)
        else:
            print(f"{directory}: deleted {_summary(programs)}")
            if left:
                names = ", ".join(path.name for path in left[: _SHOWN // 2])
                more = f" and {len(left) - _SHOWN // 2} more" if len(left) > _SHOWN // 2 else ""
                print(f"left alone, not written by JAX: {names}{more}")


def _directory() -> pathlib.Path:
    """Where the programs are, whether or not there are any yet.

    Raises:
      ConfigError: the environment switches the cache off, or names something else than a directory.
    """
    named = os.environ.get(DIRECTORY)
    if named is None:
        return user_directory()
    if not named:
        raise ConfigError(f"${DIRECTORY} is empty, which means no cache; expected a directory, or no such variable")
    if "://" in named and not named.startswith("file://"):
        raise ConfigError(f"${DIRECTORY} is {named}; expected a directory of this machine")
    directory = pathlib.Path(named.removeprefix("file://"))
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"${DIRECTORY} is {named}, a file; expected a directory")
    return directory


def _as_object(
    directory: pathlib.Path, programs: Sequence[CachedProgram], left: Sequence[pathlib.Path] | None
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "directory": str(directory),
        "programs": len(programs),
        "bytes": sum(program.size for program in programs),
        "max_bytes": size_bound(),
        "least_recently_used": programs[0].used if programs else None,
        "most_recently_used": programs[-1].used if programs else None,
        "cleared": left is not None,
    }
    if left is not None:
        told["left"] = [path.name for path in left]
    return told


def _print_programs(directory: pathlib.Path, programs: Sequence[CachedProgram]) -> None:
    bound = size_bound()
    print(directory)
    print(f"{_summary(programs)}; {'no bound' if bound is None else f'at most {size_text(bound, 1)}'}")
    if not programs:
        return
    print(f"used from {_day(programs[0].used)} (the oldest) to {_day(programs[-1].used)} (the newest)")
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    for program in programs:
        counts[program.name] += 1
        sizes[program.name] += program.size
    print()
    for name, size in sizes.most_common(_SHOWN):
        print(f"  {counts[name]:>6} {name:<32} {size_text(size, 1):>10}")
    if len(sizes) > _SHOWN:
        rest = [name for name, _ in sizes.most_common()[_SHOWN:]]
        print(
            f"  {sum(counts[name] for name in rest):>6} {f'of {len(rest)} other names':<32} "
            f"{size_text(sum(sizes[name] for name in rest), 1):>10}"
        )


def _summary(programs: Sequence[CachedProgram]) -> str:
    size = size_text(sum(program.size for program in programs), 1)
    return f"{len(programs)} program{'s' * (len(programs) != 1)}, {size}"


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
