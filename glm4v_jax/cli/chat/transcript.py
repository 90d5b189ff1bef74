"""Conversations as files: Markdown to read, or JSON to continue from."""

import dataclasses
import errno
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glm4v_jax.cli.chat.attachments import Attachment
from glm4v_jax.console.answer_writer import AnswerTimes
from glm4v_jax.errors import MessageError, counted
from glm4v_jax.files import replacing, to_json
from glm4v_jax.generate.completion import completion_fields
from glm4v_jax.generate.text.thinking import without_thoughts

if TYPE_CHECKING:
    from glm4v_jax.generate.completion import Completion
    from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer

SUFFIXES = (".md", ".markdown", ".txt", ".json")
"""Of the files for conversations."""

# The beginning of the Markdown that `save` writes, and the fields of its JSON.
_MARKDOWN = [b"#", b"Conversation", b"Model:"]
_FIELDS = {"model", "messages", "completions"}


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message of the user, and the answer.

    Attributes:
      text: of the message.
      attachments: what came before the text, images before videos.
      completion: the model's turn.
      reused: tokens of the prompt that were in the KV cache.
      times: of the turn.
    """

    text: str
    attachments: tuple[Attachment, ...]
    completion: "Completion"
    reused: int
    times: AnswerTimes


def save(
    path: pathlib.Path,
    model: str,
    system: str | None,
    turns: Sequence[Turn],
    tokenizer: "Glm4vTokenizer",
    *,
    overwrite: bool,
) -> None:
    """Write a conversation, completely or not at all: JSON where the name ends in .json, Markdown otherwise.

    Raises:
      MessageError: the file's name does not end in one of `SUFFIXES`.
      OSError: the file cannot be written; or it exists, and is not a conversation or `overwrite` is not set.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "found a directory; expected the name of a file", str(path))
    if path.suffix.lower() not in SUFFIXES:
        raise MessageError(f"{path}: found a name that ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    if path.exists() and not _is_transcript(path):
        raise FileExistsError(errno.EEXIST, "found a file that is not a conversation; expected another name", str(path))
    if path.exists() and not overwrite:
        raise FileExistsError(
            errno.EEXIST, "found an earlier conversation; expected another name; /save! overwrites it", str(path)
        )
    if path.suffix.lower() == ".json":
        content = to_json(_as_object(model, system, turns, tokenizer), ensure_ascii=False, indent=2) + "\n"
    else:
        content = _as_markdown(model, system, turns)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(path.parent))
    with replacing(path) as aside:
        aside.write_text(content, encoding="utf-8", errors="backslashreplace", newline="\n")


def _is_transcript(path: pathlib.Path) -> bool:
    """Whether `save` wrote a file; OSError if it cannot be read."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    if path.suffix.lower() != ".json":
        return content.split(maxsplit=3)[:3] == _MARKDOWN
    try:
        return json.loads(content).keys() >= _FIELDS
    except (ValueError, AttributeError, RecursionError):
        return False


def _as_object(model: str, system: str | None, turns: Sequence[Turn], tokenizer: "Glm4vTokenizer") -> dict[str, Any]:
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        items = [{"type": item.kind, "url": item.place} for item in turn.attachments]
        messages.append({"role": "user", "content": [*items, {"type": "text", "text": turn.text}]})
        messages.append(
            {"role": "assistant", "content": without_thoughts(turn.completion.text, turn.completion.thinking)}
        )
    completions = [
        {
            **completion_fields(turn.completion, tokenizer),
            "reused_tokens": turn.reused,
            "seconds": round(turn.times.seconds, 3),
            "compile_seconds": round(turn.times.compiled, 3),
            "first_token_seconds": round(turn.times.first, 3),
        }
        for turn in turns
    ]
    return {"model": model, "messages": messages, "completions": completions}


def _as_markdown(model: str, system: str | None, turns: Sequence[Turn]) -> str:
    blocks = ["# Conversation", f"Model: `{model}`"]
    if system is not None:
        blocks += ["## System", system]
    for turn in turns:
        blocks.append("## User")
        for item in turn.attachments:
            mark = "!" if item.kind == "image" else ""
            blocks.append(f"{mark}[{item.kind}](<{item.place}>) ({item.about})")
        blocks += [turn.text, "## Model"]
        parsed = turn.completion.parsed
        if parsed.thought is not None:
            # Blank lines around it: otherwise a reader of Markdown takes the thought for HTML.
            blocks += ["<details>\n<summary>Thought</summary>", parsed.thought, "</details>"]
        blocks += [parsed.answer, f"*{counted(len(turn.completion.tokens), 'token')}, {turn.completion.finish_reason}*"]
    return "\n\n".join(block for block in blocks if block) + "\n"
