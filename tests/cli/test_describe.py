"""`glm4v describe`: which files it describes, what it writes, and how it resumes."""

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

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("stacked_layers")]


@pytest.fixture
def folder(tmp_path):
    """Two images of different sizes, one truncated, one in a subdirectory, and files that are not images."""
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
    (folder / "notes.txt").write_text("not an image")
    (folder / "clip.mp4").write_bytes(b"not an image either")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4")
    return folder


def describe(*arguments):
    return main.main(["describe", "--max-new-tokens", "6", "--slots", "2", *map(str, arguments)])


def captions(path="photos/captions.jsonl"):
    return keyed(pathlib.Path(path), "file")


@pytest.mark.slow
def test_every_image_gets_a_caption(folder, capfd):
    assert describe("photos", "--json") == 1
    captured = capfd.readouterr()
    lines = captions()
    assert sorted(lines) == ["a.png", "b.jpg", "cut.png", "no extension"]
    assert (lines["a.png"]["width"], lines["a.png"]["height"]) == (84, 56)
    assert (lines["b.jpg"]["width"], lines["b.jpg"]["height"]) == (100, 120)
    assert lines["a.png"]["caption"] == lines["a.png"]["text"].strip() != ""
    assert lines["a.png"]["new_tokens"] == 6
    assert lines["cut.png"].keys() == {"file", "key", "error"}
    assert "truncated" in lines["cut.png"]["error"]
    assert captured.err.splitlines()[0] == "skipped 3 files that are not images"
    assert "images/s" in captured.err
    assert captured.err.endswith("error: 1 of 4 images failed; see 'error' in photos/captions.jsonl\n")
    assert "file cut.png: image 0: photos/cut.png: found a truncated" in captured.err
    summary = json.loads(captured.out)
    assert (summary["total"], summary["done"], summary["failed"], summary["skipped"]) == (4, 3, 1, 3)

    # The caption is the answer to the same prompt alone.
    options = ["--seed", str(lines["a.png"]["seed"]), "--max-new-tokens", "6", "--image", "photos/a.png", PROMPT]
    assert main.main(["generate", "--json", *options]) == 0
    assert json.loads(capfd.readouterr().out)["text"] == lines["a.png"]["text"]


def test_a_caption_has_no_thought(folder):
    (folder / "cut.png").unlink()
    assert describe("photos", "--think-budget", 4, "--answer-budget", 5) == 0
    for line in captions().values():
        thought, answer = line["text"].split("</think><answer>")
        assert (line["caption"], line["thought"]) == (answer.strip(), thought.strip())


def test_there_is_room_for_a_thought_by_default():
    assert long_answer(str(TINY_CHECKPOINT)) == 64
    assert long_answer("another") == 2048


def test_subdirectories_another_file_and_another_prompt(folder):
    (folder / "cut.png").unlink()
    assert describe("photos", "--recursive", "--out", "out.jsonl", "--prompt", "What is it?") == 0
    assert sorted(captions("out.jsonl")) == ["a.png", "b.jpg", "inside/c.webp", "no extension"]
    assert not (folder / "captions.jsonl").exists()


def test_a_later_run_describes_new_and_failed_images(folder, capfd, monkeypatch):
    assert describe("photos") == 1
    first = captions()
    (folder / "b.jpg").unlink()
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "0 new.png").write_bytes((folder / "a.png").read_bytes())
    monkeypatch.chdir(folder)
    capfd.readouterr()
    assert describe(".") == 0
    lines = captions("captions.jsonl")
    assert sorted(lines) == ["0 new.png", "a.png", "b.jpg", "cut.png", "no extension"]
    # The caption of a deleted image stays.
    assert {name: lines[name] for name in ("a.png", "b.jpg", "no extension")} == {
        name: first[name] for name in ("a.png", "b.jpg", "no extension")
    }
    assert "4 of 4 images answered (2 of them by an earlier run), 0 failed" in capfd.readouterr().err


def test_a_dangling_link_is_an_error_in_its_line(folder, capfd):
    (folder / "cut.png").unlink()
    os.symlink(folder / "gone.png", folder / "link.png")
    os.symlink(folder / "gone.txt", folder / "link.txt")
    for _ in range(2):
        assert describe("photos") == 1
        assert "1 of 4 images failed" in capfd.readouterr().err
    assert "no such file" in captions()["link.png"]["error"]


def test_pillow_does_not_warn_of_large_images(folder, monkeypatch):
    # Half of the size that is refused; as an error, a warning would be in the captions.
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100 * 120 // 2)
    warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
    (folder / "cut.png").unlink()
    assert describe("photos") == 0
    assert main.main(["generate", "--max-new-tokens", "1", "--image", "photos/b.jpg", "What?"]) == 0


def test_a_finished_directory_needs_no_weights_and_refuses_another_prompt(folder, capfd, request):
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
        (["nowhere"], ["nowhere: found no such file or directory; expected one"]),
        (["photos/a.png"], ["photos/a.png: found a file; expected a directory"]),
        (["photos", "--prompt", " "], ["--prompt: found ' '; expected some text"]),
        (["empty"], ["empty", "found no image among 1 file", "--recursive"]),
        (["photos", "--slots", "0"], ["--slots", "0"]),
        (["photos", "--out", "photos/a.png"], ["--out: found photos/a.png, a file that is read"]),
        (["photos", "--out", "photos/a.png", "--restart"], ["--out: found photos/a.png, a file that is read"]),
        (["photos", "--out", "photos/notes.txt"], ["notes.txt:1: found no answer"]),
        (["photos", "--out", "photos/notes.txt", "--restart"], ["notes.txt: found no file of answers to replace"]),
    ],
)
def test_an_invalid_directory_or_file_is_refused(folder, capfd, arguments, words):
    pathlib.Path("empty").mkdir()
    pathlib.Path("empty/notes.txt").write_text("not an image")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert describe(*arguments) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    for word in words:
        assert word in line
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.usefixtures("no_weights")
def test_a_directory_that_cannot_be_read_is_not_taken_for_an_empty_one(folder, capfd, monkeypatch):
    (folder / "private").mkdir()
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert describe("photos", "--recursive") == 1
    assert "photos/private: Permission denied" in capfd.readouterr().err
    assert not (folder / "captions.jsonl").exists()


def test_an_image_is_known_by_its_content_or_else_its_name(folder):
    images = {path.name for path in folder.rglob("*") if path.is_file() and is_image(path)}
    assert images == {"a.png", "b.jpg", "c.webp", "d.png", ".e.png", "no extension", "cut.png"}
    # By its name only, so that it gets an error.
    (folder / "broken.jpeg").write_bytes(b"")
    assert is_image(folder / "broken.jpeg")
    os.symlink(folder / "gone.png", folder / "link.png")
    assert is_image(folder / "link.png")
