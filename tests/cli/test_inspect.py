"""`glm4v inspect`: what it writes and prints, what it refuses, and that it replaces nothing that is not its own."""

import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import PIL.Image
import pytest
import tyro
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import save_noise

from glm4v_jax.cli.inspect import MAX_FILES, Inspect
from glm4v_jax.errors import CheckpointError, MediaError
from glm4v_jax.inputs.processor import Glm4vProcessor


def parse(*arguments):
    return tyro.cli(Inspect, args=[str(item) for item in arguments], config=(tyro.conf.FlagCreatePairsOff,))


def inspect(*arguments):
    parse(*arguments).run()


@pytest.fixture
def picture():
    save_noise("picture.png", 100, 150)
    return "picture.png"


def written():
    return sorted(path.name for path in pathlib.Path().iterdir())


# What is shown.


def test_json_has_the_facts_and_the_sheet_is_there(capfd, picture, film):
    inspect(picture, film, "--json", "--prompt", "Compare them.")
    captured = capfd.readouterr()
    told = json.loads(captured.out)
    assert captured.err == ""
    first, second = told["files"]
    assert first == {
        "file": "picture.png", "kind": "picture", "height": 100, "width": 150, "seen_height": 112, "seen_width": 140,
        "scale_height": 1.12, "scale_width": 0.9333, "why": "sides rounded to multiples of 28", "warning": None,
        "grid_thw": [1, 8, 10], "patches": 80, "image_tokens": 20, "prompt_tokens": 22, "budget_tokens": 6144,
        "share_of_budget": 0.0033, "positions": {"t": [5, 5], "h": [5, 8], "w": [5, 9]},
    }  # fmt: skip
    assert second["kind"] == "video"
    assert (second["frames"], second["fps"], second["duration"], second["video_backend"]) == (4, 2.0, 2.0, "pillow")
    assert second["frames_indices"] == [0, 1, 2, 3]
    assert second["timestamps"] == [0, 1]
    assert told["sheet"]["file"] == "inspect.png"
    with PIL.Image.open("inspect.png") as sheet:
        assert sheet.size == (told["sheet"]["width"], told["sheet"]["height"])
    inputs = Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT).apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "path": picture},
                    {"type": "video", "path": film},
                    {"type": "text", "text": "Compare them."},
                ],
            }
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    assert told["prompt"]["text"] == "Compare them."
    assert told["prompt"]["tokens"] == inputs["input_ids"].shape[1]
    assert told["prompt"]["next_position"] == told["prompt"]["positions"][1] + 1


def test_text_says_the_same(capfd, picture, film):
    inspect(picture, film)
    out = capfd.readouterr().out
    for line in (
        "picture.png (picture)",
        "  original  150 × 100 pixels",
        "  seen      140 × 112 pixels: × 0.933 wide, × 1.120 high; sides rounded to multiples of 28",
        "  grid_thw  1 × 8 × 10 = 80 patches",
        "  tokens    20 image tokens, 0.3% of the budget of 6144; 22 of the prompt",
        "  M-RoPE    t 5, h 5 to 8, w 5 to 9",
        "film.gif (video)",
        "  original  84 × 56 pixels, 4 frames, 2 a second, 2.00 s",
        "  sampled   4 frames, from 0.00 to 1.50 s; 2 temporal patches",
        "  times     0, 1 s in the prompt",
    ):
        assert f"{line}\n" in out
    assert "prompt:" not in out
    assert "warning" not in out
    assert out.splitlines()[-1].startswith("sheet: inspect.png (")


def test_the_prompt_is_counted_where_there_is_one(capfd, picture):
    inspect(picture, "--prompt", "What is this?", "--json")
    tokens = json.loads(capfd.readouterr().out)["prompt"]["tokens"]
    inspect(picture, "--prompt", "What is this?")
    assert f"prompt: {tokens} tokens, M-RoPE 0 to " in capfd.readouterr().out


def test_a_large_picture_is_warned_of(capfd):
    PIL.Image.new("RGB", (3600, 2400)).save("large.png")
    inspect("large.png")
    out = capfd.readouterr().out
    assert "scaled down to the budget of 6144 tokens" in out
    assert "  warning   scaled down by 0.73 per side: details smaller than 1.4 pixels of the original are lost\n" in out


def test_the_checkpoint_decides(capfd, picture, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in RANDOM_CHECKPOINT.iterdir():
        if path.suffix != ".safetensors":
            (checkpoint / path.name).write_bytes(path.read_bytes())
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    settings["size"] = {"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 56 * 84}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(settings))
    inspect(picture, "--model", checkpoint, "--json")
    (told,) = json.loads(capfd.readouterr().out)["files"]
    assert told["budget_tokens"] == 6
    assert told["image_tokens"] <= 6


def test_a_picture_by_http(capfd, picture):
    content = pathlib.Path(picture).read_bytes()

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            good = self.path == "/good.png"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content if good else b"<html>no picture</html>")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        inspect(f"{address}/good.png", "--json")
        (told,) = json.loads(capfd.readouterr().out)["files"]
        assert (told["file"], told["width"], told["height"]) == (f"{address}/good.png", 150, 100)
        with pytest.raises(MediaError, match=f"^{address}/page: is not a readable picture; as a video: found text"):
            inspect(f"{address}/page")
    finally:
        server.shutdown()
        server.server_close()


# What is refused, before anything is written.


def test_all_missing_files_and_directories_are_named(picture):
    pathlib.Path("folder").mkdir()
    with pytest.raises(MediaError) as error:
        inspect("nowhere.png", picture, "folder", "gone.mp4")
    assert str(error.value) == (
        "nowhere.png: there is no such file; folder: is a directory; expected a picture or a video; "
        "gone.mp4: there is no such file"
    )
    assert written() == ["folder", "picture.png"]


@pytest.mark.parametrize("content", [b"neither a picture nor a video\n", b"\x89PNG\r\n\x1a\n", b"\0" * 999])
def test_the_bad_file_among_good_ones_is_named(capfd, picture, content):
    pathlib.Path("bad.mp4").write_bytes(content)
    with pytest.raises(MediaError, match=r"^bad\.mp4: "):
        inspect(picture, "bad.mp4", picture)
    assert capfd.readouterr() == ("", "")
    assert written() == ["bad.mp4", "picture.png"]


def test_no_file_and_too_many(picture):
    with pytest.raises(MediaError, match="found none"):
        inspect()
    with pytest.raises(MediaError, match=f"found {MAX_FILES + 1}"):
        inspect(*[picture] * (MAX_FILES + 1))


def test_a_name_of_a_checkpoint_is_not_downloaded(picture):
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        inspect(picture, "--model", "THUDM/GLM-4.1V-9B-Thinking")
    assert written() == ["picture.png"]


# Where the sheet goes.


def test_a_sheet_of_an_earlier_call_is_replaced(picture, film):
    inspect(picture)
    before = pathlib.Path("inspect.png").read_bytes()
    inspect(film)
    assert pathlib.Path("inspect.png").read_bytes() != before
    assert written() == ["film.gif", "inspect.png", "picture.png"]


@pytest.mark.parametrize("kind", ["PNG", "text"])
def test_another_file_is_not_replaced_unless_asked_to(picture, kind):
    if kind == "PNG":
        PIL.Image.new("RGB", (9, 9)).save("inspect.png")
    else:
        pathlib.Path("inspect.png").write_text("a text")
    before = pathlib.Path("inspect.png").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        inspect(picture)
    assert pathlib.Path("inspect.png").read_bytes() == before
    inspect(picture, "--overwrite")
    assert pathlib.Path("inspect.png").read_bytes() != before


def test_a_file_to_look_at_is_never_replaced(picture):
    inspect(picture)
    before = pathlib.Path("inspect.png").read_bytes()
    for arguments in (("inspect.png",), ("inspect.png", "--overwrite"), ("picture.png", "--out", "./picture.png")):
        with pytest.raises(MediaError, match="one of the files to look at"):
            inspect(*arguments)
    assert pathlib.Path("inspect.png").read_bytes() == before


def test_impossible_places_of_the_sheet(picture):
    pathlib.Path("folder.png").mkdir()
    for out, error in (
        ("sheet.jpg", MediaError),
        ("", MediaError),
        ("nowhere/sheet.png", OSError),
        ("folder.png", OSError),
    ):
        with pytest.raises(error):
            inspect(picture, "--out", out)
    assert written() == ["folder.png", "picture.png"]


def test_a_sheet_that_cannot_be_written_leaves_nothing_behind(picture, monkeypatch):
    def fail(*arguments, **options):
        pathlib.Path(arguments[1]).write_bytes(b"half a")
        raise OSError("no space")

    monkeypatch.setattr(PIL.Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        inspect(picture)
    assert written() == ["picture.png"]


def test_neither_jax_nor_weights_are_loaded(picture):
    program = (
        "import sys, tyro\n"
        "from glm4v_jax.cli.inspect import Inspect\n"
        "tyro.cli(Inspect, args=['picture.png']).run()\n"
        "assert not {'jax', 'flax', 'orbax', 'torch', 'safetensors'} & sys.modules.keys()\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(RANDOM_CHECKPOINT.parents[2])},
        check=True,
        capture_output=True,
    )
