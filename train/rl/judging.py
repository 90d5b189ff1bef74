"""Scores of many texts: rules in this process, what may take long in others, which are killed when their time is up.

A rule ends by itself. math-verify and judges are asked only where a rule has not found an answer right, each in a child
process that takes one answer at a time. `signal.alarm` would work in the main thread alone, and would wait for C code.
Scores come in the order of the texts and depend on these alone; time is measured in the child's CPU seconds, so that
a busy machine does not change them.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import queue
import selectors
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from eval.metrics import Reference
from glm4v_jax.errors import ConfigError, DataError, Glm4vError, counted
from train.rl.config import VerifierConfig
from train.rl.verifiers import FAILURES, Reward, Verifier

_START = 120.0
"""Seconds that a child may take to import what it needs."""
_BUSY = 10.0
"""How many times `seconds` math-verify may take by the clock, on a machine whose CPUs have other work too."""


class Task(NamedTuple):
    """A text to score, by the verifier of its domain, and its reference."""

    domain: str
    text: str
    item: Reference


class Judges:
    r"""Verifiers of all domains, with the processes that they need. A context manager.

    >>> from train.rl.verifiers import make_verifiers
    >>> with Judges(make_verifiers({"counting": VerifierConfig(kind="counting")})) as judges:
    ...     [reward.value for reward in judges.score([Task("counting", "\\boxed{3}", {"answer": 3})])]
    [1.0]

    Attributes:
      verifiers: domain -> verifier.
    """

    def __init__(self, verifiers: Mapping[str, Verifier], processes: int = 2):
        """Start no process yet; each domain will have at most `processes` children."""
        self.verifiers = dict(verifiers)
        self._pools = {
            domain: _Pool(domain, verifier.config, processes)
            for domain, verifier in self.verifiers.items()
            if verifier.is_asked_further
        }

    def __enter__(self) -> "Judges":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all children."""
        for pool in self._pools.values():
            pool.close()

    def start(self) -> None:
        """Start a child of each domain that needs some; ConfigError if math-verify or the judge is not there."""
        for pool in self._pools.values():
            pool.start()

    def score(self, tasks: Sequence[Task]) -> list[Reward]:
        """Return the reward of each text, in their order; ConfigError if a child cannot be started."""
        rewards: list[Reward | concurrent.futures.Future[Reward]] = [self._score(task) for task in tasks]
        return [reward if isinstance(reward, Reward) else reward.result() for reward in rewards]

    def _score(self, task: Task) -> "Reward | concurrent.futures.Future[Reward]":
        verifier = self.verifiers[task.domain]
        try:
            reward = verifier.score(task.text, task.item)
        except Exception as error:  # a fault of a rule costs an answer, and not the job
            return Reward(0.0, f"{type(error).__name__}: {error}", "failed")
        if task.domain in self._pools and reward.reason in ("wrong", "unreadable"):
            answer = verifier.answer(task.text)
            if isinstance(answer, str):
                return self._pools[task.domain].ask(answer, task.item, reward)
        return reward


def score_shared(
    score: Callable[[Sequence[Task]], list[Reward]],
    tasks: Sequence[Task],
    *,
    index: int = 0,
    count: int = 1,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> list[Reward]:
    """Score texts that all processes have alike, a share in each, so that all have the same rewards.

    `score`: of a process, such as `Judges.score`; `gather`: exchanges what JSON can say (`distributed.gathered`).
    """
    shares = gather([list(reward) for reward in score(tasks[index::count])])
    rewards = [Reward(0.0, None, "failed")] * len(tasks)
    for number, share in enumerate(shares):
        rewards[number::count] = [Reward(*reward) for reward in share]
    return rewards


def check_failures(tasks: Sequence[Task], rewards: Sequence[Reward], most: float) -> None:
    """Check how many of a step's texts verifiers could not score; one always may fail.

    DataError if a larger fraction than `most` has failed: it names the domain with most of them, and the first's fault.
    """
    failed = [(task, reward) for task, reward in zip(tasks, rewards, strict=True) if reward.reason in FAILURES]
    if len(failed) <= max(1, most * len(tasks)):
        return
    domain = Counter(task.domain for task, _ in failed).most_common(1)[0][0]
    task, reward = next((task, reward) for task, reward in failed if task.domain == domain)
    why = f"{reward.reason}, {reward.parsed}" if reward.parsed else reward.reason
    raise DataError(
        f"rl.verifiers.{domain}: found {counted(len(failed), 'rollout')} of {len(tasks):,} without a score, the first "
        f"({why}): {task.text[-200:]!r}; expected at most {most:.1%}"
    )


class _Pool:
    """The children of a domain, each with a thread that waits for it."""

    def __init__(self, domain: str, config: VerifierConfig, processes: int):
        self._domain, self._config = domain, config
        self._threads = concurrent.futures.ThreadPoolExecutor(processes, f"judge-{domain}")
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._all: list[_Child] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        self._idle.put(self._new())

    def ask(self, answer: str, item: Reference, reward: Reward) -> concurrent.futures.Future[Reward]:
        """Ask about an answer that the rule has given a reward."""
        line = json.dumps([answer, dict(item)], default=str)
        return self._threads.submit(self._ask, line, reward)

    def _ask(self, line: str, reward: Reward) -> Reward:
        try:
            child = self._idle.get_nowait()
        except queue.Empty:
            child = self._new()
        try:
            found = child.ask(line)
        finally:
            if child.is_alive():
                self._idle.put(child)
        if found is None:
            return Reward(0.0, reward.parsed, "timed out")
        if isinstance(found, str):
            return Reward(0.0, found, "failed")
        if not found:
            return reward
        return Reward(found, reward.parsed if reward.parsed is not None else "", "right" if found == 1 else "partly")

    def _new(self) -> "_Child":
        with self._lock:
            try:
                child = _Child(self._config)
            except Glm4vError as error:
                raise ConfigError(f"rl.verifiers.{self._domain}: {error}") from error
            self._all.append(child)
            return child

    def close(self) -> None:
        for child in self._all:
            child.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)


class _Child:
    """A process of `second_opinion`."""

    def __init__(self, config: VerifierConfig):
        text = json.dumps({key: value for key, value in dataclasses.asdict(config).items() if value is not None})
        self._wall = config.limit * (1 if config.judge is not None else _BUSY)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "train.rl.second_opinion", text],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        if self._line(_START) != b"ready\n":
            self._process.kill()
            last = self._process.communicate()[1].decode(errors="replace").strip().rpartition("\n")[2]
            if "math_verify" in last:
                raise ConfigError(
                    "symbolic: found no math-verify; expected it: pip install 'glm4v_jax[rl]', or symbolic = false to "
                    "compare texts and numbers alone"
                )
            raise ConfigError(f"judge: found {last or 'no answer'}; expected a function that can be imported")
        stderr = self._process.stderr
        assert stderr is not None
        threading.Thread(target=_drain, args=(stderr,), daemon=True).start()

    @property
    def _stdout(self) -> Any:
        assert self._process.stdout is not None
        return self._process.stdout

    def ask(self, line: str) -> float | str | None:
        """Return a score, an error, or None where the time was up and the process is no more."""
        assert self._process.stdin is not None
        unsent = memoryview(line.encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):  # it has ended; how is found next
            while unsent:
                unsent = unsent[self._process.stdin.write(unsent) :]
        answer = self._line(self._wall)
        if not answer.endswith(b"\n"):
            self.kill()
            code = self._process.returncode
            return None if code in (-signal.SIGPROF, -signal.SIGKILL) else f"the process ended with status {code}"
        found: float | str = json.loads(answer)
        return found

    def _line(self, seconds: float) -> bytes:
        """Return a line, or what there is of it when the time is up or the process has ended."""
        line = b""
        while not line.endswith(b"\n"):
            if not self._selector.select(seconds):
                break
            if not (more := self._stdout.read(1 << 16)):
                break
            line += more
        return line

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._selector.close()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def _drain(stream: Any) -> None:
    """Read and drop what a judge prints, until it ends."""
    with stream:
        while stream.read(1 << 16):
            pass
