"""`glm4v generate --jsonl`: what is refused, what is written, and that an interrupted run resumes without loss."""

import json
import os
import pathlib
import shutil
import signal
import socket
import time

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import keyed, refuse_weights, save_noise
from helpers_processes import ForkedProgram
from helpers_terminal import Terminal

from glm4v_jax.cli import main
from glm4v_jax.console.distributed import INTERRUPTED
from glm4v_jax.console.progress import Progress
from glm4v_jax.generate.offline.answer_file import AnswerFile
from glm4v_jax.generate.offline.batch import BatchPrompt, BatchSummary, prompt_seed

pytestmark = pytest.mark.slow

OUT = "prompts.answers.jsonl"
USER = {"role": "user", "content": "Hello"}
SHORT = ("--max-new-tokens", 2)


def write(*rows, path="prompts.jsonl"):
    pathlib.Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def run(*arguments, path="prompts.jsonl"):
    return main.main(["generate", "--jsonl", path, *map(str, arguments)])


def by_index(path=OUT):
    return keyed(pathlib.Path(path), "index")


def content(path=OUT):
    return pathlib.Path(path).read_bytes()


# What is refused.


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("prompts.jsonl", "--out: found prompts.jsonl, a file that is read"),
        ("nowhere/out.jsonl", "nowhere: found no such directory"),
        ("notes.txt", "notes.txt:1: found no answer of this command; expected one per line; pass --restart"),
        ("torn.txt", "torn.txt:1: found no answer of this command"),
        (".", "irectory"),
    ],
)
def test_another_kind_of_file_is_not_overwritten(capfd, out, words):
    write({"prompt": "x"})
    pathlib.Path("notes.txt").write_text("mine\n")
    pathlib.Path("torn.txt").write_text("mine")
    before = {path: path.read_text() for path in pathlib.Path().iterdir()}
    assert run("--out", out) == 1
    assert words in capfd.readouterr().err
    assert {path: path.read_text() for path in pathlib.Path().iterdir()} == before


# What is written.


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Six prompts of all kinds, one of them with a truncated image, next to media: directory, status, JSON."""
    from helpers_cli import save_noise

    directory = tmp_path_factory.mktemp("media")
    image = directory / "image.png"
    save_noise(image)
    (directory / "cut.png").write_bytes(image.read_bytes()[:2000])
    write(
        {"prompt": "Hello", "id": "first"},
        {"prompt": "What?", "image": "image.png", "id": {"any": 1}},
        {"prompt": "Both?", "images": ["image.png"], "image": "image.png", "max_new_tokens": 3},
        {"prompt": "And this?", "image": "cut.png", "id": "cut"},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "image.png"}]}, USER]},
        {"messages": [{"role": "system", "content": "\u732b"}, USER], "seed": 5},
        path=directory / "prompts.jsonl",
    )
    arguments = ["--jsonl", "prompts.jsonl", "--max-new-tokens", "6", "--greedy", "--slots", "2", "--json"]
    running = ForkedProgram(["-m", "glm4v_jax", "generate", *arguments], env=os.environ, cwd=directory, text=True)
    out, errors = running.communicate()
    assert running.returncode == 1, errors
    return directory, out, errors


def test_every_prompt_gets_a_line(answered):
    lines = by_index(answered[0] / OUT)
    assert sorted(lines) == list(range(6))
    assert lines[0].keys() == {
        "index", "key", "id", "text", "thought", "answer", "boxed", "boxes", "finish_reason", "stop_string",
        "is_forced", "prompt_tokens", "new_tokens", "thought_tokens", "answer_tokens", "seed",
    }  # fmt: skip
    assert (lines[0]["id"], lines[1]["id"], "id" in lines[2]) == ("first", {"any": 1}, False)
    assert [lines[index]["new_tokens"] for index in (0, 1, 2, 4, 5)] == [6, 6, 3, 6, 6]
    assert "pixel_boxes" in lines[1] and "pixel_boxes" not in lines[2]
    assert lines[5]["seed"] == 5


def test_a_failed_prompt_has_an_error_in_its_line(answered):
    directory, _, err = answered
    line = by_index(directory / OUT)[3]
    assert line.keys() == {"index", "key", "id", "error"}
    assert "cut.png: " in line["error"] and "truncated" in line["error"]
    assert any(
        line.startswith("prompts.jsonl:4 (id 'cut'): ") and "cut.png: " in line and "truncated" in line
        for line in err.splitlines()
    )
    # Trying again would not help.
    assert err.endswith(f"error: 1 of 6 prompts failed; see 'error' in {OUT}\n")


def test_the_summary_adds_the_lines_up(answered):
    directory, out, err = answered
    lines, summary = by_index(directory / OUT), json.loads(out)
    assert [summary[name] for name in ("total", "earlier", "done", "failed")] == [6, 0, 5, 1]
    for name in ("new_tokens", "prompt_tokens"):
        assert summary[name] == sum(line.get(name, 0) for line in lines.values())
    assert 0 < summary["slots_busy"] <= 2
    assert "5 of 6 prompts answered, 1 failed" in err


def test_an_answer_is_that_of_the_prompt_alone(answered, capfd, monkeypatch):
    monkeypatch.chdir(answered[0])
    line = by_index(OUT)[1]
    assert main.main(["generate", "--json", "--greedy", "--max-new-tokens", "6", "--image", "image.png", "What?"]) == 0
    alone = json.loads(capfd.readouterr().out)
    common = line.keys() & alone.keys()
    assert {name: alone[name] for name in common} == {name: line[name] for name in common}


def test_the_seed_in_a_line_samples_the_same_alone(capfd):
    write(*[{"prompt": "Hello"}] * 3)
    sampling = ("--max-new-tokens", 8, "--top-k", 0, "--top-p", 1, "--temperature", 1.5)
    assert run(*sampling) == 0
    lines = by_index()
    assert len({line["text"] for line in lines.values()}) == 3
    assert run(*sampling, "--seed", 1, "--out", "other.jsonl") == 0
    others = by_index("other.jsonl")
    assert not {line["seed"] for line in lines.values()} & {line["seed"] for line in others.values()}
    capfd.readouterr()
    seed = str(lines[1]["seed"])
    assert main.main(["generate", "--json", "--seed", seed, *map(str, sampling), "Hello"]) == 0
    assert json.loads(capfd.readouterr().out)["text"] == lines[1]["text"]


def test_a_seed_of_zero_is_a_seed():
    assert prompt_seed(BatchPrompt(3, [], {}, {"seed": 0}), 7) == 0
    assert prompt_seed(BatchPrompt(3, [], {}), 7) != prompt_seed(BatchPrompt(3, [], {}), 8)


def test_a_missing_and_a_truncated_file_fail_their_lines_alone(capfd, image):
    pathlib.Path("cut.png").write_bytes(pathlib.Path(image).read_bytes()[:2000])
    pathlib.Path("frames").mkdir()
    for index in range(4):
        save_noise(f"frames/{index}.png", seed=index)
    frames = [f"frames/{index}.png" for index in range(4)]
    rows = [{"image": "no.png"}, {"image": "cut.png"}, {"video": frames, "fps": 1}, {"video": "frames", "fps": 1}]
    write(*({"prompt": "What?", **row} for row in rows))
    assert run(*SHORT, "--greedy") == 1
    err = capfd.readouterr().err
    assert "prompts.jsonl:1: no.png: found no such file; expected an image or a video; 1 of 4 prompts will fail" in err
    lines = by_index()
    assert "no.png: found no such file" in lines[0]["error"] and "cut.png: found a truncated" in lines[1]["error"]
    assert lines[2]["prompt_tokens"] == lines[3]["prompt_tokens"] and lines[2]["text"] == lines[3]["text"]
    write({"prompt": "What?", "image": "no.png"}, path="none.jsonl")
    assert run(*SHORT, path="none.jsonl") == 1
    assert capfd.readouterr().err.startswith("glm4v: error: none.jsonl:1: no.png: found no such file")


def test_decoders_are_quiet_and_other_libraries_are_heard(capfd, monkeypatch):
    pytest.importorskip("decord")
    # The box of a video's index without its content, of which FFmpeg has much to say.
    pathlib.Path("video.mp4").write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + bytes(range(256)) * 40)
    write({"prompt": "What?", "video": "video.mp4"}, {"prompt": "Hello"})
    update = Progress.update

    def speaking(progress, *arguments):
        os.write(2, b"a library speaks\n")
        update(progress, *arguments)

    monkeypatch.setattr(Progress, "update", speaking)
    assert run(*SHORT) == 1
    captured = capfd.readouterr()
    assert captured.err.count("a library speaks\n") >= 3
    assert "moov atom not found" not in captured.err
    assert "video.mp4: " in by_index()[0]["error"]


# What is resumed.


def test_a_finished_file_needs_no_weights(capfd, request):
    write({"prompt": "Hello"}, {"prompt": "You?"})
    assert run(*SHORT) == 0
    before = content()
    request.getfixturevalue("no_weights")
    capfd.readouterr()
    assert run(*SHORT) == 0
    assert "2 of 2 prompts answered (2 of them by an earlier run), 0 failed" in capfd.readouterr().err
    assert content() == before


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        (["Hello", "Me?"], SHORT),
        (["Hello"], SHORT),
        (["Hello", "You?"], ["--max-new-tokens", 3]),
        (["Hello", "You?"], [*SHORT, "--system", "Be brief."]),
        (["Hello", "You?"], [*SHORT, "--seed", 4]),
        (["Hello", "You?"], [*SHORT, "--dtype", "bfloat16"]),
        (["Hello", "You?"], [*SHORT, "--cache-dtype", "int8"]),
    ],
    ids=["prompt", "fewer", "tokens", "system", "seed", "dtype", "cache-dtype"],
)
def test_answers_to_something_else_are_not_resumed(capfd, request, prompts, options):
    write({"prompt": "Hello"}, {"prompt": "You?"})
    assert run(*SHORT) == 0
    before = content()
    request.getfixturevalue("no_weights")
    capfd.readouterr()
    write(*({"prompt": prompt} for prompt in prompts))
    assert run(*options) == 1
    line = capfd.readouterr().err
    assert f"{OUT}:" in line and "--restart" in line
    assert content() == before


def test_prompts_and_answers_in_the_model_directory_do_not_make_it_another_model(monkeypatch, tmp_path, capfd):
    model = shutil.copytree(RANDOM_CHECKPOINT, tmp_path / "model")
    prompts = model / "prompts.jsonl"
    write({"prompt": "Hi"}, path=prompts)
    arguments = ("--model", model, "--greedy", *SHORT)
    assert run(*arguments, path=str(prompts)) == 0
    refuse_weights(monkeypatch)
    assert run(*arguments, path=str(prompts)) == 0
    config = model / "generation_config.json"
    config.write_text(config.read_text() + " ")
    assert run(*arguments, path=str(prompts)) == 1
    assert "found the answer to another prompt" in capfd.readouterr().err


def test_prompts_can_be_added():
    write({"prompt": "Hello"})
    assert run(*SHORT) == 0
    first = content()
    write({"prompt": "Hello"}, {"prompt": "You?"})
    assert run(*SHORT) == 0
    assert content().startswith(first) and sorted(by_index()) == [0, 1]


def test_restart_overwrites_the_answers():
    write({"prompt": "Hello"})
    assert run(*SHORT) == 0
    assert run("--max-new-tokens", 3, "--restart") == 0
    assert [line["new_tokens"] for line in by_index().values()] == [3]


def test_a_failed_prompt_is_tried_again_and_a_torn_line_is_cut_off(image):
    complete = content(image)
    pathlib.Path(image).write_bytes(complete[:2000])
    write({"prompt": "What?", "image": image}, {"prompt": "Hello"}, {"prompt": "You?"})
    assert run(*SHORT) == 1
    lines = content().splitlines(keepends=True)
    kept, torn, failed = (next(line for line in lines if mark in line) for mark in (b'x": 1', b'x": 2', b'"error"'))
    pathlib.Path(image).write_bytes(complete)
    for length in (1, 5, 12, len(torn) // 2, len(torn) - 1):
        pathlib.Path(OUT).write_bytes(kept + failed + torn[:length])
        assert run(*SHORT) == 0
        assert content().startswith(kept)
        answers = by_index()
        assert sorted(answers) == [0, 1, 2]
        assert not any("error" in line for line in answers.values())
    assert sorted(os.listdir()) == sorted([image, OUT, "prompts.jsonl"])


MANY, LAST = 24, 2
SAMPLING = ("--slots", 2, "--top-k", 0, "--top-p", 1, "--max-new-tokens", 100)


def many():
    """Short answers, and then some that take so long that a watcher of the file is in time to interrupt them."""
    short = [{"prompt": f"Tell me about {i}."} for i in range(MANY - LAST)]
    return [*short, *({"prompt": f"Count to {i}.", "do_sample": False, "max_new_tokens": 1200} for i in range(LAST))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The answers of a run that was not interrupted: index -> line."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    path = str(directory / "prompts.jsonl")
    write(*many(), path=path)
    assert run(*SAMPLING, path=path) == 0
    return by_index(directory / OUT)


def start():
    command = ["-m", "glm4v_jax", "generate", "--jsonl", "prompts.jsonl", *SAMPLING]
    return ForkedProgram(command, env=os.environ, text=True)


def wait_for_lines(number, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.path.exists(OUT) and content().count(b"\n") >= number:
            return
        time.sleep(0.005)
    raise AssertionError(f"{OUT} has no {number} lines")


def test_a_killed_run_resumes(capfd, uninterrupted):
    write(*many())
    for number in (3, 12):
        running = start()
        wait_for_lines(number)
        running.kill()
        running.communicate()
        assert running.returncode == -signal.SIGKILL
        left = content()
        assert number <= left.count(b"\n") < MANY
    lines = left[: left.rindex(b"\n") + 1]
    assert run(*SAMPLING) == 0
    number = lines.count(b"\n")
    assert f"resuming after {number} of {MANY} answers" in capfd.readouterr().err
    assert content().startswith(lines)
    assert by_index() == uninterrupted


def test_ctrl_c_keeps_the_answers_and_says_how_to_resume(uninterrupted):
    write(*many())
    running = start()
    wait_for_lines(5)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    done = content().count(b"\n")
    assert (running.returncode, out) == (INTERRUPTED, "")
    assert 5 <= done < MANY
    # On a slow machine there are lines of progress too.
    assert [line for line in err.splitlines() if not line.startswith("answering: ")] == [
        f"interrupted: {done} answers of {MANY} prompts are in {OUT}; the same command resumes"
    ]
    assert run(*SAMPLING) == 0
    assert by_index() == uninterrupted


def test_an_interrupt_right_after_a_line_counts_it(capfd, monkeypatch):
    def append(file, name, line):
        written(file, name, line)
        if name == 2:
            raise KeyboardInterrupt

    written = AnswerFile.append
    monkeypatch.setattr(AnswerFile, "append", append)
    write(*({"prompt": f"{number}?"} for number in range(4)))
    assert run(*SHORT, "--slots", 1) == INTERRUPTED
    assert "interrupted: 3 answers of 4 prompts are in" in capfd.readouterr().err and content().count(b"\n") == 3


def test_an_interrupted_run_counts_errors_apart_from_answers(capfd, monkeypatch):
    pathlib.Path("text.png").write_text("not an image")
    write({"prompt": "What?", "image": "text.png"}, *({"prompt": f"{number}?"} for number in range(4)))

    def interrupted(progress, done, *_):
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupted)
    assert run(*SHORT, "--slots", 1) == INTERRUPTED
    assert "interrupted: 2 answers and 1 error of 5 prompts are in" in capfd.readouterr().err


def test_a_failure_of_the_network_is_worth_another_try(capfd):
    with socket.socket() as nobody:  # bound, but not listening
        nobody.bind(("127.0.0.1", 0))
        write({"prompt": "What?", "image": f"http://127.0.0.1:{nobody.getsockname()[1]}/a.png"})
        assert run() == 1
    assert capfd.readouterr().err.endswith(f"{OUT}; the same command tries them again\n")


def test_a_terminal_shows_a_bar(tmp_path):
    write(*({"prompt": f"Tell me about {i}."} for i in range(40)))
    terminal = Terminal("generate", "--jsonl", "prompts.jsonl", "--max-new-tokens", 100, directory=tmp_path, width=120)
    assert terminal.end(90) == 0
    for words in ("0 of 40 prompts, compiling 1 of 6: cache", "40 of 40 prompts, ", "tokens/s", "left"):
        assert words in terminal.output
    assert "40 of 40 prompts answered, 0 failed" in terminal.output


def test_the_summary_in_words():
    summary = BatchSummary(
        "out", 10, 2, done=7, failed=1, new_tokens=70, seconds=3.5, compile_seconds=1, slots_busy=1.5
    )
    assert str(summary) == (
        "9 of 10 prompts answered (2 of them by an earlier run), 1 failed, in 3.5 s (1.0 s compiling): 2.80 prompts/s, "
        "28.0 tokens/s, 1.50 slots busy on average; answers in out"
    )
