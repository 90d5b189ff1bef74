"""`glm4v generate`: streaming, thoughts, stops, and what excludes each other. More is in tests/cli/test_main.py."""

import json
import math
import os
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import answered, refused
from helpers_terminal import Terminal

import glm4v_jax
from glm4v_jax.cli import main
from glm4v_jax.config.presets import PRESETS
from glm4v_jax.console import answer_writer
from glm4v_jax.console.answer_writer import AnswerWriter, rate_after_first
from glm4v_jax.console.table import printable
from glm4v_jax.files import to_json
from glm4v_jax.generate.completion import Completion, Counts, Delta, TokenLogprob, completion_fields
from glm4v_jax.generate.text.thinking import Kind, Part, ThinkingParser

DIM, BOLD, PLAIN = "\x1b[2;3m", "\x1b[1m", "\x1b[0m"


@pytest.fixture(scope="module")
def tokenizer():
    return glm4v_jax.Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT).tokenizer


# What is refused.


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["PROMPT", "--jsonl"]),
        ([""], ["PROMPT", "''", "text"]),
        (["hi", "there"], ["PROMPT", "found 2", "quotes", "'hi there'"]),
        (["Hello", "--image", ""], ["--image ''", "no such file"]),
        (["Hello", "--jsonl", "x.jsonl"], ["PROMPT", "--jsonl"]),
        (["--image", "x.png", "--jsonl", "x.jsonl"], ["--image", "--jsonl"]),
        (["Hello", "--out", "x.jsonl"], ["--out", "--jsonl"]),
        (["Hello", "--slots", "2"], ["--slots", "--jsonl"]),
        (["Hello", "--restart"], ["--restart", "--jsonl"]),
        (["Hello", "--logprobs", "2"], ["--logprobs", "--json"]),
        (["Hello", "--json", "--logprobs", "65"], ["logprobs", "65", "64"]),
        (["Hello", "--preset", "best"], ["best", *PRESETS]),
        (["Hello", "--answer-budget", "5"], ["answer_budget", "think_budget"]),
        (["Hello", "--think-budget", "0"], ["think_budget", "0"]),
        (["Hello", "--think-budget", "65000", "--answer-budget", "1000"], ["think_budget", "65,000", "65,536"]),
        (["Hello", "--stop", ""], ["stop_strings"]),
        (["--jsonl", "x.jsonl", "--slots", "0"], ["--slots", "0"]),
        (["--jsonl", "x.jsonl"], ["x.jsonl", "No such file"]),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_loaded(capfd, arguments, words):
    line = refused(capfd, *arguments)
    for word in words:
        assert word in line


# What is answered.


def test_the_help_has_the_presets(capfd):
    with pytest.raises(SystemExit):
        main.main(["generate", "--help"])
    shown = " ".join(capfd.readouterr().out.replace("│", "").split())
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.description}" in shown


def test_a_preset_brings_its_number_of_tokens_and_the_option_goes_over_it(capfd, monkeypatch):
    seen = []
    monkeypatch.setitem(PRESETS["agent"].__dict__, "options", {"do_sample": False, "max_new_tokens": 5})
    for given in ([], ["--preset", "agent"], ["--preset", "agent", "--max-new-tokens", "3"], ["--preset", "greedy"]):
        seen.append(answered(capfd, *given, "--greedy", "Hello")["new_tokens"])
    assert seen == [128, 5, 3, 128]


def test_a_thought_is_closed_when_its_budget_is_used_up(capfd):
    told = answered(capfd, "--greedy", "--think-budget", 5, "--answer-budget", 7, "Hello")
    assert told["text"].count("</think><answer>") == 1
    thought, answer = told["text"].split("</think><answer>")
    assert (told["thought"], told["answer"]) == (thought.strip(), answer.strip())
    assert (told["thought_tokens"], told["answer_tokens"], told["new_tokens"]) == (6, 8, 14)
    assert told["finish_reason"] == "length"


def test_an_answer_ends_before_a_stop_text(capfd):
    whole = answered(capfd, "--greedy", "--max-new-tokens", 40, "Hello")
    stop = whole["text"][30:33]
    told = answered(capfd, "--greedy", "--max-new-tokens", 40, "--stop", stop, "--stop", "never written", "Hello")
    assert told["text"] == whole["text"][: whole["text"].index(stop)]
    assert (told["finish_reason"], told["stop_string"]) == ("stop", stop)
    assert whole["stop_string"] is None


def test_a_text_that_goes_in_circles_can_be_ended(capfd):
    told = answered(capfd, "--greedy", "--max-new-tokens", 2000, "--stop-repetition", "What is this?")
    assert told["finish_reason"] == "repetition"
    assert told["new_tokens"] < 2000


def test_what_the_system_says_is_part_of_the_prompt(capfd):
    bare = answered(capfd, "--greedy", "--max-new-tokens", 1, "Hello")
    told = answered(capfd, "--greedy", "--max-new-tokens", 1, "--system", "Be brief.", "Hello")
    assert told["prompt_tokens"] > bare["prompt_tokens"]


def test_log_probabilities_are_those_of_the_tokens(capfd, tokenizer):
    told = answered(capfd, "--greedy", "--max-new-tokens", 6, "--logprobs", 3, "Hello")
    assert "".join(item["token"] for item in told["logprobs"]) == told["text"]
    for item in told["logprobs"]:
        assert len(item["top"]) == 3
        assert item["token"] == tokenizer.decode([item["id"]])
        # Greedy without a penalty: what was chosen is the likeliest.
        assert {name: item[name] for name in ("id", "token", "logprob")} == item["top"][0]
        assert item["logprob"] < 0


def test_times_are_in_order(capfd):
    told = answered(capfd, "--greedy", "--max-new-tokens", 40, "Hello")
    assert 0 < told["first_token_seconds"] <= told["seconds"]
    assert told["compile_seconds"] <= told["seconds"]


def test_the_rate_is_that_behind_the_first_piece(capfd):
    assert rate_after_first(21, 1, 12.0, 10.0) == 10
    assert rate_after_first(8, 8, 12.0, 10.0) is None
    assert rate_after_first(9, 8, 10.01, 10.0) is None
    assert answered(capfd, "--greedy", "--max-new-tokens", 1, "Hello")["tokens_per_second"] is None


def test_what_is_no_number_is_null_in_json(tokenizer):
    tops = ((3, math.nan), (4, -math.inf), (5, -0.5))
    completion = Completion(0, "a", (3,), 9, "stop", logprobs=(TokenLogprob(3, math.nan, tops),))
    told = json.loads(to_json(completion_fields(completion, tokenizer)), parse_constant=pytest.fail)
    (token,) = told["logprobs"]
    assert (token["logprob"], [item["logprob"] for item in token["top"]]) == (None, [None, None, -0.5])


def test_who_answers_is_said_of_the_packaged_model_only(capfd, monkeypatch):
    packaged = "answering: the tiny model of the package, which knows handwritten digits; --model DIR for another"
    shutil.copytree(RANDOM_CHECKPOINT, "model")
    monkeypatch.setattr("glm4v_jax.console.options.TINY_CHECKPOINT", pathlib.Path("model"))
    for more in ([], ["--json"]):
        assert main.main(["generate", "--model", "model", *more, "--max-new-tokens", "1", "Hello"]) == 0
        assert capfd.readouterr().err.splitlines()[0] == packaged
    assert main.main(["generate", "--max-new-tokens", "1", "Hello"]) == 0
    assert "answering" not in capfd.readouterr().err


def test_boxes_in_pixels_come_with_exactly_one_picture(tokenizer):
    text = "<think>a cat</think><answer><|begin_of_box|>[[100, 200, 500, 1000]]<|end_of_box|>"
    tokens = (1, 2, tokenizer.convert_tokens_to_ids("</think>"), 3)
    for sizes, pixels in {((200, 50),): [[20, 10, 100, 50]], (): None, ((200, 50), (8, 8)): None}.items():
        told = completion_fields(Completion(0, text, tokens, 9, "stop", image_sizes=sizes), tokenizer)
        assert told["boxes"] == [[100, 200, 500, 1000]]
        assert told.get("pixel_boxes") == pixels
        assert told["boxed"] == ["[[100, 200, 500, 1000]]"]
        assert (told["thought"], told["thought_tokens"], told["answer_tokens"]) == ("a cat", 3, 1)


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("Hello", [1, 2], (0, 2)),
        ("<think>a", [8, 1], (2, 0)),
        ("<think>a</think>b", [8, 1, 9, 2], (3, 1)),
        ("a</think>b", [1, 9, 2, 3], (2, 2)),
    ],
)
def test_tokens_are_counted_by_kind(tokenizer, text, tokens, expected):
    names = {8: "<think>", 9: "</think>"}
    ids = tuple(tokenizer.convert_tokens_to_ids(names[token]) if token in names else token for token in tokens)
    counts = Counts.of(Completion(0, text, ids, 9, "stop"), tokenizer)
    assert (counts.thought, counts.answer) == expected


# What is shown.


def shown(monkeypatch, capfd, text, pieces=1, **variables):
    """What a terminal gets to see of a text that comes in pieces."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", **variables}.items():
        monkeypatch.setenv(name, value)
    for name in {"NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"} - variables.keys():
        monkeypatch.delenv(name, raising=False)
    writer, parser = AnswerWriter(), ThinkingParser()
    step = -(-len(text) // pieces)
    for start in range(0, len(text), step):
        piece = text[start : start + step]
        writer.show(Delta(piece, tuple(parser.push(piece)), ()))
    writer.show(Delta("", tuple(parser.finish()), ()))
    writer.end(Completion(0, text, (), 0, "stop"))
    return capfd.readouterr().out


THOUGHT = "<think>a cat?</think>\n<answer>A <|begin_of_box|>cat<|end_of_box|>.</answer>"


def test_a_terminal_shows_thoughts_dim_and_boxes_bold_and_no_tags(monkeypatch, capfd):
    expected = f"{DIM}a cat?{PLAIN}\n\nA {BOLD}cat{PLAIN}.\n"
    assert shown(monkeypatch, capfd, THOUGHT) == expected
    in_pieces = shown(monkeypatch, capfd, THOUGHT, len(THOUGHT))
    for code in (DIM, BOLD, PLAIN):
        expected, in_pieces = expected.replace(code, ""), in_pieces.replace(code, "")
    assert in_pieces == expected


def test_a_terminal_without_styles_shows_the_tags(monkeypatch, capfd):
    assert shown(monkeypatch, capfd, THOUGHT, TERM="dumb") == THOUGHT + "\n"


def test_a_thought_without_its_opening_tag_is_told_of_afterwards(monkeypatch, capfd):
    told = shown(monkeypatch, capfd, "a cat?</think><answer>A cat.")
    assert told.startswith("a cat?\n\nA cat.\n")
    assert "what came before </think> was the thought" in told


def test_long_lines_are_left_to_the_terminal(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "20")
    assert shown(monkeypatch, capfd, "word " * 30, 7) == "word " * 30 + "\n"


def test_a_terminal_gets_no_control_characters_of_the_model():
    assert printable("a\x1b[2Jb\x07\tc\r\nd\x9b") == "a\\x1b[2Jb\\x07\tc\nd\\x9b"


def test_an_encoding_that_lacks_characters_is_no_end(monkeypatch, capfd):
    written = []

    class Narrow:
        encoding = "ascii"
        write = staticmethod(written.append)
        flush = staticmethod(lambda: None)

    monkeypatch.setattr(answer_writer.sys, "stdout", Narrow)
    AnswerWriter().show(Delta("\u732b", (Part(Kind.TEXT, "\u732b"),), ()))
    assert written == ["\\u732b"]


def test_a_terminal_is_written_to_and_told_what_goes_on(tmp_path):
    terminal = Terminal(
        "generate", "--greedy", "--max-new-tokens", 40, "--think-budget", 9, "Hello", directory=tmp_path, width=200
    )
    assert terminal.end() == 0
    for status in ("preparing the inputs", "loading the weights", "generating (a new shape compiles first)"):
        assert status in terminal.output
    assert "</think><answer>" not in terminal.output
    assert "new (10 of thought and" in terminal.output


def test_a_pipe_gets_the_text_as_the_model_wrote_it(capfd):
    options = ("--greedy", "--max-new-tokens", 12, "--think-budget", 9, "Hello")
    text = answered(capfd, *options)["text"]
    assert main.main(["generate", *map(str, options)]) == 0
    captured = capfd.readouterr()
    assert captured.out == text + "\n"
    assert "</think><answer>" in captured.out
    assert "(10 of thought and 13 of answer)" in captured.err


def test_text_goes_out_while_it_is_made(monkeypatch):
    """The first piece is written before the last is computed."""
    written = []
    monkeypatch.setattr(AnswerWriter, "show", lambda self, delta: written.append(delta))
    assert main.main(["generate", "--greedy", "--max-new-tokens", "200", "Hello"]) == 0
    assert len(written) > 4
    assert written[0].completion is None
    assert "".join(delta.text for delta in written) == written[-1].completion.text


def test_a_picture_in_the_folder_is_named_from_there(capfd):
    PIL.Image.fromarray(np.zeros((56, 84, 3), np.uint8)).save("picture.png")
    told = answered(capfd, "--greedy", "--max-new-tokens", 2, "--image", "picture.png", "What?")
    assert pathlib.Path("picture.png").exists() and os.listdir() == ["picture.png"]
    assert told["pixel_boxes"] == []
