"""The port, and the end: a signal lets what is running finish, a second one does not."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import warnings
from types import FrameType

import uvicorn

from glm4v_jax.errors import ConfigError, GenerationError
from glm4v_jax.serve.app import create_app
from glm4v_jax.serve.connections import Watch
from glm4v_jax.serve.service import Service

logger = logging.getLogger(__name__)

_KEEP_ALIVE = 75
"""Seconds that a connection may be idle: more than the pools of clients keep one."""
_LAST_SECONDS = 5
"""For responses to be sent once the engine has ended."""
_WATCH = 0.1
_MAX_CONNECTIONS = 768
"""Below the 1,024 files that a process may often have open."""


def bind(host: str, port: int) -> socket.socket:
    """Open the port; connections wait until the server runs.

    >>> with bind("localhost", 0) as listener:
    ...     listener.getsockname()[0]
    '127.0.0.1'

    Args:
      host: a name or an address of this machine.
      port: 0 for one that is free.

    Raises:
      ConfigError: it cannot be opened.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of both, as localhost has them, the one that clients expect.
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    except (OSError, UnicodeError):
        raise ConfigError(f"--host: found {host!r}; expected a name or an address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port: found {port}, which is in use; expected a free one, or 0 for any") from None
        if error.errno == errno.EACCES:
            raise ConfigError(f"--port: found {port}, which this user may not open; expected one above 1023") from None
        raise ConfigError(f"--host: found {host!r} ({error.strerror}); expected an address of this machine") from None
    return listener


def run(service: Service, listener: socket.socket) -> None:
    """Serve until a signal comes, or the engine fails.

    The first SIGTERM or SIGINT ends the server once what is running is answered, or after `drain_seconds`; the second
    at once.

    Raises:
      Glm4vError: the model cannot be loaded, or the engine has failed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what clients send
        server = Server(service)
        server.run(sockets=[listener])
    if service.error is not None:
        raise service.error
    if server.has_failed:
        raise GenerationError("engine: found errors again and again; expected none: see the log")
    if service.is_busy:
        # The interpreter would wait for threads that decode, and cannot end while XLA's call back into it.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(0)


class Server(uvicorn.Server):
    """Uvicorn's server, which ends as `run` says."""

    def __init__(self, service: Service):
        self._service = service
        self.has_failed = self._has_signal = False
        super().__init__(
            uvicorn.Config(
                create_app(service),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; called by the signal's handler."""
        if self._has_signal:
            os._exit(128 + sig)
        self._has_signal = True
        self._service.drain()
        logger.info("server: %s: ending; once more to end at once", signal.Signals(sig).name)

    async def main_loop(self) -> None:
        """Watch the service until the server is to end."""
        was = None
        watch = Watch(_KEEP_ALIVE, _MAX_CONNECTIONS)
        while not self.should_exit:
            await super().on_tick(0)
            watch.cut(self.server_state.connections)
            state = self._service.state
            if state != was and state in ("ready", "failed"):
                logger.info("server: %s", state)
            was = state
            if state == "failed":
                self.has_failed = self.should_exit = True
            elif state in ("draining", "closed"):
                await asyncio.to_thread(self._service.close, self._service.settings.drain_seconds)
                self.should_exit = True
            else:
                await asyncio.sleep(_WATCH)
