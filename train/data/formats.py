"""The formats of training data that people have: each a function from a row to messages and what of them is learned.

The formats are those of LLaMA-Factory (`openai`, `sharegpt`, `alpaca`; data/README.md), ms-swift (`swift`;
Custom-dataset.md), TRL (`hf`; dataset_formats.md) and LLaVA (`llava`). Paths in the items are as the row has them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glm4v_jax.data.media import image_size, kind_of
from glm4v_jax.errors import DataError
from train.data.conversations import (
    FILES,
    ROLES,
    Media,
    Message,
    Row,
    Turns,
    check_supported,
    finished,
    items_list,
    loss_of,
    optional_string,
    role_of,
    split_markers,
    string,
    text_item,
    typed_items,
    with_system,
)
from train.data.grounding import SizeOf, place_objects

SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_PREFERENCES = ("chosen", "rejected", "rejected_response", "kto_tag")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a row calls its parts: `columns` and `tags` of LLaMA-Factory's dataset_info.json, with its names.

    Attributes:
        messages, prompt, query, response, history, system, tools: fields of a row.
        images, videos: fields that list files; the first that a row has counts.
        role_tag, content_tag: fields of a message.
        roles: what the role of a message is called -> system, user or assistant.
    """

    messages: str = "conversations"
    prompt: str = "instruction"
    query: str = "input"
    response: str = "output"
    history: str = "history"
    system: str = "system"
    tools: str = "tools"
    images: Sequence[str] = FILES["image"]
    videos: Sequence[str] = FILES["video"]
    role_tag: str = "from"
    content_tag: str = "value"
    roles: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(SHAREGPT_ROLES))

    def media(self, row: Row) -> Media:
        """The files that a row lists."""
        return Media(row, {"image": self.images, "video": self.videos})


SHAREGPT = Layout()
OPENAI = Layout(messages="messages", role_tag="role", content_tag="content", roles={role: role for role in ROLES})
ALPACA = Layout()
QUERY_RESPONSE = Layout(prompt="query", query="", response="response")


def conversation(row: Row, layout: Layout) -> Turns:
    """A list of messages with a role and a text each, in which `<image>` and `<video>` stand for the row's files.

    Raises:
        DataError: a field is missing or wrong; markers and files are not as many.
    """
    _check_row(row, layout)
    media = layout.media(row)
    messages, losses = _read_messages(items_list(row, layout.messages), layout, media, layout.messages)
    media.finish()
    return finished(with_system(messages, optional_string(row, layout.system)), losses, layout.messages)


def openai(row: Row, size_of: SizeOf = image_size) -> Turns:
    """`messages` of `role` and `content`, with markers; `images`, `videos`."""
    return conversation(row, OPENAI)


def sharegpt(row: Row, size_of: SizeOf = image_size) -> Turns:
    """`conversations` of `from` and `value`, with markers; `images`, `videos`, `system`."""
    return conversation(row, SHAREGPT)


def llava(row: Row, size_of: SizeOf = image_size) -> Turns:
    """`conversations` as of ShareGPT, with one `image` or `video`; `id` is not used."""
    return conversation(row, SHAREGPT)


def swift(row: Row, size_of: SizeOf = image_size) -> Turns:
    """`messages` as of OpenAI, with `loss` of each, and boxes in `objects`; see `place_objects`."""
    turns = conversation(row, OPENAI)
    if row.get("objects") is None:
        return turns
    return Turns(tuple(place_objects(turns.messages, row["objects"], size_of)), turns.losses)


def instruction(row: Row, layout: Layout) -> Turns:
    """A question and its answer, and those before them; all answers are learned, as in LLaMA-Factory.

    Raises:
        DataError: a field is missing or wrong; markers and files are not as many.
    """
    _check_row(row, layout)
    media = layout.media(row)
    texts: list[str] = []
    history = row.get(layout.history)
    if not isinstance(history, list | tuple | None):
        raise DataError(f"field {layout.history!r}: found {kind_of(history)}, expected a list of pairs")
    for index, pair in enumerate(history or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            found = pair if isinstance(pair, list | tuple) else kind_of(pair)
            raise DataError(f"field '{layout.history}[{index}]': found {found}, expected two strings")
        texts += pair
    asked = [string(row, layout.prompt), optional_string(row, layout.query)]
    texts += ["\n".join(text for text in asked if text), string(row, layout.response)]
    messages: list[Message] = [
        {"role": ROLES[1 + index % 2], "content": split_markers(text, media)} for index, text in enumerate(texts)
    ]
    media.finish()
    losses = [message["role"] == "assistant" for message in messages]
    return finished(with_system(messages, optional_string(row, layout.system)), losses, layout.response)


def alpaca(row: Row, size_of: SizeOf = image_size) -> Turns:
    """`instruction`, `input`, `output`, `history`, `system`; or `query` and `response` of ms-swift."""
    return instruction(row, QUERY_RESPONSE if "query" in row and "instruction" not in row else ALPACA)


def hf(row: Row, size_of: SizeOf = image_size) -> Turns:
    """`messages` with typed contents, or `prompt` and `completion`, of which only the completion is learned.

    Pictures stand in the items, or in `images` or `image` with items `{"type": "image"}` to say where. Contents that
    are text have no markers: if nothing says where the pictures stand, they stand before the first text of the user,
    as in TRL.
    """
    _check_row(row, OPENAI)
    media = OPENAI.media(row)
    if "messages" in row:
        messages, losses = _read_messages(items_list(row, "messages"), OPENAI, media, "messages", markers=False)
        field = "messages"
    else:
        asked, _ = _half(row, "prompt", "user", media)
        told, losses = _half(row, "completion", "assistant", media)
        messages, losses, field = [*asked, *told], [False] * len(asked) + losses, "completion"
    shown = any(item["type"] != "text" for message in messages for item in message["content"])
    if not shown and (items := media.take_all()):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise DataError(f"field {field!r}: found no message of the user, expected one to show the files in")
        first["content"] = [*items, *first["content"]]
    media.finish("{kind} items without a source")
    return finished(messages, losses, field)


Format = Callable[..., Turns]
FORMATS: dict[str, Format] = {
    "openai": openai,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "swift": swift,
    "hf": hf,
    "llava": llava,
}


def detect(row: Row) -> str:
    """The name of the format of a row, by its fields.

    Raises:
        DataError: it is none that is known.
    """
    if "conversations" in row:
        return "llava" if row.get("image") is not None or row.get("video") is not None else "sharegpt"
    if "messages" in row:
        if row.get("objects") is not None:
            return "swift"
        messages = row["messages"] if isinstance(row["messages"], list | tuple) else []
        contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
        return "hf" if any(isinstance(content, list | tuple) for content in contents) else "openai"
    if "prompt" in row and "completion" in row:
        return "hf"
    if "instruction" in row or ("query" in row and "response" in row):
        return "alpaca"
    expected = "'messages', 'conversations', 'instruction' or 'prompt' and 'completion'"
    raise DataError(f"found the fields {', '.join(map(repr, row)) or 'of nothing'}, expected {expected}")


def _half(row: Row, name: str, role: str, media: Media) -> tuple[list[Message], list[bool]]:
    """The messages of `prompt` or `completion`, which may be only a text."""
    if isinstance(row.get(name), str):
        return [{"role": role, "content": [text_item(row[name])]}], [role == "assistant"]
    return _read_messages(items_list(row, name), OPENAI, media, name, markers=False)


def _read_messages(
    given: Sequence[Any], layout: Layout, media: Media, field: str, markers: bool = True
) -> tuple[list[Message], list[bool]]:
    messages: list[Message] = []
    losses = []
    for index, message in enumerate(given):
        where = f"{field}[{index}]"
        role = role_of(message, layout.role_tag, layout.roles, where)
        check_supported(message, where)
        content = message.get(layout.content_tag)
        if isinstance(content, list | tuple):
            items = typed_items(content, media, f"{where}.{layout.content_tag}")
        else:
            text = string(message, layout.content_tag, where)
            items = split_markers(text, media) if markers else [text_item(text)]
        messages.append({"role": role, "content": items})
        losses.append(loss_of(message, role, where))
    return messages, losses


def _check_row(row: Row, layout: Layout) -> None:
    """Refuses what cannot be learned from in this way."""
    if row.get(layout.tools):
        raise DataError(f"field {layout.tools!r}: found some, expected none: tools are not supported")
    for name in _PREFERENCES:
        if row.get(name) is not None:
            raise DataError(f"field {name!r}: found preferences, expected conversations to learn")
