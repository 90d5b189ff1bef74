"""From a conversation to the text of a prompt, by the chat template of the checkpoint.

Templates come from whoever made the checkpoint, so they run in jinja2's sandbox, with the block trimming and the helper
functions that transformers 4.57.1 gives them (`utils/chat_template_utils.py`). A template skips silently what it does
not know; `render_conversation` refuses such a conversation instead.
"""

import datetime
import functools
import json
import pathlib
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from glm4v_jax.errors import CheckpointError, MessageError, naming
from glm4v_jax.files import assets_directory, read_json_object, read_text, replacing
from glm4v_jax.inputs.text.messages import Message, mentions, normalise_messages

COMMON_ROLES = ("system", "user", "assistant")

_FILES = "chat_template.jinja", "chat_template.json"
_CONFIGS = "processor_config.json", "tokenizer_config.json"
"""Files that have one in a field."""

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def load_chat_template(directory: str | pathlib.Path) -> str | dict[str, str] | None:
    """The chat template of a checkpoint directory.

    The first of: `chat_template.json`, `chat_template.jinja` (with the named ones in `additional_chat_templates/`), the
    entry `chat_template` of `processor_config.json` and of `tokenizer_config.json`.

    Returns:
      The source; {name: source} where there are several, the first one under "default"; None where there is none.

    Raises:
      CheckpointError: one of the files is corrupt, or its template is not a string.
    """
    directory = assets_directory(directory)
    source, legacy = (directory / name for name in _FILES)
    if legacy.is_file():
        template = read_json_object(legacy).get("chat_template")
        if not isinstance(template, str):
            raise CheckpointError(f"{legacy}: chat_template: found {type(template).__name__}; expected a string")
        return template
    named = {path.stem: read_text(path) for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if source.is_file():
        named["default"] = read_text(source)
    if named:
        return named["default"] if list(named) == ["default"] else named
    for path in (directory / name for name in _CONFIGS):
        if not path.is_file():
            continue
        content = read_json_object(path)
        with naming(path, CheckpointError):
            template = template_in(content)
        if template is not None:
            return template
    return None


def save_chat_template(directory: str | pathlib.Path, template: str | Mapping[str, str] | None) -> None:
    """Write `chat_template.jinja`, and named templates into `additional_chat_templates/`, where there are some."""
    directory = pathlib.Path(directory)
    for name, source in ({"default": template} if isinstance(template, str) else template or {}).items():
        path = directory / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_text(source, encoding="utf-8")
    if template is not None:
        # An older file, which would win.
        (directory / "chat_template.json").unlink(missing_ok=True)


def template_in(config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """What a configuration has under `chat_template`: source, {name: source} of a list of named ones, or None.

    Raises:
      CheckpointError: it is something else.
    """
    found = config.get("chat_template")
    if found is None or isinstance(found, str):
        return found
    pairs: list[tuple[Any, Any]] = []
    if isinstance(found, Mapping):
        pairs = list(found.items())
    elif isinstance(found, (list, tuple)):
        pairs = [(one.get("name"), one.get("template")) if isinstance(one, Mapping) else (one, None) for one in found]
    if not pairs or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise CheckpointError(
            f"chat_template: found {found!r}; expected a string, or a list of objects with 'name' and 'template'"
        )
    return dict(pairs)


def choose_template(
    template: str | Mapping[str, str] | None, wanted: str | None = None, *, where: object = "chat_template"
) -> str:
    """The source to render: `wanted`, a name or a source, else the default of what `load_chat_template` returns.

    CheckpointError if there is no template, or several and none is called "default".
    """
    if wanted is not None:
        return template.get(wanted, wanted) if isinstance(template, Mapping) else wanted
    if isinstance(template, str):
        return template
    if template is None:
        files = f"{', '.join(_FILES)} or the field chat_template of {' or '.join(_CONFIGS)}"
        raise CheckpointError(f"{where}: found no chat template; expected {files}")
    if "default" not in template:
        names = ", ".join(template)
        raise CheckpointError(f"{where}: found the chat templates {names}; expected one that is called 'default'")
    return template["default"]


# Variables of a template that print nothing unless `generation_marks` sets them.
_STARTS, _ENDS = "start_of_generation_block", "end_of_generation_block"


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for masks in training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (jinja2.nodes.Output([jinja2.nodes.Name(name, "load")]) for name in (_STARTS, _ENDS))
        return jinja2.nodes.Scope([start, *body, end]).set_lineno(lineno)


def has_generation_blocks(source: str) -> bool:
    """Whether a template marks what the assistant says."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


def generation_marks() -> dict[str, str]:
    """Variables for `render_conversation` that let `split_at_marks` find the generation blocks of its result."""
    mark = uuid.uuid4().hex
    return {_STARTS: f"{mark}-start", _ENDS: f"{mark}-end"}


def split_at_marks(prompt: str, marks: Mapping[str, str]) -> list[str]:
    """Cut a rendered conversation into the text outside and inside of `{% generation %}` blocks, by turns."""
    return re.split("|".join(map(re.escape, marks.values())), prompt)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"chat template, line {error.lineno}: {error.message}") from error


@functools.lru_cache(maxsize=16)
def template_variables(source: str) -> frozenset[str]:
    """The names that a template expects from outside, such as `messages` and `add_generation_prompt`."""
    _compile(source)
    return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(source))) - {_STARTS, _ENDS}


def render_template(source: str, messages: Sequence[Message], **variables: Any) -> str:
    """Render messages as they are, without any check of them.

    The template also sees the variables; `add_generation_prompt`, `tools` and `documents` are False, None, None by
    default.

    Raises:
      CheckpointError: the template does not parse.
      MessageError: it fails, calls `raise_exception`, or tries what the sandbox forbids.
    """
    variables = {"tools": None, "documents": None, "add_generation_prompt": False} | variables
    template = _compile(source)
    try:
        return template.render(messages=messages, **variables)
    except Exception as error:  # What a template calls raises what it likes: ValueError, ZeroDivisionError, ...
        raise MessageError(f"the chat template refuses the conversation: {error}") from error


def render_conversation(
    messages: Sequence[Message],
    source: str,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    where: str = "",
    **variables: Any,
) -> str:
    """The prompt of one conversation; see `normalise_messages` for what it may contain.

    Args:
      messages: a conversation.
      source: the chat template.
      add_generation_prompt: the prompt ends where the assistant begins to speak.
      continue_final_message: it ends inside the last message, for the model to continue it.
      where: put before the messages of errors, such as "conversation 2, ".
      **variables: what else the template sees.

    Raises:
      MessageError: the template would drop or garble a part of the conversation.
      CheckpointError: the template does not parse, or prints nothing at all.
    """
    if continue_final_message and add_generation_prompt:
        raise MessageError(f"{where}continue_final_message and add_generation_prompt exclude each other, pass one")
    messages = printable_messages(messages, source, where)
    final_text = ""
    if continue_final_message:
        messages, final_text = _tag_final_message(messages, where)
    variables = variables | {"add_generation_prompt": add_generation_prompt}
    prompt = render_template(source, messages, **variables)
    if not prompt.strip() and any(message["role"] == "user" and message.get("content") for message in messages):
        raise CheckpointError(
            f"{where}the chat template prints nothing of a user's message: it is empty or broken; expected that of a "
            "GLM-4.1V checkpoint (chat_template.jinja, or the field 'chat_template' of tokenizer_config.json)"
        )
    known_roles = [role for role in COMMON_ROLES if mentions(source, role)]
    # Once each: a conversation may have hundreds of turns, or of tools' results.
    checked_roles, checked_kinds = set(known_roles), set()
    may_have_lists = "[{" in prompt  # `{{ message.content }}` of a list is its Python repr
    for index, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if role not in checked_roles:
            checked_roles.add(role)
            others = [*messages[:index], *messages[index + 1 :]]
            if _render_or_none(source, others, **variables) == prompt:
                expected = f"; expected one of {', '.join(map(repr, known_roles))}" if known_roles else ""
                raise MessageError(
                    f"{where}message {index}: field 'role' is {role!r}, which the chat template drops silently"
                    f"{expected}"
                )
        if not may_have_lists or not isinstance(content, list):
            continue
        types = tuple(sorted({str(item.get("type")) for item in content}))
        if (role, types) not in checked_kinds and str(content) in prompt:
            raise MessageError(
                f"{where}message {index}: the chat template takes only text as 'content' of role {role!r}, "
                f"found a list with {', '.join(types)}"
            )
        checked_kinds.add((role, types))
    if continue_final_message:
        prompt = _cut_at_tag(prompt, final_text, where)
    return prompt


_PROBE = "probe-5b1f"


@functools.lru_cache(maxsize=64)
def _takes_items(source: str, role: str) -> bool:
    """Whether a template prints the texts of a list of items; `{{ message.content }}` prints its Python repr."""
    items = [{"type": "text", "text": _PROBE}]
    prompt = _render_or_none(source, [{"role": "user", "content": "?"}, {"role": role, "content": items}])
    return prompt is not None and _PROBE in prompt and f"'text': '{_PROBE}'" not in prompt


def printable_messages(messages: Sequence[Message], source: str, where: str = "") -> list[Message]:
    """Messages of `normalise_messages` as a template can print them: texts alone are a string where it takes no items.

    Images and videos are empty: a template may print what it gets, and files are megabytes.

    Raises:
      MessageError: as `normalise_messages` does.
    """
    return [_printable(message, source) for message in normalise_messages(messages, source, where)]


def _printable(message: Message, source: str) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    is_text = message["role"] != "user" and all(item["type"] == "text" for item in content)
    if is_text and not _takes_items(source, message["role"]):
        return {**message, "content": "".join(item["text"] for item in content)}
    return {**message, "content": [{key: _emptied(value) for key, value in item.items()} for item in content]}


def _emptied(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_emptied(item) for item in value]
    return b"" if isinstance(value, bytes | bytearray | memoryview) else value


def _render_or_none(source: str, messages: Sequence[Message], **variables: Any) -> str | None:
    """None where the template refuses, as one may that wants turns to alternate."""
    try:
        return render_template(source, messages, **variables)
    except MessageError:
        return None


def _tag_final_message(messages: Sequence[Message], where: str) -> tuple[list[Message], str]:
    """The conversation with a tag after the last text of its last message, and that text."""
    *before, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": content + _CONTINUE_TAG}], content
    items = [dict(item) for item in content or []]
    for item in reversed(items):
        if "text" in item:
            text = item["text"]
            item["text"] = text + _CONTINUE_TAG
            return [*before, {**last, "content": items}], text
    raise MessageError(f"{where}message {len(before)}: continue_final_message found no text to continue")


def _cut_at_tag(prompt: str, final_text: str, where: str) -> str:
    tag = _CONTINUE_TAG.strip()
    if final_text.strip() not in prompt or tag not in prompt:
        raise MessageError(f"{where}continue_final_message: the chat template does not print the final message")
    end = prompt.rindex(tag)
    # A template that trims its messages has trimmed the tag's own space, and so must the text before it be.
    return prompt[:end] if prompt[end:].startswith(_CONTINUE_TAG) else prompt[:end].rstrip()
