"""What the formats of conversations have in common: roles, contents, markers, and which messages are targets."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from glm4v_jax.config.checks import did_you_mean
from glm4v_jax.data.media import MediaItem, is_empty, kind_of, media_item, media_values
from glm4v_jax.data.tables import literal_list
from glm4v_jax.errors import DataError, counted

Row = Mapping[str, Any]
Message = dict[str, Any]

MARKERS = {"<image>": "image", "<video>": "video"}
_MARKER = re.compile("|".join(MARKERS))
FILES = {"image": ("images", "image"), "video": ("videos", "video")}
"""Fields of a row that list its images and videos."""
ROLES = ("system", "user", "assistant")
# Training on the rest of such a message would silently lose them.
_UNSUPPORTED = ("thinking", "audio")
_SOURCES = ("path", "url", "image", "video", "base64", "image_url", "video_url", "source")
_TYPES = {"image": "image", "video": "video", "image_url": "image", "video_url": "video"}


class Turns(NamedTuple):
    """A conversation, and which of its messages contribute to the loss.

    Attributes:
        messages: `{"role": ..., "content": [items]}`, the items typed as in Hugging Face; those of the assistant may
            have `reasoning_content`, a text, and `tool_calls` (`train.data.tools`).
        losses: one per message.
        tools: the functions that the assistant may call.
    """

    messages: tuple[Message, ...]
    losses: tuple[bool, ...]
    tools: tuple[Row, ...] = ()


def invalid(field: str, found: str, expected: str) -> DataError:
    """Return the error about a field of a row; `found` and `expected` are words."""
    return DataError(f"{field}: found {found}; expected {expected}")


class MediaFiles:
    """The files that a row lists beside its conversation, in which markers refer to them in their order."""

    def __init__(self, row: Row, fields: Mapping[str, Sequence[str]] = FILES):
        self._names: dict[str, str] = {}
        self._files: dict[str, list[MediaItem]] = {}
        self._taken: dict[str, list[MediaItem]] = {kind: [] for kind in FILES}
        for kind, names in fields.items():
            given = [name for name in names if not is_empty(row.get(name))]
            if len(given) > 1:
                raise invalid(given[1], f"some beside {given[0]!r}", "one of the two")
            name = self._names[kind] = given[0] if given else names[0] or FILES[kind][0]
            values = enumerate(media_values(kind, literal_list(row[name])) if given else [])
            # Tables have a place for an image in every row, if only with null.
            self._files[kind] = [media_item(kind, value, f"{name}[{i}]") for i, value in values if not is_empty(value)]
        if not is_empty(row.get("audios")):
            raise invalid("audios", "some", "none: the model takes images and videos")

    def take(self, kind: str) -> MediaItem:
        """Return the item of a marker, which is empty until `finish`: with too few markers its file is a later one."""
        item = {"type": kind}
        self._taken[kind].append(item)
        return item

    def finish(self, thing: str = "<{kind}> marker", things: str = "", *, is_strict: bool = True) -> list[MediaItem]:
        """Fill all items that were taken; DataError if there are too few files, or too many.

        Args:
            thing, things: words for one of them, and for several if an "s" is not enough.
            is_strict: each file needs an item; otherwise the first files may have none. These are returned as
                items: videos, then images, as ms-swift puts them before the query.
        """
        before: list[MediaItem] = []
        for kind, taken in self._taken.items():
            files = self._files[kind]
            more = len(files) - len(taken)
            if more < 0 or (more and is_strict):
                needed = counted(len(taken), thing.format(kind=kind), things.format(kind=kind))
                raise invalid(self._names[kind], f"{len(files)} for {needed}", "as many")
            before = files[:more] + before
            for item, file in zip(taken, files[more:], strict=True):
                item.update(file)
        return before


def split_markers(text: str, media: MediaFiles) -> list[MediaItem]:
    """Split text at `<image>` and `<video>` into items; the text around them is not changed."""
    items: list[MediaItem] = []
    start = 0
    for match in _MARKER.finditer(text):
        items += [text_item(text[start : match.start()])] if match.start() > start else []
        items.append(media.take(MARKERS[match[0]]))
        start = match.end()
    return [*items, text_item(text[start:])] if start < len(text) or not items else items


def text_item(text: str) -> MediaItem:
    """Return the item of a text."""
    return {"type": "text", "text": text}


def typed_items(content: Sequence[Any], media: MediaFiles, field: str) -> list[MediaItem]:
    """Convert typed items, as spelled by Hugging Face, OpenAI or Anthropic.

    Raises:
        DataError: an item is not a text, an image or a video.
    """
    items = []
    for index, given in enumerate(content):
        where = f"{field}[{index}]"
        if not isinstance(given, Mapping):
            raise invalid(where, kind_of(given), "an object with 'type'")
        # Tables fill every column, if only with null.
        item = {key: value for key, value in given.items() if value is not None}
        kind = item.get("type", "text" if "text" in item else None)
        if kind == "text":
            items.append(text_item(string(item, "text", where)))
        elif isinstance(kind, str) and kind in _TYPES:
            sources = [key for key in _SOURCES if key in item]
            if len(sources) > 1:
                raise invalid(where, ", ".join(map(repr, sources)), "one of them")
            kind = _TYPES[kind]
            items.append(media_item(kind, item[sources[0]], where) if sources else media.take(kind))
            if kind == "video" and "fps" in item:
                items[-1]["fps"] = _frame_rate(item["fps"], f"{where}.fps")
        else:
            raise invalid(where, "no 'type'" if kind is None else f"type {kind!r}", "'text', 'image' or 'video'")
    return items


def _frame_rate(value: Any, field: str) -> float:
    """Frames per second, of a video that is given as its frames."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise invalid(field, repr(value), "a number above 0")
    return value


def string(row: Row, name: str, where: str = "") -> str:
    """Return a field that must be text; DataError if it is not."""
    value = row.get(name)
    if not isinstance(value, str):
        raise invalid(f"{where}.{name}".lstrip("."), kind_of(value) if name in row else "none", "a string")
    return value


def optional_string(row: Row, name: str) -> str:
    """Return a field that may be missing, null or empty, and must be text otherwise."""
    return "" if row.get(name) is None else string(row, name)


def items_list(row: Row, name: str) -> Sequence[Any]:
    """Return a field that must be a list of at least one item; a table of text spells it in JSON or Python.

    Raises:
        DataError: it is missing, empty or something else.
    """
    value = literal_list(row.get(name))
    if not isinstance(value, list | tuple):
        raise invalid(name, kind_of(value) if name in row else "none", "a list of messages")
    if not value:
        raise invalid(name, "no message", "at least one")
    return value


def role_of(message: Any, key: str, names: Mapping[str, str], where: str) -> str:
    """Return the role of a message, `message[key]`; DataError if `names` (role in the format -> role) lacks it."""
    if not isinstance(message, Mapping):
        raise invalid(where, kind_of(message), f"an object with {key!r}")
    found = string(message, key, where)
    if found in names:
        return names[found]
    raise invalid(f"{where}.{key}", repr(found), f"one of {', '.join(names)}{did_you_mean(found, names)}")


def loss_of(message: Row, role: str, where: str) -> bool:
    """Return whether a message contributes to the loss: those that the assistant writes, unless a field says otherwise.

    The fields are `loss` and `loss_scale` of ms-swift and `weight` of OpenAI.

    Raises:
        DataError: one of them is neither true nor false, or true for a message that is not the assistant's.
    """
    is_target = is_said = role in ("assistant", "tool_call")
    for name in ("loss", "loss_scale", "weight"):
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise invalid(f"{where}.{name}", repr(value), "true or false")
        if value and not is_said:
            raise invalid(f"{where}.{name}", f"{value!r} in a message of {role}", "it in one of the assistant")
        is_target = is_target and bool(value)
    return is_target


def check_supported(message: Row, where: str) -> None:
    """Raise a DataError for a field of a message whose content would be lost."""
    for name in _UNSUPPORTED:
        if not is_empty(message.get(name)):
            raise invalid(f"{where}.{name}", "some", "none: it is not supported")


def with_system(messages: Iterable[Message], system: str) -> list[Message]:
    """Put a system message before `messages`, unless they begin with one."""
    messages = list(messages)
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": [text_item(system)]}, *messages]


def finished(messages: Sequence[Message], losses: Sequence[bool], field: str, tools: Sequence[Row] = ()) -> Turns:
    """Return a conversation that can be trained on.

    Raises:
        DataError: no message contributes to the loss, one that does is empty, the answer comes before the question, or
            a role other than the user's and the tools' has images or videos.
    """
    # The system message may come from a field of its own, before all others.
    losses = [False] * (len(messages) - len(losses)) + list(losses)
    order = [message["role"] for message in messages if message["role"] != "system"]
    if "user" in order and order[0] == "assistant":
        raise invalid(field, "an answer before the first question", "a message of the user first")
    for index, (message, is_target) in enumerate(zip(messages, losses, strict=True)):
        texts = [message.get("reasoning_content", ""), *(item.get("text", "") for item in message["content"])]
        for text in (*texts, json.dumps(message.get("tool_calls"), ensure_ascii=False)):
            _check_characters(text, f"{field}[{index}]")
        shown = next((item["type"] for item in message["content"] if item["type"] != "text"), None)
        if shown and message["role"] not in ("user", "tool"):
            found = f"an item of type {shown} in message {index} of role {message['role']}"
            raise invalid(field, found, "it in a message of the user")
        is_blank = "tool_calls" not in message and not any(i.get("text", "").strip() for i in message["content"])
        if is_target and is_blank:
            raise invalid(field, f"an empty message {index} of the assistant", "text to train on")
    _check_characters(json.dumps(tools, ensure_ascii=False), "tools")
    if not any(losses):
        raise invalid(field, "no message that contributes to the loss", "at least one of the assistant")
    return Turns(tuple(messages), tuple(losses), tuple(tools))


def _check_characters(text: str, field: str) -> None:
    """Check for halves of surrogate pairs, which JSON can encode and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(field, f"{text[error.start]!r}, half of a character", "text") from error
