"""Tool calls in a text, wherever it is cut."""

import itertools
import json
import types

import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import given
from tokenizers import AddedToken

from glm4v_jax.generate.text.stream import TOOL_TAGS, TextStream
from glm4v_jax.generate.text.tool_calls import ToolCall, ToolCallParser, split_calls
from glm4v_jax.inputs.text.chat_template import render_conversation
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer
from glm4v_jax.tiny import TINY_CHECKPOINT
from tests.helpers_tokenizer import FAMILY_TEMPLATE

PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "flag": {"type": "boolean"},
        "list": {"type": "array", "items": {"type": "integer"}},
        "object": {"type": "object"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["integer", "string"]},
        "unit": {"enum": ["1", "2"]},
        "level": {"enum": [1, 2]},
        "shape": {"$ref": "#/$defs/Shape"},
        "any": {},
    },
    "$defs": {"Shape": {"type": "string"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]


def written(name, /, **arguments):
    """A call as the chat template of GLM-4.5 and GLM-4.6V writes it."""
    pairs = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>"
        f"{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}</arg_value>\n"
        for key, value in arguments.items()
    )
    return f"\n<tool_call>{name}\n{pairs}</tool_call>"


def parsed(*pieces):
    """(text, calls) of a content that comes in pieces."""
    parser = ToolCallParser(TOOLS)
    found = [one for piece in pieces for one in parser.push(piece)] + parser.finish()
    calls = [one for one in found if isinstance(one, ToolCall)]
    return "".join(one for one in found if isinstance(one, str)), calls


def check(text, content, calls):
    expected = (content, [ToolCall(name, arguments) for name, arguments in calls])
    assert parsed(text) == expected
    assert parsed(*text) == expected
    for cut in range(len(text) + 1):
        assert parsed(text[:cut], text[cut:]) == expected, cut


FULL = {
    "text": " Zürich, <b>42</b> \n",
    "count": -3,
    "share": 0.5,
    "flag": True,
    "list": [1, [2]],
    "object": {"a": '中 "文"'},
    "maybe": None,
    "either": 7,
    "unit": "1",
    "level": 2,
    "shape": "12",
    "any": {"x": None},
}
PAIR = "<arg_key>a</arg_key><arg_value>1</arg_value>"
TAGS_AS_TEXT = "</tool_call><tool_call>now</tool_call><arg_key>"


def test_arguments_have_the_types_of_the_schema():
    check(written("f", **FULL), "", [("f", FULL)])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello <b> </arg_key> 1 < 2\n", "Hello <b> </arg_key> 1 < 2\n", []),
        ("I look.\n" + written("now"), "I look.", [("now", {})]),
        ("<tool_call>now</tool_call>", "", [("now", {})]),
        (written("now") + written("f", count=1) + "\n", "", [("now", {}), ("f", {"count": 1})]),
        ("A" + written("now") + "\nB\n\nC\n", "AB\n\nC\n", [("now", {})]),
        # Not calls, or of nothing that was given.
        (written("g"), written("g"), []),
        ("<tool_call>f now</tool_call>", "<tool_call>f now</tool_call>", []),
        ("<tool_call></tool_call>", "<tool_call></tool_call>", []),
        ("<tool_call>f<arg_value>1</arg_value></tool_call>", "<tool_call>f<arg_value>1</arg_value></tool_call>", []),
        ("<tool_call>f<arg_key>a</arg_key></tool_call>", "<tool_call>f<arg_key>a</arg_key></tool_call>", []),
        (f"<tool_call>f{PAIR}so{PAIR}</tool_call>", f"<tool_call>f{PAIR}so{PAIR}</tool_call>", []),
        (2 * "<tool_call>f<arg_key>" + "</tool_call>", 2 * "<tool_call>f<arg_key>" + "</tool_call>", []),
        ("<tool_call>f\n<tool_call>now</tool_call>", "<tool_call>f", [("now", {})]),
        (f"<tool_call>now{PAIR * 2}</tool_call>!", f"<tool_call>now{PAIR * 2}</tool_call>!", []),
        # Cut off by the limit of tokens.
        (written("now") + written("f", count=1)[:-5], written("f", count=1)[1:-5], [("now", {})]),
        ("\n <tool_call>f\n<arg_key>te", "\n <tool_call>f\n<arg_key>te", []),
        ("so <tool_ca", "so <tool_ca", []),
        # A value may hold all but its own end.
        (written("f", text=TAGS_AS_TEXT), "", [("f", {"text": TAGS_AS_TEXT})]),
    ],
)
def test_calls_and_texts(text, content, calls):
    check(text, content, calls)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("text", "1", "1"),
        ("text", '"quoted"', '"quoted"'),
        ("count", "2.0", 2),
        ("count", "2.5", "2.5"),
        ("count", "two", "two"),
        ("count", "true", "true"),
        ("count", "9" * 30, 10**30 - 1),
        ("share", "3", 3),
        ("share", "1e999", "1e999"),
        ("share", "NaN", "NaN"),
        ("flag", "True", True),
        ("flag", "1", "1"),
        ("list", "[1, 2", "[1, 2"),
        ("list", "[" * 100_000, "[" * 100_000),
        ("maybe", "null", None),
        ("maybe", "None", None),
        ("maybe", "12", "12"),
        ("either", "12", 12),
        ("either", "a", "a"),
        ("level", "2", 2),
        ("any", "[1]", [1]),
        ("any", "a b", "a b"),
        ("unknown", "1", 1),
    ],
)
def test_values_are_typed_by_the_schema_or_stay_text(name, value, expected):
    _, (call,) = parsed(f"<tool_call>f<arg_key>{name}</arg_key><arg_value>{value}</arg_value></tool_call>")
    assert repr(dict(call.arguments)) == repr({name: expected})
    json.loads(call.body()["function"]["arguments"], parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        [],
        {},
        {"properties": []},
        {"properties": {"a": 1}},
        {"properties": {"a": {"$ref": "#/a"}}},
        {"properties": {"a": {"$ref": "#/properties/a"}}},
        {"properties": {"a": {"anyOf": [1]}}},
    ],
)
def test_schemas_that_say_nothing(parameters):
    parser = ToolCallParser([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    (call,) = parser.push("<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>")
    assert call.arguments == {"a": 1}


def test_deltas_add_up_to_the_call():
    calls = [ToolCall("f", FULL), ToolCall("now", {})]
    deltas = [delta for index, call in enumerate(calls) for delta in call.deltas(index)]
    whole = [{}, {}]
    for delta in deltas:
        call = whole[delta["index"]]
        call |= {key: delta[key] for key in ("id", "type") if key in delta}
        function = call.setdefault("function", {"name": "", "arguments": ""})
        for key, text in delta["function"].items():
            function[key] += text
    assert whole == [call.body() for call in calls]
    assert calls[0].id != calls[1].id and calls[0].id.startswith("call_")
    assert json.loads(whole[0]["function"]["arguments"]) == FULL


_PIECES = st.sampled_from([*TOOL_TAGS, "f", "now", "count", "1", " ", "\n", "<", "tool", "ü", written("f", count=1)])


@given(st.lists(_PIECES, max_size=14), st.lists(st.integers(0, 200), max_size=6))
def test_the_result_does_not_depend_on_cuts(pieces, cuts):
    text = "".join(pieces)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    cut = [text[start:end] for start, end in itertools.pairwise(places)]
    whole = parsed(text)
    assert parsed(*cut) == whole
    if not whole[1]:
        assert whole[0] == text


def test_tags_of_calls_are_text_even_where_they_are_special_tokens():
    tokenizer = Glm4vTokenizer.from_pretrained(TINY_CHECKPOINT)
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(tag, special=True) for tag in TOOL_TAGS])
    text = written("f", text="Zürich")
    ids = backend.encode(text, add_special_tokens=False).ids
    assert TextStream(types.SimpleNamespace(backend_tokenizer=backend)).push(ids) == text


def test_a_finished_answer_is_split():
    text, calls = split_calls("One moment." + written("f", count=1) + written("now"), TOOLS)
    assert text == "One moment." and calls == [ToolCall("f", {"count": 1}), ToolCall("now", {})]


def test_one_call_may_be_all_that_is_wanted():
    parser = ToolCallParser(TOOLS, is_single=True)
    assert parser.push("A" + written("now") + written("f", count=1) + "B") == ["A", ToolCall("now", {}), "B"]


def test_a_call_is_read_as_the_family_template_writes_it():
    """What a model was trained to write is what the template makes of a call in the history."""
    call = ToolCall("f", FULL)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "So.", "tool_calls": [call.body()]}]
    said = render_conversation(messages, FAMILY_TEMPLATE, tools=TOOLS).rpartition("</think>")[2]
    assert split_calls(said, TOOLS) == ("So.", [call])
