"""Answers in micro-batches: an image once a group, positions of the prompt, weights of what was sampled."""

import types

import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT
from helpers_generation import random_request

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError
from glm4v_jax.inputs.prompt import Prompt, prompts_of
from train.config import BatchConfig
from train.rl.groups import Group, Rollout
from train.rl.packing import micro_batches

CONFIG = Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT)
BATCH = BatchConfig(rows=2, length=96, vision_rows=2, vision_length=64)


def prompt(seed=0, text=10, grids=((4, 6),)):
    asked = random_request(types.SimpleNamespace(config=CONFIG), np.random.default_rng(seed), text, list(grids))
    return prompts_of(asked, CONFIG)[0]


def group(asked, lengths, key="a", inserted=0, tokens=None):
    """Answers of these lengths, of which the first `inserted` tokens were not sampled."""
    rng = np.random.default_rng(len(asked))
    rollouts = tuple(
        Rollout(
            rng.integers(0, 768, n).astype(np.int32) if tokens is None else np.array(tokens, np.int32),
            np.where(np.arange(n) < inserted, np.nan, rng.random(n)).astype(np.float32), np.arange(n) >= inserted,
            "stop",
        )
        for n in lengths
    )  # fmt: skip
    return Group(key, asked, rollouts, np.arange(len(lengths)) % 2)


def answers_in(batch):
    """(row, segment) -> where its tokens are."""
    segments = batch.batch.segment_ids
    pairs = {
        (row, segment)
        for row, segment in zip(*np.nonzero(segments), strict=True)
        for segment in [segments[row, segment]]
    }
    return {(row, segment): np.flatnonzero(segments[row] == segment) for row, segment in sorted(pairs)}


def test_the_answers_to_one_prompt_share_its_images():
    """Also with another group that shows the same image."""
    groups = [group(prompt(text=8), [5, 3, 9, 4]), group(prompt(text=9), [5, 3], "b")]
    groups[1].prompt.media[0].patches[:] = groups[0].prompt.media[0].patches
    (batch,) = micro_batches(groups, BATCH, CONFIG)
    assert np.count_nonzero(batch.batch.vision.segment_ids) == 24
    index = batch.batch.vision_index
    assert sorted(index[index >= 0]) == sorted([*range(6)] * 6)
    assert len(answers_in(batch)) == 6


def test_positions_are_the_prompts_whatever_is_sampled():
    """Tokens of images and videos among those sampled are text, as they were in the engine."""
    planted = [CONFIG.image_token_id, 7, CONFIG.video_start_token_id, CONFIG.image_start_token_id, 9]
    asked = prompt()
    (batch,) = micro_batches([group(asked, [5, 5], tokens=planted)], BATCH, CONFIG)
    for (row, _), here in answers_in(batch).items():
        found = batch.batch
        assert found.input_ids[row, here].tolist() == [*asked.input_ids, *planted[:-1]]
        assert np.array_equal(found.position_ids[:, row, here][:, : len(asked)], asked.position_ids)
        assert (found.position_ids[:, row, here][:, len(asked) :] == asked.next_position + np.arange(4)).all()
        assert (found.vision_index[row, here][len(asked) :] == -1).all()
        assert batch.targets[row, here].tolist() == [-100] * (len(asked) - 1) + planted


@pytest.mark.parametrize("average", ["sample", "token"])
def test_weights_are_of_sampled_tokens_alone(average):
    one = group(prompt(), [8, 4, 2], inserted=2)
    (batch,) = micro_batches([one], BATCH, CONFIG, average=average)
    places = answers_in(batch)
    assert len(places) == 2  # nothing of the third was sampled
    for (row, _), here in places.items():
        said = here[len(one.prompt) - 1 :]
        weights, n = batch.weights[row, said], len(said) - 2
        assert weights.tolist() == pytest.approx([0, 0] + [1 / n if average == "sample" else 1] * n)
        (rollout,) = [one for one in one.rollouts if len(one) == len(said)]
        assert np.array_equal(batch.reference[row, said], np.nan_to_num(rollout.logprobs))
        assert np.unique(batch.advantages[row, said]) == one.advantages()[[8, 4].index(len(said))]
    assert batch.weights.sum() == pytest.approx(2 if average == "sample" else 8)
    assert np.isfinite(batch.reference).all()


def test_every_answer_comes_once_in_batches_of_one_shape():
    """Those of a group that fits no micro-batch too."""
    groups = [group(prompt(i, 6 + i), [20 + i, 4, 9] * (1 + 3 * (i == 2)), str(i)) for i in range(5)]
    batches = micro_batches(groups, BATCH, CONFIG)
    shapes = {tuple(x.shape for x in (*one.batch.vision, one.targets, one.advantages)) for one in batches}
    assert len(shapes) == 1 and len(batches) < 6
    found = sorted(
        tuple(one.targets[row, here][one.targets[row, here] >= 0]) for one in batches
        for (row, _), here in answers_in(one).items()
    )  # fmt: skip
    assert found == sorted(tuple(rollout.tokens) for one in groups for rollout in one.rollouts)


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        (
            Prompt.of_text(range(95)),
            r"found 98 tokens and 0 patches of images and videos; expected at most batch.length",
        ),
        (
            prompt(grids=[(8, 10)]),
            r"found \d+ tokens and 80 patches .*expected .*images that fit vision rows of \(2, 64\)",
        ),
    ],
)
def test_what_fits_no_row_is_named(asked, fault):
    with pytest.raises(DataError, match=f"problem 7: {fault}"):
        micro_batches([group(asked, [4, 4], "problem 7")], BATCH, CONFIG)


def test_a_batch_of_text_has_no_vision_rows():
    (batch,) = micro_batches([group(prompt(grids=()), [4, 4])], BatchConfig(rows=2, length=96, vision_rows=0), CONFIG)
    assert batch.batch.vision is None and batch.batch.vision_index is None
    assert micro_batches([], BATCH, CONFIG) == []
