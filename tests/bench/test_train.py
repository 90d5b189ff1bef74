"""bench.train on a tiny model, both sides in this process."""

import numpy as np
import pytest
from helpers_transformers import import_transformers

from bench import models, train, train_data

pytestmark = pytest.mark.slow

SHAPE = train_data.Shape(2, 320, (1, 512))
STEPS = 1  # every padded batch is a shape of its own to compile


@pytest.fixture(scope="module")
def content():
    text = models.TRAINING["text_config"] | dict(
        hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=1024,
    )  # fmt: skip
    vision = models.TRAINING["vision_config"] | dict(depth=1, hidden_size=128, num_heads=1, out_hidden_size=256)
    return models.TRAINING | {"text_config": text, "vision_config": vision}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, content):
    return models.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), content, processor=True)


@pytest.fixture(scope="module")
def samples(directory):
    made = train_data.make_samples(directory, 40)
    return [one for one in made if len(one) <= SHAPE.length and one.frames.prod(axis=1).sum() <= SHAPE.vision[1]]


@pytest.fixture(scope="module")
def figures(directory, content, samples):
    import_transformers()
    from bench.train_sides import Ours, Theirs

    sides = {"ours": Ours(), "theirs": Theirs()}
    workers = {
        name: lambda task, side=side, **arguments: getattr(side, task)(**arguments) for name, side in sides.items()
    }
    # No aim is missed, whatever else the machine does: profiles are slow, and for people.
    lines = [line._replace(aim=None) for line in train.LINES]
    return train.run(workers, directory, content, samples, steps=STEPS, rounds=1, shape=SHAPE, lines=lines)


def test_losses_of_both_sides_agree(figures):
    losses = figures["losses"]
    assert losses["passed"] and len(losses["theirs"]) == STEPS
    assert 0 <= losses["packed"] <= 1e-5 and 0 <= losses["padded"] <= 1e-5


def test_tokens_are_those_of_the_samples(figures):
    data = figures["data"]
    assert data["timed_steps"] == STEPS and 0 < data["timed_tokens"] <= STEPS * SHAPE.rows * SHAPE.length
    assert data["with_images_or_videos"] > 5 and 0 < data["vision_share"] < 1
    assert all(line["ours"]["median"] > 0 and line["theirs"]["median"] > 0 for line in figures["lines"])


def test_tables_have_a_row_for_each_comparison_and_kind_of_padding(figures):
    speeds, padding = train.tables(figures)
    assert len(speeds.rows) == len(train.LINES) and len(padding.rows) == 3
    assert all(len(row) == len(table.columns) for table in (speeds, padding) for row in table.rows)


def test_padding_is_counted(samples, content):
    batches = train_data.packed(samples, SHAPE)
    tokens = sum(len(sample) for batch in batches for sample in batch)
    padding = train_data.padding(batches, SHAPE, content)
    np.testing.assert_allclose(padding["tokens"], 1 - tokens / (len(batches) * SHAPE.rows * SHAPE.length))
    assert 0 < padding["patches"] < 1
    assert train_data.padded_fraction([[np.zeros(3), np.zeros(1)]]) == pytest.approx(1 / 3)


def test_grouping_by_length_pads_less(samples):
    batches = train_data.packed(samples, SHAPE)
    grouped = train_data.grouped(batches)
    assert sum(map(len, grouped)) == sum(map(len, batches))
    assert 0 <= train_data.padded_fraction(grouped) <= train_data.padded_fraction(batches) < 1


def test_packing_at_the_full_size_meets_its_aim(directory, content):
    """On the samples of the measurement: of fewer, more is padding at the beginning of the stream."""
    batches = train_data.packed(train_data.make_samples(directory, train.SAMPLES), train_data.SHAPE)
    assert max(train_data.padding(batches, train_data.SHAPE, content).values()) <= train.MAX_PADDING
