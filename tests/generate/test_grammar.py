"""Structured output: answers that are what a JSON schema, a regular expression or a list of choices allows."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_generation import GREEDY, random_requests
from hypothesis import given
from hypothesis import strategies as st

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.engine import Request
from glm4v_jax.generate.grammar import Guide
from glm4v_jax.generate.sequence import SequenceState
from glm4v_jax.generate.slots import MIN_CAPACITY
from glm4v_jax.generate.text.stream import TextStream
from glm4v_jax.generate.token_masks import HELD, masks_of
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer

EOS = (768, 787)  # <|endoftext|>, </answer>
VOCABULARY = 832  # rows of logits; the tokenizer has 788 tokens


@pytest.fixture(scope="module")
def tokenizer():
    return Glm4vTokenizer.from_pretrained(RANDOM_CHECKPOINT)


def after(engine, text, tail="<think></think>"):
    """The prompt of a question whose thought is over, as some chat templates end; or with another tail."""
    prompt = engine.prompt(text)
    return prompt.extended(engine.processor.tokenizer.encode(tail)) if tail else prompt


def random_schema(rng, depth=0):
    """A schema whose texts are short, so that a random model ends them."""
    kinds = ["string", "pattern", "integer", "enum", "const", "boolean", "null", "any_of"]
    if depth < 2:
        kinds += ["object"] * 4 + ["array"] * 2 + ["ref"]
    if depth == 0:
        kinds = ["object"]
    kind = rng.choice(kinds)
    if kind == "object":
        names = rng.sample(["name", "age", "x y", "größe", "tags", 'a"b', "id"], rng.randint(1, 3))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        least = rng.randint(0, 2)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if kind == "integer":
        low = rng.randint(-500, 500)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 2000)}
    simple = {
        "string": {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 6)},
        "pattern": {"type": "string", "pattern": rng.choice(["^[A-Z]{2}[0-9]{1,3}$", "^(yes|no)$", "^[a-f]{1,3}x?$"])},
        "enum": {"enum": rng.sample(["red", "green", 3, None, True, 2.5, {"a": [1]}], rng.randint(1, 4))},
        "const": {"const": rng.choice(["fixed", 7, [1, 2]])},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "any_of": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 4}]},
        "ref": {"$ref": "#/$defs/pair"},
    }
    return simple[kind]


def random_schemas(number):
    rng = random.Random(17)
    pair = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 2}
    return [{"$defs": {"pair": pair}, **random_schema(rng)} for _ in range(number)]


@pytest.fixture(scope="module")
def answers(engine):
    """100 answers to schemas among requests without, which come through the same eight slots."""
    schemas = random_schemas(100)
    prompts = [after(engine, f"Question {i}") for i in range(100)]
    free = random_requests(engine.model, 8, 5)
    sampling = [{}, dict(do_sample=True, top_k=20, temperature=2.0), dict(do_sample=True, top_p=0.9, top_k=0)]
    requests = [
        Request(prompt, dict(json_schema=schema, eos_token_id=EOS, max_new_tokens=200, **sampling[i % 3]))
        for i, (prompt, schema) in enumerate(zip(prompts, schemas, strict=True))
    ]
    mixed = [*free[:4], *requests[:50], *free[4:], *requests[50:]]
    found = {one.index: one for one in engine.generate_many(mixed, max_new_tokens=40, **GREEDY)}
    rows = [i for i, item in enumerate(mixed) if not isinstance(item, Request)]
    return schemas, [found[i] for i in range(len(mixed)) if i not in rows], free, [found[i] for i in rows]


@pytest.mark.slow
def test_answers_to_random_schemas_parse_and_validate(answers):
    schemas, completions, *_ = answers
    assert [one.finish_reason for one in completions] == ["stop"] * 100
    for schema, completion in zip(schemas, completions, strict=True):
        jsonschema.validate(json.loads(completion.answer), schema)
    # They are not all the same few texts.
    assert len({one.answer for one in completions}) > 80


def test_rows_without_a_grammar_are_answered_as_alone(engine, answers):
    *_, free, completions = answers
    alone = {one.index: one.tokens for one in engine.generate_many(free, max_new_tokens=40, **GREEDY)}
    assert [one.tokens for one in completions] == [alone[i] for i in range(len(free))]


def test_a_stream_has_the_same_text_and_the_model_s_log_probabilities(engine):
    options = dict(regex="[a-z]{2,9} and [0-9]{3}", eos_token_id=EOS, max_new_tokens=60, logprobs=2)
    prompt = after(engine, "Hello")
    deltas = list(engine.stream(prompt, **{**GREEDY, **options}))
    found = deltas[-1].completion
    assert re.fullmatch(options["regex"], found.answer) and found.finish_reason == "stop"
    assert said(deltas, "answer") + said(deltas, "text") == found.answer
    assert "".join(delta.text for delta in deltas) == found.text
    # Of the same tokens, one by one, in a model that may say anything.
    whole = prompt.extended(found.tokens[:-1])
    alone = engine.generate(whole, max_new_tokens=1, logprobs=2, **GREEDY).logprobs[0]
    assert [token for token, _ in found.logprobs[-1].top] == [token for token, _ in alone.top]
    assert all(entry.token == token for entry, token in zip(found.logprobs, found.tokens, strict=True))


def test_options_beside_a_grammar(engine):
    prompt, base = after(engine, "Hello"), {**GREEDY, "eos_token_id": EOS, "max_new_tokens": 60}
    whole = engine.generate(prompt, regex="[a-z]{8} [a-z]{8}", **base)
    stop = whole.answer[5:7]
    cut = engine.generate(prompt, regex="[a-z]{8} [a-z]{8}", stop_strings=stop, **base)
    assert (cut.answer, cut.stop_string) == (whole.answer[: whole.answer.index(stop)], stop)
    # Bans give way where a grammar leaves nothing else, and end tokens wait for the least length where it does.
    digits = engine.processor.tokenizer.encode("7")
    assert engine.generate(prompt, regex="7", suppress_tokens=digits, **base).answer == "7"
    short = engine.generate(prompt, regex="7+", suppress_tokens=digits, **base | {"max_new_tokens": 30})
    assert set(short.answer) == {"7"}
    least = engine.generate(prompt, regex="(7 )+", min_new_tokens=12, **base | {"max_new_tokens": 40})
    assert len(least.tokens) >= 12
    # Without any end token an answer ends where nothing can follow.
    endless = engine.generate(prompt, choices=["one", "two"], **base | {"eos_token_id": -1})
    assert endless.answer in ("one", "two") and endless.finish_reason == "stop"


def test_a_thought_of_the_engine_is_closed_and_then_answered(engine):
    prompt = after(engine, "Hello", "<think>")
    found = engine.generate(prompt, choices=["yes", "no"], think_budget=12, answer_budget=20, **GREEDY)
    free = engine.generate(prompt, max_new_tokens=12, **GREEDY)
    assert found.tokens[:12] == free.tokens and found.is_forced
    assert (found.answer in ("yes", "no"), found.finish_reason) == (True, "stop")
    assert found.text == f"{free.text}</think><answer>{found.answer}"


@pytest.mark.parametrize(
    ("tail", "put"),
    [("", "<think></think><answer>"), ("<think>", "</think><answer>"), ("<think></think>", "")],
)
def test_an_answer_without_a_thought(engine, tail, put):
    prompt = after(engine, "Hello", tail)
    found = engine.generate(prompt, choices=["yes", "no"], think_budget=0, answer_budget=20, **GREEDY)
    assert (found.answer in ("yes", "no"), found.finish_reason) == (True, "stop")
    assert found.text.removeprefix("<answer>") == (put + found.answer).removeprefix("<answer>") and not found.thought


def test_a_conversation_has_the_answer_in_its_history(engine):
    talk = engine.conversation(think_budget=6, answer_budget=30, **GREEDY)
    first = talk.send("Hello", choices=["</answer>a", "</answer>b"])
    assert first.answer in ("</answer>a", "</answer>b") and talk.messages[-1]["content"] == first.answer
    assert talk.send("Again") == engine.generate(talk.messages[:-1], think_budget=6, answer_budget=30, **GREEDY)


def test_one_grammar_takes_the_place_of_another():
    config = GenerationConfig(json_schema={}, seed=3).replace(choices=["a"])
    assert (config.json_schema, config.choices, config.seed) == (None, ("a",), 3)


@pytest.mark.slow
def test_requests_with_grammars_compile_nothing_after_a_warm_up_for_them(make_engine, lowerings):
    own = make_engine(num_slots=2, capacity=MIN_CAPACITY)
    done = own.warmup(prompt_lengths=(1, 32), max_new_tokens=20, json_schema={}, progress=lambda _: None)
    assert sum("grammar" in line.shape for line in done) == 2
    options = [{}, dict(json_schema={}), dict(choices=["a", "b"]), dict(regex="[a-z]{3}"), {}]
    with lowerings() as lowered:
        list(own.generate_many([Request("Hi", dict(max_new_tokens=20, **other)) for other in options], **GREEDY))
        own.generate("Hi", regex="x{3}", max_new_tokens=20, do_sample=True)
    assert lowered == []


def test_generate_of_the_model_refuses_grammars_by_name(engine):
    with pytest.raises(GenerationError, match="regex: found 'a'; expected None, or glm4v_jax\\.Engine"):
        engine.model.generate(input_ids=np.array([[1]]), regex="a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(json_schema="{"), r"json_schema: found {, no JSON \(Expecting property name"),
        (dict(json_schema="[1]"), r"json_schema: found \[1\]; expected an object"),
        (dict(json_schema=3), "json_schema: found 3; expected a JSON schema: a mapping, or its JSON text"),
        (dict(json_schema={"type": "strin"}), "json_schema: .*Invalid type: strin"),
        (dict(json_schema={"not": {}}), r'json_schema: .*Unimplemented keys: \["not"\]'),
        (dict(json_schema={"a": {1}}), "json_schema: .*set is not JSON serializable"),
        (dict(json_schema={"$ref": "file:///etc/hosts"}), "json_schema: .*does not fetch"),
        (dict(json_schema={"type": "integer", "minimum": 5, "maximum": 4}), "json_schema: .*Unsatisfiable"),
        (dict(json_schema='{"items":' * 3000 + "{}" + "}" * 3000), "json_schema: .*recursion depth"),
        (dict(choices=[]), r"choices: found \[\]; expected at least one string, none of them empty"),
        (dict(choices=["a", ""]), r"choices: found \['a', ''\]; expected at least one string"),
        (dict(regex=""), "regex: found ''; expected a regular expression"),
        (dict(regex="(a"), r"regex: found '\(a', which cannot be used \(unclosed group\)"),
        (dict(regex="(?=a)b"), "regex: .*look-ahead"),
        (dict(regex="a", choices=["b"]), "regex: found beside choices; expected one of json_schema, regex, choices"),
        (dict(regex="a", num_beams=2), "num_beams: found 2; expected 1 beside regex"),
        (dict(regex="a", prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens: found 2; expected nothing beside reg"),
    ],
)
def test_impossible_grammars_are_refused_by_name(options, message):
    with pytest.raises(GenerationError, match=message):
        GenerationConfig(**options)


def follow(tokenizer, pieces, prompt="", **options):
    """A sequence that gets these pieces of text or tokens, each in a dispatch; every one must be allowed."""
    config = GenerationConfig(**{"eos_token_id": EOS, "max_new_tokens": 100, "choices": ["ab cd", "x"], **options})
    sequence = SequenceState(Prompt.of_text(tokenizer.encode(f"Hi<|assistant|>{prompt}")), config, tokenizer, 1000)
    turn, deltas, start = sequence.start().turn, [], None
    assert sequence.turn is HELD
    for piece in pieces:
        for token in tokenizer.encode(piece):
            assert token in allowed(turn) and start is None
            delta, start = sequence.take([token], token in EOS)
            deltas.append(delta)
            if start is not None or sequence.finish_reason is not None:
                break
            turn = sequence.turn
    return sequence, deltas, start


def allowed(turn):
    """The tokens that may come first in a turn."""
    masks = masks_of({0: turn}, 1, VOCABULARY)
    if turn.forced:
        return {turn.forced[0]}
    return set(np.flatnonzero(np.unpackbits(masks.allowed.view(np.uint8), bitorder="little")).tolist())


def said(deltas, kind):
    return "".join(part.text for delta in deltas for part in delta.parts if part.kind == kind)


def test_only_texts_of_the_grammar_may_come_and_never_a_special_token(tokenizer):
    config = GenerationConfig(regex="(.|\n)*")
    guide = Guide(config.grammar, tokenizer, np.array(tokenizer.encode("<|assistant|><think></think><answer>")), EOS)
    added = set(tokenizer.added_tokens_decoder)
    assert allowed(guide.turn()) & added == {*EOS, tokenizer.convert_tokens_to_ids("<answer>")}
    guide.push(tokenizer.convert_tokens_to_ids("<answer>"))
    assert allowed(guide.turn()) & added == set(EOS)
    # Rows of logits without a token are not allowed either.
    assert max(allowed(guide.turn())) < len(tokenizer) < VOCABULARY


@pytest.mark.parametrize(
    "first", ["", "<answer>", "\n", "\n<answer>", "<think>hm, <answer", "<think>hm</think>\n<answer>"]
)
def test_the_answer_comes_after_the_thought(tokenizer, first):
    is_open = first.endswith("<answer")
    pieces = [first + ">" if is_open else first, "ab cd"]
    _, deltas, _ = follow(tokenizer, pieces)
    found = deltas[-1].completion
    assert (found.answer, found.finish_reason, found.text) == ("ab cd", "stop", "".join(pieces))
    assert found.thought == ({True: "hm,", False: "hm"}[is_open] if "think" in first else None)
    assert said(deltas, "answer" if "<answer" in first else "text") == "ab cd"


def test_what_may_come_first(tokenizer):
    think, line, tag, a, x = (tokenizer.encode(text)[0] for text in ("<think>", "\n", "<answer>", "ab cd", "x"))
    assert {think, line, tag, a, x} <= (begin := allowed(follow(tokenizer, [])[0].start().turn))
    assert think not in (closed := allowed(follow(tokenizer, [], "<think></think>")[0].start().turn))
    assert closed == begin - {think}
    # Within the thought of a prompt everything is free, until it ends.
    turn = follow(tokenizer, [], "<think>")[0].start().turn
    assert turn.allowed is None and turn.pause == (*tokenizer.encode("</think>"), tag)
    _, deltas, _ = follow(tokenizer, ["so</think>", "x"], "<think>")
    assert (deltas[-1].completion.thought, deltas[-1].completion.answer) == ("so", "x")


def test_an_answer_may_look_like_tags(tokenizer):
    for text in ('"</answer></think> <answer> <think>"', '"<|begin_of_box|>"'):
        pieces = [text[i] for i in range(len(text))]
        config = dict(choices=None, json_schema={"type": "string"})
        _, deltas, _ = follow(tokenizer, ["<think>a</think><answer>", *pieces], **config)
        found = deltas[-1].completion
        assert (found.thought, found.answer, found.finish_reason) == ("a", text, "stop")
        assert said(deltas, "answer") == text


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4), st.randoms())
def test_choices_are_any_texts(tokenizer, choices, rng):
    guide = Guide(GenerationConfig(choices=choices).grammar, tokenizer, np.array([1]), EOS)
    guide.close_thought()
    stream, text = TextStream(tokenizer), ""
    while not guide.is_complete:
        turn = guide.turn()
        token = rng.choice(sorted(allowed(turn)))
        guide.push(token)
        text += stream.push([] if token in EOS and not turn.forced else [token])
    assert text in choices


def test_forced_tokens_come_together(tokenizer):
    forced = "x" + "yz" * 30
    sequence, _, _ = follow(tokenizer, ["<answer>"], choices=[f"{forced}{end}" for end in "12"])
    taken = []
    while sequence.finish_reason is None:
        turn = sequence.turn
        rest = [] if turn.most == len(turn.forced) else [tokenizer.encode("2")[0]]
        taken.append([*turn.forced, *rest])
        assert len(taken[-1]) == turn.most
        sequence.take(taken[-1], False)
    assert sequence.text == f"<answer>{forced}2" and len(taken) < sum(map(len, taken)) / 4


@pytest.mark.parametrize("ends", [True, False])
def test_a_thought_that_ends_without_its_tag_is_closed(tokenizer, ends):
    """By an end token; or by its budget."""
    options = {} if ends else dict(think_budget=4, answer_budget=9)
    thought = tokenizer.encode("<think>a b")
    sequence, *_ = follow(tokenizer, ["<think>a b"], **options)
    if ends:
        delta, start = sequence.take([EOS[0]], True)
    else:
        delta, start = sequence.take(tokenizer.encode(" c"), True)
    assert delta.text.endswith("</think><answer>") and start is not None and sequence.turn is HELD
    assert allowed(start.turn) == {tokenizer.encode(text)[0] for text in ("a", "ab", "x")}
    assert start.step == len(thought) + 1
    delta, _ = sequence.take(tokenizer.encode("x"), False)
    assert (delta.completion.answer, delta.completion.is_forced, delta.completion.finish_reason) == ("x", True, "stop")


def test_a_cut_answer_says_so(tokenizer):
    sequence, _, _ = follow(tokenizer, ["<answer>"])
    delta, start = sequence.take(tokenizer.encode("ab"), True)
    assert start is None and delta.completion.finish_reason == "length" and delta.completion.answer == "ab"


def test_an_end_token_comes_where_the_text_may_end_but_need_not(tokenizer):
    sequence, *_ = follow(tokenizer, ["1", "2"], choices=None, regex="[0-9]{2,4}")
    assert set(EOS) & allowed(sequence.turn) == set(EOS)
    delta, _ = sequence.take([787], True)
    assert (delta.completion.answer, delta.completion.text) == ("12", "12</answer>")
    assert delta.completion.finish_reason == "stop"
    sequence, *_ = follow(tokenizer, ["1"], choices=None, regex="[0-9]{2,4}")
    assert not set(EOS) & allowed(sequence.turn)


def test_grammars_that_only_the_empty_text_fits_are_refused(tokenizer):
    with pytest.raises(GenerationError, match="no text fits but an empty one"):
        follow(tokenizer, [], choices=None, regex="()")
