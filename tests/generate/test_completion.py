"""Completions as JSON has them."""

import json
import math

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax import Glm4vProcessor
from glm4v_jax.files import to_json
from glm4v_jax.generate.completion import Completion, Counts, completion_fields
from glm4v_jax.generate.token_logprobs import TokenLogprob


@pytest.fixture(scope="module")
def tokenizer():
    return Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT).tokenizer


def test_infinities_and_nan_are_null_in_json(tokenizer):
    tops = ((3, math.nan), (4, -math.inf), (5, -0.5))
    completion = Completion(0, "a", (3,), 9, "stop", logprobs=(TokenLogprob(3, math.nan, tops),))
    fields = json.loads(to_json(completion_fields(completion, tokenizer)), parse_constant=pytest.fail)
    (token,) = fields["logprobs"]
    assert (token["logprob"], [item["logprob"] for item in token["top"]]) == (None, [None, None, -0.5])


def test_boxes_in_pixels_come_with_exactly_one_image(tokenizer):
    text = "<think>a cat</think><answer><|begin_of_box|>[[100, 200, 500, 1000]]<|end_of_box|>"
    tokens = (1, 2, tokenizer.convert_tokens_to_ids("</think>"), 3)
    for sizes, pixels in {((200, 50),): [[20, 10, 100, 50]], (): None, ((200, 50), (8, 8)): None}.items():
        fields = completion_fields(Completion(0, text, tokens, 9, "stop", image_sizes=sizes), tokenizer)
        assert fields["boxes"] == [[100, 200, 500, 1000]]
        assert fields.get("pixel_boxes") == pixels
        assert fields["boxed"] == ["[[100, 200, 500, 1000]]"]
        assert (fields["thought"], fields["thought_tokens"], fields["answer_tokens"]) == ("a cat", 3, 1)


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("Hello", [1, 2], (0, 2)),
        ("<think>a", [8, 1], (2, 0)),
        ("<think>a</think>b", [8, 1, 9, 2], (3, 1)),
        ("a</think>b", [1, 9, 2, 3], (2, 2)),
    ],
)
def test_tokens_are_counted_by_kind(tokenizer, text, tokens, expected):
    names = {8: "<think>", 9: "</think>"}
    ids = tuple(tokenizer.convert_tokens_to_ids(names[token]) if token in names else token for token in tokens)
    counts = Counts.of(Completion(0, text, ids, 9, "stop"), tokenizer)
    assert (counts.thought, counts.answer) == expected
