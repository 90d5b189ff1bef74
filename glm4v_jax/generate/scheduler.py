"""Continuous batching: a slot whose sequence has ended takes the next request, until there are none."""

import collections
import time
from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from glm4v_jax.devices.distributed import agree, spans_processes, to_host
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.completion import Delta
from glm4v_jax.generate.device_steps import Chosen
from glm4v_jax.generate.prefill_chunks import Start
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.generate.slots import MAX_STEPS, Slots
from glm4v_jax.generate.token_logprobs import TokenLogprobs
from glm4v_jax.generate.token_masks import steps_beside
from glm4v_jax.inputs.medium import Medium

STREAM_PERIOD = 0.05
"""A stream takes as many decode steps a dispatch as fit into this time, in seconds: text flows, without bursts."""
# Or this number where there are several processes: their clocks differ, and their numbers of steps must not.
SHARED_STEPS = 8
# Requests to wait for while no slot is busy.
_FEW = 8
# Decode steps a dispatch while a slot is free and the prompt for it is being prepared.
_SOON = 4


class RequestQueue(Protocol):
    """Requests that have not started."""

    def take(self, *, wait: bool) -> "SequenceState | Failure | None":
        """The next one, or why it failed; None if there are no more, or none is ready yet.

        With `wait` there is nothing else to do than to wait for one. A queue that does not know whether one will come
        returns None all the same, and `run` ends if no slot is busy.
        """

    def fill(self) -> None:
        """Prepare what comes next, while the device is busy."""

    def ready(self) -> Sequence["SequenceState"]:
        """The requests that could be taken at once, in their order."""

    @property
    def is_empty(self) -> bool:
        """Whether no more will come, or none that is known of."""


class Failure(NamedTuple):
    """A prompt that could not be prepared: its number, and why."""

    number: int
    error: Exception


class Update(NamedTuple):
    """A sequence, and what it has grown by."""

    sequence: SequenceState
    delta: Delta


class DispatchSize:
    """Decode steps per dispatch, or prefill chunks between two: a fixed number, or one that makes a steady stream."""

    def __init__(self, steps: int | None, longest: float = 2 * STREAM_PERIOD):
        """`longest`: of a dispatch, in seconds, where the number is not fixed."""
        self.steps = steps or 1
        self._longest = longest
        self._fixed = steps is not None
        self._began = 0.0

    def begin(self) -> int:
        """Start timing; returns the number."""
        self._began = time.perf_counter()
        return self.steps

    def end(self, *, is_cut: bool = False) -> None:
        """Stop timing, and adapt the number; `is_cut`: fewer were dispatched, whose time does not speak for more."""
        if self._fixed:
            return
        seconds = time.perf_counter() - self._began
        if seconds < self._longest / 4 and not is_cut:
            self.steps = min(2 * self.steps, MAX_STEPS)
        elif seconds > self._longest:
            self.steps = max(self.steps // 2, 1)


def run(
    slots: Slots, waiting: RequestQueue, *, steps: int | None = MAX_STEPS, interleave: bool = False
) -> Generator[Update | Failure, None, None]:
    """Run requests through slots; closing the iterator cancels those that are running.

    After an error the slots must not be used again.

    Args:
      slots: all free.
      waiting: the requests.
      steps: decode steps per dispatch; None finds a number that makes a steady stream.
      interleave: prefill new prompts chunk by chunk between dispatches, so that those which are running never wait for
        a whole prompt. Otherwise prompts are prefilled as soon as there is a slot, which keeps more slots busy.

    Yields:
      What each sequence has grown by, in the order of slots, the last update of each with its completion; and the
      failures of prompts that could not be prepared.
    """
    active: dict[int, SequenceState] = {}
    restarts: dict[int, Start] = {}
    variant = slots.variant
    shared = spans_processes(slots.runtime.mesh)
    if shared:
        waiting = SharedQueue(waiting, slots.shards)
    pace = DispatchSize(SHARED_STEPS if steps is None and shared else steps)
    chunks = DispatchSize(1 if shared else None, STREAM_PERIOD / 2)  # what runs waits for its own dispatch besides
    try:
        while True:
            starts = restarts
            free = [row for row in range(slots.num_rows) if row not in active]
            # With no slot busy, wait for a few: what starts together is encoded and decoded together.
            few = 0 if active else _FEW
            is_running = len(active) > len(slots.prefilling)
            while free:
                sequence = waiting.take(wait=not active or len(starts) < few)
                if sequence is None:
                    break
                if isinstance(sequence, Failure):
                    yield sequence
                    continue
                start = sequence.start()
                row = slots.place(start, free)
                free.remove(row)
                active[row], starts[row] = sequence, start
                if interleave and is_running and sequence.prompt.media:
                    break  # a live queue encodes them as they are taken: one request's between two dispatches
            restarts = {}
            if not active:
                return
            slots.admit(starts)
            # Log probabilities cost every row of a dispatch, and few requests want them.
            is_told = any(sequence.config.logprobs is not None for sequence in active.values())
            slots.variant = variant if is_told else variant.untold
            # Also while nothing runs: a prompt may be cancelled before its last chunk. Then the first that is complete
            # does not wait for the chunks of others.
            most = chunks.begin() if interleave else None
            one = interleave and len(active) == len(slots.prefilling)
            begun, count = _prefill(slots, _media(waiting), most, one=one)
            if count == most and not shared:  # timed for itself, or prompts that always join would get too little time
                waiting.fill()
                slots.wait()
                chunks.end()
            for row in begun:
                active[row].reused_tokens += slots.reused.pop(row, 0)
            first = slots.choose_first(begun) if begun else None
            # Return at the first row that ends, if there is a request to take its slot; and soon if a slot is free
            # because the next prompt is not ready.
            busy = bool(not waiting.is_empty or any(sequence.may_continue for sequence in active.values()))
            limit = min(pace.begin(), _SOON if free and not waiting.is_empty else MAX_STEPS)
            running = {row: sequence for row, sequence in active.items() if row not in slots.prefilling}
            turns = {row: sequence.turn for row, sequence in running.items() if sequence.turn is not None}
            limit = min(limit, steps_beside(turns.values(), len(running)))
            if all(row in begun and not begun[row].is_decoded for row in running):
                limit = 0
            decoded = slots.decode(limit, idle=slots.num_rows - len(running) + 1 if busy else None, turns=turns)
            waiting.fill()
            slots.prefetch(_media(waiting))
            first = to_host(first)
            fresh = {row: _take(first, row, 1, active[row].config.logprobs) for row in begun}
            chosen, counts, done = slots.read(decoded)
            if shared:  # the processes may communicate next, while no other program may be running
                jax.block_until_ready(slots.pool.array)
            pace.end(is_cut=limit < pace.steps)
            surplus, updates = list[int](), list[Update]()
            for row, sequence in list(active.items()):
                tokens, logprobs = _take(chosen, row, int(counts[row]), sequence.config.logprobs)
                if row in fresh:
                    token, told = fresh[row]
                    tokens = token + tokens
                    if told is not None:
                        logprobs = told if logprobs is None else TokenLogprobs.joined([told, logprobs])
                if not tokens and not sequence.is_cancelled:
                    if done[row] and row not in slots.prefilling:
                        raise GenerationError("slots: found another user; expected one at a time")
                    continue
                delta, restart = sequence.take(tokens, bool(done[row]), logprobs)
                if restart is not None:
                    restarts[row] = restart
                elif sequence.finish_reason is not None:
                    del active[row]
                    if not done[row] or row in slots.prefilling:
                        surplus.append(row)
                updates.append(Update(sequence, delta))
            if surplus:
                slots.stop(surplus)
            yield from updates
    except GeneratorExit:
        slots.stop(list(active))
        raise
    finally:
        slots.variant = variant


def _prefill(slots: Slots, upcoming: Sequence[Medium], most: int | None, *, one: bool) -> tuple[dict[int, Start], int]:
    """Prefill `most` chunks, or all; with `one`, until a prompt is complete.

    Returns:
      The rows whose prompts are complete, and the number of chunks.
    """
    ready, count = dict[int, Start](), 0
    while slots.prefilling and count != most and not (one and ready):
        ready |= slots.advance(upcoming)
        count += 1
    return ready, count


class SharedQueue:
    """A queue that all processes agree on: a prompt that fails in one of them fails in all."""

    def __init__(self, waiting: RequestQueue, ahead: int):
        """`ahead`: the number of requests, not taken yet, that the processes agree on."""
        self._waiting, self._ahead = waiting, ahead
        self._next: collections.deque[SequenceState | Failure] = collections.deque()
        self._is_exhausted = False

    @property
    def is_empty(self) -> bool:
        """See `RequestQueue`, here and below."""
        return self._is_exhausted and not self._next

    def fill(self) -> None:
        """Prepare more, here."""
        self._waiting.fill()

    def ready(self) -> list[SequenceState]:
        """The requests that are agreed on."""
        return [sequence for sequence in self._next if isinstance(sequence, SequenceState)]

    def take(self, *, wait: bool) -> SequenceState | Failure | None:
        """The next one. Always waits: threads of several processes are ready at different times."""
        del wait
        # Ahead of time: processes cannot communicate while their devices are busy.
        while len(self._next) <= self._ahead and not self._is_exhausted:
            sequence = _agreed(self._waiting.take(wait=True))
            if sequence is None:
                self._is_exhausted = True
            else:
                self._next.append(sequence)
        return self._next.popleft() if self._next else None


def _agreed(sequence: SequenceState | Failure | None) -> SequenceState | Failure | None:
    """Compare a request over all processes.

    Raises:
      MessageError: they were given different prompts.
    """
    if sequence is None:
        agree("number of prompts", b"no more")
        return None
    if isinstance(sequence, Failure):
        number, digest, error = sequence.number, b"", str(sequence.error)
    else:
        number, digest, error = sequence.index, sequence.digest(), None
    error = agree(f"prompt {number}", digest, error)
    return sequence if error is None else Failure(number, GenerationError(error))


def _media(waiting: RequestQueue) -> list[Medium]:
    """Images and videos of the prompts that will be next."""
    return [medium for sequence in waiting.ready() for medium in sequence.prompt.media]


def _take(chosen: Chosen, row: int, count: int, top: int | None) -> tuple[list[int], TokenLogprobs | None]:
    """The first `count` tokens of a row of NumPy's `chosen`, [B, K], or the only one of [B]; with `top` logprobs."""
    tokens = np.asarray(chosen.tokens)[row].reshape(-1)[:count]
    if chosen.logprobs is None or top is None:
        return tokens.tolist(), None
    values, ids, tops = (np.asarray(x)[row] for x in (chosen.logprobs, chosen.top_tokens, chosen.top_logprobs))
    values = values.reshape(-1)
    # Copies: a view would keep the arrays of all rows for as long as the completion.
    ids, tops = (x.reshape(len(values), x.shape[-1])[:count, :top].copy() for x in (ids, tops))
    return tokens.tolist(), TokenLogprobs.sampled(tokens.copy(), values[:count].copy(), ids, tops)
