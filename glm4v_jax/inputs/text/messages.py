"""The parts of a conversation: their checks, and the images and videos among them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm4v_jax.errors import MessageError, naming
from glm4v_jax.inputs.media.load import SampledVideo, is_path_like

Message = Mapping[str, Any]

# Where an item of a message may have its image or video, as in transformers 4.57.1's `apply_chat_template`.
SOURCE_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}

# OpenAI's spelling, {"type": "image_url", "image_url": {"url": ...}}, and the type that stands for it.
_URL_TYPES = {"image_url": "image", "video_url": "video"}


def mentions(source: str, word: str) -> bool:
    """Whether a template has a word as a string of its own, 'word' or "word"."""
    return re.search(rf"(['\"]){re.escape(word)}\1", source) is not None


def normalise_messages(messages: Sequence[Message], source: str, where: str = "") -> list[dict[str, Any]]:
    """A conversation in the one form that chat templates understand.

    Contents that are lists of text become a string wherever the role is not `user` (a template prints their Python repr
    otherwise), OpenAI's `image_url` and `video_url` items become `image` and `video` items, items without a type get
    one, and keys without a value go.

    Args:
      messages: messages with `role` and `content`: a string, or a list of items of type `text`, `image` or `video`.
        Other types are refused unless the template names them.
      source: the chat template.
      where: put before the messages of errors.

    Returns:
      New messages; those given are not changed.

    Raises:
      MessageError: a type is unknown, or a field is missing or has the wrong type.
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
    if content is None:
        # A turn that only calls tools says nothing.
        if message.get("tool_calls") and "tool_calls" in source:
            return dict(message)
        raise MessageError(f"{where}: field 'content': found nothing; expected a string or a list of items")
    if isinstance(content, str):
        return dict(message)
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise MessageError(f"{where}: field 'content': found {type(content).__name__}; expected a string or a list")
    items: list[dict[str, Any]] = [
        _normalise_item(item, source, f"{where}, item {index}") for index, item in enumerate(content)
    ]
    if role != "user" and all(item["type"] == "text" for item in items):
        return {**message, "content": "".join(item["text"] for item in items)}
    return {**message, "content": items}


def _normalise_item(item: Any, source: str, where: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise MessageError(f"{where}: found {type(item).__name__}; expected an object with 'type'")
    # Tables of messages fill every column, and a template takes the mere key `image` for an image.
    item = {key: value for key, value in item.items() if value is not None}
    kind = item.get("type")
    if not isinstance(kind, str | None):
        raise MessageError(f"{where}: field 'type': found {kind!r}; expected 'text', 'image' or 'video'")
    if kind in _URL_TYPES:
        address = item.get(kind)
        if isinstance(address, Mapping):
            address = address.get("url")
        if not isinstance(address, str):
            raise MessageError(f"{where}: field {kind!r} has no 'url'; expected {{'url': ADDRESS}}")
        return {"type": _URL_TYPES[kind], "url": address}
    if kind is None:
        kinds = [name for name in ("text", "image", "video") if name in item]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "neither 'text' nor 'image' nor 'video'"
            raise MessageError(f"{where}: field 'type' is missing and the item has {found}; expected one of them")
        kind = kinds[0]
        item = {"type": kind, **item}
    if kind == "text":
        text = item.get("text")
        if not isinstance(text, str):
            found = "nothing" if text is None else type(text).__name__
            raise MessageError(f"{where}: field 'text': found {found}; expected a string")
    if kind in ("text", *SOURCE_KEYS):
        stray = [name for name in ("image", "video") if name in item and name != kind]
        if stray:
            raise MessageError(f"{where}: an item of type {kind!r} has the field {stray[0]!r}; expected two items")
    elif not mentions(source, kind):
        raise MessageError(f"{where}: field 'type': found {kind!r}; expected 'text', 'image' or 'video'")
    if kind in SOURCE_KEYS and len(keys := [key for key in SOURCE_KEYS[kind] if key in item]) > 1:
        raise MessageError(f"{where}: the {kind} has the fields {', '.join(map(repr, keys))}; expected one of them")
    return item


def extract_media(messages: Sequence[Message], source: str, where: str = "") -> tuple[list[Any], list[Any]]:
    """The images and videos of a conversation, in its order.

    Args:
      messages: a conversation; see `normalise_messages`.
      source: the chat template.
      where: put before the messages of errors.

    Returns:
      The images and the videos as the items have them: paths, URLs, base64 as a data URL, bytes, PIL, arrays, frames.
      Frames with a field `fps` have been sampled at that rate, and are a `SampledVideo`; videos in files bring their
      own, and theirs is ignored.

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
            if kind == "video" and "fps" in item and not is_path_like(media):
                with naming(f"{where}message {index}, item {position}", MessageError):
                    media = SampledVideo(media, item["fps"])
            found[kind].append(media)
    return found["image"], found["video"]


def user_messages(
    text: str, images: Sequence[str] = (), videos: Sequence[str] = (), system: str | None = None
) -> list[dict[str, Any]]:
    """One turn of the user, as chat templates take it: images, videos, text; after what the system says."""
    media = [{"type": "image", "url": place} for place in images]
    media += [{"type": "video", "url": place} for place in videos]
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": [*media, {"type": "text", "text": text}]}]
