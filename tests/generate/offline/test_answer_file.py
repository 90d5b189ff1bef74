"""The file of answers by itself: what is read, kept, locked and replaced."""

import os
import pathlib

import pytest

from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.offline.answer_file import AnswerFile

KEYS = {index: f"key {index}" for index in range(4)}


def test_two_processes_cannot_write_one_file():
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
    read = AnswerFile._read

    def reading(file):
        with pytest.raises(BlockingIOError):
            AnswerFile("out.jsonl", "index", KEYS, restart=True)
        return read(file)

    monkeypatch.setattr(AnswerFile, "_read", reading)
    with AnswerFile("out.jsonl", "index", KEYS, restart=False) as file:
        assert file.done == {1}
        file.append(2, {"text": "b"})
    assert pathlib.Path("out.jsonl").read_text() == answer + '{"index": 2, "key": "key 2", "text": "b"}\n'
    assert os.listdir() == ["out.jsonl"]


@pytest.mark.parametrize("restart", [False, True])
def test_a_run_that_answers_nothing_leaves_what_was_there(restart):
    """As one for which memory is too small."""
    AnswerFile("out.jsonl", "index", KEYS, restart=restart).close()
    assert not os.listdir()
    with AnswerFile("out.jsonl", "index", KEYS, restart=False) as file:
        file.append(1, {"text": "a"})
    before = pathlib.Path("out.jsonl").read_bytes()
    with AnswerFile("out.jsonl", "index", KEYS, restart=restart) as file:
        assert file.written() == (0, 0)
    assert pathlib.Path("out.jsonl").read_bytes() == before


def test_a_restart_replaces_the_file_with_its_first_answer():
    pathlib.Path("out.jsonl").write_text('{"index": 1, "key": "key 1", "text": "a"}\n' * 3)
    with AnswerFile("out.jsonl", "index", KEYS, restart=True) as file:
        file.append(2, {"text": "b"})
        file.append(3, {"text": "c"})
        assert file.written() == (2, 0)
    lines = pathlib.Path("out.jsonl").read_text().splitlines()
    assert lines == [f'{{"index": {i}, "key": "key {i}", "text": "{text}"}}' for i, text in ((2, "b"), (3, "c"))]


def test_a_full_disk_names_the_file_and_leaves_no_lock():
    with pytest.raises(OSError, match=r"No space left on device: 'out\.jsonl'"):  # noqa: SIM117
        with AnswerFile("out.jsonl", "index", KEYS, restart=False) as file:
            file._file.close()
            file._file = open("/dev/full", "ab")  # noqa: SIM115
            file.append(1, {"text": "a"})
    assert os.listdir() == ["out.jsonl"]


def test_a_link_and_a_mode_are_kept():
    pathlib.Path("real.jsonl").write_text('{"index": 1, "key')
    os.chmod("real.jsonl", 0o600)
    os.symlink("real.jsonl", "out.jsonl")
    AnswerFile("out.jsonl", "index", KEYS, restart=False).close()
    assert pathlib.Path("out.jsonl").is_symlink()
    assert pathlib.Path("real.jsonl").read_text() == ""
    assert pathlib.Path("real.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_repeated_line_is_kept_once():
    line = '{"index": 1, "key": "key 1", "text": "a"}\n'
    pathlib.Path("out.jsonl").write_text(line * 2)
    AnswerFile("out.jsonl", "index", KEYS, restart=False).close()
    assert pathlib.Path("out.jsonl").read_text() == line


@pytest.mark.parametrize(
    "line", ["3", "null", "[]", "{}", '{"index": 1}', '{"index": [1], "key": "x"}', '{"index": 1, "key": 1}', "{", ""]
)
def test_a_line_that_is_not_an_answer_is_refused(line):
    content = f'{{"index": 1, "key": "key 1", "text": "a"}}\n{line}\n{{"index": 2, "key": "key 2"}}\n'
    pathlib.Path("out.jsonl").write_text(content)
    with pytest.raises(GenerationError, match=r"out\.jsonl:2: found no answer"):
        AnswerFile("out.jsonl", "index", KEYS, restart=False)
    assert pathlib.Path("out.jsonl").read_text() == content


def test_answers_to_other_prompts_can_be_kept():
    content = '{"file": "old.png", "key": "x", "caption": "a"}\n'
    pathlib.Path("out.jsonl").write_text(content)
    with AnswerFile("out.jsonl", "file", {"new.png": "y"}, restart=False, keep_others=True) as file:
        assert file.done == set()
        file.append("new.png", {"caption": "b"})
    assert pathlib.Path("out.jsonl").read_text().startswith(content)
