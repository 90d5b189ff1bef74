"""Batches of whole steps: of several micro-batches, without packing, and without pictures."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.prompt import Prompt
from train.config import BatchConfig, DataConfig
from train.data import lane
from train.data.samples import Sample
from train.data.stream import Stream

DATA = DataConfig(("data.jsonl",), shuffle=False, threads=1)
CONFIG = Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT)
PATCHES = 8


def made(number, *others):
    """A sample of `number + 1` tokens, all of them `number`; the one of record 3 has a picture, which nothing shows."""
    image = Medium(np.zeros((PATCHES, CONFIG.vision_config.patch_dim), np.float32), np.array([1, 2, PATCHES // 2]))
    prompt = Prompt.of_text([number] * (number + 1))
    prompt = dataclasses.replace(prompt, media=(image,) * (number == 3))
    return Sample(prompt, prompt.input_ids, f"data.jsonl:{number + 1}")


@pytest.fixture
def stream(monkeypatch, mesh):
    """(fields of the batch) -> a stream of records 0 to 5, in their order, and what it tells."""
    monkeypatch.setattr(lane, "encode", made)
    streams = []

    def start(**fields):
        told = []
        batch = BatchConfig(**{"length": 8, "vision_rows": 1, "vision_length": PATCHES, **fields})
        streams.append(Stream(range(6), None, CONFIG, DATA, batch, mesh, tell=told.append))
        return streams[-1], told

    # A record has its number for a name: those of a real one are looked at when it is encoded.
    monkeypatch.setattr(lane, "_read", lambda records, number: Row(number))
    yield start
    for one in streams:
        one.close()


class Row(int):
    @property
    def source(self):
        return f"data.jsonl:{self + 1}"


def rows_of(batch):
    """The records of each row of each micro-batch."""
    ids, segments = batch.batch.input_ids, batch.batch.segment_ids
    return [[sorted(set(row[used > 0].tolist())) for row, used in zip(*parts, strict=True)]
            for parts in zip(ids, segments, strict=True)]  # fmt: skip


def test_micro_batches_are_batches_one_after_another(stream):
    """Those of one each, two at a time; and they go on behind a step."""
    one, _ = stream(micro_batches=1)
    two, _ = stream(micro_batches=2)
    single = [next(one) for _ in range(6)]
    double = [next(two) for _ in range(3)]
    for number, step in enumerate(double):
        parts = [single[2 * number + i].batch for i in range(2)]
        jax.tree.map(np.testing.assert_array_equal, step.batch, jax.tree.map(lambda *x: np.concatenate(x), *parts))
        assert step.batch.targets.shape == (2, 1, 8)
        assert step.state == single[2 * number + 1].state
    again, _ = stream(micro_batches=2)
    again.set_state(double[0].state)
    for step in double[1:]:
        found = next(again)
        jax.tree.map(np.testing.assert_array_equal, found.batch, step.batch)
        assert (found.state, found.counts, found.epoch) == (step.state, step.counts, step.epoch)


def test_without_packing_a_row_is_one_sample(stream):
    unpacked, _ = stream(pack=False, rows=2, lanes=1)
    assert [rows_of(next(unpacked).batch) for _ in range(3)] == [[[[0], [1]]], [[[2], [3]]], [[[4], [5]]]]
    packed, _ = stream(rows=2, lanes=1)
    assert rows_of(next(packed).batch) != [[[0], [1]]]


def test_without_vision_rows_a_batch_is_text_alone(stream):
    """Every row is a lane of its own; what has a picture is left out, and told of once."""
    text, told = stream(vision_rows=0, rows=2, pack=False)
    steps = [next(text) for _ in range(4)]
    assert {step.batch.batch.vision for step in steps} == {step.batch.batch.vision_index for step in steps} == {None}
    # Of records 0, 2, 4 and of 1, (3), 5, in turn.
    assert [rows_of(step.batch) for step in steps] == [[[[0], [1]]], [[[2], [5]]], [[[4], [1]]], [[[0], [5]]]]
    assert told == [f"data.jsonl:4: found 1 pictures and frames of up to {PATCHES} patches, {PATCHES} together; "
                    "expected what fits vision rows of None"]  # fmt: skip
    assert set(steps[0].state) == {"0", "1"}
