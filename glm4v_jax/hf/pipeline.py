"""`pipeline("image-text-to-text", model=dir)`: prompts or messages in, text out."""

import dataclasses
import inspect
import itertools
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import PIL.Image

from glm4v_jax.config.checks import Positive, checked, fault
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.errors import ConfigError, GenerationError, MessageError
from glm4v_jax.hf.generate import generate
from glm4v_jax.hf.model import Glm4vForConditionalGeneration
from glm4v_jax.inputs.media.load import is_array
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.processor_options import OPTIONS, sort_options
from glm4v_jax.inputs.text.messages import SOURCE_KEYS

TASK = "image-text-to-text"
MAX_NEW_TOKENS = 256
"""The reference's default for pipelines, whatever `max_new_tokens` generation_config.json has."""

# What `ReturnType` of the reference calls 0, 1 and 2.
Returned = Literal["tensors", "new_text", "full_text"]
_RETURNED: tuple[Returned, ...] = ("tensors", "new_text", "full_text")


@dataclasses.dataclass(frozen=True)
class _Chat:
    messages: list[dict[str, Any]]

    @property
    def is_continued(self) -> bool:
        """Whether the last message is the assistant's, which the model continues by default."""
        return self.messages[-1].get("role") == "assistant"


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """One prompt or several that are one input, with their images."""

    text: str | list[str]
    images: Any = None


class ImageTextToTextPipeline:
    """Processor and model put together: the reference's `ImageTextToTextPipeline`.

    >>> from glm4v_jax import pipeline
    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> pipe = pipeline("image-text-to-text", model=TINY_CHECKPOINT)
    >>> (answer,) = pipe(text=[{"role": "user", "content": "Hi"}], max_new_tokens=2)
    >>> [message["role"] for message in answer["generated_text"]]
    ['user', 'assistant']
    """

    task = TASK

    def __init__(self, model: Glm4vForConditionalGeneration, processor: Glm4vProcessor, **defaults: Any):
        """Put them together.

        Args:
          model: a loaded model.
          processor: of the same checkpoint.
          **defaults: of the options of a call.

        Raises:
          GenerationError, ConfigError: an option is unknown, torch's or out of its range, or contradicts another.
        """
        self.model, self.processor, self._defaults = model, processor, defaults
        _CallOptions.of(defaults, self)

    @property
    def generation_config(self) -> GenerationConfig:
        """The options of a call that gives none: the model's, with 256 new tokens unless it has a `max_length`."""
        config = self.model.generation_config
        changes: dict[str, Any] = {} if config.max_length is not None else {"max_new_tokens": MAX_NEW_TOKENS}
        if config.pad_token_id is None:
            changes["pad_token_id"] = self.processor.tokenizer.pad_token_id
        return config.replace(**changes)

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        """Generate from prompts with images, or from conversations.

        Args:
          images: an image or a list of images for the prompts of `text`, in the order of their placeholders; for a
            conversation, those of its items `{"type": "image"}` without a source. What `text` takes may stand here,
            and `{"images": ..., "text": ...}`.
          text: a conversation (a list of messages); a prompt with `<|image|>` where its images go; a list of either; or
            a generator of any of these, whose results are made one by one.
          **options: `max_new_tokens`, 256 by default; `generate_kwargs`, options of
            `Glm4vForConditionalGeneration.generate`, `generation_config` among them; `return_full_text`, False for the
            new text alone; `return_tensors`, True for `generated_token_ids` [T + new] in place of the text;
            `return_type`, "tensors", "new_text" or "full_text" in place of these two; `continue_final_message`, by
            default whether the last message is the assistant's; `skip_special_tokens`, True by default, and
            `clean_up_tokenization_spaces`, of decoding; `stop_sequence`, at whose first token to end; `batch_size`, how
            many inputs of a list run together, 1 by default. Options of the processor (`size`, `padding`, ...) and of
            `generate` (`do_sample`, ...) may stand here too.

        Returns:
          For a conversation or a prompt `[{"input_text": ..., "generated_text": ...}]`; for a list of conversations, or
          of prompts without images, a list of these; for a list of prompts with images one list with an entry for each.

        Raises:
          MessageError: there is no prompt, or images and placeholders do not match.
          GenerationError, MediaError: see `generate` and `Glm4vProcessor`.
        """
        call = _CallOptions.of({**self._defaults, **options}, self)
        given, images = (images, None) if text is None else (text, images)
        if isinstance(given, types.GeneratorType):
            if images is not None:
                raise MessageError("images: found some beside a generator; expected them in what it yields")
            return (self._answer([_input(item)], call, number)[0] for number, item in enumerate(given))
        if not isinstance(given, list | tuple) or (given and isinstance(given[0], Mapping)):
            return self._answer([_input(given, images)], call)[0]
        if not given:
            raise MessageError("text: found an empty list; expected at least one prompt or conversation")
        if images is not None and all(isinstance(item, str) for item in given):
            return self._answer([_Prompts(list(given), images)], call)[0]
        several = [None] * len(given) if images is None else list(images)
        if len(several) != len(given):
            raise MessageError(f"images: found {len(several)} entries; expected one for each of {len(given)} inputs")
        inputs = [_input(item, its) for item, its in zip(given, several, strict=True)]
        answers: list[list[dict[str, Any]]] = []
        # Conversations of one batch either begin a message or continue one.
        for _, group in itertools.groupby(inputs, key=lambda item: (type(item), call.is_continued(item))):
            alike = list(group)
            for start in range(0, len(alike), call.batch_size):
                answers += self._answer(alike[start : start + call.batch_size], call, len(answers))
        return answers

    def _answer(
        self, batch: Sequence[_Chat | _Prompts], call: "_CallOptions", number: int = 0
    ) -> list[list[dict[str, Any]]]:
        """For each input of a batch the records of what was generated; `number` inputs came before it."""
        asked = [item.messages if isinstance(item, _Chat) else item.text for item in batch]
        inputs = self._inputs(batch, asked, call)
        # Equal inputs of a list are to draw differently.
        seed = (call.seed + number) % 2**32
        options = {"generation_config": self.generation_config, **call.generation, "seed": seed}
        ids = self.model.generate(**inputs, **{"tokenizer": self.processor.tokenizer, **options})
        prompt_length = np.shape(inputs["input_ids"])[1]
        if isinstance(asked[0], list) and isinstance(batch[0], _Prompts):
            return [self._records(asked[0], ids, prompt_length, call)]
        return [self._records([one], row[None], prompt_length, call) for one, row in zip(asked, ids, strict=True)]

    def _inputs(self, batch: Sequence[_Chat | _Prompts], asked: list[Any], call: "_CallOptions") -> dict[str, Any]:
        """What the model takes of a batch."""
        padding = {"padding": True, **call.processing} if len(batch) > 1 else call.processing
        if isinstance(batch[0], _Chat):
            continued = call.is_continued(batch[0])
            return self.processor.apply_chat_template(
                asked, add_generation_prompt=not continued, continue_final_message=continued, tokenize=True,
                return_dict=True, **padding,
            )  # fmt: skip
        (text,) = asked if len(asked) == 1 else (asked,)
        if isinstance(text, list) and len(text) > 1:
            padding = {"padding": True, **call.processing}
        return self.processor(images=batch[0].images, text=text, **padding)

    def _records(
        self, asked: Sequence[Any], ids: np.ndarray, prompt_length: int, call: "_CallOptions"
    ) -> list[dict[str, Any]]:
        if call.returned == "tensors":
            return [{"input_text": one, "generated_token_ids": row} for one, row in zip(asked, ids, strict=True)]
        texts = self.processor.post_process_image_text_to_text(ids[:, prompt_length:], **call.decoding)
        if call.returned == "full_text":
            texts = [call.full_text(*pair) for pair in zip(asked, texts, strict=True)]
        return [{"input_text": one, "generated_text": text} for one, text in zip(asked, texts, strict=True)]


@dataclasses.dataclass(frozen=True)
class _CallOptions:
    """The options of a call, sorted by what they are for."""

    processing: dict[str, Any]
    generation: dict[str, Any]
    seed: int
    decoding: dict[str, Any]
    returned: Returned
    continue_final_message: bool | None
    batch_size: int

    @classmethod
    def of(cls, options: Mapping[str, Any], pipe: ImageTextToTextPipeline) -> Self:
        """Sort and check options; None means "not given".

        Raises:
          GenerationError, ConfigError: an option is unknown, given twice, or out of its range.
        """
        left = {name: value for name, value in options.items() if value is not None}
        given = left.pop("generate_kwargs", {})
        if not isinstance(given, Mapping):
            raise GenerationError(fault("generate_kwargs", given, "a dictionary of options of generate"))
        generation = dict(given)
        # Of data loaders in other processes, which there are none of here.
        left.pop("num_workers", None)
        if "timeout" in left:
            raise ConfigError(fault("timeout", left["timeout"], "none: addresses are fetched within fixed limits"))
        if "max_length" in left:
            expected = "it in generate_kwargs, or for the tokenizer in text_kwargs"
            raise GenerationError(fault("max_length", left["max_length"], expected))
        if (sequence := left.pop("stop_sequence", None)) is not None:
            generation["eos_token_id"] = _first_token(sequence, pipe)
        returned = _returned(
            left.pop("return_type", None), left.pop("return_full_text", None), left.pop("return_tensors", None)
        )
        names = ("skip_special_tokens", "clean_up_tokenization_spaces")
        decoding = {name: left.pop(name) for name in names if name in left}
        continued, batch_size = left.pop("continue_final_message", None), left.pop("batch_size", 1)
        processing = {name: left.pop(name) for name in OPTIONS & left.keys()}
        sort_options(processing)
        if twice := sorted(generation.keys() & left.keys()):
            raise GenerationError(
                f"{', '.join(twice)}: found in generate_kwargs and beside it; expected one of the two"
            )
        generation |= left
        of_call = inspect.signature(generate).parameters
        config = pipe.model.generation_config.overridden(generation.get("generation_config", pipe.generation_config))
        config = config.replace(**{name: value for name, value in generation.items() if name not in of_call})
        for name, off in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
            if (found := getattr(config, name)) != off:
                expected = f"{off!r}: a pipeline returns one text for each input; model.generate returns more"
                raise GenerationError(fault(name, found, expected))
        checked("batch_size", batch_size, Positive)
        return cls(processing, generation, config.seed, decoding, returned, continued, batch_size)

    def is_continued(self, item: _Chat | _Prompts) -> bool:
        """Whether the model continues the last message of a conversation."""
        if isinstance(item, _Prompts):
            return False
        return item.is_continued if self.continue_final_message is None else self.continue_final_message

    def full_text(self, asked: Any, new: str) -> Any:
        """A prompt or a conversation with what was generated at its end."""
        if isinstance(asked, str):
            return asked + new
        if not self.is_continued(_Chat(asked)):
            return [*asked, {"role": "assistant", "content": new}]
        *before, last = asked
        content = last.get("content") or ""
        if isinstance(content, str):
            return [*before, {**last, "content": content + new}]
        *items, end = content
        # Text may have another name, as in OpenAI's items of type 'refusal'.
        ends = [{**end, "text": end["text"] + new}] if "text" in end else [end, {"type": "text", "text": new}]
        return [*before, {**last, "content": [*items, *ends]}]


def _first_token(sequence: str, pipe: ImageTextToTextPipeline) -> int:
    tokens = pipe.processor.tokenizer.encode(sequence, add_special_tokens=False)
    if not tokens:
        raise GenerationError(fault("stop_sequence", sequence, "a text that is not empty"))
    first, *others = tokens
    if others:
        found = f"{1 + len(others)} tokens in {sequence!r}"
        warnings.warn(f"stop_sequence: found {found}; the first ends the text, as in the reference", stacklevel=4)
    return first


def _returned(return_type: Any, return_full_text: bool | None, return_tensors: bool | None) -> Returned:
    if return_type is not None:
        name = getattr(return_type, "name", return_type)
        return checked("return_type", name.lower() if isinstance(name, str) else name, Returned)
    if return_full_text is not None and return_tensors is not None:
        raise ConfigError("return_full_text: found beside return_tensors; expected one of the two")
    if return_tensors:
        return "tensors"
    return "new_text" if return_full_text is False else "full_text"


def _input(given: Any, images: Any = None) -> _Chat | _Prompts:
    """One input: a conversation, a prompt, or an object with images and prompts."""
    if isinstance(given, str):
        return _Prompts(given, images)
    if isinstance(given, Mapping) and "text" in given and images is None:
        text = given["text"]
        return _Prompts(list(text) if isinstance(text, list | tuple) else text, given.get("images"))
    if isinstance(given, list | tuple) and given and all(isinstance(message, Mapping) for message in given):
        return _Chat(_with_images(given, images))
    if isinstance(given, PIL.Image.Image) or is_array(given):
        raise MessageError("text: found nothing beside images; expected a prompt")
    found = "nothing" if given is None else type(given).__name__
    if isinstance(given, list | tuple) and not given:
        found = f"an empty {found}"
    raise MessageError(f"text: found {found}; expected a prompt or a conversation, or a list of them")


def _with_images(messages: Iterable[Mapping[str, Any]], images: Any) -> list[dict[str, Any]]:
    """A conversation whose items without a source have theirs from `images`, and whose addresses are images."""
    given = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    pending, places = iter(given), 0
    filled: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if not isinstance(content, list | tuple):
            filled.append(dict(message))
            continue
        items = []
        for item in content:
            kind = item.get("type") if isinstance(item, Mapping) else None
            if kind == "image_url":
                address = item.get("image_url")
                others = {name: value for name, value in item.items() if name not in ("type", "image_url")}
                item = {
                    **others,
                    "type": "image",
                    "image": address.get("url") if isinstance(address, Mapping) else address,
                }
            elif kind == "image" and not any(key in item for key in SOURCE_KEYS["image"]):
                places += 1
                item = {**item, "image": next(pending, None)}
            items.append(item)
        filled.append({**message, "content": items})
    if places != len(given):
        raise MessageError(f"images: found {len(given)}; expected {places}, one for each item 'image' without a source")
    return filled


def pipeline(
    task: str = TASK,
    model: str | Path | Glm4vForConditionalGeneration | None = None,
    *,
    processor: Glm4vProcessor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> ImageTextToTextPipeline:
    """Make a pipeline.

    Args:
      task: "image-text-to-text", the only one.
      model: a checkpoint directory, or a loaded model together with `processor`.
      processor: in place of the checkpoint's.
      model_kwargs: for `Glm4vForConditionalGeneration.from_pretrained`.
      **options: for `from_pretrained` too (`dtype`, `mesh`, ...), or defaults for the options of a call.

    Raises:
      ConfigError: the task is another, there is no model, or no processor for it, or an option is unknown.
      CheckpointError: see `from_pretrained`.
    """
    if task != TASK:
        raise ConfigError(f"task: found {task!r}; expected {TASK!r}")
    of_model = set(inspect.signature(Glm4vForConditionalGeneration.from_pretrained).parameters)
    loading = dict(model_kwargs or {}) | {name: options.pop(name) for name in of_model & options.keys()}
    if isinstance(model, str | Path):
        processor = processor or Glm4vProcessor.from_pretrained(model)
        model = Glm4vForConditionalGeneration.from_pretrained(model, **loading)
    elif loading and model is not None:
        raise ConfigError(f"{', '.join(sorted(loading))}: found with a loaded model; expected a checkpoint directory")
    if model is None or processor is None:
        raise ConfigError("model: expected a checkpoint directory, or a loaded model and its processor")
    return ImageTextToTextPipeline(model, processor, **options)
