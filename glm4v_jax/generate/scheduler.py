"""Answers through slots: as one ends the next begins in its place, until there are no more."""

import collections
import time
from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from glm4v_jax.devices.distributed import agree, spans_processes, to_host
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.completion import Delta, TokenLogprob
from glm4v_jax.generate.device_steps import Chosen
from glm4v_jax.generate.prefill_chunks import Start
from glm4v_jax.generate.sequence import Answer
from glm4v_jax.generate.slots import MAX_STEPS, Slots
from glm4v_jax.inputs.medium import Medium

# A stream makes as many tokens at a time as take about this long, in seconds: seen as writing, not as bursts.
_STREAM_PERIOD = 0.05
# Or so many where there are several processes: their clocks differ, and they must make equally many.
_SHARED_STEPS = 8
# Prompts to wait for where no row is going.
_FEW = 8
# Steps to make while a slot is free and the prompt for it is being prepared.
_SOON = 4


class Waiting(Protocol):
    """Answers that have not begun."""

    def take(self, *, wait: bool) -> "Answer | Failure | None":
        """The next one, or what is wrong with it; None if there are no more, or with `wait` False none is ready yet."""

    def fill(self) -> None:
        """The device is busy: time to prepare what comes next."""

    def ready(self) -> Sequence["Answer"]:
        """Those that could be taken at once, in their order."""

    @property
    def is_empty(self) -> bool:
        """Whether no more will come."""


class Failure(NamedTuple):
    """A prompt that cannot be answered: its number among others, and why."""

    number: int
    error: Exception


class Update(NamedTuple):
    """What an answer has grown by."""

    answer: Answer
    delta: Delta


class Pace:
    """How many tokens to make at a time."""

    def __init__(self, steps: int | None):
        self.steps = steps or 1
        self._fixed = steps is not None
        self._began = 0.0

    def begin(self) -> int:
        """The number for the next call."""
        self._began = time.perf_counter()
        return self.steps

    def end(self) -> None:
        """That call has returned."""
        if self._fixed:
            return
        seconds = time.perf_counter() - self._began
        if seconds < _STREAM_PERIOD / 2:
            self.steps = min(2 * self.steps, MAX_STEPS)
        elif seconds > 2 * _STREAM_PERIOD:
            self.steps = max(self.steps // 2, 1)


def run(slots: Slots, waiting: Waiting, *, steps: int | None = MAX_STEPS) -> Generator[Update | Failure, None, None]:
    """Generate answers; closing the iterator stops those that are still going. After an error the slots are of no use.

    Args:
      slots: where; all of them are free.
      waiting: what.
      steps: tokens a call of the decoding program; None finds a number that makes a steady stream.

    Yields:
      What each answer has grown by, in the order of slots; the last of each with its completion. And what was wrong
      with prompts in the queue.
    """
    active: dict[int, Answer] = {}
    again: dict[int, Start] = {}
    taken: list[int] = []  # rows of `active` that have not started
    shared = spans_processes(slots.runtime.mesh)
    if shared:
        waiting = Agreed(waiting, slots.shards)
    pace = Pace(_SHARED_STEPS if steps is None and shared else steps)
    try:
        while True:
            starts = again
            free = [row for row in range(slots.num_rows) if row not in active]
            # With nothing else to do, a few: what begins together is encoded and decoded together.
            few = 0 if active else _FEW
            while free:
                answer = waiting.take(wait=not active or len(starts) < few)
                if answer is None:
                    break
                if isinstance(answer, Failure):
                    yield answer
                    continue
                row = free.pop(0)
                active[row], starts[row] = answer, answer.start()
                taken.append(row)
            again = {}
            if not active:
                return
            first = slots.start(starts, upcoming=_media(waiting)) if starts else None
            taken.clear()
            # Come back for the first row that ends, if there is something to do in its place; and soon for a row that
            # is free because the next prompt is not ready.
            busy = bool(not waiting.is_empty or any(answer.may_go_on for answer in active.values()))
            limit = min(pace.begin(), _SOON if free and not waiting.is_empty else MAX_STEPS)
            decoded = slots.decode(limit, idle=slots.num_rows - len(active) + 1 if busy else None)
            waiting.fill()
            slots.prefetch(_media(waiting))
            first = to_host(first)
            fresh = {row: _take(first, row, 1, active[row].config.logprobs) for row in starts}
            chosen, counts, done = slots.read(decoded)
            if shared:  # the processes may ask each other next, which nothing else must be on its way for
                jax.block_until_ready(slots.pool.array)
            pace.end()
            surplus, updates = [], []
            for row, answer in list(active.items()):
                tokens, logprobs = _take(chosen, row, int(counts[row]), answer.config.logprobs)
                if row in fresh:
                    tokens, logprobs = fresh[row][0] + tokens, fresh[row][1] + logprobs
                if not tokens:
                    if done[row]:
                        raise GenerationError("found slots that somebody else uses; expected one user at a time")
                    continue
                delta, start = answer.take(tokens, bool(done[row]), logprobs)
                if start is not None:
                    again[row] = start
                elif answer.finish_reason is not None:
                    del active[row]
                    if not done[row]:
                        surplus.append(row)
                updates.append(Update(answer, delta))
            if surplus:
                slots.stop(surplus)
            yield from updates
    except GeneratorExit:
        if going := [row for row in active if row not in taken]:
            slots.stop(going)
        raise


class Agreed:
    """Answers of a queue that all processes have; what one of them cannot prepare, none answers."""

    def __init__(self, waiting: Waiting, ahead: int):
        """`ahead`: how many that have not been taken the processes agree on."""
        self._waiting, self._ahead = waiting, ahead
        self._next: collections.deque[Answer | Failure] = collections.deque()
        self._is_exhausted = False

    @property
    def is_empty(self) -> bool:
        """See `Waiting`, here and below."""
        return self._is_exhausted and not self._next

    def fill(self) -> None:
        """Prepare more, here."""
        self._waiting.fill()

    def ready(self) -> list[Answer]:
        """What is agreed on."""
        return [answer for answer in self._next if isinstance(answer, Answer)]

    def take(self, *, wait: bool) -> Answer | Failure | None:
        """The next one, waiting for it whatever `wait` says: threads of several processes are ready at other times."""
        del wait
        # Ahead of time now and not later: processes cannot ask each other while their devices are busy.
        while len(self._next) <= self._ahead and not self._is_exhausted:
            answer = _agreed(self._waiting.take(wait=True))
            if answer is None:
                self._is_exhausted = True
            else:
                self._next.append(answer)
        return self._next.popleft() if self._next else None


def _agreed(answer: Answer | Failure | None) -> Answer | Failure | None:
    """The same in all processes.

    Raises:
      MessageError: they were given different prompts.
    """
    if answer is None:
        agree("number of prompts", b"no more")
        return None
    if isinstance(answer, Failure):
        number, digest, error = answer.number, b"", str(answer.error)
    else:
        number, digest, error = answer.index, answer.digest(), None
    told = agree(f"prompt {number}", digest, error)
    return answer if told is None else Failure(number, GenerationError(told))


def _media(waiting: Waiting) -> list[Medium]:
    """Pictures and videos of the prompts that will be next."""
    return [medium for answer in waiting.ready() for medium in answer.prompt.media]


def _take(chosen: Chosen, row: int, count: int, top: int | None) -> tuple[list[int], list[TokenLogprob]]:
    """The first `count` tokens of a row of NumPy's `chosen`, [B, K], or the only one of [B]; the `top` likeliest."""
    tokens = chosen.tokens[row].reshape(-1)[:count].tolist()
    if chosen.logprobs is None or top is None:
        return tokens, []
    values, ids, tops = (np.asarray(x)[row] for x in (chosen.logprobs, chosen.top_tokens, chosen.top_logprobs))
    values, ids, tops = values.reshape(-1), ids.reshape(-1, ids.shape[-1]), tops.reshape(-1, tops.shape[-1])
    return tokens, [
        TokenLogprob(token, float(values[i]), tuple(zip(ids[i, :top].tolist(), tops[i, :top].tolist(), strict=True)))
        for i, token in enumerate(tokens)
    ]
