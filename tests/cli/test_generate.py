"""`glm4v generate`: what is refused before weights are loaded, what is answered, and what is printed."""

import json
import os
import pathlib
import re
import shutil

import numpy as np
import PIL.Image
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import save_noise
from helpers_terminal import Terminal

import glm4v_jax
from glm4v_jax.cli import main
from glm4v_jax.config.presets import PRESETS
from glm4v_jax.console.answer_writer import AnswerWriter
from glm4v_jax.console.options import ModelOptions
from glm4v_jax.errors import CheckpointError, MediaError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("stacked_layers")]


@pytest.fixture
def refused(capfd, no_weights):
    """Runs `glm4v generate`; expects status 1 and one line of error, and no weights loaded; returns the line."""
    return lambda *arguments: error_of(capfd, *arguments)


@pytest.fixture
def answered(capfd):
    """Runs `glm4v generate --json`; returns the object."""

    def run(*arguments):
        assert main.main(["generate", "--json", *map(str, arguments)]) == 0
        return json.loads(capfd.readouterr().out)

    return run


def error_of(capfd, *arguments):
    assert main.main(["generate", *map(str, arguments)]) == 1
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith("glm4v: error: ")
    return line


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["PROMPT", "--jsonl"]),
        ([""], ["PROMPT", "''", "text"]),
        (["hi", "there"], ["PROMPT", "found 2", "quotes", "'hi there'"]),
        ([os.fsdecode(b"caf\xe9")], []),
        (["Hello", "--image", ""], ["--image: found ''"]),
        (["Hello", "--image", "nowhere.bin"], ["--image: found nowhere.bin"]),
        (["Hello", "--video", "nowhere.bin"], ["--video: found nowhere.bin"]),
        (["Hello", "--jsonl", "x.jsonl"], ["PROMPT", "--jsonl"]),
        (["--image", "x.png", "--jsonl", "x.jsonl"], ["--image", "--jsonl"]),
        (["Hello", "--fps", "2"], ["--fps: found without --video"]),
        (["Hello", "--video", "x.mp4", "--fps", "0"], ["--fps: found 0", "a number above 0"]),
        (["Hello", "--video", "x.mp4", "--fps", "nan"], ["--fps: found nan"]),
        (["--fps", "2", "--jsonl", "x.jsonl"], ["--fps: found with --jsonl; expected in the file"]),
        (["Hello", "--image", "."], ["--image: found ., a directory; expected an image; frames of a video: --video"]),
        (["Hello", "--tools", "no.json"], ["--tools: found no.json, no such file; expected JSON"]),
        (["Hello", "--tools", "[{"], ["--tools: found invalid JSON"]),
        (["Hello", "--tools", __file__], [f"--tools of {__file__}: found invalid JSON"]),
        (["Hello", "--tools", '{"name": "f"}'], ["tools: found {'name': 'f'}; expected a list of objects"]),
        (["Hello", "--tools", '[{"type": "function", "name": "f"}]'], ["tools: found {", "objects with function.name"]),
        (
            ["Hello", "--tools", '[{"type": "function", "function": {"name": "f"}}]'],
            ["tools: found 1; expected none", "no place for them"],
        ),
        (["--tools", "[]", "--jsonl", "x.jsonl"], ["--tools: found with --jsonl; expected in the file"]),
        (["Hello", "--out", "x.jsonl"], ["--out", "--jsonl"]),
        (["Hello", "--slots", "2"], ["--slots", "--jsonl"]),
        (["Hello", "--restart"], ["--restart", "--jsonl"]),
        (["--jsonl", "x.jsonl", "--slots", "0"], ["--slots: found 0"]),
        (["--jsonl", "x.jsonl"], ["x.jsonl: found no such file"]),
        (["Hello", "--logprobs", "2"], ["--logprobs", "--json"]),
        (["Hello", "--json", "--logprobs", "65"], ["--logprobs: found 65", "64"]),
        (["Hello", "--preset", "best"], ["best", *PRESETS]),
        (["Hello", "--json-schema", "nowhere.json"], ["--json-schema: found nowhere.json, no such file"]),
        (["Hello", "--json-schema", '{"type": "strin"}'], ["--json-schema: found", "Invalid type: strin"]),
        (["Hello", "--regex", "(a"], ["--regex: found '(a'", "unclosed group"]),
        (["Hello", "--regex", "a", "--choice", "b"], ["--regex: found beside choices"]),
        (["Hello", "--answer-budget", "5"], ["--answer-budget: found", "think_budget"]),
        (["Hello", "--think-budget", "-1"], ["--think-budget: found -1"]),
        (["Hello", "--think-budget", "65000", "--answer-budget", "1000"], ["--think-budget", "65,000", "65,536"]),
        (["Hello", "--stop", ""], ["--stop: found"]),
        (["Hello", "--temperature", "-0.5"], ["--temperature: found -0.5"]),
        (["Hello", "--temperature", "nan"], ["--temperature: found nan"]),
        (["Hello", "--temperature", "0"], ["--temperature: found 0", "--greedy"]),
        (["Hello", "--dtype", "int8"], ["--dtype: found 'int8'; expected one of auto, float32"]),
        (["Hello", "--quantize", "int3"], ["--quantize: found 'int3'; expected one of none, int8, int4"]),
        (["Hello", "--cache-dtype", "int4"], ["--cache-dtype: found 'int4'; expected one of auto, int8; did you mean"]),
        (["Hello", "--top-p", "1.5"], ["--top-p: found 1.5"]),
        (["Hello", "--top-k", "-1"], ["--top-k: found -1"]),
        (["Hello", "--repetition-penalty", "0"], ["--repetition-penalty: found 0"]),
        (["Hello", "--max-new-tokens", "0"], ["--max-new-tokens: found 0"]),
        (["Hello", "--max-new-tokens", "65536"], ["max_position_embeddings", "65,536"]),
        (["Hello", "--seed", "-3"], ["--seed: found -3"]),
        (["Hello", "--greedy", "--do-sample"], ["--greedy", "--do-sample"]),
        *((["Hello", "--greedy", option, "1"], ["--greedy", option]) for option in ("--temperature", "--top-k")),
        *((["Hello", "--greedy", option, "1"], ["--greedy", option]) for option in ("--top-p", "--min-p")),
    ],
)
def test_an_invalid_option_is_refused_before_weights_are_loaded(refused, arguments, words):
    line = refused(*arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("option", ["--image", "--video"])
@pytest.mark.parametrize("name", ["notes.bin", "notes.mp4"])
def test_a_file_of_another_kind_is_named(refused, option, name):
    pathlib.Path(name).write_text("neither an image nor a video\n" * 100)
    assert name in refused(option, name, "Hello")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_image_is_named(refused, kind):
    save_noise("cut.bin", kind=kind)
    content = pathlib.Path("cut.bin").read_bytes()
    pathlib.Path("cut.bin").write_bytes(content[: len(content) // 2])
    assert "cut.bin" in refused("--image", "cut.bin", "Hello")


def test_a_file_that_may_not_be_read_is_not_called_missing(refused, monkeypatch):
    save_noise("private.png", height=30, width=30)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "private.png" and access(path, mode))
    assert "--image: found private.png, a path without permission" in refused("--image", "private.png", "Hello")


def test_an_image_with_an_extreme_aspect_ratio_is_refused(refused):
    save_noise("sliver.png", height=30, width=30 * 201)
    assert "smaller than 200, got 201.0: 6030 x 30 pixels" in refused("--image", "sliver.png", "Hello")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("", "not a directory; expected a checkpoint; download it first: hf download zai-org/GLM-4.1V-9B-Thinking"),
        ("./at/GLM-OCR", "not a directory; expected a checkpoint; download it first: hf download zai-org/GLM-OCR"),
        (__file__, "a file; expected the directory of a checkpoint"),
    ],
)
def test_a_model_that_is_not_a_directory_is_named(refused, name, what):
    line = refused("--model", name, "Hello")
    assert f"--model: found {name or repr(name)}, which is {what}" in line


def test_a_model_of_the_hub_is_not_downloaded(refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", os.path.abspath("hub"))
    line = refused("--model", "THUDM/GLM-4.1V-9B-Thinking", "Hello")
    assert "--model: found THUDM/GLM-4.1V-9B-Thinking, which is neither a directory nor in the local" in line
    assert line.endswith("hf download THUDM/GLM-4.1V-9B-Thinking")


def test_a_model_of_the_environment_is_named_by_its_variable(refused, monkeypatch):
    """The default is read once, when the options are made."""
    monkeypatch.setenv("GLM4V_MODEL", "/nowhere")
    assert "glm4v: error: $GLM4V_MODEL: found /nowhere" in refused("--model", "/nowhere", "Hello")
    assert "error: --model: found /elsewhere" in refused("--model", "/elsewhere", "Hello")


def test_a_directory_that_is_not_a_checkpoint_is_named(refused, tmp_path):
    assert str(tmp_path) in refused("--model", tmp_path, "Hello")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert str(tmp_path) in refused("--model", tmp_path, "Hello")


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the random checkpoint, to be damaged."""
    return shutil.copytree(RANDOM_CHECKPOINT, tmp_path / "checkpoint")


def test_an_id_that_the_tokenizer_has_otherwise_is_named(refused, checkpoint):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token_id": 7}))
    assert f"{path}: image_token_id: found 7; expected " in refused("--model", checkpoint, "Hello")


def test_a_truncated_shard_is_named(capfd, checkpoint):
    shard = checkpoint / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert shard.name in error_of(capfd, "--model", checkpoint, "Hello")


def test_missing_tensors_are_named_and_counted(capfd, checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (checkpoint / "model-00001-of-00002.safetensors").unlink()
    kept = {name: shard for name, shard in content["weight_map"].items() if shard.startswith("model-00002")}
    index.write_text(json.dumps({**content, "weight_map": kept}))
    line = error_of(capfd, "--model", checkpoint, "Hello")
    missing = content["weight_map"].keys() - kept.keys()
    named = sum(f"{name.removeprefix('model.')}: found nothing" in line for name in missing)
    assert (
        3 <= named < len(missing) and f" {len(missing)} tensors " in line and f"and {len(missing) - named} more" in line
    )


@pytest.mark.parametrize(
    ("options", "error"), [(["--image", "nowhere.png"], MediaError), (["--model", "checkpoint"], CheckpointError)]
)
def test_verbose_raises_the_error(checkpoint, options, error):
    (checkpoint / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(error):
        main.main(["generate", "-v", *options, "Hello"])


# What is answered.


def test_calls_of_tools_are_a_field_of_the_answer(answered, checkpoint):
    """And the template writes the empty thought that is asked for, where it can."""
    switch = "{% if enable_thinking is defined %}<think></think>{% endif %}"
    template = "{% if tools %}{{ tools }}{% endif %}{{ messages[0].content[0].text }}" + switch
    (checkpoint / "chat_template.jinja").write_text(template)
    tools = '[{"type": "function", "function": {"name": "f"}}]'
    options = ("--tools", tools, "--think-budget", "0", "--max-new-tokens", 2, "--greedy", "Hello")
    answer = answered("--model", checkpoint, *options)
    assert answer["tool_calls"] == [] and answer["new_tokens"] <= 2 and answer["thought"] is None


def test_images_and_videos_are_answered_in_one_prompt(answered, image, video):
    options = ("--max-new-tokens", 4, "--greedy", "--image", image, "--video", video, "Compare them.")
    answer = answered(*options)
    assert answer.keys() == {
        "text", "thought", "answer", "boxed", "boxes", "pixel_boxes", "prompt_tokens", "new_tokens", "thought_tokens",
        "answer_tokens", "seconds", "compile_seconds", "first_token_seconds", "tokens_per_second", "finish_reason",
        "stop_string", "is_forced", "model",
    }  # fmt: skip
    assert answer["new_tokens"] == 4
    assert answer["finish_reason"] == "length"
    assert answer["model"] == str(RANDOM_CHECKPOINT)
    assert answer["text"] != ""
    assert answer["tokens_per_second"] is None  # all in one burst: there is no time between the first and the last
    assert answered(*options)["text"] == answer["text"]


def test_the_answer_is_that_of_the_python_interface(answered, image):
    answer = answered("--max-new-tokens", 4, "--greedy", "--image", image, "What is this?")
    processor = glm4v_jax.Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT)
    model = glm4v_jax.Glm4vForConditionalGeneration.from_pretrained(RANDOM_CHECKPOINT)
    content = [{"type": "image", "path": image}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer["prompt_tokens"] == length
    assert answer["text"] == processor.decode(ids[0, length:], skip_special_tokens=True)


def test_sixteen_bits_are_a_note_of_one_line(capfd):
    PIL.Image.fromarray(np.full((56, 56), 60_000, np.uint16)).save("deep.png")
    assert main.main(["generate", "--greedy", "--max-new-tokens", "1", "--image", "deep.png", "What?"]) == 0
    (note,) = [line for line in capfd.readouterr().err.splitlines() if "deep.png" in line]
    assert note.startswith("glm4v: note: deep.png: has values above 255 (mode I;16), which are clipped to 255")
    assert main.main(["generate", "-q", "--greedy", "--max-new-tokens", "1", "--image", "deep.png", "What?"]) == 0
    assert capfd.readouterr().err == ""


def test_the_seed_decides_what_is_sampled(answered):
    options = ("--max-new-tokens", 8, "--do-sample", "--top-k", 0, "--top-p", 1, "--temperature", 1.5, "Hello")
    first, again, other = (answered("--seed", seed, *options)["text"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_an_end_token_finishes_the_answer(answered, checkpoint):
    processor = glm4v_jax.Glm4vProcessor.from_pretrained(checkpoint)
    model = glm4v_jax.Glm4vForConditionalGeneration.from_pretrained(checkpoint)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    likeliest = int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": likeliest}))
    answer = answered("--model", checkpoint, "--greedy", "--max-new-tokens", 4, "Hello")
    assert answer["new_tokens"] == 1
    assert answer["finish_reason"] == "stop"
    assert answer["model"] == str(checkpoint)


def test_an_option_overrides_the_number_of_tokens_of_a_preset(answered, monkeypatch):
    seen = []
    monkeypatch.setitem(PRESETS["agent"].__dict__, "options", {"do_sample": False, "max_new_tokens": 5})
    for given in ([], ["--preset", "agent"], ["--preset", "agent", "--max-new-tokens", "3"], ["--preset", "greedy"]):
        seen.append(answered(*given, "--greedy", "Hello")["new_tokens"])
    assert seen == [128, 5, 3, 128]


def test_a_thought_is_closed_when_its_budget_is_used_up(answered):
    answer = answered("--greedy", "--think-budget", 5, "--answer-budget", 7, "Hello")
    assert answer["text"].count("</think><answer>") == 1
    parts = answer["text"].split("</think><answer>")
    assert [answer["thought"], answer["answer"]] == [part.strip() for part in parts]
    assert (answer["thought_tokens"], answer["answer_tokens"], answer["new_tokens"]) == (6, 8, 14)
    assert answer["finish_reason"] == "length"


def test_an_answer_ends_before_a_stop_text(answered):
    whole = answered("--greedy", "--max-new-tokens", 40, "Hello")
    stop = whole["text"][30:33]
    answer = answered("--greedy", "--max-new-tokens", 40, "--stop", stop, "--stop", "never written", "Hello")
    assert answer["text"] == whole["text"][: whole["text"].index(stop)]
    assert (answer["finish_reason"], answer["stop_string"]) == ("stop", stop)
    assert whole["stop_string"] is None


def test_an_answer_that_repeats_itself_can_be_ended(answered):
    answer = answered("--greedy", "--max-new-tokens", 2000, "--stop-repetition", "What is this?")
    assert answer["finish_reason"] == "repetition"
    assert answer["new_tokens"] < 2000


def test_an_answer_keeps_to_its_grammar(answered, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["red", [7]]}')
    prompts = tmp_path / "prompts.jsonl"
    lines = [{}, {"choices": ["yes", "no"]}, {"regex": "[0-9]{3}"}]
    prompts.write_text("".join(f"{json.dumps({'prompt': 'Hello', **line})}\n" for line in lines))
    budget = ("--think-budget", 4, "--answer-budget", 60)
    summary = answered("--jsonl", prompts, "--out", tmp_path / "out.jsonl", "--json-schema", schema, *budget)
    assert summary["failed"] == 0
    rows = sorted(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()), key=lambda row: row["index"])
    first, second, third = (row["answer"] for row in rows)
    assert json.loads(first) in ("red", [7])
    assert second in ("yes", "no") and re.fullmatch("[0-9]{3}", third)


def test_an_int8_cache_answers_and_its_memory_is_counted(answered, monkeypatch):
    """The cache of a long answer is checked before the weights are read, in the numbers that it will have."""
    from glm4v_jax.checkpoints import load

    reserved, load_runtime = [], load.load_runtime
    monkeypatch.setattr(
        load,
        "load_runtime",
        lambda *args, **options: reserved.append(options["reserve"]) or load_runtime(*args, **options),
    )
    engine = glm4v_jax.Engine.from_pretrained(RANDOM_CHECKPOINT, cache_dtype="int8")
    expected = engine.generate("Hello", do_sample=False, max_new_tokens=8)
    for options in ([], ["--cache-dtype", "int8"]):
        answer = answered("--greedy", "--max-new-tokens", 8, *options, "Hello")
    assert answer["text"] == expected.text
    text, tokens = engine.runtime.config.text_config, answer["prompt_tokens"] + 8
    numbers = 2 * tokens * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    assert reserved[-2:] == [4 * numbers, numbers * (1 + 4 / text.head_dim)]


def test_options_that_change_no_number_name_no_precision():
    """Answers of a file are resumed where the precision is the same."""
    assert ModelOptions().precision is ModelOptions(quantize="none", cache_dtype="auto").precision is None
    options = ModelOptions(dtype="bfloat16", quantize="int8", cache_dtype="int8")
    assert options.precision == "bfloat16 int8 cache int8"


def test_the_system_prompt_is_part_of_the_prompt(answered):
    bare = answered("--greedy", "--max-new-tokens", 1, "Hello")
    answer = answered("--greedy", "--max-new-tokens", 1, "--system", "Be brief.", "Hello")
    assert answer["prompt_tokens"] > bare["prompt_tokens"]


def test_log_probabilities_are_those_of_the_tokens(answered):
    tokenizer = glm4v_jax.Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT).tokenizer
    answer = answered("--greedy", "--max-new-tokens", 6, "--logprobs", 3, "Hello")
    assert "".join(item["token"] for item in answer["logprobs"]) == answer["text"]
    for item in answer["logprobs"]:
        assert len(item["top"]) == 3
        assert item["token"] == tokenizer.decode([item["id"]])
        # Greedy without a penalty: what was chosen is the likeliest.
        assert {name: item[name] for name in ("id", "token", "logprob")} == item["top"][0]
        assert item["logprob"] < 0
    alone = answered("--greedy", "--max-new-tokens", 6, "--logprobs", 0, "Hello")
    assert alone["logprobs"] == [item | {"top": []} for item in answer["logprobs"]]


def test_times_are_in_order(answered):
    answer = answered("--greedy", "--max-new-tokens", 40, "Hello")
    assert 0 < answer["first_token_seconds"] <= answer["seconds"]
    assert answer["compile_seconds"] <= answer["seconds"]


# What is printed.


def test_text_goes_to_standard_output_and_figures_to_standard_error(answered, capfd):
    options = ("--greedy", "--max-new-tokens", 12, "--think-budget", 9, "Hello")
    answer = answered(*options)
    assert main.main(["generate", *map(str, options)]) == 0
    captured = capfd.readouterr()
    assert captured.out == answer["text"] + "\n"
    assert "</think><answer>" in captured.out
    assert f"{answer['prompt_tokens']} prompt tokens, " in captured.err
    assert "(10 of thought and 13 of answer)" in captured.err
    assert "finish reason: length" in captured.err


def test_text_is_printed_while_it_is_generated(monkeypatch):
    """The first part is written before the last is computed."""
    written = []
    monkeypatch.setattr(AnswerWriter, "show", lambda self, delta: written.append(delta))
    assert main.main(["generate", "--greedy", "--max-new-tokens", "200", "Hello"]) == 0
    assert len(written) > 4
    assert written[0].completion is None
    assert "".join(delta.text for delta in written) == written[-1].completion.text


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_the_tiny_model_is_named(capfd, monkeypatch, more):
    shutil.copytree(RANDOM_CHECKPOINT, "model")
    monkeypatch.setattr("glm4v_jax.console.options.TINY_CHECKPOINT", pathlib.Path("model"))
    words = "using the tiny model in the package, which reads handwritten digits; --model DIR for another"
    for model, is_named in (("model", True), (RANDOM_CHECKPOINT, False)):
        assert main.main(["generate", "--model", str(model), *more, "--max-new-tokens", "1", "Hello"]) == 0
        assert (words in capfd.readouterr().err.splitlines()) == is_named


def test_a_terminal_shows_what_is_going_on_and_no_tags(tmp_path):
    terminal = Terminal(
        "generate", "--greedy", "--max-new-tokens", 40, "--think-budget", 9, "Hello", directory=tmp_path, width=200
    )
    assert terminal.end() == 0
    for status in ("preparing the inputs", "loading the weights"):
        assert status in terminal.output
    assert re.search(r"generating|compiling \d of 4: ", terminal.output)
    assert "</think><answer>" not in terminal.output
    assert "new (10 of thought and" in terminal.output
