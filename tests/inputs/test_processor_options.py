"""Options of a call go to the parts that they are for."""

import warnings

import pytest
from helpers_processor import SQUARE, clip, metadata

from glm4v_jax.errors import ConfigError, MessageError


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
def test_torch_options_are_refused(processor, options):
    with pytest.raises(ConfigError, match="is not supported"):
        processor(text="Hi", **options)


def test_an_option_given_twice_is_refused(processor):
    with pytest.raises(ConfigError, match="images_kwargs: found 5; expected a dictionary of options"):
        processor(text="Hi", images_kwargs=5)
    with pytest.raises(ConfigError, match="padding passed two times: in text_kwargs"):
        processor(text="Hi", padding=True, text_kwargs={"padding": True})


def test_an_option_in_one_group_leaves_the_others_alone(processor):
    found = processor(text=["Hi", "Hello"], text_kwargs={"max_length": 8}, padding="max_length")
    assert found["input_ids"].shape == (2, 8)


def say(processor, **options):
    return processor.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True, **options)


UNKNOWN = {
    "a call": lambda processor: processor(text="Hi", paddding=True),
    "text_kwargs": lambda processor: processor(text="Hi", text_kwargs={"paddding": True}),
    "images_kwargs": lambda processor: processor(text="Hi", images_kwargs={"paddding": True}),
    "images_kwargs with images": lambda processor: processor(
        text="<|image|>", images=SQUARE, images_kwargs={"paddding": True}
    ),
    "videos_kwargs": lambda processor: processor(text="Hi", videos_kwargs={"paddding": True}),
    "common_kwargs": lambda processor: processor(text="Hi", common_kwargs={"paddding": True}),
    "prepare_media": lambda processor: processor.prepare_media(SQUARE, paddding=True),
    "a chat": lambda processor: say(processor, paddding=True),
    "a group in a chat": lambda processor: say(processor, text_kwargs={"paddding": True}),
    "counting": lambda processor: processor.get_num_multimodal_tokens([(56, 56)], paddding=True),
    "tokenizing": lambda processor: processor.tokenizer("Hi", paddding=True),
    "decoding": lambda processor: processor.decode([1], paddding=True),
    "decoding a batch": lambda processor: processor.batch_decode([[1]], paddding=True),
    "images": lambda processor: processor.image_processor(SQUARE, paddding=True),
    "videos": lambda processor: processor.video_processor(clip(4), do_sample_frames=False, paddding=True),
    "an image in a message": lambda processor: processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": SQUARE, "paddding": True}]}]
    ),
    "a message": lambda processor: processor.apply_chat_template([{"role": "user", "content": "Hi", "paddding": True}]),
}


@pytest.mark.parametrize("place", UNKNOWN)
def test_a_misspelt_option_is_named_wherever_it_stands(processor, place, caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            UNKNOWN[place](processor)
            found = [str(warning.message) for warning in caught] + caplog.messages
        except (TypeError, MessageError) as error:
            found = [str(error)]
    assert any("paddding" in line for line in found)


@pytest.mark.parametrize("option", ["tools", "documents"])
def test_what_the_template_has_no_place_for_is_named(processor, option):
    with pytest.warns(UserWarning, match=f"unknown to the processor and to the chat template, and ignored: {option}"):
        say(processor, **{option: [{"name": "f"}]})


def test_options_of_a_group_alone_are_taken(processor):
    """`max_duration` is none of a call's in the reference."""
    known = {"video_metadata": [metadata(40, 10.0)], "max_duration": 2, "fps": 4}
    found = processor(text="<|video|>", videos=clip(40), videos_kwargs=known)
    assert found["video_grid_thw"][0, 0] == 4  # the 2 seconds' 8 frames
