"""The curriculum of the tiny model: the same records in the same order, as much of each task as it says, and when."""

from collections import Counter

import numpy as np
import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import ConfigError
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.tiny.digits import NUM_TRAIN, TASKS, digits, examples
from tools.digit_curriculum import CYCLE, Curriculum, DigitRecords
from train.data.records import Record
from train.data.samples import IGNORED, encode

pytest.importorskip("sklearn")

COUNT = 40 * CYCLE


def task_of(record):
    return record.source.split("/")[1]


def shown(record):
    """What a record shows and says."""
    item, question = record.messages[0]["content"]
    return np.asarray(item[item["type"]]).tobytes(), question["text"], record.messages[1]["content"][0]["text"]


def test_a_record_follows_from_the_seed_and_its_number():
    ours, again, other = (DigitRecords(COUNT, seed=seed) for seed in (1, 1, 2))
    numbers = [0, 5, 700, COUNT - 1]
    # Whatever was asked for before.
    backwards = {number: shown(again[number]) for number in reversed(numbers)}
    assert [shown(ours[number]) for number in numbers] == [backwards[number] for number in numbers]
    assert [shown(other[number]) for number in numbers] != [backwards[number] for number in numbers]
    assert shown(ours[-1]) == backwards[COUNT - 1] and [shown(r) for r in ours[4:8:3]] == [
        shown(ours[i]) for i in (4, 7)
    ]
    assert len(ours) == COUNT and len(ours[:7]) == 7
    with pytest.raises(IndexError):
        ours[COUNT]


def test_every_cycle_has_its_share_of_each_task():
    curriculum = Curriculum(reading=9, grounding=20, motion=3)
    records = DigitRecords(COUNT, curriculum, seed=3)
    for start in (0, 5 * CYCLE, COUNT - CYCLE):
        found = Counter(task_of(record) for record in records[start : start + CYCLE])
        assert (found["reading"], found["motion"]) == (9, 3)
        assert found["grounding1"] + found["grounding2"] == 20
    kinds = [task_of(record)[:6] for record in records[:CYCLE]]
    assert max(len(run) for run in "".join("g" if kind == "ground" else " " for kind in kinds).split()) < 12


def test_the_second_digit_joins_when_the_curriculum_says_so():
    curriculum = Curriculum(reading=0, grounding=CYCLE, motion=0, two_digits=((0.25, 0.0), (0.75, 0.8)))
    assert [curriculum.two_digits_at(place) for place in (0, 0.25, 0.5, 0.75, 1)] == [0, 0, 0.4, 0.8, 0.8]
    found = np.array([task_of(record) == "grounding2" for record in DigitRecords(COUNT, curriculum)])
    quarters = found.reshape(4, -1).mean(axis=1)
    assert quarters[0] == 0
    # 320 draws each: three standard deviations of the mean are below 0.085.
    np.testing.assert_allclose(quarters[1:], [0.2, 0.6, 0.8], atol=0.085)


def test_every_training_digit_comes_before_any_comes_again():
    curriculum = Curriculum(reading=CYCLE, grounding=0, motion=0)
    records = DigitRecords(2 * NUM_TRAIN, curriculum)
    answers = [shown(record)[2] for record in records]
    labels = sorted(digits("train").labels)
    for part in (answers[:NUM_TRAIN], answers[NUM_TRAIN:]):
        assert sorted(int(answer.split("|>")[1][0]) for answer in part) == labels
    assert answers[:NUM_TRAIN] != answers[NUM_TRAIN:]


def test_tasks_of_a_curriculum_add_up_to_a_cycle():
    with pytest.raises(ConfigError, match=r"curriculum: found 1 \+ 2 \+ 3 records; expected 32 together"):
        DigitRecords(COUNT, Curriculum(1, 2, 3))


def test_the_released_processor_does_not_resize():
    """Patches of 14 pixels: as many as the pictures have. And what is learned is what the assistant says."""
    processor, config = (cls.from_pretrained(RANDOM_CHECKPOINT) for cls in (Glm4vProcessor, Glm4vConfig))
    grids = {"reading": [[6, 6]], "grounding1": [[8, 8]], "grounding2": [[8, 8]], "motion": [[4, 4]] * 2}
    for task in TASKS:
        (made,) = examples(task, "train", 1)
        sample = encode(Record(made.messages, (False, True), made.source), processor, config)
        assert sample.frames.tolist() == grids[task]
        learned = sample.targets[sample.targets != IGNORED].tolist()
        text = processor.tokenizer.decode(learned, skip_special_tokens=False)
        assert text == made.messages[-1]["content"][0]["text"] + "<|user|>"
