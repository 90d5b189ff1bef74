"""The key-value store of JAX's coordination service, which every process of a program can read and write.

JAX has no public way to it, and nothing public does its work: collectives (`multihost_utils`) need every process to
call them, while a failure is announced by one process to others that are busy or wait in a computation. Nothing else
in this package imports from `jax._src`.
"""

import functools
from typing import Any

import jax


def process_index() -> int:
    """Which process this is; `jax.process_index` would start the devices' backends."""
    return _state().process_id


def process_count() -> int:
    """How many processes have joined; `jax.process_count` would start the devices' backends."""
    return _state().num_processes


def put(key: str, value: str) -> bool:
    """Write a value once; False if there is one already."""
    try:
        _client().key_value_set(key, value)
    except jax.errors.JaxRuntimeError as error:
        return "ALREADY_EXISTS" not in str(error)
    return True


def wait_for(key: str, seconds: float) -> str | None:
    """The value of a key, once somebody has written it; None if nobody has in this time.

    Raises:
      jax.errors.JaxRuntimeError: the service has ended.
    """
    try:
        return _client().blocking_key_value_get(key, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


def count(prefix: str) -> int:
    """How many keys have this prefix.

    Raises:
      jax.errors.JaxRuntimeError: the service has ended.
    """
    return len(_client().key_value_dir_get(prefix))


def _client() -> Any:
    return _state().client


@functools.cache
def _state() -> Any:
    from jax._src import distributed  # where it is used: a release that moves it breaks no import of this package

    return distributed.global_state
