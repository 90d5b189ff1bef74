"""The formats of training data that people have: a row -> its messages, and which of them contribute to the loss.

The formats are those of LLaMA-Factory (`openai`, `sharegpt`, `alpaca`; data/README.md), ms-swift (`swift`;
Custom-dataset.md), TRL (`hf`; dataset_formats.md), LLaVA (`llava`), and FineVision and The Cauldron (`finevision`).
Paths in the items are as the row has them.

A row alone rarely says whether it is LLaMA-Factory's or ms-swift's. They differ where there are fewer markers than
files: the one refuses the row, the other puts the missing markers before the query (`_add_default_tags` in
swift/template/base.py). So a row whose format nobody names is read as ms-swift does; one of a dataset_info.json, or of
a format that is named, has to have as many.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from glm4v_jax.config.checks import did_you_mean
from glm4v_jax.data.media import MediaItem, image_size, is_empty, kind_of
from glm4v_jax.data.tables import literal_list
from glm4v_jax.errors import DataError
from train.data import FormatName, tools
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
SHAREGPT_ROLES |= tools.ROLES
_SWIFT_ROLES = SHAREGPT_ROLES | {"bot": "assistant"}
LISTS = ("messages", "conversations", "conversation")
# `ResponsePreprocessor` of ms-swift, swift/dataset/preprocessor/core.py.
QUERIES = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSES = (
    "response", "answer", "output", "targets", "target", "answer_key", "answers", "solution", "text", "completion",
    "content",
)  # fmt: skip
_SWIFT_KEYS = {"role", "from", *_SWIFT_ROLES}
"""Of a message or a pair: names of its role, or the roles themselves."""
_FIELDS = (*LISTS, "texts", *QUERIES, *RESPONSES)
_MEDIA_FIELDS = (*FILES["image"], *FILES["video"])
# What names of files end in.
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".mp4", ".mkv", ".webm", ".mov", ".avi")
_PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of a row's fields: `columns` and `tags` of LLaMA-Factory's dataset_info.json, with its defaults.

    Attributes:
        messages, prompt, query, response, history, system, tools: fields of a row.
        images, videos: fields that list files; the first that a row has counts.
        role_tag, content_tag: fields of a message; empty for those of the first message, OpenAI's or ShareGPT's.
        roles: name of a role -> system, user, assistant, or a role of `train.data.tools`.
        chosen, rejected: fields of the answers of preference data.
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
    chosen: str = "chosen"
    rejected: str = "rejected"

    def media(self, row: Row) -> MediaFiles:
        """Return the files that a row lists."""
        return MediaFiles(row, {"image": self.images, "video": self.videos})


DEFAULT = Columns()
OPENAI = Columns(
    messages="messages", role_tag="role", content_tag="content",
    roles={role: role for role in ROLES} | tools.ROLES | {"developer": "system"},  # as in conversations to answer
)  # fmt: skip
QUERY_RESPONSE = Columns(prompt="query", query="", response="response")


def read_row(row: Row, name: FormatName | None, size_of: SizeOf = image_size) -> Turns:
    """Read a row of a format.

    - `openai`: `messages` of `role` and `content`, with markers; `images`, `videos`, `tools`.
    - `sharegpt`: `conversations` of `from` and `value`, with markers; `images`, `videos`, `system`, `tools`.
    - `llava`: the same, with one `image` or `video`; `id` is not used.
    - `swift`: what ms-swift reads: the formats above with role and text by any of their names, and with `loss` of each
      message; `conversation` of `human` and `assistant`; `query` and `response` by any of its names. Boxes are in
      `objects`; see `place_objects`.
    - `alpaca`: `instruction`, `input`, `output`, `history`, `system`; or `query` and `response` of ms-swift.
    - `hf`: `messages` with typed contents, or `prompt` and `completion`; see `typed_conversation`.
    - `finevision`: `texts` of `user` and `assistant`; `images`.

    Args:
        row: of a data file.
        name: of the format; None detects it, and reads a row with fewer markers than files as ms-swift does.
        size_of: width and height of an image, for boxes in pixels.

    Raises:
        DataError: a field is missing or wrong; there are more markers than files, or fewer where that matters; or files
            are in a field that is not read.
    """
    turns = _read_row(row, name or detect(row), name not in (None, "swift", "finevision"), size_of)
    _check_files_are_read(row, turns)
    return turns


def _read_row(row: Row, name: FormatName, is_strict: bool, size_of: SizeOf) -> Turns:
    if name == "hf":
        return typed_conversation(row, is_strict)
    if name == "alpaca":
        columns = QUERY_RESPONSE if "query" in row and "instruction" not in row else DEFAULT
        return instruction(row, columns, is_strict)
    if name == "finevision":
        return pairs(row, dataclasses.replace(DEFAULT, messages="texts"), is_strict)
    if name == "swift":
        turns = _swift(row)
        if row.get("objects") is not None:
            return turns._replace(messages=tuple(place_objects(turns.messages, row["objects"], size_of)))
        return turns
    return conversation(row, OPENAI if name == "openai" else DEFAULT, is_strict)


def conversation(row: Row, columns: Columns, is_strict: bool = True) -> Turns:
    """Read messages with a role and a text each, in which `<image>` and `<video>` refer to the row's files.

    Not `is_strict`: there may be fewer markers than files, and the missing ones are put before the first message.
    DataError if a field is missing or wrong, or the numbers of markers and files differ.
    """
    _check_row(row, columns)
    media = columns.media(row)
    given = items_list(row, columns.messages)
    functions = tools.read_tools(row, columns.tools)
    messages, losses = _read_messages(given, _with_tags(columns, given), media, columns.messages, functions)
    _put_first(messages, media.finish(is_strict=is_strict))
    messages = with_system(messages, optional_string(row, columns.system))
    return finished(messages, losses, columns.messages, functions)


def pairs(row: Row, columns: Columns, is_strict: bool = True) -> Turns:
    """Read objects of a question and its answer, by their roles: `{"user": ..., "assistant": ...}`.

    `columns.roles` are the keys of a pair; see `conversation` for the rest.
    """
    _check_row(row, columns)
    media = columns.media(row)
    messages: list[Message] = []
    for index, pair in enumerate(items_list(row, columns.messages)):
        where = f"{columns.messages}[{index}]"
        if not isinstance(pair, Mapping):
            raise invalid(where, kind_of(pair), "an object with 'user' and 'assistant'")
        for role in ("user", "assistant"):
            key = next((key for key, means in columns.roles.items() if means == role and key in pair), role)
            messages.append({"role": role, "content": split_markers(string(pair, key, where), media)})
    _put_first(messages, media.finish(is_strict=is_strict))
    losses = [message["role"] == "assistant" for message in messages]
    messages = with_system(messages, optional_string(row, columns.system))
    return finished(messages, losses, columns.messages, tools.read_tools(row, columns.tools))


def _swift(row: Row) -> Turns:
    """Read what ms-swift's `AutoPreprocessor` reads."""
    system = "system" if row.get("system") is not None else "system_prompt"
    columns = dataclasses.replace(DEFAULT, system=system, roles=_SWIFT_ROLES)
    name = next((name for name in LISTS if row.get(name) is not None), None)
    if name is None:
        if "instruction" in row and "input" in row:
            return instruction(row, columns, is_strict=False)
        query, response = only_field(row, QUERIES) or "query", only_field(row, RESPONSES) or "response"
        columns = dataclasses.replace(columns, prompt=query, query="", response=response)
        return instruction(row, columns, is_strict=False)
    columns = dataclasses.replace(columns, messages=name, role_tag="", content_tag="")
    keys = _keys(items_list(row, name))
    is_pair = keys & columns.roles.keys() and not keys & {"role", "from", "content", "value"}
    return (pairs if is_pair else conversation)(row, columns, is_strict=False)


def _keys(messages: Sequence[Any]) -> set[Any]:
    """The fields of the first message."""
    return set(messages[0]) if isinstance(messages[0], Mapping) else set()


def _with_tags(columns: Columns, messages: Sequence[Any]) -> Columns:
    """Columns with the names of fields that the first message has, unless they are given."""
    if columns.role_tag:
        return columns
    keys = _keys(messages)
    role_tag, content_tag = "from" if "from" in keys else "role", "value" if "value" in keys else "content"
    return dataclasses.replace(columns, role_tag=role_tag, content_tag=content_tag)


def only_field(row: Row, names: Sequence[str]) -> str | None:
    """The only field among these; with several ms-swift takes none, except its own, the first."""
    given = [name for name in names if row.get(name) is not None]
    return given[0] if len(given) == 1 or names[0] in given else None


def _put_first(messages: Sequence[Message], items: Sequence[MediaItem]) -> None:
    """Put items before the first message that is not the system's."""
    first = next((message for message in messages if message["role"] != "system"), None)
    if items and first is not None:
        first["content"] = [*items, *first["content"]]


def instruction(row: Row, columns: Columns, is_strict: bool = True) -> Turns:
    """Read a question with its answer, and earlier pairs; all answers are targets, as in LLaMA-Factory.

    See `conversation` for the rest.
    """
    _check_row(row, columns)
    media = columns.media(row)
    texts: list[str] = []
    history = literal_list(row.get(columns.history))
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
    _put_first(messages, media.finish(is_strict=is_strict))
    losses = [message["role"] == "assistant" for message in messages]
    messages = with_system(messages, optional_string(row, columns.system))
    return finished(messages, losses, columns.response, tools.read_tools(row, columns.tools))


def typed_conversation(row: Row, is_strict: bool = True) -> Turns:
    """Read `messages` with typed contents, or `prompt` and `completion`, of which only the completion is a target.

    Images are in the items, or in `images` or `image`, with items `{"type": "image"}` at their positions. Contents that
    are text have no markers: without such items the images go before the first text of the user, as in TRL.

    Not `is_strict`: there may be fewer such items than files. DataError as in `conversation`.
    """
    _check_row(row, OPENAI)
    media, functions = OPENAI.media(row), tools.read_tools(row, OPENAI.tools)
    if "messages" in row:
        given = items_list(row, "messages")
        messages, losses = _read_messages(given, OPENAI, media, "messages", functions, markers=False)
        field = "messages"
    else:
        prompt, _ = _half(row, "prompt", "user", media, functions)
        completion, losses = _half(row, "completion", "assistant", media, functions)
        messages, losses, field = [*prompt, *completion], [False] * len(prompt) + losses, "completion"
    has_items = any(item["type"] != "text" for message in messages for item in message["content"])
    item = "{kind} item without a source", "{kind} items without a source"
    items = media.finish(*item, is_strict=is_strict and has_items)
    if items and not any(message["role"] == "user" for message in messages):
        raise invalid(field, "no message of the user", "one for the images and videos")
    _put_first([message for message in messages if message["role"] == "user"], items)
    return finished(messages, losses, field, functions)


def detect(row: Row) -> FormatName:
    """Return the name of the format of a row, by its fields; DataError if it is unknown."""
    # Tables have all columns in every row, if only with null; a row of nothing else is refused by name.
    given = {name: value for name, value in row.items() if value is not None}
    name = _detect(given) or _detect(row)
    if name is None:
        expected = "'messages', 'conversations', 'texts', 'instruction', or a prompt and its completion"
        near = next(filter(None, (did_you_mean(field, _FIELDS) for field in row if field not in _FIELDS)), "")
        raise DataError(f"found the fields {', '.join(map(repr, row)) or 'of nothing'}; expected {expected}{near}")
    return name


def _detect(row: Row) -> FormatName | None:
    name = next((name for name in LISTS if name in row), None)
    if name is not None:
        given = literal_list(row[name])
        given = given if isinstance(given, list | tuple) else []
        messages = [message for message in given if isinstance(message, Mapping)]
        columns = OPENAI if name == "messages" else DEFAULT
        is_swift = name == "conversation" or row.get("objects") is not None
        # By the names of the other format.
        if is_swift or (messages and columns.role_tag not in messages[0] and _SWIFT_KEYS & messages[0].keys()):
            return "swift"
        if name == "conversations":
            return "llava" if not is_empty(row.get("image")) or not is_empty(row.get("video")) else "sharegpt"
        is_typed = any(isinstance(message.get("content"), list | tuple) for message in messages)
        return "hf" if is_typed else "openai"
    if "texts" in row:
        return "finevision"
    if "prompt" in row and "completion" in row:
        return "hf"
    if ("instruction" in row and "output" in row) or ("query" in row and "response" in row):
        return "alpaca"
    if only_field(row, QUERIES) and only_field(row, RESPONSES):
        return "swift"
    return "alpaca" if "instruction" in row else None


def _half(
    row: Row, name: str, role: str, media: MediaFiles, functions: Sequence[Row]
) -> tuple[list[Message], list[bool]]:
    """Read `prompt` or `completion`, messages or only a text."""
    if isinstance(row.get(name), str):
        return [{"role": role, "content": [text_item(row[name])]}], [role == "assistant"]
    return _read_messages(items_list(row, name), OPENAI, media, name, functions, markers=False)


def _read_messages(
    given: Sequence[Any],
    columns: Columns,
    media: MediaFiles,
    field: str,
    functions: Sequence[Row],
    markers: bool = True,
) -> tuple[list[Message], list[bool]]:
    messages: list[Message] = []
    losses = []
    for index, message in enumerate(given):
        where = f"{field}[{index}]"
        role = role_of(message, columns.role_tag, columns.roles, where)
        check_supported(message, where)
        content, calls = message.get(columns.content_tag), None
        if role == tools.CALLS:
            content, calls = tools.split_thought(string(message, columns.content_tag, where))
        more = tools.read_more(message, content, role, calls, where)
        if content is None and more:  # a turn that only calls tools
            content = ""
        if isinstance(content, list | tuple):
            items = typed_items(content, media, f"{where}.{columns.content_tag}")
        else:
            text = string({columns.content_tag: content} if more else message, columns.content_tag, where)
            items = split_markers(text, media) if markers else [text_item(text)]
        messages.append({"role": role, "content": items, **more})
        losses.append(loss_of(message, role, where))
    tools.check_turns(messages, functions, field)
    return tools.joined(messages, losses, field)


_LIKE_MEDIA = re.compile("ima?g|pic|photo|vid|clip|frame|media|file|path", re.IGNORECASE)
"""Names of fields that may hold images or videos."""


def _check_files_are_read(row: Row, turns: Turns) -> None:
    """Check that a conversation without images and videos has none in a field of another name, such as `imgs`."""
    if any(item["type"] != "text" for message in turns.messages for item in message["content"]):
        return
    for name, value in row.items():
        # Others may name where a text comes from, as "source": "page1.png".
        if name in _FIELDS or name in _MEDIA_FIELDS or not _LIKE_MEDIA.search(name):
            continue
        first = value[0] if isinstance(value, list | tuple) and value else value
        is_content = isinstance(first, Mapping) and isinstance(first.get("bytes"), bytes)
        is_name = isinstance(first, str) and first.lower().endswith(_SUFFIXES) and not any(map(str.isspace, first))
        if is_content or is_name:
            raise invalid(name, "files in a field that is not read", f"them in one of {', '.join(_MEDIA_FIELDS)}")


def _check_row(row: Row, columns: Columns) -> None:
    """Check for fields that supervised training cannot use."""
    for name in _PREFERENCES:
        if not is_empty(row.get(name)):
            raise invalid(name, "preferences", "conversations to train on, or a job with [preference]")
