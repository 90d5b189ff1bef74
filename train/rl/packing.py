"""Groups of sampled answers -> micro-batches of static shape, in which the answers to one prompt share its images.

The tokens are those of the prompt and those that were sampled; nothing is decoded and encoded again. An answer's
positions follow its prompt's, whatever its tokens are: a sampled token of an image is text like any other, as it was
when it was sampled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError, counted
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.prompt import Prompt
from train.config import BatchConfig
from train.data.packing import RowWriter, TrainBatch, place, vision_fits
from train.data.samples import IGNORED
from train.rl.groups import AdvantageName, Group, Rollout


class Answer(NamedTuple):
    """One answer of a group, to be packed."""

    prompt: Prompt
    rollout: Rollout
    advantage: float

    @property
    def length(self) -> int:
        """Tokens that the model takes: the last one is a target only."""
        return len(self.prompt) + len(self.rollout) - 1


def micro_batches(
    groups: Sequence[Group],
    batch: BatchConfig,
    config: Glm4vConfig,
    *,
    average: str = "sample",
    advantage: AdvantageName = "mean_std",
) -> list[TrainBatch]:
    """Pack groups into as few micro-batches as a greedy search finds, all of one shape.

    A group is kept together where it fits a micro-batch, so that its images are encoded once; one that does not is
    divided. Which answers share a micro-batch changes no number but by rounding.

    `average` is that of `train.data.packing.pack`, `advantage` of `Group.advantages`; answers from which nothing can be
    learned take no room. Tokens that the engine inserted have a weight of 0. DataError if a prompt with its answer is
    longer than a row, or its images do not fit the vision rows.
    """
    bins: list[list[Answer]] = []
    for part in sorted(_parts(groups, batch, advantage), key=lambda part: -sum(answer.length for answer in part)):
        room = next((held for held in bins if _fits([*held, *part], batch)), None)
        if room is None:
            bins.append(list(part))
        else:
            room += part
    return [_packed(held, batch, config, average) for held in bins]


def _parts(groups: Sequence[Group], batch: BatchConfig, advantage: AdvantageName) -> list[list[Answer]]:
    """The answers of each group, in as many parts as it takes for each to fit a micro-batch."""
    parts: list[list[Answer]] = []
    for group in groups:
        answers = [
            Answer(group.prompt, rollout, float(value))
            for rollout, value in zip(group.rollouts, group.advantages(advantage), strict=True)
            if rollout.num_sampled
        ]
        part: list[Answer] = []
        for answer in sorted(answers, key=lambda answer: -answer.length):
            if not _fits([answer], batch):
                raise DataError(
                    f"{group.key}: found {counted(answer.length, 'token')} and {_patches(answer)} patches of images "
                    f"and videos; expected at most batch.length = {batch.length:,} tokens, and images that fit vision "
                    f"rows of {batch.vision_shape}"
                )
            if not _fits([*part, answer], batch):
                parts.append(part)
                part = []
            part.append(answer)
        if part:
            parts.append(part)
    return parts


def _patches(answer: Answer) -> int:
    return sum(len(medium.patches) for medium in answer.prompt.media)


def _media(answers: Sequence[Answer]) -> dict[bytes, Medium]:
    """The images and videos of these answers, each once."""
    return {medium.key: medium for answer in answers for medium in answer.prompt.media}


def _fits(answers: Sequence[Answer], batch: BatchConfig) -> bool:
    lengths = [answer.length for answer in answers]
    frames = [medium.frames for medium in _media(answers).values()]
    fits_vision = vision_fits(np.concatenate([np.zeros((0, 2), np.int64), *frames]), batch.vision_shape)
    return fits_vision and place(lengths, batch.rows, batch.length, batch.per_row) is not None


def _packed(answers: Sequence[Answer], batch: BatchConfig, config: Glm4vConfig, average: str) -> TrainBatch:
    shape, own = (batch.rows, batch.length), _media(answers)
    writer = RowWriter(*shape, list(own.values()), batch.vision_shape, config, average)
    shared = {medium: writer.features[own[medium.key]] for answer in answers for medium in answer.prompt.media}
    writer.features |= shared
    advantages, logprobs = (np.zeros(shape, np.float32) for _ in range(2))
    places = place([answer.length for answer in answers], *shape, batch.per_row)
    assert places is not None
    for answer, found in zip(answers, places, strict=True):
        rollout = answer.rollout
        # A token is predicted from the one before it, the first from the last of the prompt.
        first = len(answer.prompt) - 1
        targets = np.concatenate([np.full(first, IGNORED, np.int32), rollout.tokens])
        counts = np.concatenate([np.zeros(first, bool), rollout.is_sampled])
        row, here = writer.write(found, answer.prompt.extended(rollout.tokens[:-1]), targets, counts)
        said = np.s_[row, here.start + first : here.stop]
        advantages[said] = answer.advantage
        logprobs[said] = np.where(rollout.is_sampled, rollout.logprobs, 0)
    return writer.batch._replace(reference=logprobs, advantages=advantages)
