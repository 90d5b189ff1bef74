"""`glm4v describe`: which files it describes, what it writes, and that it goes on where it ended."""

import json
import os
import pathlib
import warnings

import PIL.Image
import pytest
from helpers_cli import keyed, save_noise

from glm4v_jax.cli import main
from glm4v_jax.cli.describe import PROMPT, is_image
from glm4v_jax.console.options import long_answer
from glm4v_jax.tiny import TINY_CHECKPOINT


@pytest.fixture
def folder(tmp_path):
    """Two pictures of different sizes, one cut off, one in a folder inside, and files that are no pictures."""
    folder = tmp_path / "photos"
    (folder / "inside").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, size in {
        "a.png": (84, 56),
        "b.jpg": (100, 120),
        "inside/c.webp": (60, 60),
        ".hidden/d.png": (60, 60),
        ".e.png": (60, 60),
        "no extension": (56, 56),
    }.items():
        kind = {".jpg": "JPEG", ".webp": "WEBP"}.get(pathlib.Path(name).suffix, "PNG")
        save_noise(folder / name, size[1], size[0], kind, seed=len(name))
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:3000])
    (folder / "notes.txt").write_text("no picture")
    (folder / "clip.mp4").write_bytes(b"no picture either")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4")
    return folder


def describe(*arguments):
    return main.main(["describe", "--max-new-tokens", "6", "--slots", "2", *map(str, arguments)])


def captions(path="photos/captions.jsonl"):
    return keyed(pathlib.Path(path), "file")


def test_every_picture_gets_a_caption(folder, capfd):
    assert describe("photos", "--json") == 1
    captured = capfd.readouterr()
    told = captions()
    assert sorted(told) == ["a.png", "b.jpg", "cut.png", "no extension"]
    assert (told["a.png"]["width"], told["a.png"]["height"]) == (84, 56)
    assert (told["b.jpg"]["width"], told["b.jpg"]["height"]) == (100, 120)
    assert told["a.png"]["caption"] == told["a.png"]["text"].strip() != ""
    assert told["a.png"]["new_tokens"] == 6
    assert told["cut.png"].keys() == {"file", "key", "error"}
    assert "truncated" in told["cut.png"]["error"]
    assert captured.err.splitlines()[0] == "3 files skipped: no pictures"
    assert "pictures/s" in captured.err
    assert captured.err.endswith("error: 1 of 4 pictures failed; see 'error' in photos/captions.jsonl\n")
    assert "file cut.png: image 0: photos/cut.png: is truncated" in captured.err
    summary = json.loads(captured.out)
    assert (summary["total"], summary["done"], summary["failed"], summary["skipped"]) == (4, 3, 1, 3)

    # The caption is the answer to the same prompt alone.
    options = ["--seed", str(told["a.png"]["seed"]), "--max-new-tokens", "6", "--image", "photos/a.png", PROMPT]
    assert main.main(["generate", "--json", *options]) == 0
    assert json.loads(capfd.readouterr().out)["text"] == told["a.png"]["text"]


def test_a_thought_is_no_part_of_a_caption(folder):
    (folder / "cut.png").unlink()
    assert describe("photos", "--think-budget", 4, "--answer-budget", 5) == 0
    for line in captions().values():
        thought, answer = line["text"].split("</think><answer>")
        assert (line["caption"], line["thought"]) == (answer.strip(), thought.strip())


def test_there_is_room_for_a_thought_by_default():
    assert long_answer(str(TINY_CHECKPOINT)) == 64
    assert long_answer("another") == 2048


def test_folders_inside_and_another_place_and_prompt(folder, capfd):
    (folder / "cut.png").unlink()
    assert describe("photos", "--recursive", "--out", "out.jsonl", "--prompt", "What is it?") == 0
    assert sorted(captions("out.jsonl")) == ["a.png", "b.jpg", "inside/c.webp", "no extension"]
    assert not (folder / "captions.jsonl").exists()


def test_it_goes_on_with_new_pictures_and_those_that_failed_from_wherever_it_is_called(folder, capfd, monkeypatch):
    assert describe("photos") == 1
    first = captions()
    (folder / "b.jpg").unlink()
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "0 new.png").write_bytes((folder / "a.png").read_bytes())
    monkeypatch.chdir(folder)
    capfd.readouterr()
    assert describe(".") == 0
    told = captions("captions.jsonl")
    assert sorted(told) == ["0 new.png", "a.png", "b.jpg", "cut.png", "no extension"]
    # Of a picture that is gone the caption stays.
    assert {name: told[name] for name in ("a.png", "b.jpg", "no extension")} == {
        name: first[name] for name in ("a.png", "b.jpg", "no extension")
    }
    assert "4 of 4 answered (2 of them by an earlier run), 0 failed" in capfd.readouterr().err


def test_a_link_that_leads_nowhere_does_not_keep_the_rest_from_going_on(folder, capfd):
    (folder / "cut.png").unlink()
    os.symlink(folder / "gone.png", folder / "link.png")
    os.symlink(folder / "gone.txt", folder / "link.txt")
    for _ in range(2):
        assert describe("photos") == 1
        assert "1 of 4 pictures failed" in capfd.readouterr().err
    assert "no such file" in captions()["link.png"]["error"]


def test_a_large_picture_is_no_suspect(folder, monkeypatch):
    # Half of the size that is refused; as an error, a warning would be in the captions.
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100 * 120 // 2)
    warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
    (folder / "cut.png").unlink()
    assert describe("photos") == 0
    assert main.main(["generate", "--max-new-tokens", "1", "--image", "photos/b.jpg", "What?"]) == 0


def test_a_finished_folder_needs_no_weights_and_another_prompt_is_refused(folder, capfd, request):
    (folder / "cut.png").unlink()
    assert describe("photos") == 0
    before = (folder / "captions.jsonl").read_bytes()
    request.getfixturevalue("no_weights")
    assert describe("photos") == 0
    capfd.readouterr()
    assert describe("photos", "--prompt", "What is it?") == 1
    assert "captions.jsonl:1: found the answer to another prompt" in capfd.readouterr().err
    assert (folder / "captions.jsonl").read_bytes() == before


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "no directory"]),
        (["photos/a.png"], ["photos/a.png", "no directory"]),
        (["empty"], ["empty", "found no picture among 1 files", "--recursive"]),
        (["photos", "--slots", "0"], ["--slots", "0"]),
        (["photos", "--out", "photos/a.png"], ["a.png", "is among what is asked about"]),
        (["photos", "--out", "photos/a.png", "--restart"], ["a.png", "is among what is asked about"]),
        (["photos", "--out", "photos/notes.txt"], ["notes.txt:1", "no answer"]),
        (["photos", "--out", "photos/notes.txt", "--restart"], ["notes.txt", "no file of answers to replace"]),
    ],
)
def test_what_cannot_be_described_is_said(folder, capfd, arguments, words):
    pathlib.Path("empty").mkdir()
    pathlib.Path("empty/notes.txt").write_text("no picture")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert describe(*arguments) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    for word in words:
        assert word in line
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_what_is_a_picture(folder):
    pictures = {path.name for path in folder.rglob("*") if path.is_file() and is_image(path)}
    assert pictures == {"a.png", "b.jpg", "c.webp", "d.png", ".e.png", "no extension", "cut.png"}
    # By its name only, so that it is told of.
    (folder / "broken.jpeg").write_bytes(b"")
    assert is_image(folder / "broken.jpeg")
    os.symlink(folder / "gone.png", folder / "link.png")
    assert is_image(folder / "link.png")
