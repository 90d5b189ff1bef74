"""`pipeline`: what it refuses, before there is a model; what it answers, `test_examples` looks at."""

import pytest

from glm4v_jax import pipeline
from glm4v_jax.errors import ConfigError, MessageError
from glm4v_jax.hf.pipeline import ImageTextToTextPipeline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"role": "user", "content": "Hi"}, "text: found dict; expected a conversation, or a list of conversations"),
        ("Hi", "text: found str"),
        (None, "text: found NoneType"),
        (5, "text: found int"),
        ([], "text: found no messages"),
        ([[]], "text: found no messages"),
        (["Hi"], "text: found a list of str; expected messages"),
        ([[{"role": "user", "content": "Hi"}], 5], "text: found a list of int; expected messages"),
    ],
)
def test_what_is_no_conversation_is_named(text, message):
    with pytest.raises(MessageError, match=message):
        ImageTextToTextPipeline(None, None)(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text-generation", "x"), "task: found 'text-generation'; expected 'image-text-to-text'"),
        ((), "model: expected a checkpoint directory, or a loaded model and its processor"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        pipeline(*arguments)
