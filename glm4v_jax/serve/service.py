"""What stands behind the routes: the engine, from loading to draining, and the preparation of requests for it."""

import asyncio
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.errors import Glm4vError
from glm4v_jax.generate.engine import Engine
from glm4v_jax.generate.live import LiveEngine, QueueFullError, State
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.generate.text.thinking import THINK, thought_before
from glm4v_jax.generate.warmup import Warmed
from glm4v_jax.inputs.media.threads import num_workers
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.vision.smart_resize import patch_range
from glm4v_jax.inputs.vision_rows import MAX_ROW_LENGTH
from glm4v_jax.serve.bodies import MAX_CHOICES
from glm4v_jax.serve.call import Call, Inbox
from glm4v_jax.serve.errors import ApiError, client_error
from glm4v_jax.serve.limits import MAX_BODY_BYTES
from glm4v_jax.serve.media import MediaPolicy, has_media, limit_videos, naming_items, resolve
from glm4v_jax.serve.metrics import Metrics, count, gauge
from glm4v_jax.serve.requests import ApiRequest, Served, generation_config
from glm4v_jax.serve.responses import Reply
from glm4v_jax.serve.workers import Workers, busy

logger = logging.getLogger(__name__)

R = TypeVar("R")

SHORT_BYTES = 1 << 13
"""Of a body that is parsed in the event loop: in 0.1 ms, and in 1 ms whatever is in it."""
_READERS = 2
"""Threads that read bodies and texts."""
_WORTH_A_LINE = 1.0
"""Seconds of a program's compilation that are worth a line in the log."""
_WARM_TOKENS = 3
"""New tokens of the requests that warm an engine: enough for each program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a server answers.

    Attributes:
      model: the name that clients ask for.
      api_key: what clients send as a bearer token; None for no key.
      preset: of the sampling options that a request may override.
      max_model_len: the most tokens of prompt and completion together.
      max_waiting: sequences that may wait for a slot, and requests that may be prepared at a time.
      max_logprobs: the most log probabilities of a token that a request may ask for; None for none at all.
      request_timeout: seconds that a request may take.
      drain_seconds: for the requests that are running when the server is to end.
      is_tiny: whether the model is the packaged one, about which the page says what it knows.
      is_warmed: whether all programs are compiled before the server is ready.
      max_body_bytes: of the body of a request.
      hosts: the names under which the server may be asked; none for any.
      media: what images and videos may be.
    """

    model: str
    api_key: str | None = None
    preset: str | None = None
    max_model_len: int = 4096
    max_waiting: int = 64
    max_logprobs: int | None = None
    request_timeout: float = 600.0
    drain_seconds: float = 30.0
    is_tiny: bool = False
    is_warmed: bool = True
    max_body_bytes: int = MAX_BODY_BYTES
    hosts: tuple[str, ...] = ()
    media: MediaPolicy = dataclasses.field(default_factory=MediaPolicy)


class Service:
    """An engine that starts while the port is open, and the threads that prepare requests for it.

    Attributes:
      settings: see `ServeSettings`.
      metrics: the server's numbers.
      progress: what it does until it is ready.
      error: why it could not start.
      live: the engine of requests, once it is there.
      created: when it was created, in seconds since 1970.
    """

    def __init__(self, settings: ServeSettings, load: Callable[[], Engine]):
        """Create a service; call `start`, and `close` in the end.

        Args:
          settings: how to answer.
          load: returns the engine; called in a thread of its own.
        """
        self.settings, self._load = settings, load
        self.metrics = Metrics(settings.model)
        self.progress = "loading the model"
        self.error: Exception | None = None
        self.live: LiveEngine | None = None
        self._engine: Engine | None = None
        self._is_draining = False
        self._latest_inbox: Inbox | None = None
        self.created = int(time.time())
        self._readers = Workers(_READERS, settings.max_waiting, "read")
        self._decoders = Workers(min(4, num_workers()), settings.max_waiting, "decode")
        self._loader = threading.Thread(target=self._start, name="load", daemon=True)

    @property
    def state(self) -> State:
        """What `/health` says."""
        if self.error is not None:
            return "failed"
        if self.live is None:
            return "draining" if self._is_draining else "starting"
        return "draining" if self._is_draining and self.live.state == "ready" else self.live.state

    @property
    def is_busy(self) -> bool:
        """Whether the engine is being loaded, or a request prepared, which cannot be stopped."""
        return self._loader.is_alive() or self._readers.is_busy or self._decoders.is_busy

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
          ApiError: it is not ready.
        """
        self._ready()
        assert self._engine is not None
        return self._engine

    def start(self) -> None:
        """Load and warm the engine in a thread."""
        self._loader.start()

    def drain(self) -> None:
        """Accept no more requests."""
        self._is_draining = True

    def close(self, drain_seconds: float = 0.0) -> None:
        """End the engine: wait for what is running, then cancel it. Blocks; does nothing the second time."""
        self.drain()
        if self.live is not None:
            self.live.close(drain_seconds)
        for workers in (self._readers, self._decoders):  # what is being prepared is refused when it is ready
            workers.close()

    async def call(self, request: ApiRequest, since: float) -> Call:
        """Prepare a request and queue it.

        Args:
          request: what is asked.
          since: when it arrived, of `time.perf_counter`.

        Raises:
          ApiError: the request is invalid, too many wait, or the server is not ready.
        """
        live = self._ready()
        with_media = request.is_chat and any(map(has_media, request.prompts))
        prompts, sequences = await self.prepare(self._sequences, request, with_media=with_media)
        processor = self.engine.processor
        reply = Reply(request, prompts, self.settings.model, processor.tokenizer, processor.thinking)
        call = Call(reply, sequences, self.metrics, since, self._inbox)
        try:
            call.submit(live)
        except QueueFullError as error:
            raise busy(str(error)) from None
        except Glm4vError as error:
            self._ready()
            raise client_error(error) from error
        self.metrics.began(sum(map(len, prompts)))
        return call

    async def prepare(
        self, function: Callable[..., R], *arguments: Any, with_media: bool = False, is_short: bool = False
    ) -> R:
        """Run a function in one of few threads.

        Args:
          function: what is to be run.
          arguments: of it.
          is_short: whether it takes less time than the way to another thread; run here.
          with_media: whether it may read images and videos, for which there are other threads: so texts and bodies do
            not wait until slow videos are decoded.

        Raises:
          ApiError: what the client has sent is invalid, or too many requests are being prepared.
        """
        workers = self._decoders if with_media else self._readers
        try:
            if is_short:
                return function(*arguments)
            return await workers.run(function, *arguments)
        except Glm4vError as error:
            raise client_error(error, "messages") from error

    def prompt_of(self, prompt: Any, variables: dict[str, Any]) -> Prompt:
        """Prepare messages, a text, or a list of tokens; for `prepare`.

        Raises:
          ApiError, Glm4vError: what is wrong with it.
        """
        engine = self.engine
        if isinstance(prompt, str):
            self.check_length(prompt)
            prompt = engine.processor.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], int):
            return engine.prompt({"input_ids": np.array([prompt])})
        messages = resolve(prompt, self.settings.media, engine.processor, self.settings.max_model_len)
        self.check_length([messages, variables])
        with naming_items(messages):
            prepared = engine.prompt(messages, **variables)
        for medium in prepared.media:
            _ = medium.key  # hashed here, and not in the engine's thread
        return prepared

    def check_length(self, texts: Any) -> None:
        """Check that texts may fit the model's length, wherever they stand: rendering others would be work for nothing.

        Raises:
          ApiError: they do not.
        """
        if (found := _count_characters(texts)) > self._max_characters:
            raise ApiError(
                400,
                f"prompt: found {found:,} characters; expected at most {self.settings.max_model_len:,} tokens with the "
                "completion, the length that this server was started with",
                code="context_length_exceeded",
            )

    @property
    def served(self) -> Served:
        """What of the model decides which requests are valid."""
        choices = min(MAX_CHOICES, self.settings.max_waiting + self.engine.num_slots)
        processor = self.engine.processor
        return Served(
            self.settings.model,
            self.settings.max_model_len,
            processor.template_variables,
            choices,
            has_template=processor.has_template,
        )

    @property
    def _inbox(self) -> Inbox:
        """Of the running event loop; an application may be asked in one after the other, as by a test's client."""
        inbox = self._latest_inbox
        if inbox is None or inbox.loop is not asyncio.get_running_loop():
            inbox = self._latest_inbox = Inbox()
        return inbox

    @functools.cached_property
    def _max_characters(self) -> int:
        """Of a text that may fit the model's length."""
        return self.settings.max_model_len * max(map(len, self.engine.processor.tokenizer.get_vocab()))

    def _ready(self) -> LiveEngine:
        if self.state != "ready" or self.live is None:
            doing = f" ({self.progress})" if self.state == "starting" else ""
            raise ApiError(
                503, f"server: found it {self.state}{doing}; expected it ready", headers={"Retry-After": "5"}
            )
        return self.live

    def _sequences(self, request: ApiRequest) -> tuple[list[Prompt], list[SequenceState]]:
        engine = self.engine
        base = engine.config(self.settings.preset, **request.options)
        tokenizer, thinking = engine.processor.tokenizer, engine.processor.thinking
        prompts, sequences = [], list[SequenceState]()
        for asked in request.prompts:
            prompt = self.prompt_of(asked, dict(request.variables))
            is_closed = thought_before(prompt.input_ids, tokenizer) is False
            close = 0 if is_closed else len(tokenizer.encode(THINK + thinking.close))
            config = generation_config(request, base, len(prompt), close, self.settings.max_model_len)
            prompts.append(prompt)
            sequences += [self._sequence(prompt, config, len(sequences), number) for number in range(request.n)]
        return prompts, sequences

    def _sequence(self, prompt: Prompt, config: GenerationConfig, first: int, number: int) -> SequenceState:
        return self.engine.new_sequence(prompt, config, index=first + number, number=number)

    def _start(self) -> None:
        since = time.perf_counter()
        logger.info("server: %s", self.progress)
        try:
            engine = self._load()
            logger.info("server: loaded in %.0f s", time.perf_counter() - since)
            limit_videos(engine.processor, self.settings.media, self.settings.max_model_len)
            if self.settings.is_warmed:
                self._warm(engine)
            settings = self.settings
            live = LiveEngine(
                engine,
                max_waiting=settings.max_waiting,
                logprobs=settings.max_logprobs,
                capacity=settings.max_model_len,
            )
            self._add_readings(engine, live)
            self._engine, self.live = engine, live
            self.progress = "starting the engine"
            live.start()
        except Exception as error:
            self.error = error

    def _warm(self, engine: Engine) -> None:
        """Compile what requests up to the model's length need.

        Of images and videos what the processor makes and what fits one row: what is larger comes in many shapes, and
        seldom.
        """
        longest = self.settings.max_model_len - _WARM_TOKENS
        merged = engine.runtime.config.vision_config.spatial_merge_size**2

        since = time.perf_counter()
        self.progress = "compiling"
        logger.info("server: compiling its programs, which may take minutes")

        def show(one: Warmed) -> None:
            self.progress = f"compiling: {one.program} {one.shape}"
            if one.seconds >= _WORTH_A_LINE:
                logger.info("server: compiled %s %s in %.1f s", one.program, one.shape, one.seconds)

        patches = longest * merged
        # The pool's size is part of the programs' shapes.
        engine.pool.reserve(engine.pool.needed((merged, patches)))
        warmed = engine.warmup(
            prompt_lengths=(1, longest),
            vision_patches=(merged, min(patches, MAX_ROW_LENGTH, max(merged, most_patches(engine.processor)))),
            max_new_tokens=_WARM_TOKENS,
            one=False,
            progress=show,
            logprobs=self.settings.max_logprobs,
            json_schema={},  # programs of all grammars
            min_new_tokens=1,  # and those of bans and biases
        )
        logger.info("server: %d programs in %.0f s", len(warmed), time.perf_counter() - since)

    def _add_readings(self, engine: Engine, live: LiveEngine) -> None:
        stats = engine.stats
        self.metrics.add_readings(
            [
                gauge("num_requests_running", "Sequences in slots.", lambda: live.num_running),
                gauge("num_requests_waiting", "Sequences that wait for a slot.", lambda: live.num_waiting),
                count("engine_restarts", "Times that the slots were rebuilt after an error.", lambda: live.restarts),
                count("prefix_cache_queries", "Prompt tokens of sequences that started.", lambda: stats.prompt_tokens),
                count("prefix_cache_hits", "Those of them that a row held already.", lambda: stats.reused_tokens),
                count("vision_encoded", "Images and videos that were encoded.", lambda: engine.pool.encoded),
                count("vision_reused", "Images and videos whose features were kept.", lambda: engine.pool.reused),
            ]
        )


def _count_characters(value: Any) -> int:
    """Characters of all texts in a value of JSON, names of fields included."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_count_characters, (*value, *value.values())))
    return sum(map(_count_characters, value)) if isinstance(value, list | tuple) else 0


def most_patches(processor: Glm4vProcessor) -> int:
    """Patches of the largest image or video that a processor makes, unless a message says otherwise.

    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> most_patches(Glm4vProcessor.from_pretrained(TINY_CHECKPOINT))  # of a video
    120000
    """
    sides = (processor.image_processor, processor.video_processor)
    return max(patch_range(side.size, side.patch_size, side.temporal_patch_size)[1] for side in sides)
