"""The formats of training data that people have: a row -> its messages, and which of them contribute to the loss.

The formats are those of LLaMA-Factory (`openai`, `sharegpt`, `alpaca`; data/README.md), ms-swift (`swift`;
Custom-dataset.md), TRL (`hf`; dataset_formats.md) and LLaVA (`llava`). Paths in the items are as the row has them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from glm4v_jax.data.media import image_size, kind_of
from glm4v_jax.errors import DataError
from train.data import FormatName
from train.data.conversations import (
    FILES,
    ROLES,
    MediaFiles,
    Message,
    Row,
    Turns,
    check_supported,
    finished,
    invalid,
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

FORMATS: tuple[FormatName, ...] = get_args(FormatName)

SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_PREFERENCES = ("chosen", "rejected", "rejected_response", "kto_tag")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of a row's fields: `columns` and `tags` of LLaMA-Factory's dataset_info.json, with its defaults.

    Attributes:
        messages, prompt, query, response, history, system, tools: fields of a row.
        images, videos: fields that list files; the first that a row has counts.
        role_tag, content_tag: fields of a message.
        roles: name of a role -> system, user or assistant.
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

    def media(self, row: Row) -> MediaFiles:
        """Return the files that a row lists."""
        return MediaFiles(row, {"image": self.images, "video": self.videos})


DEFAULT = Columns()
OPENAI = Columns(messages="messages", role_tag="role", content_tag="content", roles={role: role for role in ROLES})
QUERY_RESPONSE = Columns(prompt="query", query="", response="response")


def read_row(row: Row, name: FormatName, size_of: SizeOf = image_size) -> Turns:
    """Read a row of a format.

    - `openai`: `messages` of `role` and `content`, with markers; `images`, `videos`.
    - `sharegpt`: `conversations` of `from` and `value`, with markers; `images`, `videos`, `system`.
    - `llava`: the same, with one `image` or `video`; `id` is not used.
    - `swift`: as `openai`, with `loss` of each message, and boxes in `objects`; see `place_objects`.
    - `alpaca`: `instruction`, `input`, `output`, `history`, `system`; or `query` and `response` of ms-swift.
    - `hf`: `messages` with typed contents, or `prompt` and `completion`; see `typed_conversation`.

    Args:
        row: of a data file.
        name: of the format.
        size_of: width and height of an image, for boxes in pixels.

    Raises:
        DataError: a field is missing or wrong; markers and files are not as many.
    """
    if name == "hf":
        return typed_conversation(row)
    if name == "alpaca":
        return instruction(row, QUERY_RESPONSE if "query" in row and "instruction" not in row else DEFAULT)
    turns = conversation(row, OPENAI if name in ("openai", "swift") else DEFAULT)
    if name == "swift" and row.get("objects") is not None:
        return turns._replace(messages=tuple(place_objects(turns.messages, row["objects"], size_of)))
    return turns


def conversation(row: Row, columns: Columns) -> Turns:
    """Read messages with a role and a text each, in which `<image>` and `<video>` refer to the row's files.

    Raises:
        DataError: a field is missing or wrong; markers and files are not as many.
    """
    _check_row(row, columns)
    media = columns.media(row)
    messages, losses = _read_messages(items_list(row, columns.messages), columns, media, columns.messages)
    media.finish()
    return finished(with_system(messages, optional_string(row, columns.system)), losses, columns.messages)


def instruction(row: Row, columns: Columns) -> Turns:
    """Read a question with its answer, and earlier pairs; all answers are targets, as in LLaMA-Factory.

    Raises:
        DataError: a field is missing or wrong; markers and files are not as many.
    """
    _check_row(row, columns)
    media = columns.media(row)
    texts: list[str] = []
    history = row.get(columns.history)
    if not isinstance(history, list | tuple | None):
        raise invalid(columns.history, kind_of(history), "a list of pairs")
    for index, pair in enumerate(history or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            found = str(pair) if isinstance(pair, list | tuple) else kind_of(pair)
            raise invalid(f"{columns.history}[{index}]", found, "two strings")
        texts += pair
    question = [string(row, columns.prompt), optional_string(row, columns.query)]
    texts += ["\n".join(text for text in question if text), string(row, columns.response)]
    messages: list[Message] = [
        {"role": ROLES[1 + index % 2], "content": split_markers(text, media)} for index, text in enumerate(texts)
    ]
    media.finish()
    losses = [message["role"] == "assistant" for message in messages]
    return finished(with_system(messages, optional_string(row, columns.system)), losses, columns.response)


def typed_conversation(row: Row) -> Turns:
    """Read `messages` with typed contents, or `prompt` and `completion`, of which only the completion is a target.

    Images are in the items, or in `images` or `image`, with items `{"type": "image"}` at their positions. Contents that
    are text have no markers: without such items the images go before the first text of the user, as in TRL.

    Raises:
        DataError: a field is missing or wrong; items and files are not as many.
    """
    _check_row(row, OPENAI)
    media = OPENAI.media(row)
    if "messages" in row:
        messages, losses = _read_messages(items_list(row, "messages"), OPENAI, media, "messages", markers=False)
        field = "messages"
    else:
        prompt, _ = _half(row, "prompt", "user", media)
        completion, losses = _half(row, "completion", "assistant", media)
        messages, losses, field = [*prompt, *completion], [False] * len(prompt) + losses, "completion"
    has_items = any(item["type"] != "text" for message in messages for item in message["content"])
    if not has_items and (items := media.take_all()):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise invalid(field, "no message of the user", "one for the images and videos")
        first["content"] = [*items, *first["content"]]
    media.finish("{kind} items without a source")
    return finished(messages, losses, field)


def detect(row: Row) -> FormatName:
    """Return the name of the format of a row, by its fields.

    Raises:
        DataError: it is unknown.
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
    raise DataError(f"found the fields {', '.join(map(repr, row)) or 'of nothing'}; expected {expected}")


def _half(row: Row, name: str, role: str, media: MediaFiles) -> tuple[list[Message], list[bool]]:
    """Read `prompt` or `completion`, messages or only a text."""
    if isinstance(row.get(name), str):
        return [{"role": role, "content": [text_item(row[name])]}], [role == "assistant"]
    return _read_messages(items_list(row, name), OPENAI, media, name, markers=False)


def _read_messages(
    given: Sequence[Any], columns: Columns, media: MediaFiles, field: str, markers: bool = True
) -> tuple[list[Message], list[bool]]:
    messages: list[Message] = []
    losses = []
    for index, message in enumerate(given):
        where = f"{field}[{index}]"
        role = role_of(message, columns.role_tag, columns.roles, where)
        check_supported(message, where)
        content = message.get(columns.content_tag)
        if isinstance(content, list | tuple):
            items = typed_items(content, media, f"{where}.{columns.content_tag}")
        else:
            text = string(message, columns.content_tag, where)
            items = split_markers(text, media) if markers else [text_item(text)]
        messages.append({"role": role, "content": items})
        losses.append(loss_of(message, role, where))
    return messages, losses


def _check_row(row: Row, columns: Columns) -> None:
    """Check for fields that supervised training cannot use."""
    if row.get(columns.tools):
        raise invalid(columns.tools, "some", "none: tools are not supported")
    for name in _PREFERENCES:
        if row.get(name) is not None:
            raise invalid(name, "preferences", "conversations to train on")
