"""A program in a terminal of its own, as a person would use it."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

from glm4v_jax.tiny import TINY_CHECKPOINT

ROOT = TINY_CHECKPOINT.parents[2]

# The terminal becomes that of the process, so that Ctrl-C reaches it; `pty.fork` would fork a process with threads.
BEGIN = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
)
PROGRAM = "from glm4v_jax.cli.main import program; program()"


class Terminal:
    """`glm4v ARGUMENTS` behind a pseudo-terminal; `before` is Python that runs first."""

    def __init__(self, *arguments, directory, width=100, height=40, before="", **variables):
        self.output = ""
        self._read_to = 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "INPUTRC": os.devnull}
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        self._screen, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, f"{before}\n{PROGRAM}", *map(str, arguments)],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            cwd=directory,
            env={**environment, **variables},
        )
        os.close(inside)

    def send(self, text):
        """Types."""
        os.write(self._screen, text.encode())

    def interrupt(self):
        """Ctrl-C at a prompt, which Python hears of only once it waits for a key: a moment after the prompt shows."""
        time.sleep(0.5)
        self.send("\x03")

    def wait_for(self, text, seconds=60.0):
        """Reads until a text has been shown since the last call; returns what was shown up to it."""
        end = time.monotonic() + seconds
        while text not in self.output[self._read_to :]:
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"no {text!r} in {self.output[self._read_to :]!r}")
        begin, self._read_to = self._read_to, self.output.index(text, self._read_to) + len(text)
        return self.output[begin : self._read_to]

    def end(self, seconds=30.0):
        """Waits for the end of the program; returns its exit status."""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        os.close(self._screen)
        return self._process.wait(seconds)

    def _read(self, seconds):
        """Reads what there is; returns whether there may be more."""
        if seconds <= 0 or not select.select([self._screen], [], [], seconds)[0]:
            return False
        try:
            piece = os.read(self._screen, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self.output += piece.decode(errors="replace")
        return bool(piece)
