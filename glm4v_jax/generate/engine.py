"""`Engine`: prompts in, completions out; one at a time as a stream, or thousands by continuous batching."""

import contextlib
import dataclasses
import inspect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from glm4v_jax.checkpoints.load import load_runtime
from glm4v_jax.config.checks import CacheDtype, Positive, checked, refuse_unknown
from glm4v_jax.config.generation import OF_ALL_REQUESTS, GenerationConfig
from glm4v_jax.config.presets import configured
from glm4v_jax.devices.compilation_cache import use_compilation_cache
from glm4v_jax.devices.distributed import spans_processes
from glm4v_jax.devices.mesh import platform
from glm4v_jax.errors import GenerationError, counted
from glm4v_jax.generate.completion import Completion, Delta, last
from glm4v_jax.generate.conversation import Conversation
from glm4v_jax.generate.device_steps import Variant
from glm4v_jax.generate.feature_pool import KEPT, FeaturePool
from glm4v_jax.generate.prefill_chunks import CHUNK, live_chunk
from glm4v_jax.generate.prompt import chat_variables, is_message, prompt_of, split_options
from glm4v_jax.generate.prompt_queue import PromptQueue
from glm4v_jax.generate.scheduler import Failure, Update, run
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.generate.slots import MAX_STEPS, MIN_CAPACITY, Slots, Stats, check_cache_dtype
from glm4v_jax.generate.warmup import (
    Warmed,
    checked_ranges,
    run_all,
    show,
    time_chunks,
    warm_slots,
    warm_vision,
)
from glm4v_jax.inputs.make_batch import MIN_LENGTH
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.vision_rows import bucket, buckets
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.runtime import HasRuntime, Runtime, runtime_of


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt among many, with options of its own.

    >>> Request("What is 2 + 2?", {"max_new_tokens": 8}).options["max_new_tokens"]
    8

    Attributes:
      prompt: as `Engine.stream` takes it.
      options: as `Engine.stream` takes them, where they differ from those of the whole batch; not those that all its
        requests share (`OF_ALL_REQUESTS`).
    """

    prompt: Any
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _Prepared:
    """A request whose prompt is prepared once, by the first thread that asks for it."""

    def __init__(self, request: Request):
        self.request = request
        self._lock = threading.Lock()
        self._prompt: Prompt | None = None

    def prompt(self, prepare: Callable[[Any], Prompt]) -> Prompt:
        with self._lock:
            if self._prompt is None:
                self._prompt = prepare(self.request.prompt)
                for medium in self._prompt.media:
                    _ = medium.key  # hashed here, in the preparing thread
            return self._prompt


class Engine:
    """A model and its processor, ready for requests; may be used from several threads, each with slots of its own.

    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> engine = Engine.from_pretrained(TINY_CHECKPOINT, num_slots=2)
    >>> completion = engine.generate("Hello", max_new_tokens=4)
    >>> completion.prompt_tokens > 0 and len(completion.tokens) <= 4
    True
    >>> [c.index for c in engine.generate_many(["Hello", "Good morning"], max_new_tokens=1)]
    [0, 1]

    Where several processes share the model's mesh (`devices.distributed.init_distributed`), all of them call the same
    methods with the same arguments, from one thread, and all get the same completions.

    Attributes:
      model, processor: what the constructor was given; after an `update` the model is the runtime.
      runtime: the model's weights on their mesh.
      updates: how often they were replaced.
      num_slots: sequences that `generate_many` decodes at a time.
      steps_per_dispatch, cache_dtype, reuse_prefixes: as the constructor takes them.
      chunk: the most tokens of a prompt that are prefilled at a time while others decode (`LiveEngine`): about what
        takes as long as a dispatch, by the size of the model; `warmup` measures it, in a single process.
      pool: vision features of the images and videos encoded so far.
      stats: counts of tokens and dispatches so far.
    """

    def __init__(
        self,
        model: Runtime | HasRuntime,
        processor: Glm4vProcessor,
        *,
        num_slots: int = 8,
        capacity: int = MIN_CAPACITY,
        steps_per_dispatch: int | None = None,
        cache_dtype: CacheDtype = "auto",
        reuse_prefixes: bool = True,
    ):
        """Create an engine.

        Args:
          model: a `Runtime`, or a model that has one (`Glm4vForConditionalGeneration`).
          processor: of the same checkpoint.
          num_slots: sequences that `generate_many` decodes at a time.
          capacity: tokens of prompt and completion that a slot holds at first. It grows with the prompts, and each
            growth compiles programs again.
          steps_per_dispatch: decode steps per dispatch, at most 32; by default 32 for `generate_many`, and what makes
            a steady stream for `stream`. The completions do not depend on it.
          cache_dtype: "int8" keeps keys and values as 8-bit integers with a scale per token and head, in about a half
            of bfloat16's memory and a quarter of float32's; by default they are in the compute dtype.
          reuse_prefixes: where a prompt begins like one before it whose keys and values are still in a slot, keep or
            copy them. The completions are the same without.
        """
        if num_slots < 1:
            raise GenerationError(f"num_slots: found {num_slots}; expected at least 1")
        if steps_per_dispatch is not None and not 1 <= steps_per_dispatch <= MAX_STEPS:
            raise GenerationError(f"steps_per_dispatch: found {steps_per_dispatch}; expected 1 to {MAX_STEPS}")
        self.model, self.runtime, self.processor = model, runtime_of(model), processor
        processor.check_ids(self.runtime.config)
        self.num_slots, self.steps_per_dispatch, self._capacity = num_slots, steps_per_dispatch, capacity
        self.cache_dtype, self.reuse_prefixes = check_cache_dtype(cache_dtype), reuse_prefixes
        with self.runtime.on_mesh():
            self.chunk = live_chunk(sum(leaf.size for leaf in self.runtime.text.leaves), platform())
        self.pool = FeaturePool(self.runtime, KEPT)
        self.stats = Stats()
        self.updates = 0
        self._free: dict[tuple[int, int | None], list[Slots]] = {}
        self._running = 0

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, num_slots: int = 8, cache_dtype: CacheDtype = "auto", **kwargs: Any
    ) -> Self:
        """Load model and processor of a checkpoint directory; see `checkpoints.load.load_runtime` for the options.

        Among them are `dtype`, `quantize`, `mesh`, and `adapter`, the directory of an adapter in PEFT's format.
        Compiled programs are kept from one process to the next, see `use_compilation_cache`.
        """
        known = {*inspect.signature(load_runtime).parameters, "num_slots", "cache_dtype"} - {"directory"}
        refuse_unknown("from_pretrained", kwargs, known)
        check_cache_dtype(cache_dtype)
        use_compilation_cache()
        processor = Glm4vProcessor.from_pretrained(directory)
        return cls(load_runtime(directory, **kwargs), processor, num_slots=num_slots, cache_dtype=cache_dtype)

    def config(self, preset: str | None = None, **options: Any) -> GenerationConfig:
        """The checkpoint's options, changed by a preset's, changed by `options`; None means "not given".

        Raises:
          GenerationError: an option or preset is unknown, or out of its range.
        """
        return configured(self.runtime.generation_config, preset, options)

    def prompt(self, prompt: Any, **variables: Any) -> Prompt:
        """Prepare a prompt, as every method that takes one does by itself; see `prompt_of`."""
        return prompt_of(prompt, self.processor, self.runtime.config, **variables)

    def stream(self, prompt: Any, *, preset: str | None = None, **options: Any) -> Iterator[Delta]:
        """Generate from a prompt as a stream; closing the iterator cancels the request.

        Args:
          prompt: see `prompt`.
          preset: name of published sampling options (`presets.PRESETS`), which override the checkpoint's.
          **options: fields of `GenerationConfig`, which override both; and for messages `tools`, the functions that the
            model may call, and `enable_thinking`, of which False is the same as `think_budget=0`.

        Yields:
          Text as it is generated; the last delta holds the completion.

        Raises:
          Glm4vError: the prompt or an option is invalid; before anything is computed.
        """
        return self._stream(self._sequence(prompt, preset, options))

    def generate(self, prompt: Any, *, preset: str | None = None, **options: Any) -> Completion:
        """Generate from a prompt and wait for the completion; see `stream`."""
        return last(self._stream(self._sequence(prompt, preset, options), self.steps_per_dispatch or MAX_STEPS))

    def _sequence(self, prompt: Any, preset: str | None, options: Mapping[str, Any]) -> SequenceState:
        variables, options = split_options(options)
        config = self.config(preset, **options)
        return self.new_sequence(self.prompt(prompt, **chat_variables(variables, config, self.processor)), config)

    def generate_many(
        self,
        prompts: Iterable[Any],
        *,
        preset: str | None = None,
        skip_errors: bool = False,
        samples: int = 1,
        **options: Any,
    ) -> Iterator[Completion]:
        """Generate from many prompts by continuous batching: a slot that is free takes the next prompt.

        Args:
          prompts: any number, read as they are needed; each as `prompt` takes it, or a `Request`; or only one, which
            needs no list. Prompt number i samples from (seed, i), whatever slot it is in and whatever else is in the
            batch.
          preset, **options: see `stream`; for all prompts.
          skip_errors: yield a completion with `error` for a prompt that cannot be prepared, instead of raising.
          samples: completions of each prompt, as if it were given as many times in a row: sample j of prompt i has the
            number i * samples + j. It is prepared once, and prefilled once where its slots are of one shard.

        Yields:
          Completions in the order in which they finish; `index` is the number of the prompt.

        Raises:
          Glm4vError: an option or a prompt is invalid.
        """
        shared_variables, options = split_options(options)
        shared = self.config(preset, **options)
        checked("samples", samples, Positive, GenerationError)

        def prepare(index: int, item: _Prepared) -> SequenceState:
            request = item.request
            if shared_options := [name for name in OF_ALL_REQUESTS if name in request.options]:
                raise GenerationError(f"{shared_options[0]}: found an option of one prompt; expected one for all")
            own_variables, own = split_options(request.options)
            config = configured(shared, None, own)
            variables = chat_variables(shared_variables | own_variables, config, self.processor)
            number = index % samples if "seed" in own else index
            prompt = item.prompt(lambda one: self.prompt(one, **variables))
            return self.new_sequence(prompt, config, index=index, number=number)

        def items() -> Iterator[_Prepared]:
            for item in [prompts] if _is_one(prompts) else prompts:
                prepared = _Prepared(item if isinstance(item, Request) else Request(item))
                yield from itertools.repeat(prepared, samples)

        def completions() -> Iterator[Completion]:
            queue = PromptQueue(items(), prepare, ahead=self.num_slots, skip_errors=skip_errors)
            steps = self.steps_per_dispatch or MAX_STEPS
            with (
                contextlib.closing(queue),
                self.lend_slots(self.num_slots, shared) as slots,
                contextlib.closing(run(slots, queue, steps=steps)) as updates,
            ):
                for update in updates:
                    if isinstance(update, Failure):
                        yield Completion(update.number, "", (), 0, "error", error=str(update.error))
                    elif update.delta.completion is not None:
                        yield update.delta.completion

        return completions()

    def conversation(self, system: str | None = None, *, preset: str | None = None, **options: Any) -> Conversation:
        """Start a conversation whose turns keep their KV cache.

        Args:
          system: the system message.
          preset, **options: see `stream`; for all turns.
        """
        variables, options = split_options(options)
        return Conversation(self, system, self.config(preset, **options), **variables)

    def warmup(
        self,
        *,
        prompt_lengths: tuple[int, int] | int,
        vision_patches: tuple[int, int] | int | None = None,
        max_new_tokens: int = 128,
        one: bool = True,
        many: bool = True,
        progress: Callable[[Warmed], None] = show,
        **options: Any,
    ) -> list[Warmed]:
        """Compile ahead what requests in these ranges need, so that none of them compiles anything.

        The KV cache and the feature pool get the size of the largest such request at once.

        Args:
          prompt_lengths: tokens of the shortest and of the longest prompt, or whole conversation; one number for both.
          vision_patches: patches (before merging) of the smallest image, and of all images and frames of the largest
            request together; None for text alone.
          max_new_tokens: of the requests; with a think budget, that and the answer budget together.
          one: compile for `generate`, `stream` and conversations.
          many: compile for `generate_many`.
          progress: called with each program and its seconds; by default they are printed to standard error.
          **options: of the requests, as `stream` takes them. Programs of their own belong to `logprobs`, to
            `logits_processor`, to `prompt_lookup_num_tokens`, to bans, biases and least lengths together, and to
            grammars (`json_schema={}` stands for all of them).

        Returns:
          The programs, in the order in which they ran.

        Raises:
          GenerationError: a range is empty or negative, or the longest prompt leaves no room for the new tokens.
        """
        ranges = checked_ranges(self.runtime.config, prompt_lengths, vision_patches, max_new_tokens)
        (_, longest), patches = ranges.prompt_lengths, ranges.vision_patches
        config = self.config(**options)
        self.new_sequence(Prompt.of_text([0]), config.replace(max_new_tokens=1))  # prepares the tokenizer for grammars
        need = longest + max_new_tokens + (Variant.of(config).draft or 0)
        self.reserve(need)
        # Later turns, answers after a think budget, and what follows a prefix prefill as little as one token.
        lengths = [min(t, longest) for t in buckets(1, min(longest, CHUNK), MIN_LENGTH)]

        def all_programs() -> Iterator[Warmed]:
            if patches is not None:
                self.pool.reserve(self.pool.needed(patches, self.pool.shards if many else 1))
                yield from warm_vision(self.pool, patches)
            for num_rows in [1] * one + [self.num_slots] * many:
                with self.lend_slots(num_rows, config) as slots:
                    yield from warm_slots(slots, lengths, max_new_tokens, config)
                    if slots.variant.top is not None:  # dispatches without a request for them
                        slots.variant = slots.variant.untold
                        yield from warm_slots(slots, lengths[-1:], max_new_tokens, config)
                    if num_rows > 1 and not spans_processes(self.runtime.mesh):
                        self.chunk = time_chunks(slots, lengths, config)

        return run_all(all_programs(), progress)

    def new_sequence(self, prompt: Prompt, config: GenerationConfig, **kwargs: Any) -> SequenceState:
        """Create the state of a request that has not started; see `SequenceState`."""
        config.check_vocabulary(self.runtime.config.text_config.vocab_size)
        limit = self.runtime.config.text_config.max_position_embeddings
        processor = self.processor
        return SequenceState(prompt, config, processor.tokenizer, limit, thinking=processor.thinking, **kwargs)

    def reserve(self, capacity: int) -> None:
        """Have slots hold at least `capacity` tokens of prompt and completion from now on."""
        with self.pool.lock:
            self._capacity = max(self._capacity, bucket(capacity, MIN_CAPACITY))
            self._free.clear()

    def release(self, *, weights: bool = False) -> None:
        """Free the device memory that is kept for later requests: KV caches and vision features.

        Args:
          weights: those of the model as well, as far as nothing else holds them; requests fail until the next `update`.

        Raises:
          GenerationError: with `weights`, while requests are running.
        """
        with self.pool.lock:
            if weights:
                self._check_idle()
                self.runtime = self.model = self.runtime.released()
            self._free.clear()
            self.pool.use(self.runtime)

    def update(self, module: Glm4v) -> None:
        """Take other weights of the same structure, such as those of the next training step; nothing is compiled.

        What depends on the old ones is forgotten: vision features, and the keys and values that slots keep.
        Conversations that began before raise in their next turn. The runtime is a new one: a model that this engine was
        made of, and other engines of that model, keep theirs.

        Args:
          module: the functional model (`Runtime.module`), in the dtypes, the layout and the shardings of the old one.

        Raises:
          GenerationError: requests are running.
          ConfigError: a leaf has another shape, dtype or sharding, or is missing; the message names it.
        """
        with self.pool.lock:
            self._check_idle()
            self.runtime = self.model = self.runtime.updated(module)
            self.updates += 1
            self.pool.use(self.runtime)
            for slots in itertools.chain.from_iterable(self._free.values()):
                slots.use(self.runtime)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep the weights from being replaced or released while the body runs.

        Raises:
          GenerationError: they were released.
        """
        with self.pool.lock:
            if self.runtime.is_released:
                raise GenerationError(
                    "engine: found its weights released; expected an update with others before requests"
                )
            self._running += 1
        try:
            yield
        finally:
            with self.pool.lock:
                self._running -= 1

    def _check_idle(self) -> None:
        if self._running:
            found = counted(self._running, "user")
            raise GenerationError(f"engine: found {found} of its slots; expected none: end or close what is generating")

    def _stream(self, sequence: SequenceState, steps: int | None = None) -> Iterator[Delta]:
        steps = steps or self.steps_per_dispatch
        with (
            self.lend_slots(1, sequence.config) as slots,
            contextlib.closing(run(slots, sequence.queue(), steps=steps)) as updates,
        ):
            for update in updates:
                if isinstance(update, Update):
                    yield update.delta

    def new_slots(self, num_rows: int, config: GenerationConfig) -> Slots:
        """Create slots of this engine's model, which share its feature pool."""
        return Slots(
            self.runtime, num_rows, self._capacity, pool=self.pool, variant=Variant.of(config), stats=self.stats,
            cache_dtype=self.cache_dtype, reuse_prefixes=self.reuse_prefixes,
        )  # fmt: skip

    @contextlib.contextmanager
    def lend_slots(
        self, num_rows: int, config: GenerationConfig, *, chunk: int = CHUNK, whole: int = 0
    ) -> Iterator[Slots]:
        """Lend slots, and keep them for the next request, unless a long prompt has made them large.

        Args:
          num_rows: how many, at least.
          config: of the requests, for its programs.
          chunk: tokens of a prefill chunk at most, a power of two.
          whole: tokens of a prompt up to which it is one chunk.
        """
        with self.running():
            with self.pool.lock:
                variant = Variant.of(config)
                free = self._free.setdefault((num_rows, variant.top), [])
                slots = free.pop() if free else self.new_slots(num_rows, config)
                slots.variant = variant
                slots.use_chunks(chunk, whole)

            def give_back() -> None:
                if slots.capacity <= slots.capacity_for(self._capacity):
                    free.append(slots)

            try:
                yield slots
            except GeneratorExit:
                give_back()  # the stream was closed, the slots are intact
                raise
            give_back()


def _is_one(prompts: Any) -> bool:
    """Whether what should be many prompts is a single one: a text, a conversation, a message, inputs, a request."""
    if isinstance(prompts, list | tuple):
        return bool(prompts) and all(map(is_message, prompts))
    return isinstance(prompts, str | Mapping | Prompt | Request)
