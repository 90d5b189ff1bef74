"""What JAX's native code says when processes lose each other, in a line that helps.

The coordination service ends a process from native code, with pages of its own log and a stack. So standard error of
native code goes through this file, run as a program of its own, which outlives the process by a moment: it passes on
what it reads, except what that service says, and for that it says what has happened, once.

Usage: `python native_log.py PREFIX`, from standard input to standard output. Standard library only.
"""

import re
import signal
import sys
from collections.abc import Iterable, Iterator

# Lines of the service's log.
_SERVICE = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ (coordination_service\w*|preemption_\w+|client|service)\.(cc|h):\d+\]")
# Gloo greets its peers on standard output, from several threads at a time, which mix their words and ends of lines.
_GLOO = re.compile(r"(\[Gloo\]|Rank|is|connected|to|peer|ranks\.?|Expected|number|of|:|\d|\s)+", re.ASCII)
_FATAL = re.compile(r"F\d{4} .*(JAX distributed service detected|[Tt]erminating process because)")
_MORE = re.compile(
    r"Additional GRPC error|:UNKNOWN:|RPC: /|The tasks have crashed|=== Source Location|external/|\s*$|\d+$"
    r"|\*\*\* Check failure|\s+@ +0x"
)
_END = "*** Check failure"

_GONE = re.compile(r"stopped sending heartbeats\):((?:\s+\d+)+)")
_TWICE = re.compile(r"(\d+) unexpectedly tried to connect")
_LEADER = re.compile(r"Failed to send RPC to coordination service|leader task")


def translate(lines: Iterable[str], prefix: str) -> Iterator[str]:
    """The lines to pass on; and in place of the service's last words what they mean, after `prefix`."""
    said: list[str] = []
    is_service = is_fatal = is_greeting = False
    for line in lines:
        is_greeting = (is_greeting and not line.strip()) or (
            ("Gloo" in line or "peer" in line) and _GLOO.fullmatch(line) is not None
        )
        if is_greeting:
            continue
        if _SERVICE.match(line):
            is_service, is_fatal = True, is_fatal or _FATAL.match(line) is not None
        elif not (is_service and _MORE.match(line)):
            is_service = False
            yield line
            continue
        said.append(line)
        if is_fatal and line.startswith(_END):
            yield f"{prefix}{explain(''.join(said))}\n"
            is_fatal = False
    if is_fatal:
        yield f"{prefix}{explain(''.join(said))}\n"


def explain(said: str) -> str:
    """What the service's last words mean, as a line."""
    if gone := _GONE.search(said):
        numbers = gone[1].split()
        if len(numbers) == 1:
            return f"process {numbers[0]} is gone: nothing was heard of it for too long"
        return f"processes {', '.join(numbers)} are gone: nothing was heard of them for too long"
    if twice := _TWICE.search(said):
        return f"--process-id {twice[1]}: found two processes with it; expected one"
    if "RegisterTask" in said:
        return "found fewer processes than --num-processes when the time was over; expected all of them to be started"
    if _LEADER.search(said):
        return "process 0 is gone"
    return f"lost the other processes: {' '.join(said.split())}"


def main() -> None:
    """Passes standard input on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines = (line.decode(errors="replace") for line in sys.stdin.buffer)
    for line in translate(lines, sys.argv[1]):
        sys.stdout.write(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
