"""`glm4v cache`: the compiled programs that are kept on disk."""

import contextlib
import dataclasses
import json
import os
import pathlib

from glm4v_jax.console.program import JsonOptions
from glm4v_jax.devices.cache_bound import MAX_BYTES, MAX_SIZE
from glm4v_jax.devices.compilation_cache import DIRECTORY, cache_files, size_bound, user_directory
from glm4v_jax.errors import ConfigError, counted
from glm4v_jax.files import size_text


@dataclasses.dataclass(kw_only=True)
class Cache(JsonOptions):
    """Show the cache of compiled programs, or clear it.

    Prints its directory, number of files, size and bound. The directory is $JAX_COMPILATION_CACHE_DIR, or glm4v_jax/xla
    in the user's cache directory. A program that is not in the cache is compiled again.
    """

    clear: bool = False
    """Delete the files of compiled programs (*-cache and *-atime) in the directory and its glm4v_jax, and no others."""

    def run(self) -> None:
        """Look at the directory, delete if asked to, and print."""
        directory, bound = cache_directory(), size_bound()
        files = cache_files(directory)
        nbytes = 0
        for path in files:
            with contextlib.suppress(FileNotFoundError):  # a running process may delete it meanwhile
                nbytes += path.stat().st_size
        if self.clear:
            for path in files:
                path.unlink(missing_ok=True)
        if self.as_json:
            fields = {"files": len(files), "bytes": nbytes, "max_bytes": bound, "cleared": self.clear}
            print(json.dumps({"directory": str(directory), **fields}))
            return
        deleted = "deleted " if self.clear else ""
        limit = "no bound" if bound is None else f"at most {size_text(bound, 1)}"
        if bound is None and MAX_SIZE not in os.environ:
            limit += f"; at most {size_text(MAX_BYTES, 1)} of executables"
        print(f"{directory}: {deleted}{counted(len(files), 'file')}, {size_text(nbytes, 1)}; {limit}")


def cache_directory() -> pathlib.Path:
    """The directory of the cache, which need not exist.

    Raises:
      ConfigError: the environment switches the cache off, or does not name a directory.
    """
    named = os.environ.get(DIRECTORY)
    if named is None:
        return user_directory()
    if not named:
        raise ConfigError(f"${DIRECTORY}: found an empty value, which means no cache; expected a directory")
    if "://" in named and not named.startswith("file://"):
        raise ConfigError(f"${DIRECTORY}: found {named}; expected a directory of this machine")
    directory = pathlib.Path(named.removeprefix("file://"))
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"${DIRECTORY}: found {named}, a file; expected a directory")
    return directory
