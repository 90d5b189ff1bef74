"""Tools in rows: the functions that the assistant may call, its calls, and what tools answer.

Rows write them as OpenAI (`tool_calls` of a message, role `tool`), LLaMA-Factory (messages `function_call` and
`observation`, `tools` as a text) or ms-swift (messages `tool_call` and `tool_response`). All become what chat templates
read: `tool_calls` of the assistant's message, messages of role `tool`, and `{"type": "function", "function": ...}`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm4v_jax.config.thinking import END_THINK, THINK
from glm4v_jax.data.media import is_empty, kind_of
from glm4v_jax.errors import DataError, MessageError, counted
from glm4v_jax.inputs.text.messages import checked_call, thought_of
from train.data.conversations import Message, Row, invalid

CALLS, TOOL = "tool_call", "tool"
ROLES = {
    "tool": TOOL, "observation": TOOL, "tool_response": TOOL, "function": TOOL,
    "function_call": CALLS, "tool_call": CALLS,
}  # fmt: skip
"""Role in any of the formats -> that of what a tool answers, or of a message whose text is the assistant's calls."""

ANSWERED = "tool_call_id"
"""Of what a tool answers, the id of the call."""

_THOUGHT = re.compile(rf"\s*{THINK}.*?{END_THINK}", re.DOTALL)


def read_tools(row: Row, name: str) -> tuple[Row, ...]:
    """Return the functions of a row that the assistant may call, a list of objects or its JSON.

    >>> read_tools({"tools": '[{"name": "add"}]'}, "tools")
    ({'type': 'function', 'function': {'name': 'add'}},)

    Raises:
        DataError: they are something else, or a function has no name.
    """
    value = row.get(name)
    if is_empty(value):
        return ()
    if isinstance(value, str):
        value = _parsed(value, name, "a list of functions")
    if not isinstance(value, list | tuple):
        raise invalid(name, kind_of(value), "a list of functions")
    found = []
    for index, given in enumerate(value):
        # Tables and some exports have each as a text.
        tool = _parsed(given, f"{name}[{index}]", "a function") if isinstance(given, str) else given
        if not isinstance(tool, Mapping):
            raise invalid(f"{name}[{index}]", kind_of(tool), "an object with 'name' or 'function'")
        function = tool.get("function") if "function" in tool else tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise invalid(f"{name}[{index}]", "a function without a name", "'name', by itself or in 'function'")
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(found)


def read_more(message: Row, content: Any, role: str, calls: str | None, where: str) -> Message:
    """Return what a message has besides its content: `tool_calls`, `reasoning_content`, or of an answer `tool_call_id`.

    `content` is the message's under any name, without calls; `calls` the text of a message that is calls. DataError if
    a call is invalid, the thought is not text or there twice, or one of them is not the assistant's.
    """
    if role not in ("assistant", CALLS):
        for name in ("tool_calls", "function_call", "reasoning_content", "reasoning"):
            if not is_empty(message.get(name)):
                raise invalid(f"{where}.{name}", f"some in a message of {role}", "it in one of the assistant")
        return {ANSWERED: message[ANSWERED]} if role == TOOL and isinstance(message.get(ANSWERED), str) else {}
    try:
        found, thought = _calls_of(message, calls, where), thought_of({**message, "content": content}, where)
    except MessageError as error:
        raise DataError(str(error)) from error
    return ({"tool_calls": found} if found else {}) | ({"reasoning_content": thought} if thought else {})


def _calls_of(message: Row, text: str | None, where: str) -> list[Any]:
    given: list[tuple[Any, str]] = []
    if text is not None:
        value = _parsed(text, where, "calls as JSON, objects with 'name' and 'arguments'")
        every = value if isinstance(value, list) else [value]
        if not every:
            raise invalid(where, "no call", "at least one")
        given += [(call, where if value is not every else f"{where}[{index}]") for index, call in enumerate(every)]
    if not is_empty(message.get("tool_calls")):
        value, field = message["tool_calls"], f"{where}.tool_calls"
        if isinstance(value, str):
            value = _parsed(value, field, "a list of calls")
        if not isinstance(value, list | tuple):
            raise invalid(field, kind_of(value), "a list of calls")
        given += [(call, f"{field}[{index}]") for index, call in enumerate(value)]
    if not is_empty(message.get("function_call")):  # OpenAI's before there were several
        given.append((message["function_call"], f"{where}.function_call"))
    return [_call(call, place) for call, place in given]


def _call(call: Any, where: str) -> Message:
    if not isinstance(call, Mapping):
        raise invalid(where, kind_of(call), "an object with 'name' and 'arguments'")
    found = checked_call(call, where)
    function = found["function"] if isinstance(found.get("function"), Mapping) else found
    if function.get("arguments") is None:
        raise invalid(f"{where}.arguments", "nothing", "an object")
    named = {"id": found["id"]} if isinstance(found.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": function["arguments"]}}


def split_thought(text: str) -> tuple[str, str]:
    r"""Split the text of calls into the thought before them, with its tags, and the calls.

    >>> split_thought('<think>I add.</think>\n{"name": "add"}')
    ('<think>I add.</think>', '{"name": "add"}')
    """
    thought = _THOUGHT.match(text)
    return (thought[0], text[thought.end() :].strip()) if thought else ("", text)


def joined(messages: Sequence[Message], losses: Sequence[bool], field: str) -> tuple[list[Message], list[bool]]:
    """Join messages of calls alone with the assistant's message, or the calls, right before them.

    Raises:
        DataError: they do not all contribute to the loss.
    """
    found: list[Message] = []
    are_targets: list[bool] = []
    for index, (message, loss) in enumerate(zip(messages, losses, strict=True)):
        has_text = "reasoning_content" in message or any(item.get("text", "").strip() for item in message["content"])
        is_alone = message["role"] == CALLS and not has_text
        if message["role"] == CALLS:
            message = message | {"role": "assistant"}
        if not is_alone or not found or found[-1]["role"] != "assistant":
            found.append(message)
            are_targets.append(loss)
            continue
        if are_targets[-1] != loss:
            said = "another loss than in the message of the assistant before it"
            raise invalid(f"{field}[{index}]", said, "the same: the two are one message")
        found[-1] = found[-1] | {"tool_calls": [*_calls(found[-1]), *_calls(message)]}
    return found, are_targets


def _calls(message: Message) -> Sequence[Any]:
    return message.get("tool_calls", ())


def check_turns(messages: Sequence[Message], functions: Sequence[Row], field: str) -> None:
    """Check that calls are of the row's functions, and that tools answer calls and nothing else.

    Raises:
        DataError: they do not.
    """
    names = [function["function"]["name"] for function in functions]
    calls: list[Any] = []  # those that may be answered
    answers = 0
    for index, message in enumerate(messages):
        where, role = f"{field}[{index}]", message["role"]
        if role == TOOL:
            answers += 1
            if not calls:
                raise invalid(where, "what a tool answers, without a call", "a call of the assistant before it")
            if answers > len(calls):
                raise invalid(where, f"answer {answers} to {counted(len(calls), 'call')}", "as many")
            known = [call["id"] for call in calls if "id" in call]
            if known and (name := message.get(ANSWERED)) is not None and name not in known:
                expected = f"the id of a call before it, {', '.join(map(repr, known))}"
                raise invalid(f"{where}.{ANSWERED}", repr(name), expected)
            continue
        if calls and not answers and role != CALLS:
            raise invalid(where, f"a message of {role} after a call", "what the tool answers")
        calls, answers = [*([] if answers else calls), *_calls(message)], 0
        for call in _calls(message):
            if names and (name := call["function"]["name"]) not in names:
                raise invalid(where, f"a call of {name!r}", f"one of the row's tools, {', '.join(names)}")


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(where, f"invalid JSON ({error})", expected) from error
