"""`glm4v inspect`: what it writes and prints, what it refuses, and that it overwrites only its own files."""

import http.server
import json
import pathlib
import threading

import PIL.Image
import pytest
import tyro
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import save_noise

from glm4v_jax.cli.inspect import MAX_FILES, Inspect
from glm4v_jax.errors import CheckpointError, MediaError
from glm4v_jax.inputs.processor import Glm4vProcessor


def inspect(*arguments):
    tyro.cli(Inspect, args=[str(item) for item in arguments], config=(tyro.conf.FlagCreatePairsOff,)).run()


@pytest.fixture
def image():
    save_noise("image.png", 100, 150)
    return "image.png"


def written():
    return sorted(path.name for path in pathlib.Path().iterdir())


# What is shown.


def test_json_has_the_facts_and_the_sheet_is_there(capfd, image, video):
    inspect(image, video, "--json", "--prompt", "Compare them.")
    captured = capfd.readouterr()
    told = json.loads(captured.out)
    assert captured.err == ""
    first, second = told["files"]
    assert first == {
        "file": "image.png", "kind": "picture", "height": 100, "width": 150, "seen_height": 112, "seen_width": 140,
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
                    {"type": "image", "path": image},
                    {"type": "video", "path": video},
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


def test_text_has_the_same_facts(capfd, image, video):
    inspect(image, video)
    out = capfd.readouterr().out
    for line in (
        "image.png (image)",
        "  original  150 × 100 pixels",
        "  seen      140 × 112 pixels: × 0.933 wide, × 1.120 high; sides rounded to multiples of 28",
        "  grid_thw  1 × 8 × 10 = 80 patches",
        "  tokens    20 image tokens, 0.3% of the budget of 6144; 22 of the prompt",
        "  M-RoPE    t 5, h 5 to 8, w 5 to 9",
        "video.gif (video)",
        "  original  84 × 56 pixels, 4 frames, 2 per second, 2.00 s",
        "  sampled   4 frames, from 0.00 to 1.50 s; 2 temporal patches",
        "  times     0, 1 in the prompt",
    ):
        assert f"{line}\n" in out
    assert "prompt:" not in out
    assert "warning" not in out
    assert out.splitlines()[-1].startswith("sheet: inspect.png (")


def test_a_directory_is_a_video_of_its_images(capfd):
    pathlib.Path("frames").mkdir()
    for index in range(11):
        save_noise(f"frames/{index}.png", seed=index)
    inspect("frames")
    out = capfd.readouterr().out
    for line in (
        "frames (video)",
        "  original  84 × 56 pixels, 11 frames, 2 per second, 5.50 s",
        "  sampled   11 frames, from 0.00 to 5.00 s; 6 temporal patches",
        "  times     0, 1, 2, 3, 4, 5 in the prompt",
    ):
        assert f"{line}\n" in out


def test_a_frame_that_is_taken_twice_is_mentioned(capfd):
    frames = [PIL.Image.new("RGB", (84, 56), (60 * index, 0, 0)) for index in range(4)]
    for milliseconds, note in ((200, "too short for a second sample"), (450, "frames are taken in pairs")):
        frames[0].save("short.gif", save_all=True, append_images=frames[1:], duration=milliseconds)
        inspect("short.gif")
        assert f"  note      the last frame is taken twice: {note}\n" in capfd.readouterr().out


def test_the_prompt_is_counted_where_there_is_one(capfd, image):
    inspect(image, "--prompt", "What is this?", "--json")
    tokens = json.loads(capfd.readouterr().out)["prompt"]["tokens"]
    inspect(image, "--prompt", "What is this?")
    assert f"prompt: {tokens} tokens, M-RoPE 0 to " in capfd.readouterr().out


def test_a_large_image_has_a_warning(capfd):
    PIL.Image.new("RGB", (3600, 2400)).save("large.png")
    inspect("large.png")
    out = capfd.readouterr().out
    assert "scaled down to the budget of 6144 tokens" in out
    assert "  warning   scaled down by 0.73 per side: details smaller than 1.4 pixels of the original are lost\n" in out


def test_the_processor_of_the_checkpoint_is_used(capfd, image, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in RANDOM_CHECKPOINT.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            (checkpoint / path.name).write_bytes(path.read_bytes())
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    settings["size"] = {"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 56 * 84}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(settings))
    inspect(image, "--model", checkpoint, "--json")
    (told,) = json.loads(capfd.readouterr().out)["files"]
    assert told["budget_tokens"] == 6
    assert told["image_tokens"] <= 6


def test_an_image_can_be_an_http_address(capfd, image):
    content = pathlib.Path(image).read_bytes()

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
        with pytest.raises(MediaError, match=f"^{address}/page: found no readable image; as a video: found text"):
            inspect(f"{address}/page")
    finally:
        server.shutdown()
        server.server_close()


# What is refused, before anything is written.


def test_all_missing_files_are_named(image):
    pathlib.Path("folder").mkdir()
    with pytest.raises(MediaError) as error:
        inspect("nowhere.png", image, "folder", "gone.mp4")
    for place in ("nowhere.png", "gone.mp4"):
        assert f"FILE: found {place}, no such file; expected an image or a video" in str(error.value)
    assert "folder" not in str(error.value)
    with pytest.raises(MediaError, match=r"^folder: found no frames"):
        inspect("folder")
    assert written() == ["folder", "image.png"]


@pytest.mark.parametrize("content", [b"neither a picture nor a video\n", b"\x89PNG\r\n\x1a\n", b"\0" * 999])
def test_the_bad_file_among_good_ones_is_named(capfd, image, content):
    pathlib.Path("bad.mp4").write_bytes(content)
    with pytest.raises(MediaError, match=r"^bad\.mp4: "):
        inspect(image, "bad.mp4", image)
    assert capfd.readouterr() == ("", "")
    assert written() == ["bad.mp4", "image.png"]


def test_no_files_and_too_many_are_refused(image):
    with pytest.raises(MediaError, match="FILE: found none"):
        inspect()
    with pytest.raises(MediaError, match=f"found {MAX_FILES + 1}"):
        inspect(*[image] * (MAX_FILES + 1))


def test_a_name_of_a_checkpoint_is_not_downloaded(image):
    with pytest.raises(CheckpointError, match="neither a directory"):
        inspect(image, "--model", "THUDM/GLM-4.1V-9B-Thinking")
    assert written() == ["image.png"]


# Where the sheet goes.


def test_an_earlier_sheet_is_overwritten(image, video):
    inspect(image)
    before = pathlib.Path("inspect.png").read_bytes()
    inspect(video)
    assert pathlib.Path("inspect.png").read_bytes() != before
    assert written() == ["image.png", "inspect.png", "video.gif"]


@pytest.mark.parametrize("kind", ["PNG", "text"])
def test_another_file_is_overwritten_on_request_only(image, kind):
    if kind == "PNG":
        PIL.Image.new("RGB", (9, 9)).save("inspect.png")
    else:
        pathlib.Path("inspect.png").write_text("a text")
    before = pathlib.Path("inspect.png").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        inspect(image)
    assert pathlib.Path("inspect.png").read_bytes() == before
    inspect(image, "--overwrite")
    assert pathlib.Path("inspect.png").read_bytes() != before


def test_an_input_is_never_overwritten(image):
    inspect(image)
    before = pathlib.Path("inspect.png").read_bytes()
    for arguments in (("inspect.png",), ("inspect.png", "--overwrite"), ("image.png", "--out", "./image.png")):
        with pytest.raises(MediaError, match="one of the inputs"):
            inspect(*arguments)
    assert pathlib.Path("inspect.png").read_bytes() == before


@pytest.mark.parametrize(
    ("out", "error"),
    [("sheet.jpg", MediaError), ("", MediaError), ("nowhere/sheet.png", OSError), ("folder.png", OSError)],
)
def test_an_invalid_name_of_the_sheet_is_refused(image, out, error):
    pathlib.Path("folder.png").mkdir()
    with pytest.raises(error):
        inspect(image, "--out", out)
    assert written() == ["folder.png", "image.png"]


def test_a_sheet_that_cannot_be_written_leaves_nothing_behind(image, monkeypatch):
    def fail(*arguments, **options):
        pathlib.Path(arguments[1]).write_bytes(b"half a")
        raise OSError("no space")

    monkeypatch.setattr(PIL.Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        inspect(image)
    assert written() == ["image.png"]


def test_neither_jax_nor_weights_are_loaded(image, run_python):
    run_python(
        "import sys\n"
        "from glm4v_jax.cli import main\n"
        "assert main.main(['inspect', 'image.png']) == 0\n"
        "assert not {'jax', 'flax', 'orbax', 'torch', 'safetensors'} & sys.modules.keys()\n"
    )
