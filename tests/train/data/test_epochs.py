"""Epochs: each record is seen as often as a job says, by any lanes and processes, in the steps that are counted."""

import collections
import concurrent.futures
import threading
import types

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import distributed
from glm4v_jax.errors import ConfigError, DataError
from glm4v_jax.inputs.prompt import Prompt
from train.config import BatchConfig, DataConfig
from train.data import epochs, stream
from train.data.encoder import Encoder
from train.data.epochs import count_steps, read_steps, write_steps
from train.data.placement import packer_of
from train.data.samples import Sample
from train.data.stream import Stream

RECORDS, EPOCHS = 11, 3
CONFIG = Glm4vConfig.from_pretrained(RANDOM_CHECKPOINT)
DATA = DataConfig(files=("data.jsonl",), threads=1)


def made(record):
    """A sample of `number + 1` tokens, all of them `number`."""
    prompt = Prompt.of_text([record.number] * (record.number + 1))
    return Sample(prompt, prompt.input_ids, record.source)


def job(mesh, *, encode=made, bad_rows="skip", epochs=EPOCHS, **fields):
    """A stream with its messages as `told`, and what counts its steps."""
    batch = BatchConfig(**{"rows": 2, "length": 12, "vision_rows": 0, **fields})
    records = [types.SimpleNamespace(number=number, source=f"data.jsonl:{number + 1}") for number in range(RECORDS)]
    encoder, data = Encoder(records, encode, packer_of(batch).check), DataConfig(files=DATA.files, bad_rows=bad_rows)
    told = []
    one = Stream(encoder, CONFIG, data, batch, mesh, seed=3, log=told.append, epochs=epochs)
    one.told = told
    return one, lambda **resumed: count_steps(encoder, data, batch, mesh, epochs, seed=3, log=print, **resumed)


ALL = slice(None)


def seen(one, steps, lanes=ALL):
    """Of so many steps, how often each record is in them; of two `lanes` of one row each, or of all rows.

    The state after them is kept as `one.state`.
    """
    found = []
    for _ in range(steps):
        batch, one.state = next(one)
        ids, segments = batch.batch.input_ids[:, lanes], batch.batch.segment_ids[:, lanes]
        tokens = collections.Counter(ids[segments > 0].tolist())
        found.append(collections.Counter({number: count // (number + 1) for number, count in tokens.items()}))
    return found


def total(counters):
    return dict(sum(counters, collections.Counter()))


@pytest.mark.parametrize("fields", [dict(lanes=1), dict(lanes=2), dict(lanes=2, micro_batches=3), dict(pack=False)])
def test_each_record_is_seen_once_an_epoch(mesh, fields):
    one, count = job(mesh, **fields)
    steps = count()
    found = seen(one, steps + 2, ALL)
    one.close()
    assert total(found) == dict.fromkeys(range(RECORDS), EPOCHS)
    assert found[steps - 1] and not found[steps] and not found[steps + 1]


@pytest.mark.parametrize("fields", [dict(lanes=1), dict(lanes=2), dict(lanes=2, micro_batches=3)])
@pytest.mark.parametrize("stopped", [0, 1])
def test_more_epochs_see_each_record_exactly_as_often(mesh, fields, stopped):
    """After a job that was complete, whose last batches were partly filled, or that stopped a step before its end."""
    one, count = job(mesh, epochs=1, **fields)
    steps = count() - stopped
    lanes, first = None, []
    for _ in range(steps):
        first += seen(one, 1)
        lanes = one.state
    one.close()
    more, count = job(mesh, **fields)
    if lanes is not None:
        more.set_state(lanes)
    found = seen(more, count(step=steps, lanes=lanes) - steps)
    more.close()
    assert total(first + found) == dict.fromkeys(range(RECORDS), EPOCHS) and found[-1] and not more.left(more.state)
    _, fewer = job(mesh, epochs=2, **fields)
    with pytest.raises(ConfigError, match="epochs: found 2; expected at least 3: the checkpoint has begun these"):
        fewer(step=9, lanes=more.state)


@pytest.fixture
def of_two_processes(monkeypatch):
    """A function that runs another for the number of each of two processes, and returns both results."""
    here, told, barrier = threading.local(), {}, threading.Barrier(2, timeout=60)

    def gathered(value):
        told[here.index] = value
        barrier.wait()
        found = [told[0], told[1]]
        barrier.wait()
        return found

    def run(function):
        for module in (epochs, distributed):
            monkeypatch.setattr(module, "gathered", gathered)
        monkeypatch.setattr(epochs, "process_index", lambda: here.index)
        monkeypatch.setattr(epochs, "process_count", lambda: 2)
        for module in (epochs, stream):
            monkeypatch.setattr(module, "lanes_here", lambda batch, mesh: [here.index])

        def in_process(index):
            here.index = index
            return function(index)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(in_process, range(2)))

    return run


def test_two_processes_see_together_what_one_sees(mesh, of_two_processes):
    """Each encodes half of the records to count them, and reads a lane of its own."""
    alone, count = job(mesh, lanes=2)
    expected = count()
    of_one = seen(alone, expected, ALL)
    alone.close()
    encoded = ([], [])

    def run(index):
        one, count = job(mesh, lanes=2, encode=lambda record: encoded[index].append(record.number) or made(record))
        steps = count()
        counting = sorted(encoded[index])
        found = seen(one, steps, slice(index, index + 1))
        one.close()
        return steps, counting, found

    (steps, first, one), (same, second, other) = of_two_processes(run)
    assert steps == same == expected
    assert sorted(first + second) == list(range(RECORDS))
    assert [a + b for a, b in zip(one, other, strict=True)] == of_one


def test_what_one_process_cannot_count_is_raised_in_both(mesh, of_two_processes):
    """A row of the second process is bad; and its lane has begun more epochs than the job has."""

    def broken(record):
        if record.number == 3:
            raise DataError(f"{record.source}: broken")
        return made(record)

    def row(index):
        one, count = job(mesh, lanes=2, encode=broken, bad_rows="error")
        one.close()
        with pytest.raises(DataError) as error:
            count()
        return str(error.value)

    def lane(index):
        one, count = job(mesh, lanes=2, epochs=1)
        _, state = next(one)
        one.close()
        if index == 1:
            state["1"]["counts"]["samples"] = RECORDS
        with pytest.raises(ConfigError) as error:
            count(lanes=state)
        return str(error.value)

    assert of_two_processes(row) == ["data.jsonl:4: broken (in process 1)", "data.jsonl:4: broken"]
    begun = "epochs: found 1; expected at least 2: the checkpoint has begun these"
    assert of_two_processes(lane) == [f"{begun} (in process 1)", begun]


def test_epochs_of_the_lanes_of_one_process_end_with_a_whole_number(mesh):
    """Although one of them has a row more than the other: 17 and 16."""
    one, count = job(mesh, lanes=2)
    states = [next(one)[1] for _ in range(count())]
    one.close()
    for lanes in ("01", "0", "1"):
        read = [one.epochs({lane: state[lane] for lane in lanes}) for state in states]
        assert read == sorted(read) and read[-1] == EPOCHS and 0 < read[0] < EPOCHS


def test_a_stream_resumes_in_the_middle_of_an_epoch_and_in_its_last_batches(mesh):
    one, count = job(mesh, lanes=2)
    steps = count()
    batches = [next(one) for _ in range(steps)]
    one.close()
    for done in (1, steps // 2, steps - 1):
        again, _ = job(mesh, lanes=2)
        again.set_state(batches[done - 1][1])
        for batch, state in batches[done:]:
            found = next(again)
            assert (found[0].batch.input_ids == batch.batch.input_ids).all() and found[1] == state
        again.close()


def test_rows_that_become_no_sample_take_no_step(mesh):
    def encode(record):
        if record.number == 4:
            raise DataError("data.jsonl:5: no image")
        return None if record.number % 2 else made(record)

    one, count = job(mesh, encode=encode, lanes=2)
    found = seen(one, count(), ALL)
    one.close()
    assert one.told == ["data.jsonl:5: no image"]  # once, although both lanes have read it
    for lane in one.state.values():  # for the other processes
        assert lane["bad"] == ("data.jsonl:5: no image" if lane["counts"]["skipped"] else None)
    assert total(found) == dict.fromkeys((0, 2, 6, 8, 10), EPOCHS) and found[-1]
    one, count = job(mesh, encode=encode, bad_rows="error")
    one.close()
    with pytest.raises(DataError, match=r"^data\.jsonl:5: no image$"):
        count()
    one, count = job(mesh, encode=lambda record: None)
    one.close()
    with pytest.raises(DataError, match="found no sample in 11 rows; reason for the last: too long"):
        count()


def test_what_is_left_after_the_counted_steps_is_known(mesh):
    """As where a disk has come back since they were counted."""
    is_there = False

    def encode(record):
        if record.number > 4 and not is_there:
            raise DataError(f"{record.source}: no image")
        return made(record)

    one, count = job(mesh, encode=encode, lanes=1)
    steps = count()
    is_there = True
    for _ in range(steps):
        _, state = next(one)
    assert one.left(state) > 0
    while one.left(state):
        _, state = next(one)
    one.close()
    assert state["0"]["counts"] == {"samples": EPOCHS * RECORDS, "dropped": 0, "skipped": 0}


def test_counted_steps_are_kept_for_the_same_job_alone(tmp_path):
    path = tmp_path / "epochs.json"
    assert read_steps(path, "a") is None
    write_steps(path, "a", 12)
    assert read_steps(path, "a") == 12 and read_steps(path, "b") is None
    path.write_text("{")
    assert read_steps(path, "a") is None
