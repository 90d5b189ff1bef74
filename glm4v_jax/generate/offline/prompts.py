"""The prompts of a JSON-lines file, all checked before a model is loaded."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glm4v_jax.config.checks import PositiveNumber, checked, did_you_mean
from glm4v_jax.data.media import MEDIA_FIELDS, is_base64, kind_of, located, media_item
from glm4v_jax.data.tables import open_text
from glm4v_jax.errors import GenerationError, Glm4vError, MediaError, MessageError, not_there, raise_listed
from glm4v_jax.inputs.media.fetch import is_address, is_url
from glm4v_jax.inputs.media.load import are_frames
from glm4v_jax.inputs.text.messages import SOURCE_KEYS, extract_media, normalise_messages, user_messages

if TYPE_CHECKING:
    from glm4v_jax.config.generation import GenerationConfig
    from glm4v_jax.inputs.processor import Glm4vProcessor

_PROMPT_FIELDS = ("prompt", *MEDIA_FIELDS, "fps")
_GZIP = b"\x1f\x8b"
_FIELDS = ("messages", "id", *_PROMPT_FIELDS)


@dataclasses.dataclass(frozen=True)
class BatchPrompt:
    """A prompt among many.

    Attributes:
      name: distinguishes it from the others, in its answer too: its index from 0, or the name of its file.
      messages: the prompt, as chat templates take it.
      asked: the prompt as it was written; equal for equal prompts, wherever their files are.
      options: fields of `GenerationConfig` for this prompt.
      fields: what its answer has besides, such as "id".
      place: file and line that it was read from.
      missing: which of its files does not exist, in words; an error takes the place of its answer then.
    """

    name: int | str
    messages: list[dict[str, Any]]
    asked: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str | None = None
    missing: str | None = None


def read_prompts(
    path: str, config: "GenerationConfig", processor: "Glm4vProcessor", system: str | None = None
) -> list[BatchPrompt]:
    """Read all prompts of a JSON-lines file; skip blank lines.

    Args:
      path: the file; paths in it are relative to its directory.
      config: the options that those of a line override.
      processor: its chat template will render them.
      system: system prompt for lines that have none.

    Raises:
      OSError: the file cannot be read.
      Glm4vError: what is wrong with a line; with several, see `raise_listed`. Files that do not exist are no fault of a
        line, unless none of those that the lines show exists.
    """
    template = processor.template()
    directory = os.path.dirname(path)
    prompts: list[BatchPrompt] = []
    problems: list[Glm4vError] = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if number == 1 and line.startswith(_GZIP):
                raise MessageError(f"{path}: found a compressed file; expected text: name it {path}.gz")
            try:
                prompt = _read(line, len(prompts), directory, config, template, system)
                prompts.append(dataclasses.replace(prompt, place=f"{path}:{number}"))
            except Glm4vError as error:
                problems.append(type(error)(f"{path}:{number}: {error}"))
                problems[-1].__cause__ = error
    showing = [prompt for prompt in prompts if any(map(_is_file, _sources(prompt.messages)))]
    if not problems and all(prompt.missing for prompt in showing):
        problems = [MediaError(f"{prompt.place}: {prompt.missing}") for prompt in showing]
    raise_listed(problems, path, "lines")
    if not prompts:
        raise MessageError(f"{path}: found no prompt; expected one JSON object per line")
    return prompts


def _read(
    line: bytes, index: int, directory: str, config: "GenerationConfig", template: str, system: str | None
) -> BatchPrompt:
    from glm4v_jax.generate.prompt import CHAT_OPTIONS
    from glm4v_jax.inputs.text.chat_template import COMMON_ROLES, render_conversation

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"found invalid JSON ({error}); expected an object") from error
    if not isinstance(row, dict):
        raise MessageError(f"found {kind_of(row)}; expected an object")
    options = {name: value for name, value in row.items() if name not in _FIELDS}
    _check_options(options, config)
    if "messages" in row:
        if both := [name for name in _PROMPT_FIELDS if name in row]:
            raise MessageError(f"{both[0]}: found with 'messages'; expected one of the two")
        if not isinstance(row["messages"], list):
            raise MessageError(f"messages: found {kind_of(row['messages'])}; expected a list")
        try:
            extract_media(row["messages"], template)
        except MessageError as error:
            raise MessageError(f"messages: {error}") from error
        messages = [_located(message, directory) for message in normalise_messages(row["messages"], template)]
        if any(message["role"] not in COMMON_ROLES for message in messages):
            render_conversation(messages, template)  # raises where the template drops them
        if system is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": system}, *messages]
    else:
        if not isinstance(row.get("prompt"), str):
            found = kind_of(row["prompt"]) if "prompt" in row else "nothing"
            raise MessageError(f"prompt: found {found}; expected a string, or 'messages' instead")
        messages = user_messages(row["prompt"], _media(row, directory), system)
    asked = {name: value for name, value in row.items() if name in CHAT_OPTIONS or name not in {*options, "id"}}
    missing = next((place for place in _sources(messages) if _is_file(place) and not os.path.exists(place)), None)
    return BatchPrompt(
        index, messages, asked | {"system": system}, options, {"id": row["id"]} if "id" in row else {},
        missing=None if missing is None else not_there(missing, "an image or a video"),
    )  # fmt: skip


def _check_options(options: Mapping[str, Any], config: "GenerationConfig") -> None:
    if "logprobs" in options:
        raise GenerationError("logprobs: found in a line; expected --logprobs for all prompts")
    if options.get("num_return_sequences", 1) != 1:
        raise GenerationError(f"num_return_sequences: found {options['num_return_sequences']!r}; expected 1")
    from glm4v_jax.config.generation import OF_ALL_REQUESTS, OF_BEAMS, OF_THE_MODEL
    from glm4v_jax.generate.prompt import CHAT_OPTIONS, split_options

    known = {field.name for field in dataclasses.fields(config)} - {*OF_THE_MODEL, *OF_BEAMS, *OF_ALL_REQUESTS}
    if unknown := [name for name in options if name not in {*known, *CHAT_OPTIONS}]:
        expected = ", ".join([*_FIELDS, *CHAT_OPTIONS, *sorted(known - {"num_return_sequences", "use_cache"})])
        near = did_you_mean(unknown[0], [*_FIELDS, *CHAT_OPTIONS, *known])
        raise MessageError(f"{unknown[0]}: found an unknown field; expected some of {expected}{near}")
    config.replace(**split_options(options)[1])  # raises where one is out of range


def asks_network(prompt: BatchPrompt) -> bool:
    """Whether a prompt has an address of the network."""
    return any(map(is_url, _sources(prompt.messages)))


def _media(row: Mapping[str, Any], directory: str) -> list[dict[str, Any]]:
    """The images and videos of a row, images first, with paths from the directory of the file they are written in.

    Raises:
      DataError, MessageError: a field is invalid.
    """
    found: dict[str, list[dict[str, Any]]] = {"image": [], "video": []}
    for field, kind in MEDIA_FIELDS.items():
        value = row.get(field, [])
        if kind == "video" and isinstance(value, list):
            # Of single images: the frames of one video, as for a processor.
            places = [_place(place, directory) for place in value]
            value = [value] if are_frames(places) else value
        for index, one in enumerate(value if isinstance(value, list) else [value]):
            item = media_item(kind, one, f"{field}[{index}]" if isinstance(value, list) else field)
            found[kind].append(located(item, directory))
    if "fps" in row:
        rate = checked("fps", row["fps"], PositiveNumber, MessageError)
        if not found["video"]:
            raise MessageError("fps: found without a video; expected it beside one")
        found["video"] = [{**item, "fps": rate} for item in found["video"]]
    return [*found["image"], *found["video"]]


def _located(message: dict[str, Any], directory: str) -> dict[str, Any]:
    """Resolve the paths of images and videos in a normalised message."""
    if not isinstance(message.get("content"), list):
        return message
    items = []
    for item in message["content"]:
        keys = [key for key in SOURCE_KEYS.get(item["type"], ()) if key in item and key != "base64"]
        items.append(item | {key: _place(item[key], directory) for key in keys})
    return {**message, "content": items}


def _place(source: Any, directory: str) -> Any:
    """Resolve a path from the directory of the file it is written in; leave everything else as it is."""
    if isinstance(source, list):
        return [_place(frame, directory) for frame in source]
    return os.path.join(directory, source) if isinstance(source, str) and _is_file(source) else source


def _sources(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The paths and addresses of images and videos, frame by frame."""
    for message in messages:
        for item in message["content"] if isinstance(message.get("content"), list) else ():
            for key in SOURCE_KEYS.get(item["type"], ()):
                sources = item.get(key)
                yield from (
                    one for one in (sources if isinstance(sources, list) else [sources]) if isinstance(one, str)
                )


def _is_file(place: str) -> bool:
    """Whether text is a path, and neither an address nor encoded."""
    return not is_address(place) and not is_base64(place)
