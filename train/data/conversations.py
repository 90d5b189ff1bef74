"""What the formats of conversations have in common: roles, contents, markers, and which messages are learned."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from glm4v_jax.data.media import MediaItem, kind_of, media_item
from glm4v_jax.errors import DataError

Row = Mapping[str, Any]
Message = dict[str, Any]

MARKERS = {"<image>": "image", "<video>": "video"}
_MARKER = re.compile("|".join(MARKERS))
FILES = {"image": ("images", "image"), "video": ("videos", "video")}
"""Fields of a row that list its pictures and videos."""
ROLES = ("system", "user", "assistant")
_TOOL_ROLES = ("tool", "tools", "observation", "function", "function_call", "tool_call", "tool_response", "ipython")
# What would be lost without a word if the rest of the message were learned.
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "audio")
_SOURCES = ("path", "url", "image", "video", "base64", "image_url", "video_url", "source")
_TYPES = {"image": "image", "video": "video", "image_url": "image", "video_url": "video"}


class Turns(NamedTuple):
    """A conversation, and which of its messages are learned.

    Attributes:
        messages: `{"role": ..., "content": [items]}`, the items typed as in Hugging Face.
        losses: one a message.
    """

    messages: tuple[Message, ...]
    losses: tuple[bool, ...]


class Media:
    """The files that a row lists beside its conversation, which markers in it stand for, in their order."""

    def __init__(self, row: Row, fields: Mapping[str, Sequence[str]] = FILES):
        self._names: dict[str, str] = {}
        self._items: dict[str, list[MediaItem]] = {}
        self._taken = dict.fromkeys(FILES, 0)
        for kind, names in fields.items():
            given = [name for name in names if _is_given(row.get(name))]
            if len(given) > 1:
                raise DataError(f"field {given[1]!r}: found beside {given[0]!r}, expected one of the two")
            name = self._names[kind] = given[0] if given else names[0] or FILES[kind][0]
            values = _listed(row[name]) if given else []
            self._items[kind] = [media_item(kind, value, f"{name}[{i}]") for i, value in enumerate(values)]
        if _is_given(row.get("audios")):
            raise DataError("field 'audios': found some, expected none: the model takes pictures and videos")

    def take(self, kind: str) -> MediaItem:
        """The next one; past the end anything, which `finish` complains about."""
        index = self._taken[kind]
        self._taken[kind] += 1
        return self._items[kind][index] if index < len(self._items[kind]) else {"type": kind}

    def take_all(self) -> list[MediaItem]:
        """All of them, of a row in which nothing says where they stand."""
        self._taken = {kind: len(items) for kind, items in self._items.items()}
        return [item for items in self._items.values() for item in items]

    def finish(self, what: str = "<{kind}> markers") -> None:
        """Compares what was taken with what there is.

        Raises:
            DataError: more or fewer were taken.
        """
        for kind, taken in self._taken.items():
            there = len(self._items.get(kind, ()))
            if taken != there:
                name = self._names.get(kind, FILES[kind][0])
                raise DataError(f"field {name!r}: found {there} for {taken} {what.format(kind=kind)}, expected as many")


def _is_given(value: Any) -> bool:
    return value is not None and (not isinstance(value, list | tuple | str) or len(value) > 0)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def split_markers(text: str, media: Media) -> list[MediaItem]:
    """Text with `<image>` and `<video>` in it as items; the text around them stays as it is, character by character."""
    items: list[MediaItem] = []
    start = 0
    for match in _MARKER.finditer(text):
        items += [text_item(text[start : match.start()])] if match.start() > start else []
        items.append(media.take(MARKERS[match[0]]))
        start = match.end()
    return [*items, text_item(text[start:])] if start < len(text) or not items else items


def text_item(text: str) -> MediaItem:
    """The item of a text."""
    return {"type": "text", "text": text}


def typed_items(content: Sequence[Any], media: Media, field: str) -> list[MediaItem]:
    """A list of typed items in the spelling of Hugging Face, OpenAI or Anthropic as items of ours.

    Raises:
        DataError: an item is not a text, a picture or a video.
    """
    items = []
    for index, given in enumerate(content):
        where = f"{field}[{index}]"
        if not isinstance(given, Mapping):
            raise DataError(f"field {where!r}: found {kind_of(given)}, expected an object with 'type'")
        # Tables fill every column, if only with null.
        item = {key: value for key, value in given.items() if value is not None}
        kind = item.get("type", "text" if "text" in item else None)
        if kind == "text":
            items.append(text_item(string(item, "text", where)))
        elif isinstance(kind, str) and kind in _TYPES:
            sources = [key for key in _SOURCES if key in item]
            if len(sources) > 1:
                raise DataError(f"field {where!r}: found {', '.join(map(repr, sources))}, expected one of them")
            kind = _TYPES[kind]
            items.append(media_item(kind, item[sources[0]], where) if sources else media.take(kind))
            if kind == "video" and "fps" in item:
                items[-1]["fps"] = _rate(item["fps"], f"{where}.fps")
        else:
            found = "no 'type'" if kind is None else f"type {kind!r}"
            raise DataError(f"field {where!r}: found {found}, expected 'text', 'image' or 'video'")
    return items


def _rate(value: Any, field: str) -> float:
    """Frames a second, of a video that is given as its frames."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise DataError(f"field {field!r}: found {value!r}, expected a number above 0")
    return value


def string(row: Row, name: str, where: str = "") -> str:
    """A field that must be text.

    Raises:
        DataError: it is missing or something else.
    """
    value = row.get(name)
    if not isinstance(value, str):
        found = kind_of(value) if name in row else "none"
        raise DataError(f"field {f'{where}.{name}'.lstrip('.')!r}: found {found}, expected a string")
    return value


def optional_string(row: Row, name: str) -> str:
    """A field that may be missing, null or empty, and must be text otherwise."""
    return "" if row.get(name) is None else string(row, name)


def items_list(row: Row, name: str) -> Sequence[Any]:
    """A field that must be a list with something in it.

    Raises:
        DataError: it is missing, empty or something else.
    """
    value = row.get(name)
    if not isinstance(value, list | tuple):
        found = kind_of(value) if name in row else "none"
        raise DataError(f"field {name!r}: found {found}, expected a list of messages")
    if not value:
        raise DataError(f"field {name!r}: found no message, expected at least one")
    return value


def role_of(message: Any, key: str, names: Mapping[str, str], where: str) -> str:
    """The role of a message, from what a format calls it.

    Raises:
        DataError: it has none, or one of tools, or one that nobody knows.
    """
    if not isinstance(message, Mapping):
        raise DataError(f"field {where!r}: found {kind_of(message)}, expected an object with {key!r}")
    found = string(message, key, where)
    if found in names:
        return names[found]
    expected = f"expected one of {', '.join(names)}"
    if found in _TOOL_ROLES:
        expected += ": conversations with tools are not supported"
    raise DataError(f"field {f'{where}.{key}'!r}: found {found!r}, {expected}")


def loss_of(message: Row, role: str, where: str) -> bool:
    """Whether a message is learned: those of the assistant, save where a field says otherwise.

    The fields are `loss` and `loss_scale` of ms-swift and `weight` of OpenAI.

    Raises:
        DataError: one of them is neither true nor false, or asks for what the assistant does not say.
    """
    learned = role == "assistant"
    for name in ("loss", "loss_scale", "weight"):
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"field {f'{where}.{name}'!r}: found {value!r}, expected true or false")
        if value and role != "assistant":
            raise DataError(
                f"field {f'{where}.{name}'!r}: found {value!r} in a message of {role}, expected one of assistant"
            )
        learned = learned and bool(value)
    return learned


def check_supported(message: Row, where: str) -> None:
    """Refuses fields of a message that say something which would be lost.

    Raises:
        DataError: there is one.
    """
    for name in _UNSUPPORTED:
        if message.get(name):
            raise DataError(f"field {f'{where}.{name}'!r}: found some, expected none: it is not supported")


def with_system(messages: Iterable[Message], system: str) -> list[Message]:
    """`messages`, with what the system says at first, unless it says something there already."""
    messages = list(messages)
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": [text_item(system)]}, *messages]


def finished(messages: Sequence[Message], losses: Sequence[bool], field: str) -> Turns:
    """A conversation that can be learned from.

    Raises:
        DataError: nothing of it is learned, the assistant says nothing, or somebody but the user shows something.
    """
    # What the system says may stand in a field of its own, before all messages.
    losses = [False] * (len(messages) - len(losses)) + list(losses)
    for index, (message, learned) in enumerate(zip(messages, losses, strict=True)):
        for item in message["content"]:
            _check_characters(item.get("text", ""), f"{field}, message {index}")
        shown = next((item["type"] for item in message["content"] if item["type"] != "text"), None)
        if shown and message["role"] != "user":
            raise DataError(
                f"field {field!r}: found a picture or video ({shown}) in message {index} of role {message['role']}, "
                "expected it in one of the user"
            )
        if learned and not any(item.get("text", "").strip() for item in message["content"]):
            raise DataError(f"field {field!r}: found an empty message {index} of the assistant, expected text to learn")
    if not any(losses):
        raise DataError(f"field {field!r}: found no message to learn, expected one of the assistant")
    return Turns(tuple(messages), tuple(losses))


def _check_characters(text: str, field: str) -> None:
    """Refuses halves of characters, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"field {field!r}: found {text[error.start]!r}, half of a character; expected text") from error
