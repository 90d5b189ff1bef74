"""Which lines of a file of prompts are refused, and how."""

import gzip
import json
import pathlib

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_cli import save_noise, save_video

from glm4v_jax import Glm4vProcessor
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.errors import Glm4vError, MessageError, one_line
from glm4v_jax.generate.offline.prompts import read_prompts
from glm4v_jax.inputs.text.messages import extract_media

USER = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def processor():
    return Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT)


@pytest.fixture
def read(processor):
    """Reads a file of these lines."""

    def run(*rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        pathlib.Path("prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return read_prompts("prompts.jsonl", GenerationConfig(), processor)

    return run


def message(**item):
    return {"messages": [{"role": "user", "content": [item]}]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", ["invalid JSON", "expected an object"]),
        ("[1]", ["found a list; expected an object"]),
        ({}, ["prompt: found nothing; expected a string"]),
        ({"prompt": 3}, ["prompt: found the number 3; expected a string"]),
        ({"prompt": "x", "messages": [USER]}, ["prompt: found with 'messages'; expected one of the two"]),
        ({"messages": [USER], "image": "x.png"}, ["image: found with 'messages'"]),
        ({"messages": "Hello"}, ["messages: found a string; expected a list"]),
        ({"messages": []}, ["messages: ", "at least one"]),
        ({"messages": [{"role": "user"}]}, ["messages: ", "content"]),
        (message(type="sound"), ["messages: ", "sound"]),
        (message(type="image"), ["messages: ", "source"]),
        (message(type="image", url="no.png"), ["no.png: found no such file; expected an image or a video"]),
        (message(type="image_url", image_url={"url": "no.png"}), ["no.png: found no such file"]),
        ({"prompt": "x", "image": "no.png"}, ["no.png: found no such file; expected an image or a video"]),
        ({"prompt": "x", "videos": ["no.mp4"]}, ["no.mp4: found no such file"]),
        ({"prompt": "x", "videos": [["0.png", "no.png"]]}, ["0.png: found no such file"]),
        ({"prompt": "x", "fps": 2}, ["fps: found without a video; expected it beside one"]),
        ({"prompt": "x", "video": "no.mp4", "fps": 0}, ["fps: found 0; expected a number above 0"]),
        ({"prompt": "x", "images": [3]}, ["images[0]: found the number 3; expected a path"]),
        ({"prompt": "x", "image": None}, ["image: found null"]),
        ({"prompt": "x", "colour": "red"}, ["colour: found an unknown field; ", "prompt", "max_new_tokens"]),
        ({"prompt": "x", "max_new_tokens": 0}, ["max_new_tokens: found 0"]),
        ({"messages": [{"role": "human", "content": "x"}]}, ["message 0: field 'role' is 'human'"]),
        ({"prompt": "x", "temperature": "hot"}, ["temperature: found 'hot'"]),
        ({"prompt": "x", "seed": -1}, ["seed: found -1"]),
        ({"prompt": "x", "tools": "f"}, ["tools: found 'f'; expected a list of objects"]),
        ({"prompt": "x", "enable_thinking": 0}, ["enable_thinking: found 0"]),
        ({"prompt": "x", "logprobs": 2}, ["logprobs: found in a line; expected --logprobs"]),
        ({"prompt": "x", "num_beams": 4}, ["num_beams"]),
        ({"prompt": "x", "bad_words_ids": [3]}, ["bad_words_ids: found [3]; expected a list of lists"]),
        ({"prompt": "x", "output_scores": True}, ["output_scores: found an unknown field; expected some of"]),
        ({"prompt": "x", "num_return_sequences": 2}, ["num_return_sequences: found 2; expected 1"]),
    ],
)
def test_an_invalid_line_is_named_with_its_number(read, row, words):
    with pytest.raises(Glm4vError) as caught:
        read({"prompt": "good"}, "", row, {"prompt": "good"})
    assert str(caught.value).startswith("prompts.jsonl:3: ")
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_compressed_file_is_read(processor):
    pathlib.Path("prompts.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}\n\n{"prompt": "y"}'))
    prompts = read_prompts("prompts.jsonl.gz", GenerationConfig(), processor)
    assert [(prompt.place, prompt.messages[-1]["content"][-1]["text"]) for prompt in prompts] == [
        ("prompts.jsonl.gz:1", "x"), ("prompts.jsonl.gz:3", "y")
    ]  # fmt: skip


def test_a_compressed_file_that_is_not_named_so_or_damaged_is_named(processor):
    content = gzip.compress(b'{"prompt": "x"}')
    for name, data, message in (
        (
            "prompts.jsonl",
            content,
            r"prompts\.jsonl: found a compressed file; expected text: name it prompts\.jsonl\.gz",
        ),
        ("prompts.jsonl.gz", content[:-9], r"prompts\.jsonl\.gz: cannot be read \(Compressed file ended"),
    ):
        pathlib.Path(name).write_bytes(data)
        with pytest.raises(Glm4vError, match=message):
            read_prompts(name, GenerationConfig(), processor)


@pytest.mark.parametrize(("invalid", "listed", "more"), [(3, 3, []), (25, 20, ["and 5 more"])])
def test_several_invalid_lines_are_listed(read, invalid, listed, more):
    with pytest.raises(MessageError) as caught:
        read({"prompt": "good"}, *({"prompt": number} for number in range(invalid)))
    head, *rest = str(caught.value).splitlines()
    assert head == f"prompts.jsonl: found {invalid} invalid lines; expected none:"
    fault = "prompt: found the number {}; expected a string, or 'messages' instead"
    assert rest == [*(f"prompts.jsonl:{line}: {fault.format(line - 2)}" for line in range(2, 2 + listed)), *more]
    assert one_line(caught.value) == "\n  ".join([head, *rest])


def test_files_that_do_not_exist_fail_their_lines_only_unless_none_exists(read):
    pathlib.Path("cat.png").touch()
    good, bad = {"prompt": "x", "image": "cat.png"}, message(type="image", url="no.png")
    prompts = read(good, bad, {"prompt": "y", "image": "https://host/a.png"})
    assert [prompt.missing for prompt in prompts] == [
        None, "no.png: found no such file; expected an image or a video", None,
    ]  # fmt: skip
    with pytest.raises(MessageError, match=r"prompts\.jsonl: found 2 invalid lines") as caught:
        read(bad, {"prompt": "no image"}, bad)
    assert str(caught.value).count("no.png: found no such file") == 2
    with pytest.raises(MessageError, match="prompt: found the number 3"):
        read(good, bad, {"prompt": 3})


def test_frames_are_files_relative_to_the_file(processor, tmp_path):
    folder = tmp_path / "data"
    (folder / "clip").mkdir(parents=True)
    for index in range(3):
        save_noise(folder / f"clip/{index}.png", seed=index)
    save_video(folder / "a.gif")
    names = [f"clip/{index}.png" for index in range(3)]
    located = [str(folder / name) for name in names]
    items = {
        # A list of single images is one video, and one of videos several.
        "list": ({"video": names}, [{"type": "video", "video": located}]),
        "several": ({"videos": ["a.gif", "clip"]}, [
            {"type": "video", "path": str(folder / name)} for name in ("a.gif", "clip")
        ]),
        "nested": ({"videos": [names, "a.gif"], "fps": 1}, [
            {"type": "video", "video": located, "fps": 1}, {"type": "video", "path": str(folder / "a.gif"), "fps": 1},
        ]),
        "message": (message(type="video", video=names, fps=4), [{"type": "video", "video": located, "fps": 4}]),
        "directory": (message(type="video", video="clip"), [{"type": "video", "video": str(folder / "clip")}]),
    }  # fmt: skip
    rows = [row if "messages" in row else {"prompt": "What?", **row} for row, _ in items.values()]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prompts = read_prompts(str(folder / "prompts.jsonl"), GenerationConfig(), processor)
    for prompt, (_, expected) in zip(prompts, items.values(), strict=True):
        content = prompt.messages[0]["content"]
        assert [item for item in content if item["type"] == "video"] == expected
        assert prompt.missing is None and prompt.options == {}
        times = processor.prepare_media(*extract_media(prompt.messages, "")).videos
        assert len(times) == len(expected)


def test_a_file_without_prompts_is_refused(read):
    with pytest.raises(Glm4vError, match=r"prompts\.jsonl: found no prompt"):
        read("", "")
