"""The parts of a conversation: their checks, and the images and videos among them.

Messages come in the shapes of transformers and of OpenAI's clients. Whatever changes what the model is shown is honored
or refused by name; nothing is dropped silently.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from glm4v_jax.config.checks import PositiveNumber, checked
from glm4v_jax.config.thinking import THINK
from glm4v_jax.errors import MessageError, naming
from glm4v_jax.inputs.media.load import SampledVideo, frame_files, is_path_like
from glm4v_jax.inputs.vision.settings import AREA_OPTIONS, MediaWithOptions, checked_area

Message = Mapping[str, Any]

# Where an item of a message may have its image or video, as in transformers 4.57.1's `apply_chat_template`.
SOURCE_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}

# OpenAI's spelling, {"type": "image_url", "image_url": {"url": ...}}, with the type and the field that stand for it.
_URL_TYPES = {
    "image_url": ("image", "image_url"),
    "video_url": ("video", "video_url"),
    "input_image": ("image", "image_url"),
}
# Types of text in OpenAI's messages, and where they have it.
_TEXT_TYPES = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}

# Options of an image or video in an item, as Qwen's and ours.
_ITEM_OPTIONS: Mapping[str, tuple[str, ...]] = {"text": (), "image": AREA_OPTIONS, "video": (*AREA_OPTIONS, "fps")}
_OTHER_VIDEO_OPTIONS = ("nframes", "num_frames", "min_frames", "max_frames", "total_pixels", "video_start", "video_end")
# What clients add that does not change what the model is shown: OpenAI's `detail` asks for a resolution of its own
# models, the others are for caches and programs.
_ITEM_NOTES = frozenset({"detail", "format", "cache_control", "annotations", "logprobs", "id", "index", "uuid"})
_THOUGHTS = ("reasoning_content", "reasoning")
_MESSAGE_NOTES = frozenset(
    {
        "name", "tool_call_id", "refusal", "annotations", "id", "index", "status", "type", "cache_control",
        # Thoughts are not part of the history, unless the template has a place for them.
        *_THOUGHTS,
    }
)  # fmt: skip
# What would be missing from the prompt if the template does not print it.
_MESSAGE_PARTS = ("tool_calls", "function_call", "audio")
_MISPLACED = ("image", "images", "video", "videos")


def mentions(source: str, word: str) -> bool:
    """Whether a template has a word as a string of its own, 'word' or "word"."""
    return re.search(rf"(['\"]){re.escape(word)}\1", source) is not None


def reads(source: str, field: str) -> bool:
    """Whether a template may read a field of a message or of an item."""
    return re.search(rf"\b{re.escape(field)}\b", source) is not None


def normalise_messages(messages: Sequence[Message], source: str, where: str = "") -> list[dict[str, Any]]:
    """A conversation in the one form that chat templates understand.

    OpenAI's shapes become those of transformers: `image_url`, `video_url`, `input_image` and `input_text` items are
    images, videos and texts; arguments of `tool_calls` that are JSON become objects; a content that is null beside them
    or beside a thought becomes an empty one; a thought (`thought_of`) gets the name `reasoning_content` where the
    template reads that; `developer` is `system`. Items without a type get one, and keys without a value go.

    Args:
      messages: messages with `role` and `content`: a string, or a list of items of type `text`, `image` or `video`.
        Other types are refused unless the template names them.
      source: the chat template.
      where: put before the messages of errors.

    Returns:
      New messages; those given are not changed.

    Raises:
      MessageError: a type is unknown, a field is missing or has the wrong type, or something is asked for that neither
        the template nor the processor does.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise MessageError(f"{where}found {type(messages).__name__}; expected a list of messages")
    if not messages:
        raise MessageError(f"{where}found no message; expected at least one")
    return [_normalise_message(message, source, f"{where}message {i}") for i, message in enumerate(messages)]


def _normalise_message(message: Any, source: str, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise MessageError(f"{where}: found {type(message).__name__}; expected an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        found = "nothing" if role is None else type(role).__name__
        raise MessageError(f"{where}: field 'role': found {found}; expected a string")
    if role == "developer" and mentions(source, "system") and not mentions(source, role):
        role = "system"
    fields = _message_fields(message, source, where)
    if content is None:
        # A turn that only calls tools, or was cut off in its thought, says nothing.
        if "tool_calls" not in fields and all(message.get(name) is None for name in _THOUGHTS):
            raise MessageError(f"{where}: field 'content': found nothing; expected a string or a list of items")
        content = ""
    if isinstance(content, str):
        return {"role": role, "content": content, **fields}
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise MessageError(f"{where}: field 'content': found {type(content).__name__}; expected a string or a list")
    items: list[dict[str, Any]] = [
        _normalise_item(item, source, f"{where}, item {index}") for index, item in enumerate(content)
    ]
    return {"role": role, "content": items, **fields}


def _message_fields(message: Message, source: str, where: str) -> dict[str, Any]:
    """The fields of a message beside role and content, without those that say nothing."""
    # Clients send back what they got, with null and [] for what there is not.
    fields = {
        name: value
        for name, value in message.items()
        if name not in ("role", "content") and value is not None and not (isinstance(value, list) and not value)
    }
    for name in _MESSAGE_PARTS:
        if name in fields and not reads(source, name):
            raise MessageError(f"{where}: field {name!r}: found some, which the chat template drops; expected none")
    for name in _MISPLACED:
        if name in fields:
            raise MessageError(f"{where}: field {name!r}: found some; expected images and videos as items of 'content'")
    if reads(source, "reasoning_content"):
        # Servers disagree about the name; templates read this one.
        thought = thought_of(message, where) if message["role"] == "assistant" else ""
        fields = {name: value for name, value in fields.items() if name not in _THOUGHTS}
        fields |= {"reasoning_content": thought} if thought else {}
    if "tool_calls" in fields:
        fields["tool_calls"] = _tool_calls(fields["tool_calls"], f"{where}: field 'tool_calls'")
    unknown = [name for name in fields if not (name in _MESSAGE_NOTES or reads(source, str(name)))]
    if unknown:
        warnings.warn(
            f"{where}: unknown to the chat template, and ignored: {', '.join(map(str, unknown))}", stacklevel=2
        )
    return fields


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Tool calls as templates take them, with arguments that are objects: OpenAI's API has them as JSON."""
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
        raise MessageError(f"{where}: found {type(calls).__name__}; expected a list")
    return [checked_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def checked_call(call: Any, where: str) -> dict[str, Any]:
    """Return a call of a tool whose arguments, where it has some, are an object; its own or those of its `function`.

    >>> checked_call({"name": "add", "arguments": '{"a": 1}'}, "tool_calls[0]")
    {'name': 'add', 'arguments': {'a': 1}}

    Raises:
      MessageError: it has no name, or its arguments are not an object.
    """
    if not isinstance(call, Mapping):
        raise MessageError(f"{where}: found {type(call).__name__}; expected an object with 'function'")
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": checked_call(call["function"], f"{where}.function")}
    if not isinstance(call.get("name"), str) or not call["name"].strip():
        raise MessageError(f"{where}.name: found {call.get('name')!r}; expected the name of a tool")
    arguments = call.get("arguments")
    if arguments is None or isinstance(arguments, Mapping):
        return dict(call)
    if not isinstance(arguments, str):
        raise MessageError(f"{where}.arguments: found {type(arguments).__name__}; expected an object")
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{where}.arguments: found invalid JSON ({error}); expected an object") from error
    if not isinstance(parsed, Mapping):
        raise MessageError(f"{where}.arguments: found a JSON {type(parsed).__name__}; expected an object")
    return {**call, "arguments": parsed}


def thought_of(message: Message, where: str) -> str:
    """Return the thought that a message of the assistant has in a field of its own; empty if it has none.

    >>> thought_of({"role": "assistant", "reasoning": "1 + 1.", "content": "2"}, "message 1")
    '1 + 1.'

    Raises:
      MessageError: it is not text, another one has the field's other name, or there is one in the content, too.
    """
    found = {name: message[name] for name in _THOUGHTS if message.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, str):
            raise MessageError(f"{where}: field {name!r}: found {type(value).__name__}; expected a string")
    thoughts = {name: value for name, value in found.items() if value.strip()}
    if len(set(thoughts.values())) > 1:
        fields = " and ".join(map(repr, thoughts))
        raise MessageError(f"{where}: found {fields} with different texts; expected one of them")
    content = message.get("content")
    if isinstance(content, list | tuple) and content and isinstance(content[0], Mapping):
        content = content[0].get("text")
    if thoughts and isinstance(content, str) and content.lstrip().startswith(THINK):
        (name, *_) = thoughts
        raise MessageError(f"{where}: found {THINK} in 'content' beside {name!r}; expected the thought in one of them")
    return next(iter(thoughts.values()), "")


def _normalise_item(item: Any, source: str, where: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise MessageError(f"{where}: found {type(item).__name__}; expected an object with 'type'")
    # Tables of messages fill every column, and a template takes the mere key `image` for an image.
    item = {key: value for key, value in item.items() if value is not None}
    kind = item.get("type")
    if not isinstance(kind, str | None):
        raise MessageError(f"{where}: field 'type': found {kind!r}; expected 'text', 'image' or 'video'")
    if kind is None:
        kinds = [name for name in ("text", "image", "video", "image_url", "video_url") if name in item]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "neither 'text' nor 'image' nor 'video'"
            raise MessageError(f"{where}: field 'type' is missing and the item has {found}; expected one of them")
        kind = kinds[0]
    if kind in _URL_TYPES and (mentions(source, _URL_TYPES[kind][0]) or not mentions(source, kind)):
        # Also where a template knows both: that of GLM-4.6V does for a tool's result, and drops it in a user's message.
        kind, item = _from_openai(kind, item, where)
    elif kind in _TEXT_TYPES and not (kind != "text" and mentions(source, kind)):
        text = item.pop(_TEXT_TYPES[kind], None)
        if not isinstance(text, str):
            found = "nothing" if text is None else type(text).__name__
            raise MessageError(f"{where}: field {_TEXT_TYPES[kind]!r}: found {found}; expected a string")
        kind, item["text"] = "text", text
    item = {**item, "type": kind}
    if kind in ("text", *SOURCE_KEYS):
        stray = [name for name in ("image", "video") if name in item and name != kind]
        if stray:
            raise MessageError(f"{where}: an item of type {kind!r} has the field {stray[0]!r}; expected two items")
    elif not mentions(source, kind):
        raise MessageError(f"{where}: field 'type': found {kind!r}; expected 'text', 'image' or 'video'")
    if kind in SOURCE_KEYS and len(keys := [key for key in SOURCE_KEYS[kind] if key in item]) > 1:
        raise MessageError(f"{where}: the {kind} has the fields {', '.join(map(repr, keys))}; expected one of them")
    if kind in _ITEM_OPTIONS:
        _check_item_options(item, kind, source, where)
    return item


def _from_openai(kind: str, item: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """An item whose image or video is an address, or an object with `url`, in the shape of transformers."""
    kind, field = _URL_TYPES[kind]
    address = item.pop(field, None)
    if isinstance(address, Mapping):
        item |= {key: value for key, value in address.items() if value is not None and key != "url"}
        address = address.get("url")
    if not isinstance(address, str):
        raise MessageError(f"{where}: field {field!r} has no 'url'; expected {{'url': ADDRESS}}")
    return kind, {**item, "url": address}


def _check_item_options(item: Mapping[str, Any], kind: str, source: str, where: str) -> None:
    known = {"type", "text", *SOURCE_KEYS.get(kind, ()), *_ITEM_OPTIONS[kind]}
    for name in item:
        if name in known or name in _ITEM_NOTES or reads(source, str(name)):
            continue
        expected = ", ".join(("text",) if kind == "text" else (*SOURCE_KEYS[kind], *_ITEM_OPTIONS[kind]))
        if kind == "video" and name in _OTHER_VIDEO_OPTIONS:
            expected += ": fps says how many frames are taken, and max_pixels how large each is"
        raise MessageError(f"{where}: found {name!r} in an item of type {kind!r}; expected some of {expected}")


def extract_media(messages: Sequence[Message], source: str, where: str = "") -> tuple[list[Any], list[Any]]:
    """The images and videos of a conversation (see `normalise_messages`), in its order.

    They are as the items have them: paths, URLs, base64 as a data URL, bytes, PIL, arrays, frames. Frames with a field
    `fps`, and frames in files, have been sampled, and are a `SampledVideo`. What else an item asks for is in a
    `MediaWithOptions`: `fps` of an encoded video, to be sampled at that rate, and `AREA_OPTIONS`.

    Raises:
      MessageError: the conversation is malformed, a medium has no source, or the rate of frames is not a number.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in SOURCE_KEYS}
    for index, message in enumerate(normalise_messages(messages, source, where)):
        content = message.get("content")
        for position, item in enumerate(content if isinstance(content, list) else []):
            kind = item["type"]
            if kind not in SOURCE_KEYS:
                continue
            key = next((key for key in SOURCE_KEYS[kind] if key in item), None)
            if key is None:
                raise MessageError(
                    f"{where}message {index}, item {position}: the {kind} has no source; expected one of the fields "
                    f"{', '.join(map(repr, SOURCE_KEYS[kind]))}"
                )
            media = item[key]
            if key == "base64" and isinstance(media, str) and not media.startswith("data:"):
                media = "data:image/unknown;base64," + media
            if isinstance(media, (list, tuple)) and not media:
                expected = "at least one frame" if kind == "video" else "one image"
                raise MessageError(f"{where}message {index}, item {position}: found an empty list; expected {expected}")
            with naming(f"{where}message {index}, item {position}", MessageError):
                found[kind].append(_with_options(media, item, kind))
    return found["image"], found["video"]


def _with_options(media: Any, item: Mapping[str, Any], kind: str) -> Any:
    options = {name: item[name] for name in AREA_OPTIONS if name in item}
    checked_area(options)
    if kind == "video":
        if frame_files(media) is not None or ("fps" in item and not is_path_like(media)):
            media = SampledVideo(media, item.get("fps"))
        elif "fps" in item:
            options |= {"fps": checked("fps", item["fps"], PositiveNumber), "do_sample_frames": True}
    return MediaWithOptions(media, options) if options else media


def user_messages(
    text: str, media: Sequence[Mapping[str, Any]] = (), system: str | None = None
) -> list[dict[str, Any]]:
    """One turn of the user, as chat templates take it: items of images and videos, text; after what the system says."""
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": [*media, {"type": "text", "text": text}]}]
