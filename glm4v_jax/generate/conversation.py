"""A conversation that keeps its cache: a turn runs only what is new through the model.

Every turn renders the whole conversation and compares it, token by token and picture by picture, with what the cache
holds. What is the same stays, the rest is run. So the result is that of one long prompt, whatever the chat template
does: thoughts are dropped from the history by running the answer again without them, and positions are those of the
whole, also behind pictures that came late.
"""

import contextlib
import dataclasses
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.presets import configured
from glm4v_jax.errors import GenerationError, MessageError
from glm4v_jax.generate.completion import Completion, Delta, last
from glm4v_jax.generate.scheduler import Update, run
from glm4v_jax.generate.sequence import Answer
from glm4v_jax.generate.slots import Slots
from glm4v_jax.generate.text.thinking import without_thoughts
from glm4v_jax.inputs.batch_feature import BatchFeature
from glm4v_jax.inputs.medium import Medium, media_of
from glm4v_jax.inputs.prepared_media import PreparedMedia
from glm4v_jax.inputs.prompt import Prompt, prompts_of

if TYPE_CHECKING:
    from glm4v_jax.generate.engine import Engine


class _Media(NamedTuple):
    """Pictures and videos of a turn: what stands for them in the prompt, and what the model sees."""

    prepared: PreparedMedia
    images: list[Medium]
    videos: list[Medium]


class Conversation:
    """Turns between a user and the model.

    Attributes:
      messages: what has been said, as chat templates take it; the model's turns without their thoughts.
      completions: the model's turns as it wrote them.
      in_cache: the tokens that need not be run again if the next turn begins with them.
    """

    def __init__(self, engine: "Engine", system: str | None = None, config: GenerationConfig | None = None):
        """Begin; see `Engine.conversation`."""
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
        images: Iterable[Any] = (),
        videos: Iterable[Any] = (),
        preset: str | None = None,
        **options: Any,
    ) -> Iterator[Delta]:
        """Say something and stream the answer.

        Closing the iterator stops the answer, and what there is of it stays in the conversation; so does asking again
        before it has ended. A turn that fails before its first token leaves the conversation as it was.

        Args:
          text: what the user says.
          images, videos: what comes before it: paths, addresses, bytes, Pillow images, arrays.
          preset, **options: see `Engine.stream`; for this turn, over the conversation's.

        Yields:
          Pieces; the last holds the completion.

        Raises:
          Glm4vError: what is wrong with media or options, before anything is computed.
        """
        if self._open is not None:
            self._open.close()
        config = configured(self._config, preset, options)
        if config.logprobs != self._config.logprobs:
            raise GenerationError(
                f"logprobs: found {config.logprobs}; expected the conversation's, {self._config.logprobs}"
            )
        images, videos = list(images), list(videos)
        prepared = self._engine.processor.prepare_media(images or None, videos or None)
        media = _Media(
            dataclasses.replace(prepared, features=BatchFeature()),
            *media_of(prepared.features, self._engine.runtime.config),
        )
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content += [{"type": "video", "video": video} for video in videos]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}] if content else text}
        prompt = self._prompt([*self.messages, message], [*self._media, media])
        # Turn number i draws from (seed, i), or all would draw alike.
        number = len(self.completions)
        answer = self._engine.answer(prompt, config, number=number, keep=self._tokens_in_cache(prompt))
        self._open = self._turn(message, media, answer)
        return self._open

    def send(self, text: str, **kwargs: Any) -> Completion:
        """Say something and wait for the answer; see `ask`."""
        return last(self.ask(text, **kwargs))

    @property
    def system(self) -> str | None:
        """What the system says first; may be set between turns."""
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
        inputs = processor.assemble([processor.apply_chat_template(messages, add_generation_prompt=True)], joined)
        images = [medium for turn in media for medium in turn.images]
        videos = [medium for turn in media for medium in turn.videos]
        (prompt,) = prompts_of(inputs, self._engine.runtime.config, (images, videos))
        return dataclasses.replace(prompt, image_sizes=joined.image_sizes)

    def _tokens_in_cache(self, prompt: Prompt) -> int:
        """How many of the prompt's tokens need not be run; the last always is, for what comes after it."""
        return 0 if self.in_cache is None else min(self.in_cache.common_prefix(prompt), len(prompt) - 1)

    def _turn(self, message: dict[str, Any], media: _Media, answer: Answer) -> Generator[Delta, None, None]:
        if self._slots is None:
            self._slots = self._engine.new_slots(1, answer.config)
        # If the turn ends before its first token, this is what can be relied on.
        self.in_cache = answer.prompt.truncated(answer.start().keep)
        try:
            updates = run(self._slots, answer.alone(), steps=self._engine.steps_per_dispatch)
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
            if answer.tokens:
                if self._slots is not None:
                    self.in_cache = answer.in_cache
                completion = answer.completion()
                self.messages += [message, {"role": "assistant", "content": without_thoughts(completion.text)}]
                self._media.append(media)
                self.completions.append(completion)
