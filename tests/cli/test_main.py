"""The command line: what it prints, what it refuses and how, and that it does not load weights for nothing."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import ROOT, answered, refuse_weights, refused, save_film, save_noise

import glm4v_jax
from glm4v_jax.cli import main
from glm4v_jax.errors import CheckpointError, MediaError


def picture_bytes(kind="PNG", height=56, width=84):
    buffer = io.BytesIO()
    save_noise(buffer, height, width, kind)
    return buffer.getvalue()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(picture_bytes())
    return path


@pytest.fixture
def film(tmp_path):
    """Two seconds at two frames a second, as an animated picture."""
    path = tmp_path / "film.gif"
    save_film(path)
    return path


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are asked for."""
    refuse_weights(monkeypatch)


# What is refused before weights are loaded.


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("option", ["--image", "--video"])
def test_a_missing_file_is_named(capfd, tmp_path, option):
    line = refused(capfd, option, tmp_path / "nowhere.bin", "Hello")
    assert f"{option} {tmp_path / 'nowhere.bin'}" in line


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_picture_is_named(capfd, tmp_path, kind):
    content = picture_bytes(kind)
    path = tmp_path / "cut.bin"
    path.write_bytes(content[: len(content) // 2])
    assert "cut.bin" in refused(capfd, "--image", path, "Hello")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("option", ["--image", "--video"])
@pytest.mark.parametrize("name", ["notes.bin", "notes.mp4"])
def test_a_file_that_is_no_media_is_named(capfd, tmp_path, option, name):
    path = tmp_path / name
    path.write_text("neither a picture nor a video\n" * 100)
    assert name in refused(capfd, option, path, "Hello")


@pytest.mark.usefixtures("no_weights")
def test_a_sliver_is_refused(capfd, tmp_path):
    path = tmp_path / "sliver.png"
    path.write_bytes(picture_bytes(height=30, width=30 * 201))
    assert "200" in refused(capfd, "--image", path, "Hello")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--temperature", "-0.5", "temperature"),
        ("--temperature", "nan", "temperature"),
        ("--temperature", "0", "--greedy"),
        ("--dtype", "int8", "auto, float32"),
        ("--top-p", "1.5", "top_p"),
        ("--top-k", "-1", "top_k"),
        ("--min-p", "nan", "min_p"),
        ("--repetition-penalty", "0", "repetition_penalty"),
        ("--max-new-tokens", "0", "max_new_tokens"),
        ("--max-new-tokens", "65536", "max_position_embeddings"),
        ("--seed", "-3", "seed"),
    ],
)
def test_an_impossible_option_is_named(capfd, option, value, field):
    line = refused(capfd, option, value, "Hello")
    assert field in line
    assert value.lstrip("-") in line.replace(",", "")


@pytest.mark.usefixtures("no_weights")
def test_greedy_and_sampling_exclude_each_other(capfd):
    line = refused(capfd, "--greedy", "--do-sample", "Hello")
    assert "--greedy" in line
    assert "--do-sample" in line


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("option", ["--temperature", "--top-k", "--top-p", "--min-p"])
def test_greedy_and_what_shapes_a_draw_exclude_each_other(capfd, option):
    line = refused(capfd, "--greedy", option, "1", "Hello")
    assert "--greedy" in line
    assert option in line


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["", "THUDM/GLM-4.1V-9B-Thinking", __file__])
def test_what_is_no_directory_is_not_downloaded(capfd, name):
    line = refused(capfd, "--model", name, "Hello")
    assert f"--model {name or repr(name)}: not a directory" in line
    assert "nothing is downloaded" in line


@pytest.mark.usefixtures("no_weights")
def test_a_variable_of_the_environment_is_named_as_one(capfd, monkeypatch):
    """The default is read once, when the options are made."""
    monkeypatch.setenv("GLM4V_MODEL", "/nowhere")
    assert "glm4v: error: $GLM4V_MODEL /nowhere: not a directory" in refused(capfd, "--model", "/nowhere", "Hello")
    assert "error: --model /elsewhere: not a directory" in refused(capfd, "--model", "/elsewhere", "Hello")


@pytest.mark.usefixtures("no_weights")
def test_a_prompt_that_is_no_utf_8_is_refused(capfd):
    refused(capfd, os.fsdecode(b"caf\xe9"))


@pytest.mark.usefixtures("no_weights")
def test_what_is_no_checkpoint_is_named(capfd, tmp_path):
    assert str(tmp_path / "nowhere") in refused(capfd, "--model", tmp_path / "nowhere", "Hello")
    assert str(tmp_path) in refused(capfd, "--model", tmp_path, "Hello")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert str(tmp_path) in refused(capfd, "--model", tmp_path, "Hello")


def test_debug_shows_where_it_happened(tmp_path):
    with pytest.raises(MediaError):
        main.main(["generate", "--debug", "--image", str(tmp_path / "nowhere.png"), "Hello"])


def test_an_unknown_option_exits_with_status_2(capfd):
    with pytest.raises(SystemExit) as exit_of_process:
        main.main(["generate", "Hello", "--picture", "x.png"])
    assert exit_of_process.value.code == 2
    assert "--picture" in capfd.readouterr().err


def test_a_complaint_about_usage_names_the_help_of_the_subcommand(capfd):
    with pytest.raises(SystemExit) as exit_of_process:
        main.main(["generate", "--max-new-tokens", "abc", "Hello"])
    assert exit_of_process.value.code == 2
    assert "glm4v generate --help" in capfd.readouterr().err


def test_the_version(capfd):
    assert main.main(["--version"]) == 0
    assert capfd.readouterr().out == f"glm4v {glm4v_jax.__version__}\n"


def test_a_reader_that_went_away_is_no_error(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        result = subprocess.run(
            [sys.executable, "-m", "glm4v_jax", "generate", "--max-new-tokens", "2", "Hello"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == main.READER_GONE
    assert result.stderr == ""


def test_a_process_ends_with_one_line_and_status_1(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "glm4v_jax", "generate", "--image", "nowhere.png", "Hello"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "glm4v: error: --image nowhere.png: there is no such file or directory\n"


def test_help_does_not_wait_for_jax(tmp_path):
    program = (
        "import sys\n"
        "from glm4v_jax.cli import main as cli\n"
        "for arguments in ([], *([name] for name in cli.COMMANDS)):\n"
        "    try:\n        cli.main([*arguments, '--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0\n"
        "slow = {'jax', 'flax', 'orbax', 'torch', 'numpy', 'PIL', 'tokenizers', 'decord', 'av'}\n"
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("generate", "chat", "describe", "inspect", "cache"):
        assert f"usage: glm4v {name}" in result.stdout
    assert "--max-new-tokens" in result.stdout
    assert "JAX_COMPILATION_CACHE_DIR" in result.stdout
    assert "{auto,float32,bfloat16,float16}" in result.stdout
    assert "None" not in result.stdout


# What is wrong with weights.


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the random checkpoint, to be spoiled."""
    return shutil.copytree(RANDOM_CHECKPOINT, tmp_path / "checkpoint")


def test_a_truncated_shard_is_named(capfd, checkpoint):
    shard = checkpoint / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert shard.name in refused(capfd, "--model", checkpoint, "Hello")


def test_missing_tensors_are_all_named(capfd, checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (checkpoint / "model-00001-of-00002.safetensors").unlink()
    kept = {name: shard for name, shard in content["weight_map"].items() if shard.startswith("model-00002")}
    index.write_text(json.dumps({**content, "weight_map": kept}))
    line = refused(capfd, "--model", checkpoint, "Hello")
    for name in content["weight_map"].keys() - kept.keys():
        assert name.removeprefix("model.") in line


def test_debug_shows_where_a_checkpoint_is_wrong(checkpoint):
    (checkpoint / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError):
        main.main(["generate", "--debug", "--model", str(checkpoint), "Hello"])


# What is answered.


def test_a_picture_and_a_video_are_answered_in_one_prompt(capfd, picture, film):
    options = ("--max-new-tokens", 4, "--greedy", "--image", picture, "--video", film, "Compare them.")
    answer = answered(capfd, *options)
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
    assert answered(capfd, *options)["text"] == answer["text"]


def test_the_answer_is_that_of_the_python_interface(capfd, picture):
    answer = answered(capfd, "--max-new-tokens", 4, "--greedy", "--image", picture, "What is this?")
    processor = glm4v_jax.Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT)
    model = glm4v_jax.Glm4vForConditionalGeneration.from_pretrained(RANDOM_CHECKPOINT)
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer["prompt_tokens"] == length
    assert answer["text"] == processor.decode(ids[0, length:], skip_special_tokens=True)


def test_text_goes_to_standard_output_and_figures_to_standard_error(capfd):
    options = ("--max-new-tokens", 4, "--greedy", "Hello")
    answer = answered(capfd, *options)
    assert main.main(["generate", *map(str, options)]) == 0
    captured = capfd.readouterr()
    assert captured.out == answer["text"] + "\n"
    assert f"{answer['prompt_tokens']} prompt tokens, 4 new" in captured.err
    assert "finish reason: length" in captured.err


def test_the_seed_decides_what_is_drawn(capfd):
    options = ("--max-new-tokens", 8, "--do-sample", "--top-k", 0, "--top-p", 1, "--temperature", 1.5, "Hello")
    first, again, other = (answered(capfd, "--seed", seed, *options)["text"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_an_end_token_is_a_reason_to_finish(capfd, checkpoint):
    processor = glm4v_jax.Glm4vProcessor.from_pretrained(checkpoint)
    model = glm4v_jax.Glm4vForConditionalGeneration.from_pretrained(checkpoint)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    likeliest = int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": likeliest}))
    answer = answered(capfd, "--model", checkpoint, "--greedy", "--max-new-tokens", 4, "Hello")
    assert answer["new_tokens"] == 1
    assert answer["finish_reason"] == "stop"
    assert answer["model"] == str(checkpoint)


# What is compiled once.


def in_a_process(directory, *arguments, **variables):
    """Runs Python with a home of its own and without a cache, unless `variables` name one; returns what it prints."""
    cached = ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in cached}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**environment, "PYTHONPATH": str(ROOT), "HOME": str(directory), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    return result.stdout


def test_a_second_process_compiles_less(tmp_path):
    cache = tmp_path / ".cache" / "glm4v_jax" / "xla"
    command = ("-m", "glm4v_jax", "generate", "--json", "--greedy", "--max-new-tokens", "2", "Hello")
    first = json.loads(in_a_process(tmp_path, *command))
    programs = sorted(path.name for path in cache.glob("*-cache"))
    assert programs
    again = json.loads(in_a_process(tmp_path, *command))
    assert sorted(path.name for path in cache.glob("*-cache")) == programs
    assert again["text"] == first["text"]
    assert again["compile_seconds"] < first["compile_seconds"] < first["seconds"]


COMPILING = (
    "from glm4v_jax.devices.compilation_cache import compile_times, use_compilation_cache\n"
    "use_compilation_cache()\n"
    "import jax\n"
    "with compile_times() as times:\n    jax.jit(jax.numpy.sin)(1.0)\n"
    "before = len(times)\n"
    "jax.jit(jax.numpy.cos)(1.0)\n"
    "print(0 < before == len(times))\n"
)


@pytest.mark.parametrize(
    ("variable", "place"), [("JAX_COMPILATION_CACHE_DIR", "."), ("XDG_CACHE_HOME", "glm4v_jax/xla")]
)
def test_the_cache_is_where_the_environment_says(tmp_path, variable, place):
    assert in_a_process(tmp_path, "-c", COMPILING, **{variable: str(tmp_path / "elsewhere")}) == "True\n"
    assert list((tmp_path / "elsewhere" / place).glob("*-cache"))
    assert not (tmp_path / ".cache").exists()


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path):
    occupied = tmp_path / "occupied"
    occupied.write_text("")
    assert in_a_process(tmp_path, "-c", COMPILING, XDG_CACHE_HOME=str(occupied)) == "True\n"
    assert list(tmp_path.iterdir()) == [occupied]
