"""Options of a call go to the parts that they are for."""

import pytest

from glm4v_jax.errors import ConfigError


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
    with pytest.raises(ConfigError, match="padding passed two times: in text_kwargs"):
        processor(text="Hi", padding=True, text_kwargs={"padding": True})


def test_an_option_in_one_group_leaves_the_others_alone(processor):
    found = processor(text=["Hi", "Hello"], text_kwargs={"max_length": 8}, padding="max_length")
    assert found["input_ids"].shape == (2, 8)


def test_unknown_options_warn(processor):
    with pytest.warns(UserWarning, match="ignored: paddding"):
        processor(text="Hi", paddding=True)
