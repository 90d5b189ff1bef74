"""`glm4v generate --jsonl`: what is refused, what is written, and that a run that ends early goes on losing nothing."""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import ROOT, keyed, refuse_weights, save_noise
from helpers_terminal import Terminal

from glm4v_jax.cli import main
from glm4v_jax.console.progress import Progress
from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.offline import batch
from glm4v_jax.generate.offline.answer_file import AnswerFile
from glm4v_jax.generate.offline.batch import BatchSummary


@pytest.fixture
def picture():
    pathlib.Path("media").mkdir()
    save_noise("media/picture.png")
    return "media/picture.png"


def write(*rows, path="prompts.jsonl"):
    pathlib.Path(path).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def run(*arguments, path="prompts.jsonl"):
    return main.main(["generate", "--jsonl", path, *map(str, arguments)])


def lines(path="prompts.answers.jsonl"):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def by_index(path="prompts.answers.jsonl"):
    return keyed(pathlib.Path(path), "index")


def test_prompts_and_answers_may_lie_in_the_model(monkeypatch, tmp_path, capfd):
    """They do not make it another model, whose answers would not be gone on with."""
    model = shutil.copytree(RANDOM_CHECKPOINT, tmp_path / "model")
    prompts = model / "prompts.jsonl"
    write({"prompt": "Hi"}, path=prompts)
    arguments = ("--model", model, "--greedy", "--max-new-tokens", 2)
    assert run(*arguments, path=str(prompts)) == 0
    refuse_weights(monkeypatch)
    assert run(*arguments, path=str(prompts)) == 0
    assert "1 of 1 answered (1 of them by an earlier run)" in capfd.readouterr().err
    config = model / "generation_config.json"
    config.write_text(config.read_text() + " ")
    assert run(*arguments, path=str(prompts)) == 1
    assert "found the answer to another prompt" in capfd.readouterr().err


# What is refused before weights are loaded.

USER = {"role": "user", "content": "Hello"}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", ["not JSON", "object"]),
        ("[1]", ["a list", "object"]),
        ({}, ["'prompt'", "none", "string"]),
        ({"prompt": 3}, ["'prompt'", "a number", "string"]),
        ({"prompt": "x", "messages": [USER]}, ["'prompt'", "'messages'", "one of the two"]),
        ({"messages": [USER], "image": "x.png"}, ["'image'", "'messages'"]),
        ({"messages": "Hello"}, ["'messages'", "a string", "list"]),
        ({"messages": []}, ["'messages'", "at least one"]),
        ({"messages": [{"role": "user"}]}, ["'messages'", "'content'", "missing"]),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, ["'messages'", "'sound'"]),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, ["'messages'", "no source"]),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "no.png"}]}]}, ["'url'", "no.png"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "no.png"}}]}]},
            ["'url'", "no.png"],
        ),
        ({"prompt": "x", "image": "no.png"}, ["'image'", "no.png", "no such file"]),
        ({"prompt": "x", "videos": ["no.mp4"]}, ["'videos'", "no.mp4"]),
        ({"prompt": "x", "images": [3]}, ["'images'", "a list", "strings"]),
        ({"prompt": "x", "image": None}, ["'image'", "null"]),
        ({"prompt": "x", "colour": "red"}, ["'colour'", "not known", "prompt", "max_new_tokens"]),
        ({"prompt": "x", "max_new_tokens": 0}, ["max_new_tokens", "0", "at least 1"]),
        ({"prompt": "x", "temperature": "hot"}, ["temperature", "hot"]),
        ({"prompt": "x", "seed": -1}, ["seed", "-1"]),
        ({"prompt": "x", "logprobs": 2}, ["logprobs", "--logprobs"]),
        ({"prompt": "x", "num_beams": 4}, ["num_beams"]),
        ({"prompt": "x", "num_return_sequences": 2}, ["num_return_sequences", "found 2, expected 1"]),
    ],
)
def test_a_wrong_line_is_named_with_its_number(capfd, row, words):
    write({"prompt": "good"}, "", row, {"prompt": "good"})
    assert run() == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("glm4v: error: prompts.jsonl:3: ")
    for word in words:
        assert word in line
    assert os.listdir() == ["prompts.jsonl"]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("wrong", "listed", "more"), [(3, 3, []), (25, 20, ["  and 5 more"])])
def test_several_wrong_lines_are_listed(capfd, wrong, listed, more):
    write({"prompt": "good"}, *({"prompt": number} for number in range(wrong)))
    assert run() == 1
    head, *rest = capfd.readouterr().err.splitlines()
    assert head == f"glm4v: error: prompts.jsonl: found {wrong} wrong lines, expected none:"
    field = "field 'prompt': found a number, expected a string, or 'messages' in its place"
    assert rest == [*(f"  prompts.jsonl:{line}: {field}" for line in range(2, 2 + listed)), *more]


@pytest.mark.usefixtures("no_weights")
def test_a_file_without_prompts_is_refused(capfd):
    write("", "")
    assert run() == 1
    assert "prompts.jsonl: found no prompt" in capfd.readouterr().err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("prompts.jsonl", ["among what is asked about"]),
        ("nowhere/out.jsonl", ["no such directory"]),
        ("notes.txt", ["notes.txt:1", "no answer of this command", "--restart"]),
        ("torn.txt", ["torn.txt:1", "no answer of this command"]),
        (".", ["directory"]),
    ],
)
def test_a_place_for_answers_that_is_something_else_is_left_alone(capfd, out, words):
    write({"prompt": "x"})
    pathlib.Path("notes.txt").write_text("mine\n")
    pathlib.Path("torn.txt").write_text("mine")
    before = {path: path.read_text() for path in pathlib.Path().iterdir()}
    assert run("--out", out) == 1
    line = capfd.readouterr().err
    for word in words:
        assert word in line
    assert {path: path.read_text() for path in pathlib.Path().iterdir()} == before


# What is written.


def test_every_prompt_gets_a_line(capfd, picture):
    pathlib.Path("media/cut.png").write_bytes(pathlib.Path(picture).read_bytes()[:2000])
    write(
        {"prompt": "Hello", "id": "first"},
        {"prompt": "What?", "image": "picture.png", "id": {"any": 1}},
        {"prompt": "Both?", "images": ["picture.png"], "image": "picture.png", "max_new_tokens": 3},
        {"prompt": "And this?", "image": "cut.png", "id": "cut"},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "picture.png"}]}, USER]},
        {"messages": [{"role": "system", "content": "\u732b"}, USER], "seed": 5},
        path="media/prompts.jsonl",
    )
    options = ("--max-new-tokens", 6, "--greedy", "--slots", 2)
    assert run(*options, "--json", path="media/prompts.jsonl") == 1
    captured = capfd.readouterr()
    told = by_index("media/prompts.answers.jsonl")
    assert sorted(told) == list(range(6))
    assert told[0].keys() == {
        "index", "key", "id", "text", "thought", "answer", "boxed", "boxes", "finish_reason", "stop_string",
        "is_forced", "prompt_tokens", "new_tokens", "thought_tokens", "answer_tokens", "seed",
    }  # fmt: skip
    assert (told[0]["id"], told[1]["id"]) == ("first", {"any": 1})
    assert "id" not in told[2]
    assert [told[index]["new_tokens"] for index in (0, 1, 2, 4, 5)] == [6, 6, 3, 6, 6]
    assert told[3].keys() == {"index", "key", "id", "error"}
    assert "cut.png: is truncated or corrupt" in told[3]["error"]
    assert "pixel_boxes" in told[1] and "pixel_boxes" not in told[2]
    assert told[5]["seed"] == 5
    summary = json.loads(captured.out)
    assert (summary["total"], summary["earlier"], summary["done"], summary["failed"]) == (6, 0, 5, 1)
    assert summary["new_tokens"] == sum(line.get("new_tokens", 0) for line in told.values())
    assert summary["prompt_tokens"] == sum(line.get("prompt_tokens", 0) for line in told.values())
    assert 0 < summary["slots_busy"] <= 2
    notes = captured.err.splitlines()
    note = next(line for line in notes if "cut.png" in line)  # how far it is comes first on a slow machine
    assert note.startswith("media/prompts.jsonl:4 (id 'cut'): ") and "cut.png: is truncated" in note
    assert "5 of 6 answered, 1 failed" in captured.err
    # Trying again would not help.
    assert captured.err.endswith("error: 1 of 6 prompts failed; see 'error' in media/prompts.answers.jsonl\n")

    # Row 1 alone says the same.
    assert main.main(["generate", "--json", "--greedy", "--max-new-tokens", "6", "--image", picture, "What?"]) == 0
    alone = json.loads(capfd.readouterr().out)
    assert {name: alone[name] for name in told[1].keys() & alone.keys()} == {
        name: told[1][name] for name in told[1].keys() & alone.keys()
    }


def test_the_seed_in_a_line_draws_the_same_alone(capfd):
    write({"prompt": "Hello"}, {"prompt": "Hello"}, {"prompt": "Hello"})
    drawing = ("--max-new-tokens", 8, "--top-k", 0, "--top-p", 1, "--temperature", 1.5)
    assert run(*drawing) == 0
    told = by_index()
    assert len({line["text"] for line in told.values()}) == 3
    assert run(*drawing, "--seed", 1, "--out", "other.jsonl") == 0
    assert not {line["seed"] for line in told.values()} & {line["seed"] for line in lines("other.jsonl")}
    capfd.readouterr()
    seed = str(told[1]["seed"])
    assert main.main(["generate", "--json", "--seed", seed, *map(str, drawing), "Hello"]) == 0
    assert json.loads(capfd.readouterr().out)["text"] == told[1]["text"]


def test_a_seed_of_zero_is_a_seed():
    row = batch.BatchPrompt(3, [], {}, {"seed": 0})
    assert batch.prompt_seed(row, 7) == 0
    assert batch.prompt_seed(batch.BatchPrompt(3, [], {}), 7) != batch.prompt_seed(batch.BatchPrompt(3, [], {}), 8)


def test_decoders_are_quiet_and_what_a_library_says_is_heard(capfd, monkeypatch):
    pytest.importorskip("decord")
    # The box of a film's index without its content, of which FFmpeg has much to say.
    pathlib.Path("film.mp4").write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + bytes(range(256)) * 40)
    write({"prompt": "What?", "video": "film.mp4"}, {"prompt": "Hello"})
    add = Progress.add

    def saying(progress, tokens):
        os.write(2, b"a library speaks\n")
        add(progress, tokens)

    monkeypatch.setattr(Progress, "add", saying)
    assert run("--max-new-tokens", 2) == 1
    captured = capfd.readouterr()
    assert captured.err.count("a library speaks\n") == 2
    assert "moov atom not found" not in captured.err
    assert "film.mp4: is not a readable video" in by_index()[0]["error"]


# What is gone on with.


def test_a_finished_file_needs_no_weights(capfd, request):
    write({"prompt": "Hello"}, {"prompt": "You?"})
    assert run("--max-new-tokens", 2) == 0
    before = pathlib.Path("prompts.answers.jsonl").read_bytes()
    request.getfixturevalue("no_weights")
    capfd.readouterr()
    assert run("--max-new-tokens", 2) == 0
    assert "2 of 2 answered (2 of them by an earlier run), 0 failed" in capfd.readouterr().err
    assert pathlib.Path("prompts.answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda: (write({"prompt": "Hello"}, {"prompt": "Me?"}), ["--max-new-tokens", 2]),
        lambda: (write({"prompt": "Hello"}), ["--max-new-tokens", 2]),
        lambda: (None, ["--max-new-tokens", 3]),
        lambda: (None, ["--max-new-tokens", 2, "--system", "Be brief."]),
        lambda: (None, ["--max-new-tokens", 2, "--seed", 4]),
        lambda: (None, ["--max-new-tokens", 2, "--dtype", "bfloat16"]),
    ],
    ids=["prompt", "fewer", "tokens", "system", "seed", "dtype"],
)
def test_answers_to_something_else_are_not_gone_on_with(capfd, request, change):
    write({"prompt": "Hello"}, {"prompt": "You?"})
    assert run("--max-new-tokens", 2) == 0
    before = pathlib.Path("prompts.answers.jsonl").read_bytes()
    request.getfixturevalue("no_weights")
    capfd.readouterr()
    _, options = change()
    assert run(*options) == 1
    line = capfd.readouterr().err
    assert "prompts.answers.jsonl:" in line and "--restart" in line
    assert pathlib.Path("prompts.answers.jsonl").read_bytes() == before


def test_more_prompts_may_follow_and_restart_begins_anew(capfd):
    write({"prompt": "Hello"})
    assert run("--max-new-tokens", 2) == 0
    first = pathlib.Path("prompts.answers.jsonl").read_bytes()
    write({"prompt": "Hello"}, {"prompt": "You?"})
    assert run("--max-new-tokens", 2) == 0
    both = pathlib.Path("prompts.answers.jsonl").read_bytes()
    assert both.startswith(first) and sorted(by_index()) == [0, 1]
    assert run("--max-new-tokens", 3, "--restart") == 0
    assert [line["new_tokens"] for line in by_index().values()] == [3, 3]


def test_what_failed_is_tried_again_and_a_torn_line_is_cut_off(capfd, picture):
    whole = pathlib.Path(picture).read_bytes()
    pathlib.Path(picture).write_bytes(whole[:2000])
    write({"prompt": "What?", "image": picture}, {"prompt": "Hello"}, {"prompt": "You?"})
    assert run("--max-new-tokens", 2) == 1
    out = pathlib.Path("prompts.answers.jsonl")
    kept = [line for line in out.read_bytes().splitlines(keepends=True) if b'"index": 1' in line]
    torn = next(line for line in out.read_bytes().splitlines(keepends=True) if b'"index": 2' in line)
    failed = next(line for line in out.read_bytes().splitlines(keepends=True) if b'"error"' in line)
    pathlib.Path(picture).write_bytes(whole)
    for length in (1, 5, 12, len(torn) // 2, len(torn) - 1):
        out.write_bytes(kept[0] + failed + torn[:length])
        assert run("--max-new-tokens", 2) == 0
        assert out.read_bytes().startswith(kept[0])
        told = by_index()
        assert sorted(told) == [0, 1, 2]
        assert not any("error" in line for line in told.values())
    assert sorted(os.listdir()) == ["media", "prompts.answers.jsonl", "prompts.jsonl"]


def process(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "glm4v_jax", "generate", "--jsonl", "prompts.jsonl", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(number, path="prompts.answers.jsonl", seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.path.exists(path) and pathlib.Path(path).read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.005)
    raise AssertionError(f"{path} has no {number} lines")


MANY = 24
LAST = 4
DRAWN = ("--slots", 2, "--top-k", 0, "--top-p", 1, "--max-new-tokens", 100)


def many():
    """Short answers, and then some that take so long that whoever looks at the file is in time to interrupt them."""
    short = [{"prompt": f"Tell me about {i}."} for i in range(MANY - LAST)]
    return [*short, *({"prompt": f"Count to {i}.", "do_sample": False, "max_new_tokens": 2500} for i in range(LAST))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The answers of a run that nothing happened to: index -> line."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    path = str(directory / "prompts.jsonl")
    write(*many(), path=path)
    assert run(*DRAWN, path=path) == 0
    return by_index(directory / "prompts.answers.jsonl")


def test_what_a_killed_process_leaves_is_gone_on_with(capfd, uninterrupted):
    write(*many())
    for number in (3, 12):
        running = process(*DRAWN)
        wait_for_lines(number)
        running.kill()
        running.communicate()
        assert running.returncode == -signal.SIGKILL
        left = pathlib.Path("prompts.answers.jsonl").read_bytes()
        assert number <= left.count(b"\n") < MANY
    whole = left[: left.rindex(b"\n") + 1]
    assert run(*DRAWN) == 0
    newline = b"\n"
    assert f"goes on behind {whole.count(newline)} of {MANY} answers" in capfd.readouterr().err
    assert pathlib.Path("prompts.answers.jsonl").read_bytes().startswith(whole)
    assert by_index() == uninterrupted


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(capfd, uninterrupted):
    write(*many())
    running = process(*DRAWN)
    wait_for_lines(5)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == main.INTERRUPTED
    done = len(lines())
    assert 5 <= done < MANY
    assert out == ""
    # On a slow machine there are lines of progress too.
    assert [line for line in err.splitlines() if not line.startswith(tuple("0123456789"))] == [
        f"interrupted: {done} answers of {MANY} prompts are in prompts.answers.jsonl; the same command goes on behind "
        "them"
    ]
    assert run(*DRAWN) == 0
    assert by_index() == uninterrupted


def test_errors_are_no_answers_where_a_run_is_interrupted(capfd, monkeypatch):
    pathlib.Path("text.png").write_text("no picture")
    write({"prompt": "What?", "image": "text.png"}, *({"prompt": f"{number}?"} for number in range(4)))
    told = []

    def interrupted(progress, tokens):
        told.append(tokens)
        if len(told) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "add", interrupted)
    assert run("--max-new-tokens", 2, "--slots", 1) == main.INTERRUPTED
    assert "interrupted: 2 answers and 1 error of 5 prompts are in" in capfd.readouterr().err


def test_what_the_net_did_not_give_is_worth_another_try(capfd):
    with socket.socket() as nobody:  # bound, but not listening
        nobody.bind(("127.0.0.1", 0))
        write({"prompt": "What?", "image": f"http://127.0.0.1:{nobody.getsockname()[1]}/a.png"})
        assert run() == 1
    assert capfd.readouterr().err.endswith("prompts.answers.jsonl; the same command tries them again\n")


# The file, the bar and the summary by themselves.

KEYS = {index: f"key {index}" for index in range(4)}


def test_two_processes_do_not_write_one_file():
    with AnswerFile("out.jsonl", "index", KEYS, restart=False) as file:
        file.append(2, {"text": "\u732b \ud800"})
        with pytest.raises(BlockingIOError, match="another process is writing"):
            AnswerFile("out.jsonl", "index", KEYS, restart=False)
        with pytest.raises(BlockingIOError, match="another process is writing"):
            AnswerFile("out.jsonl", "index", KEYS, restart=True)
    with AnswerFile("out.jsonl", "index", KEYS, restart=False) as file:
        assert file.done == {2}


def test_the_file_is_locked_before_it_is_read(monkeypatch):
    """Or what another process adds in between would be lost when the file is cleaned up."""
    answer, torn = '{"index": 1, "key": "key 1", "text": "a"}\n', '{"index": 2, "key'
    pathlib.Path("out.jsonl").write_text(answer + torn)
    read, replace = AnswerFile._read, os.replace
    tried = []

    def is_locked():
        with pytest.raises(BlockingIOError):
            AnswerFile("out.jsonl", "index", KEYS, restart=True)
        tried.append(len(tried))

    def reading(file):
        monkeypatch.setattr(AnswerFile, "_read", read)
        is_locked()
        return read(file)

    def replacing(*paths):
        is_locked()
        replace(*paths)
        is_locked()

    monkeypatch.setattr(AnswerFile, "_read", reading)
    monkeypatch.setattr(os, "replace", replacing)
    with AnswerFile("out.jsonl", "index", KEYS, restart=False) as file:
        assert file.done == {1}
        assert tried == [0, 1, 2]
        is_locked()
        file.append(2, {"text": "b"})
    assert pathlib.Path("out.jsonl").read_text() == answer + '{"index": 2, "key": "key 2", "text": "b"}\n'
    assert os.listdir() == ["out.jsonl"]


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(monkeypatch):
    pathlib.Path("out.jsonl").write_text('{"index": 1, "key": "key 1", "text": "a"}\n')
    both = pathlib.Path("out.jsonl").read_text() + '{"index": 2, "key": "key 2", "text": "b"}\n'
    flock = fcntl.flock

    def replaced(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        pathlib.Path("new").write_text(both)
        os.replace("new", "out.jsonl")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", replaced)
    with AnswerFile("out.jsonl", "index", KEYS, restart=False) as file:
        assert file.done == {1, 2}
        file.append(3, {})
    assert pathlib.Path("out.jsonl").read_text() == both + '{"index": 3, "key": "key 3"}\n'


def test_a_link_stays_one_and_a_mode_stays():
    pathlib.Path("real.jsonl").write_text('{"index": 1, "key')
    os.chmod("real.jsonl", 0o600)
    os.symlink("real.jsonl", "out.jsonl")
    AnswerFile("out.jsonl", "index", KEYS, restart=False).close()
    assert pathlib.Path("out.jsonl").is_symlink()
    assert pathlib.Path("real.jsonl").read_text() == ""
    assert pathlib.Path("real.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_line_twice_is_left_once():
    line = '{"index": 1, "key": "key 1", "text": "a"}\n'
    pathlib.Path("out.jsonl").write_text(line * 2)
    AnswerFile("out.jsonl", "index", KEYS, restart=False).close()
    assert pathlib.Path("out.jsonl").read_text() == line


@pytest.mark.parametrize(
    "line", ["3", "null", "[]", "{}", '{"index": 1}', '{"index": [1], "key": "x"}', '{"index": 1, "key": 1}', "{", ""]
)
def test_a_line_that_is_no_answer_is_refused(line):
    content = f'{{"index": 1, "key": "key 1", "text": "a"}}\n{line}\n{{"index": 2, "key": "key 2"}}\n'
    pathlib.Path("out.jsonl").write_text(content)
    with pytest.raises(GenerationError, match=r"out\.jsonl:2: found no answer"):
        AnswerFile("out.jsonl", "index", KEYS, restart=False)
    assert pathlib.Path("out.jsonl").read_text() == content


def test_others_are_kept_where_asked_for():
    content = '{"file": "old.png", "key": "x", "caption": "a"}\n'
    pathlib.Path("out.jsonl").write_text(content)
    with AnswerFile("out.jsonl", "file", {"new.png": "y"}, restart=False, keep_others=True) as file:
        assert file.done == set()
        file.append("new.png", {"caption": "b"})
    assert pathlib.Path("out.jsonl").read_text().startswith(content)


def test_a_line_every_so_often_without_a_terminal(capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with Progress("answering", "prompts") as progress:
        progress.update(10, 40)
        for done in range(11, 16):
            now[0] += 4
            progress.update(done, 40, 20)
        progress.log("a\x1bb")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "answering: 13 of 40 prompts, 0.25 prompts/s, 5.0 tokens/s, 0:01:48 left",
        "a\\x1bb",
    ]


def test_a_bar_on_a_terminal(tmp_path):
    write(*({"prompt": f"Tell me about {i}."} for i in range(40)))
    terminal = Terminal("generate", "--jsonl", "prompts.jsonl", "--max-new-tokens", 100, directory=tmp_path, width=120)
    assert terminal.end(90) == 0
    assert "a new shape compiles first" in terminal.output
    assert "0/40" in terminal.output and "40/40" in terminal.output
    assert "tokens/s" in terminal.output and "left" in terminal.output
    assert "40 of 40 answered, 0 failed" in terminal.output


def test_the_summary_in_words():
    told = str(
        BatchSummary("out", 10, 2, done=7, failed=1, new_tokens=70, seconds=3.5, compile_seconds=1, slots_busy=1.5)
    )
    assert told == (
        "9 of 10 prompts answered (2 of them by an earlier run), 1 failed, in 3.5 s (1.0 s compiling): 2.00 prompts/s, "
        "20.0 tokens/s, 1.50 slots busy on average; answers in out"
    )
