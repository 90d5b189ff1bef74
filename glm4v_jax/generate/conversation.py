"""A conversation that keeps its KV cache: a turn prefills only what is new.

Every turn renders the whole conversation and compares it, token by token and image by image, with what the cache holds.
The common prefix stays, the rest is prefilled. So the result is that of one long prompt, whatever the chat template
does: thoughts are dropped from the history by prefilling the answer again without them, and positions are those of the
whole prompt, also after images of later turns.
"""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.presets import configured
from glm4v_jax.errors import GenerationError, MessageError, counted
from glm4v_jax.generate.completion import Completion, Delta, last
from glm4v_jax.generate.device_steps import Variant
from glm4v_jax.generate.prompt import chat_variables, split_options
from glm4v_jax.generate.scheduler import Update, run
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.generate.slots import Slots
from glm4v_jax.generate.text.thinking import without_thoughts
from glm4v_jax.generate.text.tool_calls import ToolCall, split_calls
from glm4v_jax.inputs.batch_feature import BatchFeature
from glm4v_jax.inputs.medium import Medium, media_of
from glm4v_jax.inputs.prepared_media import PreparedMedia
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.prompt import Prompt, prompts_of
from glm4v_jax.inputs.text.messages import extract_media
from glm4v_jax.inputs.vision.image import flatten_images
from glm4v_jax.inputs.vision.video import flatten_videos
from glm4v_jax.model.runtime import Runtime


class _Media(NamedTuple):
    """Images and videos of a turn: their placeholders in the prompt, and their patches."""

    prepared: PreparedMedia
    images: list[Medium]
    videos: list[Medium]
    num_messages: int
    """of the turn, without the model's"""


class ConversationEngine(Protocol):
    """What a conversation needs of an engine."""

    runtime: Runtime
    processor: Glm4vProcessor
    steps_per_dispatch: int | None
    updates: int

    def config(self, preset: str | None = None, **options: Any) -> GenerationConfig:
        """See `Engine.config`."""

    def new_sequence(self, prompt: Prompt, config: GenerationConfig, **kwargs: Any) -> SequenceState:
        """See `Engine.new_sequence`."""

    def new_slots(self, num_rows: int, config: GenerationConfig) -> Slots:
        """See `Engine.new_slots`."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """See `Engine.running`."""


class Conversation:
    """Turns between a user and the model.

    >>> from glm4v_jax import Engine
    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> talk = Engine.from_pretrained(TINY_CHECKPOINT).conversation(max_new_tokens=4)
    >>> _ = talk.send("Hello"), talk.send("And now?")
    >>> [message["role"] for message in talk.messages]
    ['user', 'assistant', 'user', 'assistant']

    Attributes:
      messages: the turns so far, as chat templates take them; the model's with their calls of `tools` apart, and with
        their thoughts only where the template has a place for them (and says which of them stay).
      completions: the model's turns as it wrote them.
      in_cache: the tokens that need not be prefilled again if the next turn begins with them.
    """

    def __init__(
        self,
        engine: ConversationEngine,
        system: str | None = None,
        config: GenerationConfig | None = None,
        **variables: Any,
    ):
        """Start; see `Engine.conversation`, of whose options `variables` are those for the chat template."""
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.completions: list[Completion] = []
        self._engine, self._updates = engine, engine.updates
        self._config = config or engine.config()
        self._variables = variables
        self._media: list[_Media] = []  # of each of the user's turns
        self._open: Generator[Delta, None, None] | None = None
        self.in_cache: Prompt | None = None
        self._slots: Slots | None = None

    def ask(
        self,
        text: str,
        *,
        images: Any = (),
        videos: Any = (),
        preset: str | None = None,
        **options: Any,
    ) -> Iterator[Delta]:
        """Send a message and stream the answer.

        Closing the iterator cancels the answer, and the part generated so far stays in the conversation; so does
        asking again before it has ended. A turn that fails before its first token leaves the conversation as it was.

        Args:
          text: the user's message.
          images, videos: placed before it, one or a list: paths, URLs, bytes, Pillow images, arrays; see
            `flatten_images` and `flatten_videos`.
          preset, **options: see `Engine.stream`; for this turn, overriding the conversation's.

        Yields:
          Text as it is generated; the last delta holds the completion.

        Raises:
          Glm4vError: media or options are invalid; before anything is computed.
        """
        self._close()
        images = flatten_images(list(images) if isinstance(images, Iterator) else images)
        videos = flatten_videos(list(videos) if isinstance(videos, Iterator) else videos)
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content += [{"type": "video", "video": video} for video in videos]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}] if content else text}
        return self._begin([message], (images, videos), preset, options)

    def reply(
        self, results: Sequence[str | Sequence[Mapping[str, Any]]], *, preset: str | None = None, **options: Any
    ) -> Iterator[Delta]:
        """Send the results of the tools that the model has called, and stream what it says to them; see `ask`.

        Args:
          results: one for each call of the newest turn, in their order: a text, or a list of items of texts and images
            as messages have them.
          preset, **options: see `ask`.

        Raises:
          MessageError: there are no calls, or more or fewer than results.
        """
        self._close()
        calls = self.messages[-1].get("tool_calls", ()) if self.messages else ()
        if not calls or len(calls) != len(results):
            found = counted(len(results), "result")
            raise MessageError(f"results: found {found}; expected as many as the newest turn has calls, {len(calls)}")
        messages = [{"role": "tool", "content": one if isinstance(one, str) else list(one)} for one in results]
        media = extract_media(messages, self._engine.processor.template())
        return self._begin(messages, media, preset, options)

    def _close(self) -> None:
        """End the turn that is being generated."""
        if self._open is not None:
            self._open.close()

    def _begin(
        self,
        messages: list[dict[str, Any]],
        media: tuple[Sequence[Any], Sequence[Any]],
        preset: str | None,
        options: Mapping[str, Any],
    ) -> Iterator[Delta]:
        """Begin a turn of these messages, with their images and videos."""
        if self._engine.updates != self._updates:
            raise GenerationError(
                "conversation: found one that began with other weights; expected one that began after Engine.update"
            )
        variables, options = split_options(options)
        config = configured(self._config, preset, options)
        if config.logprobs != self._config.logprobs:
            raise GenerationError(
                f"logprobs: found {config.logprobs}; expected the conversation's, {self._config.logprobs}"
            )
        processor = self._engine.processor
        prepared = processor.prepare_media(*(list(one) or None for one in media))
        turn = _Media(
            dataclasses.replace(prepared, features=BatchFeature()),
            *media_of(prepared.features, self._engine.runtime.config),
            num_messages=len(messages),
        )
        variables = chat_variables(self._variables | variables, config, processor)
        prompt = self._prompt([*self.messages, *messages], [*self._media, turn], variables)
        # Turn number i samples from (seed, i), or all would sample alike.
        number = len(self.completions)
        sequence = self._engine.new_sequence(prompt, config, number=number, keep=self._tokens_in_cache(prompt))
        self._open = self._turn(messages, turn, sequence, variables.get("tools", ()))
        return self._open

    def send(self, text: str, **kwargs: Any) -> Completion:
        """Send a message and wait for the answer; see `ask`."""
        return last(self.ask(text, **kwargs))

    @property
    def system(self) -> str | None:
        """The system message; may be set between turns."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        del self.messages[: 0 if self.system is None else 1]
        if text is not None:
            self.messages.insert(0, {"role": "system", "content": text})

    def undo(self) -> None:
        """Forget the last turn of the user, or the last results of tools, and what the model said to them.

        Raises:
          MessageError: there is none.
        """
        if not self.completions:
            raise MessageError("undo: found a conversation without turns; expected at least one")
        self.completions.pop()
        del self.messages[-self._media.pop().num_messages - 1 :]

    def _prompt(self, messages: list[Mapping[str, Any]], media: list[_Media], variables: Mapping[str, Any]) -> Prompt:
        processor = self._engine.processor
        joined = PreparedMedia.joined([turn.prepared for turn in media])
        inputs = processor.prepare_turn(messages, joined, **variables)
        images = [medium for turn in media for medium in turn.images]
        videos = [medium for turn in media for medium in turn.videos]
        (prompt,) = prompts_of(inputs, self._engine.runtime.config, (images, videos))
        return dataclasses.replace(prompt, image_sizes=joined.image_sizes)

    def _tokens_in_cache(self, prompt: Prompt) -> int:
        """How many of the prompt's tokens are in the cache; the last is always prefilled, for the token after it."""
        return 0 if self.in_cache is None else min(self.in_cache.common_prefix(prompt), len(prompt) - 1)

    def _turn(
        self,
        messages: list[dict[str, Any]],
        media: _Media,
        sequence: SequenceState,
        tools: Sequence[Mapping[str, Any]],
    ) -> Generator[Delta, None, None]:
        if self._slots is None:
            self._slots = self._engine.new_slots(1, sequence.config)
            self._slots.reuses = False  # a conversation keeps more, answers too, and always in the first row
        self._slots.variant = Variant.of(sequence.config)
        # What the cache holds for certain if the turn ends before its first token.
        self.in_cache = sequence.prompt.truncated(sequence.start().keep)
        try:
            updates = run(self._slots, sequence.queue(), steps=self._engine.steps_per_dispatch)
            with self._engine.running(), contextlib.closing(updates):
                for update in updates:
                    if isinstance(update, Update):
                        yield update.delta
        except GeneratorExit:
            raise
        except BaseException:
            self._slots = self.in_cache = None
            raise
        finally:
            if sequence.tokens:
                if self._slots is not None:
                    self.in_cache = sequence.in_cache
                completion = sequence.completion()
                self.messages += [*messages, self._said(completion, tools)]
                self._media.append(media)
                self.completions.append(completion)

    def _said(self, completion: Completion, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The model's turn as the history has it."""
        answer, calls = completion.answer, list[ToolCall]()
        if completion.answer_span is None:
            answer = without_thoughts(completion.text, completion.thinking)
            if tools:
                answer, calls = split_calls(answer, tools)
        message: dict[str, Any] = {"role": "assistant", "content": answer}
        if completion.thought and "reasoning_content" in self._engine.processor.template():
            message["reasoning_content"] = completion.thought
        if calls:
            message["tool_calls"] = [call.body() for call in calls]
        return message
