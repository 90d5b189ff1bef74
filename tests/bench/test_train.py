"""The comparison of training steps compares: both sides for real on a small model, and the judging on made-up times."""

import numpy as np
import pytest
from helpers_transformers import import_transformers

from bench import cpu_model, report, train, train_data

SHAPE = train_data.Shape(2, 320, (1, 512))
STEPS = 1  # every padded batch is a shape of its own to compile


@pytest.fixture(scope="module")
def content():
    found = train_data.config()
    found["text_config"] = found["text_config"] | dict(
        hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=1024,
    )  # fmt: skip
    found["vision_config"] = found["vision_config"] | dict(depth=1, hidden_size=128, num_heads=1, out_hidden_size=256)
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("checkpoint")
    train_data.write_checkpoint(directory, content)
    return directory


@pytest.fixture(scope="module")
def samples(directory):
    made = train_data.make_samples(directory, 40)
    return [one for one in made if len(one) <= SHAPE.length and one.frames.prod(axis=1).sum() <= SHAPE.vision[1]]


@pytest.fixture(scope="module")
def figures(directory, content, samples):
    import_transformers()
    from bench.train_ours import Ours
    from bench.train_theirs import Theirs

    sides = {"ours": Ours(), "theirs": Theirs()}
    workers = {
        name: lambda task, side=side, **arguments: getattr(side, task)(**arguments) for name, side in sides.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_data, "make_samples", lambda *_: samples)
        # No aim is missed, whatever else the machine does: profiles are slow, and for people.
        patch.setattr(train, "LINES", [line._replace(aim=None) for line in train.LINES])
        return train.run(workers, directory, content, samples=len(samples), steps=STEPS, rounds=1, shape=SHAPE)


def test_the_model_is_wide_and_of_the_promised_size():
    assert 20e6 < cpu_model.num_parameters(train_data.config()) < 50e6
    assert train_data.TEXT["hidden_size"] // train_data.TEXT["num_attention_heads"] == 128


def test_both_sides_learn_the_same(figures):
    losses = figures["losses"]
    assert losses["passed"] and len(losses["theirs"]) == STEPS
    assert 0 <= losses["packed"] <= 1e-5 and 0 <= losses["padded"] <= 1e-5


def test_tokens_are_those_of_the_samples(figures):
    data = figures["data"]
    assert data["timed_steps"] == STEPS and 0 < data["timed_tokens"] <= STEPS * SHAPE.rows * SHAPE.length
    assert data["with_pictures_or_videos"] > 5 and 0 < data["vision_share"] < 1
    assert all(line["ours"]["median"] > 0 and line["theirs"]["median"] > 0 for line in figures["lines"])
    report.console().print(report.table(train.title(figures), train.COLUMNS, train.rows(figures)))
    assert len(train.padding_rows(figures)) == 3
    assert train.markdown(figures).count("\n| ") == 2 + 2 + len(train.LINES) + 3


def test_padding_is_counted(samples, content):
    batches = train_data.packed(samples, SHAPE)
    tokens = sum(len(sample) for batch in batches for sample in batch)
    share = train_data.padding(batches, SHAPE, content)
    np.testing.assert_allclose(share["tokens"], 1 - tokens / (len(batches) * SHAPE.rows * SHAPE.length))
    assert 0 < share["patches"] < 1
    by_length = train_data.grouped(batches)
    assert sum(map(len, by_length)) == sum(map(len, batches))
    assert 0 <= train_data.padded_share(by_length) <= train_data.padded_share(batches) < 1
    assert train_data.padded_share([[np.zeros(3), np.zeros(1)]]) == pytest.approx(1 / 3)


def test_what_a_job_of_the_full_size_leaves_empty(directory, content):
    """The aim of the measurement, on its samples: of fewer, more is left at the beginning of the stream."""
    batches = train_data.packed(train_data.make_samples(directory, train.SAMPLES), train_data.SHAPE)
    assert max(train_data.padding(batches, train_data.SHAPE, content).values()) <= train.MAX_PADDING


def test_ratios_are_of_one_round():
    times = [
        {"ours": {"packed": a, "padded": 2 * a}, "theirs": {"padded": b, "grouped": b / 2}}
        for a, b in ((1, 2), (2, 8), (4, 12))
    ]
    usual, same, grouped = (train.compare(line, times, 24) for line in train.LINES)
    assert usual["ratio"] == {"median": 3, "min": 2, "max": 4} and usual["passed"]
    assert usual["ours"]["median"] == 12 and usual["theirs"]["median"] == 3
    assert same["ratio"]["median"] == 1.5 and same["aim"] is None
    assert grouped["ratio"]["median"] == 1.5 and grouped["passed"]
    slow = [{"ours": one["theirs"] | {"packed": 9.0}, "theirs": one["ours"]} for one in times]
    assert not train.compare(train.LINES[0], slow, 24)["passed"]
