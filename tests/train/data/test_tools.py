"""Conversations with tools and thoughts: the same of every layout, encoded as the checkpoint's template writes them."""

import json

import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_tokenizer import FAMILY_TEMPLATE
from helpers_transformers import import_transformers

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError
from glm4v_jax.generate.prompt import prompt_of
from glm4v_jax.inputs.processor import Glm4vProcessor
from tools import make_family
from train.data.formats import detect, read_row
from train.data.lengths import TokenCounter
from train.data.records import Record, question_of, read_records
from train.data.samples import IGNORED, EncodeOptions, encode
from train.rl.problems import read_problems

ADD = {
    "name": "add",
    "description": "größer",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
FUNCTION = {"type": "function", "function": ADD}
FIRST, SECOND = {"a": 1, "b": "zwei"}, {"a": [2, None], "b": ""}
HI = {"role": "user", "content": "Add them."}
DONE = {"role": "assistant", "content": "Three."}


def call(arguments, **more):
    return {**more, "type": "function", "function": {"name": "add", "arguments": arguments}}


def text(role, value, **more):
    return {"role": role, "content": [{"type": "text", "text": value}], **more}


def calls_text(*arguments):
    found = [{"name": "add", "arguments": one} for one in arguments]
    return json.dumps(found if len(found) > 1 else found[0], ensure_ascii=False)


OPENAI = {
    "messages": [
        HI,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I add.",
            "tool_calls": [call(json.dumps(FIRST), id="1"), call(json.dumps(SECOND), id="2")],
        },
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "tool", "tool_call_id": "2", "content": "4"},
        DONE,
    ],
    "tools": [FUNCTION],
}
SWIFT = {
    "messages": [
        HI,
        {"role": "assistant", "content": "", "reasoning": "I add."},
        {"role": "tool_call", "content": calls_text(FIRST)},
        {"role": "tool_call", "content": calls_text(SECOND)},
        {"role": "tool_response", "content": "3"},
        {"role": "tool_response", "content": "4"},
        DONE,
    ],
    "tools": json.dumps([FUNCTION]),
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Add them."},
        {"from": "function_call", "value": calls_text(FIRST, SECOND), "reasoning_content": "I add."},
        {"from": "observation", "value": "3"},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "Three."},
    ],
    "tools": json.dumps([ADD]),
}
TRL = {
    "prompt": [HI],
    "completion": [{**OPENAI["messages"][1], "content": []}, *OPENAI["messages"][2:]],
    "tools": [json.dumps(ADD)],
}
ROWS = {"openai": OPENAI, "swift": SWIFT, "sharegpt": SHAREGPT, "hf": TRL}


def without_ids(message):
    message = {name: value for name, value in message.items() if name != "tool_call_id"}
    if "tool_calls" in message:
        message["tool_calls"] = [{k: v for k, v in one.items() if k != "id"} for one in message["tool_calls"]]
    return message | {"content": message["content"] or [{"type": "text", "text": ""}]}


@pytest.mark.parametrize("name", ROWS)
def test_every_layout_reads_alike(name):
    messages, losses, functions = read_row(ROWS[name], detect(ROWS[name]))
    assert [without_ids(message) for message in messages] == [
        text("user", "Add them."),
        text("assistant", "", reasoning_content="I add.", tool_calls=[call(FIRST), call(SECOND)]),
        text("tool", "3"),
        text("tool", "4"),
        text("assistant", "Three."),
    ]
    assert losses == (False, True, False, False, True) and functions == (FUNCTION,)


def test_calls_may_have_a_loss_and_a_thought_of_their_own():
    called = {"role": "tool_call", "content": calls_text(FIRST), "loss": True, "reasoning": "I add."}
    messages, losses, _ = read_row({"messages": [HI, {**DONE, "loss": True}, called]}, "openai")
    assert messages[1] == text("assistant", "Three.") and losses == (False, True, True)
    assert messages[2]["reasoning_content"] == "I add." and messages[2]["tool_calls"] == [call(FIRST)]


def test_names_of_a_dataset_info_are_read(tmp_path):
    tags = {"role_tag": "r", "content_tag": "c", "user_tag": "u", "assistant_tag": "a", "observation_tag": "o",
            "function_tag": "f"}  # fmt: skip
    row = {
        "m": [{"r": "u", "c": "?"}, {"r": "f", "c": calls_text(FIRST)}, {"r": "o", "c": "3"}, {"r": "a", "c": "3."}],
        "t": json.dumps([ADD]),
    }
    (tmp_path / "data.json").write_text(json.dumps([row]))
    entry = {
        "file_name": "data.json",
        "formatting": "sharegpt",
        "columns": {"messages": "m", "tools": "t"},
        "tags": tags,
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"sums": entry}))
    (record,) = read_records(f"{tmp_path}/dataset_info.json:sums")
    assert [message["role"] for message in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.tools == (FUNCTION,) and record.losses == (False, True, False, True)


def test_tables_of_calls_have_no_arguments_of_others(tmp_path):
    """A table gives all objects the fields of each."""
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    called = {"role": "assistant", "content": None, "tool_calls": [call({"a": 1}), call({"b": 2})]}
    pq.write_table(
        pa.Table.from_pylist([{"messages": [HI, called], "tools": [FUNCTION, {"name": "mul"}]}]), tmp_path / "a.parquet"
    )
    (record,) = read_records(str(tmp_path / "a.parquet"))
    assert [one["function"]["arguments"] for one in record.messages[1]["tool_calls"]] == [{"a": 1}, {"b": 2}]
    assert record.tools[1] == {"type": "function", "function": {"name": "mul"}}


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    """The processor and the configuration of a checkpoint whose template has tools."""
    directory = tmp_path_factory.mktemp("flash")
    make_family.write_checkpoint("flash", directory)
    return Glm4vProcessor.from_pretrained(directory), Glm4vConfig.from_pretrained(directory)


@pytest.fixture(scope="module")
def released():
    """Those of a checkpoint as GLM-4.1V is, whose template prints contents alone."""
    return Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT), Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT)


def record_of(*messages, **fields):
    turns = read_row({"messages": list(messages), **fields}, "openai")
    return Record(turns.messages, turns.losses, "data.jsonl:7", tools=turns.tools)


def learned(sample, processor):
    """The texts that are learned."""
    is_target = sample.targets != IGNORED
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_target.astype(int), [0]])))
    return [processor.decode(sample.targets[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def rendered(processor, messages, tools):
    """The tokens of what transformers itself makes of a template and messages as OpenAI's clients write them."""
    import_transformers()
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [dict(message) for message in messages]
    for message in messages:
        if "tool_calls" in message:
            every = [one["function"] for one in message["tool_calls"]]
            message["tool_calls"] = [call(json.loads(one["arguments"])) for one in every]
            message["content"] = message["content"] or ""
    (prompt,), _ = render_jinja_template([messages], tools=tools, chat_template=FAMILY_TEMPLATE)
    return processor(text=prompt, add_special_tokens=False)["input_ids"][0]


CALLED = (
    "<think>I add.</think>\n"
    "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
    "<arg_key>b</arg_key>\n<arg_value>zwei</arg_value>\n</tool_call>\n"
    "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>[2, null]</arg_value>\n"
    "<arg_key>b</arg_key>\n<arg_value></arg_value>\n</tool_call><|observation|>"
)


@pytest.mark.parametrize("name", ROWS)
def test_tokens_are_those_of_the_template_and_only_what_the_assistant_writes_is_learned(flash, name):
    turns = read_row(ROWS[name], detect(ROWS[name]))
    record = Record(turns.messages, turns.losses, "data.jsonl:7", tools=turns.tools)
    sample = encode(record, *flash)
    expected = rendered(flash[0], OPENAI["messages"], [FUNCTION])
    np.testing.assert_array_equal(sample.input_ids, expected)
    assert learned(sample, flash[0]) == [CALLED, "<think></think>\nThree.<|user|>"]
    assert TokenCounter(flash[0])(record) == len(sample)
    assert "<|observation|>\n<tool_response>\n3\n</tool_response>" in flash[0].decode(sample.input_ids)


def test_a_thought_may_stand_before_the_json_of_calls(flash):
    """As LLaMA-Factory has it; tags in arguments are text."""
    arguments = {"a": "</think>"}
    called = {"role": "tool_call", "content": f"<think>I add.</think>\n{calls_text(arguments)}"}
    sample = encode(record_of(HI, called, tools=[FUNCTION]), *flash)
    said = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value></think></arg_value>\n</tool_call><|observation|>"
    assert learned(sample, flash[0]) == [f"<think>I add.</think>\n{said}"]


def test_a_conversation_may_end_with_a_call_and_losses_choose_the_turns(flash):
    ends = record_of(*OPENAI["messages"][:2], tools=[FUNCTION])
    assert learned(encode(ends, *flash), flash[0]) == [CALLED]
    messages = [{**message, "loss": message is DONE} for message in OPENAI["messages"]]
    messages[0], messages[2], messages[3] = OPENAI["messages"][0], *OPENAI["messages"][2:4]
    sample = encode(record_of(*messages, tools=[FUNCTION]), *flash)
    assert learned(sample, flash[0]) == ["<think></think>\nThree.<|user|>"]


def test_a_tool_may_answer_with_an_image(flash):
    shown = {
        "role": "tool",
        "content": [{"type": "text", "text": "See:"}, {"type": "image", "image": np.zeros((56, 56, 3), np.uint8)}],
    }
    sample = encode(record_of(*OPENAI["messages"][:2], shown, DONE, tools=[FUNCTION]), *flash)
    assert len(sample.prompt.media) == 1 and len(learned(sample, flash[0])) == 2


AGAIN = ({"role": "user", "content": "Again."}, {"role": "assistant", "content": "Three.", "reasoning": "Still."})


def test_thoughts_since_the_last_question_are_kept(flash):
    """Those before it are not in a prompt for generation either, and turns without theirs are not learned."""
    record = record_of(*OPENAI["messages"], *AGAIN, tools=[FUNCTION])
    sample = encode(record, *flash)
    np.testing.assert_array_equal(
        sample.input_ids,
        rendered(flash[0], [*OPENAI["messages"], AGAIN[0], {**AGAIN[1], "reasoning_content": "Still."}], [FUNCTION]),
    )
    assert learned(sample, flash[0]) == ["<think></think>\nThree.<|user|>", "<think>Still.</think>\nThree.<|user|>"]
    bare = encode(record, *flash, EncodeOptions(keep_thoughts="none"))
    assert len(learned(bare, flash[0])) == 3 and "Still." not in flash[0].decode(bare.input_ids)


def test_a_thought_in_a_field_is_written_as_the_model_writes_it(flash, released):
    thought = {"role": "assistant", "content": "Three.", "reasoning_content": "1 + 2"}
    inline = {"role": "assistant", "content": "<think>1 + 2</think><answer>Three.</answer>"}
    tagged = {**thought, "content": "<answer>Three.</answer>"}
    for said in (thought, inline, tagged):
        sample = encode(record_of(HI, said), *released)
        assert learned(sample, released[0]) == ["<think>1 + 2</think><answer>Three.</answer><|user|>"]
    assert learned(encode(record_of(HI, thought), *flash), flash[0]) == ["<think>1 + 2</think>\nThree.<|user|>"]
    bare = encode(record_of(HI, thought), *released, EncodeOptions(keep_thoughts="none"))
    assert learned(bare, released[0]) == ["Three.<|user|>"]


@pytest.mark.parametrize("name", ROWS)
def test_an_evaluation_prompt_equals_the_training_sample(flash, name):
    turns = read_row(ROWS[name], detect(ROWS[name]))
    record = Record(turns.messages, turns.losses, "data.jsonl:7", tools=turns.tools)
    sample = encode(record, *flash)
    messages, expected = question_of(record, fps=2)
    prompt = prompt_of(messages, *flash, tools=list(record.tools))
    np.testing.assert_array_equal(prompt.input_ids, sample.input_ids[: len(prompt)])
    assert expected == "Three." and sample.targets[len(prompt) - 1] == sample.input_ids[len(prompt)]
    assert not record.ends_in_call and record_of(*OPENAI["messages"][:2]).ends_in_call


def test_preferences_may_be_calls(flash, tmp_path):
    """Only what differs is learned: the call, its thought and the token after it."""
    better, worse = ({**OPENAI["messages"][1], "tool_calls": [call({"a": a})]} for a in (1, 2))
    row = {"prompt": [HI], "chosen": [better], "rejected": [worse], "tools": [ADD]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    (record,) = read_records(str(tmp_path / "data.jsonl"), is_preference=True)
    sample = encode(record, *flash)
    called = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>{}</arg_value>\n</tool_call><|observation|>"
    assert learned(sample, flash[0]) == [f"<think>I add.</think>\n{called.format(a)}" for a in (1, 2)]


def test_the_reference_of_a_problem_is_no_thought(tmp_path):
    row = {"messages": [HI, AGAIN[1], *AGAIN]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    (problem,) = read_problems([str(tmp_path / "data.jsonl")], ["math"])
    assert problem.item == {"answer": "Three."} and problem.messages[1]["reasoning_content"] == "Still."


def test_problems_with_tools_are_refused(tmp_path):
    row = {"messages": [HI], "answer": 3, "tools": [ADD]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"data\.jsonl:1: tools: found some; expected none: answers that call tools"):
        read_problems([str(tmp_path / "data.jsonl")], ["math"])


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (record_of(*OPENAI["messages"], tools=[FUNCTION]), "tools: found some, which the chat template does not print"),
        (record_of(*OPENAI["messages"]), "message 1: field 'tool_calls': found some, which the chat template drops"),
    ],
)
def test_a_template_without_tools_refuses_them_by_row_and_field(released, record, says):
    with pytest.raises(DataError, match=rf"^data\.jsonl:7: {says}"):
        encode(record, *released)


def said(*messages, **fields):
    return {"messages": [HI, *messages], **fields}


def calling(content, **more):
    return {"role": "tool_call", "content": content, **more}


GOOD = {"role": "assistant", "tool_calls": [call({}, id="1")]}
ANSWER = {"role": "tool", "content": "3"}
BROKEN = [
    (said(DONE, tools="add, multiply"), r"tools: found invalid JSON \(.*\); expected a list of functions"),
    (said(DONE, tools={"name": "add"}), "tools: found an object; expected a list of functions"),
    (said(DONE, tools='{"name": "add"}'), "tools: found an object; expected a list of functions"),
    (said(DONE, tools=[7]), r"tools\[0\]: found the number 7; expected an object with 'name' or 'function'"),
    (said(DONE, tools=["add"]), r"tools\[0\]: found invalid JSON .*; expected a function"),
    (said(DONE, tools=[{"type": "function"}]), r"tools\[0\]: found a function without a name"),
    (said(ANSWER, DONE), r"messages\[1\]: found what a tool answers, without a call; expected a call"),
    (said(DONE, ANSWER), r"messages\[2\]: found what a tool answers, without a call"),
    (said(GOOD, ANSWER, ANSWER, DONE), r"messages\[3\]: found answer 2 to 1 call; expected as many"),
    (said(GOOD, DONE), r"messages\[2\]: found a message of assistant after a call; expected what the tool answers"),
    (said(GOOD, HI), r"messages\[2\]: found a message of user after a call; expected what the tool answers"),
    (said(GOOD, {**ANSWER, "tool_call_id": "2"}), r"messages\[2\].tool_call_id: found '2'; expected the id .*, '1'"),
    (said(GOOD, {"role": "tool", "content": {"sum": 3}}), r"messages\[2\].content: found an object; expected a string"),
    (said(calling("add(1, 2)")), r"messages\[1\]: found invalid JSON .*; expected calls as JSON, objects with 'name'"),
    (said(calling("[]")), r"messages\[1\]: found no call; expected at least one"),
    (said(calling('"add"')), r"messages\[1\]: found a string; expected an object with"),
    (said(calling('{"arguments": {}}')), r"messages\[1\].name: found None; expected the name of a tool"),
    (said(calling('{"name": "add"}')), r"messages\[1\].arguments: found nothing; expected an object"),
    (said(calling('{"name": "add", "arguments": [1]}')), r"messages\[1\].arguments: found list; expected an object"),
    (said(calling('[{"name": "add", "arguments": {}}, 3]')), r"messages\[1\]\[1\]: found the number 3; expected"),
    (said(calling(7)), r"messages\[1\].content: found the number 7; expected a string"),
    (said({"role": "assistant", "tool_calls": {}, "content": "a"}, {**HI, "tool_calls": [1]}), "message of user"),
    (said({**DONE, "tool_calls": "add"}), r"messages\[1\].tool_calls: found invalid JSON"),
    (said({**DONE, "tool_calls": [call("{")]}), r"messages\[1\].tool_calls\[0\].function.arguments: found invalid"),
    (said({**DONE, "function_call": {"name": ""}}), r"messages\[1\].function_call.name: found ''; expected the name"),
    (said(GOOD, tools=[{"name": "mul"}]), r"messages\[1\]: found a call of 'add'; expected one of the row's tools"),
    (said(DONE, calling(calls_text(FIRST), loss=False)), r"messages\[2\]: found another loss than in the message"),
    (said({**ANSWER, "role": "tol"}), r"messages\[1\].role: found 'tol'; expected one of .*did you mean 'tool'"),
    (said({**DONE, "reasoning_content": 7}), r"messages\[1\]: field 'reasoning_content': found int; expected a string"),
    (said({**DONE, "reasoning_content": "a", "reasoning": "b"}), "'reasoning_content' and 'reasoning' with different"),
    (
        said({"role": "assistant", "content": "<think>a</think>b", "reasoning_content": "c"}),
        r"messages\[1\]: found <think> in 'content' beside 'reasoning_content'; expected the thought in one of them",
    ),
    (
        {"conversations": [{"from": "gpt", "value": "<think>b</think>c", "reasoning": "d"}]},
        r"conversations\[0\]: found <think> in 'content' beside 'reasoning'",
    ),
    (said(calling(f"<think>a</think>{calls_text(FIRST)}", reasoning="b")), "found <think> in 'content' beside"),
    ({"messages": [{**HI, "reasoning": "b"}, DONE]}, r"messages\[0\].reasoning: found some in a message of user"),
    (said({**GOOD, "tool_calls": [call({"a": "\ud83d"})]}), "half of a character"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "says"), BROKEN, ids=range(len(BROKEN)))
def test_invalid_rows_are_named_in_one_line(row, says, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=says) as error:
        read_records(str(tmp_path / "data.jsonl"))[0]
    assert str(error.value).startswith(f"{tmp_path}/data.jsonl:1: ") and "\n" not in str(error.value)
