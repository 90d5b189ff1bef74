"""A conversation that keeps its KV cache: a turn prefills only what is new.

Every turn renders the whole conversation and compares it, token by token and image by image, with what the cache holds.
The common prefix stays, the rest is prefilled. So the result is that of one long prompt, whatever the chat template
does: thoughts are dropped from the history by prefilling the answer again without them, and positions are those of the
whole prompt, also after images of later turns.
"""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.presets import configured
from glm4v_jax.errors import GenerationError, MessageError
from glm4v_jax.generate.completion import Completion, Delta, last
from glm4v_jax.generate.device_steps import Variant
from glm4v_jax.generate.scheduler import Update, run
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.generate.slots import Slots
from glm4v_jax.generate.text.thinking import without_thoughts
from glm4v_jax.inputs.batch_feature import BatchFeature
from glm4v_jax.inputs.medium import Medium, media_of
from glm4v_jax.inputs.prepared_media import PreparedMedia
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.prompt import Prompt, prompts_of
from glm4v_jax.inputs.vision.image import flatten_images
from glm4v_jax.inputs.vision.video import flatten_videos
from glm4v_jax.model.runtime import Runtime


class _Media(NamedTuple):
    """Images and videos of a turn: their placeholders in the prompt, and their patches."""

    prepared: PreparedMedia
    images: list[Medium]
    videos: list[Medium]


class ConversationEngine(Protocol):
    """What a conversation needs of an engine."""

    runtime: Runtime
    processor: Glm4vProcessor
    steps_per_dispatch: int | None

    def config(self, preset: str | None = None, **options: Any) -> GenerationConfig:
        """See `Engine.config`."""

    def new_sequence(self, prompt: Prompt, config: GenerationConfig, **kwargs: Any) -> SequenceState:
        """See `Engine.new_sequence`."""

    def new_slots(self, num_rows: int, config: GenerationConfig) -> Slots:
        """See `Engine.new_slots`."""


class Conversation:
    """Turns between a user and the model.

    >>> from glm4v_jax import Engine
    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> talk = Engine.from_pretrained(TINY_CHECKPOINT).conversation(max_new_tokens=4)
    >>> _ = talk.send("Hello"), talk.send("And now?")
    >>> [message["role"] for message in talk.messages]
    ['user', 'assistant', 'user', 'assistant']

    Attributes:
      messages: the turns so far, as chat templates take them; the model's without their thoughts.
      completions: the model's turns as it wrote them.
      in_cache: the tokens that need not be prefilled again if the next turn begins with them.
    """

    def __init__(self, engine: ConversationEngine, system: str | None = None, config: GenerationConfig | None = None):
        """Start; see `Engine.conversation`."""
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.completions: list[Completion] = []
        self._engine = engine
        self._config = config or engine.config()
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
        if self._open is not None:
            self._open.close()
        config = configured(self._config, preset, options)
        if config.logprobs != self._config.logprobs:
            raise GenerationError(
                f"logprobs: found {config.logprobs}; expected the conversation's, {self._config.logprobs}"
            )
        images = flatten_images(list(images) if isinstance(images, Iterator) else images)
        videos = flatten_videos(list(videos) if isinstance(videos, Iterator) else videos)
        prepared = self._engine.processor.prepare_media(images or None, videos or None)
        media = _Media(
            dataclasses.replace(prepared, features=BatchFeature()),
            *media_of(prepared.features, self._engine.runtime.config),
        )
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content += [{"type": "video", "video": video} for video in videos]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}] if content else text}
        prompt = self._prompt([*self.messages, message], [*self._media, media])
        # Turn number i samples from (seed, i), or all would sample alike.
        number = len(self.completions)
        sequence = self._engine.new_sequence(prompt, config, number=number, keep=self._tokens_in_cache(prompt))
        self._open = self._turn(message, media, sequence)
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
        """Forget the last turn of the user and the model's answer.

        Raises:
          MessageError: there is none.
        """
        if not self.completions:
            raise MessageError("undo: found a conversation without turns; expected at least one")
        del self.messages[-2:]
        self.completions.pop()
        self._media.pop()

    def _prompt(self, messages: list[Mapping[str, Any]], media: list[_Media]) -> Prompt:
        processor = self._engine.processor
        joined = PreparedMedia.joined([turn.prepared for turn in media])
        inputs = processor.prepare_turn(messages, joined)
        images = [medium for turn in media for medium in turn.images]
        videos = [medium for turn in media for medium in turn.videos]
        (prompt,) = prompts_of(inputs, self._engine.runtime.config, (images, videos))
        return dataclasses.replace(prompt, image_sizes=joined.image_sizes)

    def _tokens_in_cache(self, prompt: Prompt) -> int:
        """How many of the prompt's tokens are in the cache; the last is always prefilled, for the token after it."""
        return 0 if self.in_cache is None else min(self.in_cache.common_prefix(prompt), len(prompt) - 1)

    def _turn(self, message: dict[str, Any], media: _Media, sequence: SequenceState) -> Generator[Delta, None, None]:
        if self._slots is None:
            self._slots = self._engine.new_slots(1, sequence.config)
            self._slots.reuses = False  # a conversation keeps more, answers too, and always in the first row
        self._slots.variant = Variant.of(sequence.config)
        # What the cache holds for certain if the turn ends before its first token.
        self.in_cache = sequence.prompt.truncated(sequence.start().keep)
        try:
            updates = run(self._slots, sequence.queue(), steps=self._engine.steps_per_dispatch)
            with contextlib.closing(updates):
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
                structured = completion.answer_span is not None
                answer = completion.answer if structured else without_thoughts(completion.text)
                self.messages += [message, {"role": "assistant", "content": answer}]
                self._media.append(media)
                self.completions.append(completion)
