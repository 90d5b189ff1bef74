"""The prompts of a JSON-lines file, all checked before a model is loaded."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glm4v_jax.config.checks import did_you_mean
from glm4v_jax.errors import GenerationError, Glm4vError, MediaError, MessageError, raise_listed
from glm4v_jax.inputs.text.messages import user_messages

if TYPE_CHECKING:
    from glm4v_jax.config.generation import GenerationConfig
    from glm4v_jax.inputs.processor import Glm4vProcessor

_MEDIA = {"image": "image", "images": "image", "video": "video", "videos": "video"}
_PROMPT_FIELDS = ("prompt", *_MEDIA)
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
    """

    name: int | str
    messages: list[dict[str, Any]]
    asked: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str | None = None


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
      Glm4vError: what is wrong with a line; with several, see `raise_listed`.
    """
    from glm4v_jax.inputs.text.chat_template import choose_template

    template = choose_template(processor.chat_template)
    directory = os.path.dirname(path)
    prompts: list[BatchPrompt] = []
    problems: list[Glm4vError] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                prompt = _read(line, len(prompts), directory, config, template, system)
                prompts.append(dataclasses.replace(prompt, place=f"{path}:{number}"))
            except Glm4vError as error:
                problems.append(type(error)(f"{path}:{number}: {error}"))
                problems[-1].__cause__ = error
    raise_listed(problems, path, "lines")
    if not prompts:
        raise MessageError(f"{path}: found no prompt; expected one JSON object per line")
    return prompts


def _read(
    line: bytes, index: int, directory: str, config: "GenerationConfig", template: str, system: str | None
) -> BatchPrompt:
    from glm4v_jax.inputs.text.messages import extract_media, normalise_messages

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"found invalid JSON ({error}); expected an object") from error
    if not isinstance(row, dict):
        raise MessageError(f"found {_kind(row)}; expected an object")
    options = {name: value for name, value in row.items() if name not in _FIELDS}
    _check_options(options, config)
    if "messages" in row:
        if both := [name for name in _PROMPT_FIELDS if name in row]:
            raise MessageError(f"{both[0]}: found with 'messages'; expected one of the two")
        if not isinstance(row["messages"], list):
            raise MessageError(f"messages: found {_kind(row['messages'])}; expected a list")
        try:
            extract_media(row["messages"], template)
        except MessageError as error:
            raise MessageError(f"messages: {error}") from error
        messages = [_located(message, directory) for message in normalise_messages(row["messages"], template)]
        if system is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": system}, *messages]
    else:
        if not isinstance(row.get("prompt"), str):
            found = _kind(row["prompt"]) if "prompt" in row else "nothing"
            raise MessageError(f"prompt: found {found}; expected a string, or 'messages' instead")
        media: dict[str, list[str]] = {"image": [], "video": []}
        for field, kind in _MEDIA.items():
            if field in row:
                media[kind] += [_place(place, field, directory) for place in _strings(field, row[field])]
        messages = user_messages(row["prompt"], media["image"], media["video"], system)
    asked = {name: value for name, value in row.items() if name not in options and name != "id"}
    return BatchPrompt(index, messages, asked | {"system": system}, options, {"id": row["id"]} if "id" in row else {})


def _check_options(options: Mapping[str, Any], config: "GenerationConfig") -> None:
    if "logprobs" in options:
        raise GenerationError("logprobs: found in a line; expected --logprobs for all prompts")
    if options.get("num_return_sequences", 1) != 1:
        raise GenerationError(f"num_return_sequences: found {options['num_return_sequences']!r}; expected 1")
    from glm4v_jax.config.generation import OF_THE_MODEL

    known = {field.name for field in dataclasses.fields(config)} - {*OF_THE_MODEL, "logits_processor"}
    if unknown := [name for name in options if name not in known]:
        expected = ", ".join([*_FIELDS, *sorted(known - {"logprobs", "num_return_sequences", "use_cache"})])
        near = did_you_mean(unknown[0], [*_FIELDS, *known])
        raise MessageError(f"{unknown[0]}: found an unknown field; expected some of {expected}{near}")
    config.replace(**options)  # raises where one is out of range


def asks_network(prompt: BatchPrompt) -> bool:
    """Whether a prompt has an address of the network."""
    from glm4v_jax.inputs.media.fetch import is_url

    contents = [message["content"] for message in prompt.messages if isinstance(message.get("content"), list)]
    values = [value for content in contents for item in content for value in item.values()]
    return any(map(is_url, values))


def _strings(field: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise MessageError(f"{field}: found {_kind(value)}; expected a string or a list of strings")
    return values


def _place(place: str, field: str, directory: str) -> str:
    """Resolve a path from the directory of the file it is written in; leave an address as it is."""
    from glm4v_jax.inputs.media.fetch import is_address

    if is_address(place):
        return place
    path = os.path.join(directory, place)
    if not place or not os.path.exists(path):
        raise MediaError(f"{field}: found {place!r}, which does not exist; expected a file")
    return path


def _located(message: dict[str, Any], directory: str) -> dict[str, Any]:
    """Resolve the paths of images and videos in a normalised message."""
    from glm4v_jax.inputs.text.messages import SOURCE_KEYS

    if not isinstance(message.get("content"), list):
        return message
    keys = {key for keys in SOURCE_KEYS.values() for key in keys} - {"base64"}
    items = []
    for item in message["content"]:
        located = dict(item)
        for key in keys & item.keys():
            if isinstance(item[key], str):
                located[key] = _place(item[key], key, directory)
        items.append(located)
    return {**message, "content": items}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
