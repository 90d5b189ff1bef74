"""Requests that come at any time: one thread answers them in slots that stay.

Requests wait in a queue that never waits itself: `scheduler.run` starts whatever has come, and ends when no slot is
busy and nobody waits.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import jax

from glm4v_jax.config.checks import fault
from glm4v_jax.config.generation import OF_ALL_REQUESTS
from glm4v_jax.devices.distributed import spans_processes
from glm4v_jax.devices.mesh import platform
from glm4v_jax.errors import GenerationError, MediaError
from glm4v_jax.generate.engine import Engine
from glm4v_jax.generate.feature_pool import FeaturePool
from glm4v_jax.generate.prefill_chunks import longest_live_chunk
from glm4v_jax.generate.scheduler import Failure, Update, run
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.generate.slots import MIN_EOS
from glm4v_jax.inputs.medium import Medium

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "draining", "failed", "closed"]
Receive = Callable[[SequenceState, Update | Failure], None]

MAX_RESTARTS = 3
"""Restarts within `RESTART_PERIOD` seconds after which an engine gives up."""
RESTART_PERIOD = 60.0
MAX_MEDIA_BYTES = 4 << 30
"""Patches of all requests that have not ended, in host memory; a request alone may have more."""


class QueueFullError(GenerationError):
    """As many requests wait as may."""


class LiveRequest:
    """Sequences that were submitted together."""

    def __init__(self, cancel: Callable[[], None]):
        """`cancel`: what ends them."""
        self._cancel = cancel

    def cancel(self) -> None:
        """End the sequences after the present dispatch; the last update of each has the finish reason "cancelled"."""
        self._cancel()


class LiveEngine:
    """An engine for requests that come at any time, from any thread; one thread of its own answers them.

    >>> import queue
    >>> from glm4v_jax import Engine
    >>> from glm4v_jax.generate.live import LiveEngine
    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> engine = Engine.from_pretrained(TINY_CHECKPOINT, num_slots=2)
    >>> live, updates = LiveEngine(engine), queue.Queue()
    >>> live.start()
    >>> sequence = engine.new_sequence(engine.prompt("Hello"), engine.config(max_new_tokens=4))
    >>> request = live.submit([sequence], lambda sequence, update: updates.put(update))
    >>> live.close(drain_seconds=60)
    >>> len(sequence.tokens) <= 4, sequence.finish_reason in ("stop", "length"), live.state
    (True, True, 'closed')

    What fails hurts as few requests as it can:

    - An image or video that cannot be encoded: the requests that show it.
    - An error in the slots: the requests that are running. Slots and feature pool are rebuilt; requests that wait
      notice nothing.
    - More than `MAX_RESTARTS` of these within `RESTART_PERIOD` seconds: all; the state is "failed".
    - An error in `receive`: the request whose it is; it is cancelled.

    Attributes:
      state: "starting" until the slots are there, "draining" once `close` has been called.
      capacity: the most tokens of prompt and completion of a request; None for no limit but the model's.
      restarts: how often the slots were rebuilt after an error.
    """

    def __init__(
        self, engine: Engine, *, max_waiting: int = 64, logprobs: int | None = None, capacity: int | None = None
    ):
        """Create a live engine; call `start`, and `close` in the end.

        Args:
          engine: `num_slots` is the number of sequences at a time. Warm it up first, with these `logprobs`.
          max_waiting: sequences that may wait for a slot.
          logprobs: the most log probabilities of a token that a request may ask for; None for none at all. All
            dispatches compute them.
          capacity: the most tokens of prompt and completion of a request. By default slots grow with the requests, and
            each growth compiles programs again.

        Raises:
          GenerationError: an option is invalid, or several processes share the model's mesh.
        """
        if max_waiting < 0:
            raise GenerationError(fault("max_waiting", max_waiting, "0 or more"))
        if spans_processes(engine.runtime.mesh):
            raise GenerationError("mesh: found devices of several processes; expected those of one")
        self._engine, self._config = engine, engine.config(logprobs=logprobs)
        self.capacity, self._max_live = capacity, engine.num_slots + max_waiting
        if capacity is not None:
            engine.reserve(capacity + (self._config.prompt_lookup_num_tokens or 0))
        self.state: State = "starting"
        self.restarts = 0
        self._restarted: collections.deque[float] = collections.deque(maxlen=MAX_RESTARTS + 1)
        self._changed = threading.Condition()
        self._requests: dict[SequenceState, Receive] = {}  # those that have not ended
        self._unsent = collections.deque[tuple[SequenceState, Update | Failure]]()
        self._queue = _LiveQueue(engine.pool, self._changed, self._deliver, self._send)
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="live engine", daemon=True)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._queue.waiting)

    @property
    def num_running(self) -> int:
        """Sequences in slots."""
        with self._changed:
            return len(self._requests) - len(self._queue.waiting) - len(self._queue.dropped)

    def start(self) -> None:
        """Start the thread that answers."""
        self._thread.start()

    def submit(self, sequences: Sequence[SequenceState], receive: Receive) -> LiveRequest:
        """Queue the sequences of a request: all or none.

        Args:
          sequences: made by `Engine.new_sequence`; several of one request share a prompt.
          receive: called in the engine's thread with each update of a sequence, the last of which has its completion,
            or with a `Failure` that ends it. It must not block.

        Raises:
          QueueFullError: as many sequences wait as may.
          GenerationError: a sequence cannot be answered here, or the engine has failed or is being closed.
        """
        for sequence in sequences:
            self._check(sequence)
        with self._changed:
            if self.state not in ("starting", "ready"):
                raise GenerationError(f"engine: found it {self.state}; expected it ready")
            if len(self._requests) + len(sequences) > self._max_live:
                raise QueueFullError(
                    f"engine: found {len(self._requests)} requests running or waiting, and {len(sequences)} more; "
                    f"expected at most {self._max_live}: send it again later"
                )
            held, more = _media_bytes(self._requests), _media_bytes(sequences)
            if held and more and held + more > MAX_MEDIA_BYTES:
                raise QueueFullError(
                    f"engine: found requests running or waiting with {held / 2**30:.1f} GiB of images and videos; "
                    f"expected at most {MAX_MEDIA_BYTES / 2**30:g} GiB with this one: send it again later"
                )
            self._requests |= dict.fromkeys(sequences, receive)
            self._queue.waiting.extend(sequences)
            self._changed.notify_all()
        return LiveRequest(lambda: self._cancel(sequences))

    def close(self, drain_seconds: float = 0.0) -> None:
        """Accept nothing more, wait for what is running or waiting, and cancel what is left; ends the thread.

        Args:
          drain_seconds: how long to wait.
        """
        with self._changed:
            if self.state == "closed":
                return
            if self.state != "failed":
                self.state = "draining"
            is_running = self._thread.ident is not None
            self._changed.wait_for(lambda: not self._requests, drain_seconds if is_running else 0)
            self._cancel(list(self._requests))
            self._is_closing = True
            self._changed.notify_all()
        if is_running:
            self._thread.join()
        else:
            self._queue.fill()
        self.state = "closed"

    def _check(self, sequence: SequenceState) -> None:
        """Check that the slots' programs can answer a sequence; GenerationError if they cannot."""
        config, own = sequence.config, self._config
        for name in OF_ALL_REQUESTS:
            found, most = getattr(config, name), getattr(own, name)
            if found != most and (name != "logprobs" or (found is not None and (most is None or found > most))):
                expected = f"at most {most}" if name == "logprobs" and most is not None else f"{most}"
                raise GenerationError(fault(name, found, f"{expected}, as the engine was started with"))
        if len(config.eos_token_id) > MIN_EOS:
            found = f"{len(config.eos_token_id)} end tokens"
            raise GenerationError(f"eos_token_id: found {found}; expected at most {MIN_EOS}, the model's own included")
        total = len(sequence.prompt) + sequence.max_total_tokens
        if self.capacity is not None and total > self.capacity:
            raise GenerationError(
                f"max_new_tokens: found {sequence.max_total_tokens:,} after a prompt of {len(sequence.prompt):,} "
                f"tokens; expected at most {self.capacity:,} tokens in all"
            )

    def _cancel(self, sequences: Sequence[SequenceState]) -> None:
        with self._changed:
            for sequence in sequences:
                if sequence in self._requests:
                    sequence.cancel()
                    self._queue.drop(sequence)
            self._changed.notify_all()

    def _work(self) -> None:
        """Answer until closed, in new slots after each error."""
        while (error := self._answer()) is not None:
            self._send()
            with self._changed:
                self.restarts += 1
                self._restarted.append(time.monotonic())
                is_failed = len(self._restarted) > MAX_RESTARTS and (
                    self._restarted[-1] - self._restarted[0] <= RESTART_PERIOD
                )
                if is_failed:
                    self.state = "failed"
                    self._queue.waiting.clear()
                waiting = {*self._queue.waiting, *self._queue.dropped}
                lost = [sequence for sequence in self._requests if sequence not in waiting]
            for sequence in lost:
                self._deliver(sequence, Failure(sequence.index, error))
            if is_failed:
                logger.error("engine: %d errors within %.0f s; giving up", len(self._restarted), RESTART_PERIOD)
                self._queue.fill()
                return

    def _answer(self) -> GenerationError | None:
        """Answer until closed; returns what its requests are told if an error ends it.

        A new error without the traceback of the old one, which would keep the old slots' memory.
        """
        engine = self._engine
        try:
            if self.restarts:
                engine.pool.forget()
            with engine.runtime.on_mesh():
                whole = longest_live_chunk(platform())
            with engine.lend_slots(engine.num_slots, self._config, chunk=engine.chunk, whole=whole) as slots:
                self._become_ready()
                while self._wait():
                    for update in run(slots, self._queue, steps=engine.steps_per_dispatch, interleave=True):
                        assert isinstance(update, Update)
                        self._unsent.append((update.sequence, update))
                    self._send()
        except Exception as error:
            logger.exception("engine: an error in its slots; the requests that are running are lost")
            return GenerationError(
                f"engine: found an error in its slots ({type(error).__name__}); expected none: send the request again"
            )
        return None

    def _become_ready(self) -> None:
        with self._changed:
            if self.state == "starting":
                self.state = "ready"

    def _wait(self) -> bool:
        """Wait for a request; False once nothing is left and the engine is being closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue.waiting or self._queue.dropped or self._is_closing)
        self._queue.fill()
        return bool(self._queue.waiting) or not self._is_closing

    def _send(self) -> None:
        """Deliver what the last dispatch has brought.

        Called once the next one is running: what receivers do, and the threads that they wake, which take the
        interpreter's lock, would otherwise keep the device waiting. Programs that were not warmed up are compiled
        first.
        """
        while self._unsent:
            self._deliver(*self._unsent.popleft())

    def _deliver(self, sequence: SequenceState, update: Update | Failure) -> None:
        with self._changed:
            receive = self._requests[sequence]
            is_last = isinstance(update, Failure) or update.delta.completion is not None
            if is_last:
                del self._requests[sequence]
                self._changed.notify_all()
        try:
            receive(sequence, update)
        except Exception:
            logger.exception("engine: an error in the receiver of a request, which is cancelled")
            if not is_last:
                self._requests[sequence] = _ignore
                self._cancel([sequence])


class _LiveQueue:
    """The sequences that wait; see `scheduler.RequestQueue`. Used in the engine's thread, but for `drop`.

    `take` never waits, so that one request alone starts at once. It encodes images and videos itself, request by
    request: one that cannot be encoded fails alone.
    """

    def __init__(self, pool: FeaturePool, changed: threading.Condition, deliver: Receive, send: Callable[[], None]):
        self.waiting: collections.deque[SequenceState] = collections.deque()
        self.dropped: collections.deque[SequenceState] = collections.deque()
        """cancelled before they were taken, and not told yet"""
        self._pool, self._changed, self._deliver, self._send = pool, changed, deliver, send

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits now."""
        return not self.waiting

    def fill(self) -> None:
        """Deliver what is new, and what was cancelled before its turn."""
        self._send()
        while self.dropped:
            sequence = self.dropped.popleft()
            delta, _ = sequence.take([], False)
            self._deliver(sequence, Update(sequence, delta))

    def ready(self) -> list[SequenceState]:
        """Those that wait, in their order."""
        with self._changed:
            return list(self.waiting)

    def take(self, *, wait: bool) -> SequenceState | None:
        """The next one whose images and videos can be encoded; None if nobody waits now."""
        del wait
        while True:
            with self._changed:
                if not self.waiting:
                    return None
                sequence = self.waiting.popleft()
            error = self._encode(sequence.prompt.media)
            if error is None:
                return sequence
            self._deliver(sequence, Failure(sequence.index, error))

    def drop(self, sequence: SequenceState) -> None:
        """Take a sequence out that was cancelled; does nothing if it does not wait any more. Call it with the lock."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            self.dropped.append(sequence)

    def _encode(self, media: Sequence[Medium]) -> MediaError | None:
        """Encode the images and videos of a request; returns why that failed."""
        if not media:
            return None
        self._send()  # before the device is waited for
        upcoming = [medium for sequence in self.ready() for medium in sequence.prompt.media]
        # An error may be that of another request's, which was to fill a wave: once more without them.
        for others in (upcoming, []):
            try:
                self._pool.encode(media, others)
                # An error of the device shows here, and not in everybody's prefill.
                jax.block_until_ready(self._pool.array)
            except Exception as error:
                logger.exception("engine: an image or video cannot be encoded")
                self._pool.forget()
                found = f"some that cannot be encoded ({type(error).__name__})"
            else:
                return None
        return MediaError(f"images and videos: found {found}; expected smaller ones")


def _media_bytes(sequences: Iterable[SequenceState]) -> int:
    """Host memory of the images and videos of sequences; those of one request share them."""
    media = {id(medium): medium for sequence in sequences for medium in sequence.prompt.media}
    return sum(medium.patches.nbytes for medium in media.values())


def _ignore(sequence: SequenceState, update: Update | Failure) -> None:
    del sequence, update
