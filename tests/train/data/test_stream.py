"""Encoders, lanes and streams: errors name the record, steps follow one another, and streams resume."""

import dataclasses
import errno
import re
import types

import jax
import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.prompt import Prompt
from train.config import BatchConfig, DataConfig
from train.data.encoder import Encoder
from train.data.packing import Packer
from train.data.placement import packer_of
from train.data.samples import Sample
from train.data.stream import Lane, RowCounts, Stream, in_order

DATA = DataConfig(files=("data.jsonl",), shuffle=False, threads=1)
CONFIG = Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT)
PATCHES = 8


class Row(int):
    """A record that has its number for content."""

    @property
    def source(self):
        return f"data.jsonl:{self + 1}"


def made(record):
    """A sample of `number + 1` tokens, all of them `number`; that of record 3 has an image, but no token for it."""
    image = Medium(np.zeros((PATCHES, CONFIG.vision_config.patch_dim), np.float32), np.array([1, 2, PATCHES // 2]))
    prompt = Prompt.of_text([int(record)] * (record + 1))
    prompt = dataclasses.replace(prompt, media=(image,) * (record == 3))
    return Sample(prompt, prompt.input_ids, record.source)


class FlakyDisk:
    """Records of a disk that fails so many times first."""

    def __init__(self, failures, error=None):
        self.failures, self.error = failures, error or OSError("stale file handle")

    def __getitem__(self, number):
        if self.failures:
            self.failures -= 1
            raise self.error
        return Row(number)


def outcome_of(records, encode=made, number=3):
    return Encoder(records, encode, lambda sample: None, pauses=(0.0, 0.0))(number)[1]


def test_a_record_is_read_again_after_errors_of_the_disk():
    assert outcome_of(FlakyDisk(2)).source == "data.jsonl:4"
    assert str(outcome_of(FlakyDisk(3))) == "row 3: stale file handle"


def test_a_missing_file_is_not_read_again():
    missing = FlakyDisk(1, FileNotFoundError("no such file"))
    assert str(outcome_of(missing)) == "row 3: no such file" and not missing.failures


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "Input/output error", "cat.png"), "data.jsonl:4: cat.png: Input/output error"),
        (ZeroDivisionError("division by zero"), "data.jsonl:4: ZeroDivisionError: division by zero"),
    ],
)
def test_errors_of_encoding_name_the_record(error, message):
    def broken(record):
        raise error

    assert str(outcome_of([Row(i) for i in range(5)], broken)) == message
    with pytest.raises(DataError, match=f"^row 3: found {message}; expected the sample it was$"):
        Encoder([Row(i) for i in range(5)], broken, lambda sample: None).again(3)


def test_a_record_that_is_gone_is_named_by_its_row():
    with pytest.raises(DataError, match="row 0: found row 0: IndexError: "):
        Encoder([], made, lambda sample: None).again(0)


@pytest.mark.parametrize(
    ("found", "reason", "counts"),
    [
        (DataError("no image"), "no image", RowCounts(skipped=3)),
        (None, "too long: found more tokens than batch.length", RowCounts(dropped=3)),
        (made(Row(8)), "data.jsonl:9: found 9 tokens; expected at most 8, a row", RowCounts(skipped=3)),
    ],
)
def test_an_epoch_without_a_sample_ends_a_lane(found, reason, counts):
    def encode(record):
        if isinstance(found, Exception):
            raise found
        return found

    messages = []
    packer = Packer(rows=1, length=8)
    encoder = Encoder([types.SimpleNamespace(source="data.jsonl")] * 3, encode, packer.check)
    lane = Lane(encoder, packer, DATA, index=0, count=1, threads=1, seed=0, log=messages.append)
    with pytest.raises(
        DataError, match=re.escape(f"found no sample in 3 rows, a whole epoch; reason for the last: {reason}")
    ):
        next(lane)
    assert lane.counts == counts and len(messages) == counts.skipped


@pytest.fixture
def stream(mesh):
    """Fields of the batch -> a stream of records 0 to 5, in their order, and its messages."""
    streams = []

    def start(**fields):
        messages = []
        batch = BatchConfig(**{"length": 8, "vision_rows": 1, "vision_length": PATCHES, **fields})
        encoder = Encoder([Row(i) for i in range(6)], made, packer_of(batch).check)
        streams.append(Stream(encoder, CONFIG, DATA, batch, mesh, log=messages.append))
        return streams[-1], messages

    yield start
    for one in streams:
        one.close()


def rows_of(batch):
    """The records of each row of each micro-batch."""
    ids, segments = batch.batch.input_ids, batch.batch.segment_ids
    return [[sorted(set(row[used > 0].tolist())) for row, used in zip(*parts, strict=True)]
            for parts in zip(ids, segments, strict=True)]  # fmt: skip


def test_micro_batches_are_consecutive_batches(stream):
    one, _ = stream(micro_batches=1)
    two, _ = stream(micro_batches=2)
    single = [next(one) for _ in range(6)]
    for number, (batch, state) in enumerate(next(two) for _ in range(3)):
        parts = [single[2 * number + i][0] for i in range(2)]
        jax.tree.map(np.testing.assert_array_equal, batch, jax.tree.map(lambda *x: np.concatenate(x), *parts))
        assert batch.targets.shape == (2, 1, 8)
        assert state == single[2 * number + 1][1]


def test_a_stream_resumes_after_a_step(stream):
    first, _ = stream(micro_batches=2)
    (_, at), *expected = [next(first) for _ in range(3)]
    again, _ = stream(micro_batches=2)
    again.set_state(at)
    for batch, state in expected:
        found = next(again)
        jax.tree.map(np.testing.assert_array_equal, found[0], batch)
        assert found[1] == state


def test_epochs_are_rows_read_by_rows_there_are(stream):
    whole, _ = stream(micro_batches=2)
    divided, _ = stream(rows=2, vision_rows=2)
    for found in (whole, divided):
        _, state = next(found)
        assert found.epochs(state) == RowCounts.of(state).rows / 6 > 0


def test_without_packing_a_row_is_one_sample(stream):
    unpacked, _ = stream(pack=False, rows=2, lanes=1)
    assert [rows_of(next(unpacked)[0]) for _ in range(3)] == [[[[0], [1]]], [[[2], [3]]], [[[4], [5]]]]
    packed, _ = stream(rows=2, lanes=1)
    assert rows_of(next(packed)[0]) != [[[0], [1]]]


def test_without_vision_rows_samples_with_images_are_skipped(stream):
    """Every row is a lane of its own; the message comes once."""
    text, messages = stream(vision_rows=0, rows=2, pack=False)
    batches, states = zip(*(next(text) for _ in range(4)), strict=True)
    assert {batch.batch.vision for batch in batches} == {batch.batch.vision_index for batch in batches} == {None}
    # Of records 0, 2, 4 and of 1, (3), 5, in turn.
    assert [rows_of(batch) for batch in batches] == [[[[0], [1]]], [[[2], [5]]], [[[4], [1]]], [[[0], [5]]]]
    assert len(messages) == 1 and messages[0].startswith("data.jsonl:4: found 1 image or frame of up to 8 patches")
    assert set(states[0]) == {"0", "1"}


def test_an_epoch_has_each_record_once_whatever_the_lanes_are():
    for count in (1, 2, 3):
        lanes = [in_order([(range(12), 1.0)], True, 5, index, count) for index in range(count)]
        for epoch in range(3):
            places = range(epoch * 12 // count, (epoch + 1) * 12 // count)
            assert sorted(lane[place] for lane in lanes for place in places) == list(range(12))


def test_sets_have_their_shares_in_every_lane_and_each_record_of_a_set_once_an_epoch_of_it():
    draws = [(np.arange(100), 0.7), (np.arange(100, 130), 0.25), (np.arange(130, 137), 0.05)]
    lanes = [in_order(draws, True, 0, index, 2) for index in range(2)]
    drawn = [[int(lane[place]) for place in range(1000)] for lane in lanes]
    for numbers, share in draws:
        for lane in drawn:
            is_of_set = np.cumsum(np.isin(lane, numbers))
            assert np.abs(is_of_set - share * np.arange(1, 1001)).max() <= 1  # of any number of draws
    first = [[number for number in lane if number < 100][:50] for lane in drawn]
    assert sorted(number for lane in first for number in lane) == list(range(100))


def test_sets_resume_at_any_record():
    def lane():
        packer = Packer(rows=1, length=8)
        encoder = Encoder([Row(i % 6) for i in range(20)], made, packer.check)
        draws = [(np.arange(15), 2.0), (np.arange(15, 20), 1.0)]
        return Lane(encoder, packer, DATA, index=0, count=1, threads=1, seed=0, log=print, draws=draws)

    def sources(samples):
        return [sample.source for sample in samples]

    one, other = lane(), lane()
    for _ in range(5):
        next(one)
    other.set_state(one.get_state())
    assert [sources(next(one)) for _ in range(9)] == [sources(next(other)) for _ in range(9)]
