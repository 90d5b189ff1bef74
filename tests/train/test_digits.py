"""Digits: the split, the tasks' pictures and truths, and that the model's processor takes them as they are."""

import itertools
import re

import numpy as np
import pytest

from glm4v_jax.config import Glm4vConfig
from glm4v_jax.data import TINY_CHECKPOINT
from glm4v_jax.errors import DataError
from glm4v_jax.files import read_json_object
from glm4v_jax.generate.boxes import find_boxes
from glm4v_jax.generate.thinking import is_well_formed, parse
from glm4v_jax.inputs.processor import Glm4vProcessor
from train.digits import (
    DIRECTIONS,
    GROUNDING_SIZE,
    NUM_FRAMES,
    NUM_HELD_OUT,
    NUM_TRAIN,
    STEP,
    TASKS,
    digits,
    examples,
    examples_with_truth,
    held_out,
    shuffled_frames,
)
from train.samples import IGNORED, encode

load_digits = pytest.importorskip("sklearn.datasets").load_digits


def picture(example):
    """uint8 [H, W] of the example's picture."""
    (item,) = example.record.media("image")
    array = np.asarray(item["image"])
    assert array.shape[2] == 3 and (array == array[..., :1]).all()
    return array[..., 0]


def frames(example):
    """uint8 [T, H, W] of the example's video."""
    (item,) = example.record.media("video")
    return np.stack(item["video"])[..., 0]


def said(example):
    """What the assistant says."""
    return example.record.messages[-1]["content"][0]["text"]


def middle(frame):
    """(x, y): the ink's centre of mass."""
    rows, columns = np.indices(frame.shape)
    weight = frame.astype(float)
    return (columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()


def drawn(example):
    """All of what an example shows and says."""
    shown = frames(example) if example.record.media("video") else picture(example)
    return shown.tobytes(), example.record.messages[0]["content"][1]["text"], said(example)


def test_split_takes_every_digit_once():
    train, held = digits("train"), digits("held-out")
    assert (len(train.labels), len(held.labels)) == (NUM_TRAIN, NUM_HELD_OUT)
    both = np.concatenate([train.pixels, held.pixels]).reshape(-1, 64)
    everything = load_digits().data
    np.testing.assert_array_equal(both[np.lexsort(both.T)], everything[np.lexsort(everything.T)])
    known = {image.tobytes() for image in train.pixels}
    assert not any(image.tobytes() in known for image in held.pixels)
    # No class is rare on either side.
    assert min(np.bincount(held.labels)) >= 25 and len(np.bincount(held.labels)) == 10


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_examples(task):
    first, again, other = ([drawn(e) for e in examples_with_truth(task, "train", 12, seed=seed)] for seed in (3, 3, 4))
    assert first == again and len(set(first)) == 12
    assert not set(first) & set(other)
    # A longer run begins as a shorter one.
    assert [drawn(e) for e in examples_with_truth(task, "train", 5, seed=3)] == first[:5]


def test_examples_are_the_records_of_those_with_truth():
    found = [record.source for record in examples("reading", "train", 3)]
    assert found == [e.record.source for e in examples_with_truth("reading", "train", 3)]
    assert found == [f"digits/reading/train:{number}" for number in range(3)]


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_in_the_format(task):
    for example in examples_with_truth(task, "train", 20):
        user, assistant = example.record.messages
        assert (user["role"], assistant["role"]) == ("user", "assistant") and example.record.losses == (False, True)
        assert is_well_formed(said(example)) and parse(said(example)).boxed == (example.answer,)


def test_reading_asks_for_the_label():
    """Every held-out digit once."""
    labels = [example.answer for example in held_out("reading")]
    assert sorted(labels) == sorted(map(str, digits("held-out").labels))


@pytest.mark.parametrize("task", ["grounding1", "grounding2"])
def test_boxes_hold_the_ink(task):
    """Outside the boxes is nothing that counts, a quarter of full ink; and every edge of a box is near some ink."""
    for example in held_out(task)[:60]:
        assert find_boxes(said(example)) == [example.boxes[0]]
        assert all(0 <= value < 1000 and value % STEP == 0 for box in example.boxes for value in box)
        shown = picture(example)
        slack = 5  # pixels: an original pixel is up to 7 wide, and fades out over as many
        outside = shown.copy()
        for box in example.boxes:
            x1, y1, x2, y2 = (round(value * GROUNDING_SIZE / 1000) for value in box)
            outside[max(y1 - slack, 0) : y2 + slack, max(x1 - slack, 0) : x2 + slack] = 0
            inside = shown[y1:y2, x1:x2] >= 32
            rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
            assert max(rows[0], columns[0], len(inside) - 1 - rows[-1], inside.shape[1] - 1 - columns[-1]) <= slack
        assert outside.max() < 64


def test_two_digits_differ_and_do_not_overlap():
    for example in held_out("grounding2"):
        (x1, y1, x2, y2), (a1, b1, a2, b2) = example.boxes
        assert x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1
    found = [int(re.search(r"\d", e.record.messages[0]["content"][1]["text"])[0]) for e in held_out("grounding2")]
    assert sorted(found) == sorted(digits("held-out").labels)
    # The one that is asked for is on either side as often.
    first = np.mean([boxes[0][0] < boxes[1][0] for _, _, boxes in held_out("grounding2")])
    assert 0.42 < first < 0.58


def test_thoughts_say_what_is_where():
    """Both digits, each at its side along the axis on which they are further apart, and the side that is asked for."""
    for example in held_out("grounding2"):
        asked = re.search(r"\d", example.record.messages[0]["content"][1]["text"])[0]
        pattern = r"(\d) (left|top), (\d) (right|bottom): (\d) (left|right|top|bottom)\."
        one, first, other, second, again, place = re.fullmatch(pattern, parse(said(example)).thought).groups()
        assert asked == again and asked in (one, other) and one != other
        assert place == (first if asked == one else second)
        assert (first, second) in (("left", "right"), ("top", "bottom"))
        ours, theirs = (np.reshape(box, (2, 2)).mean(axis=0) for box in example.boxes)
        apart = (ours - theirs) * (1 if place == second else -1)
        axis = ("left", "top").index(first)
        assert apart[axis] > 0 and apart[axis] >= abs(apart[1 - axis]) - 1  # the means were rounded
    for example in held_out("grounding1"):
        asked = re.search(r"\d", example.record.messages[0]["content"][1]["text"])[0]
        assert parse(said(example)).thought == f"Only {asked}."


def test_digits_move_as_said():
    counts = dict.fromkeys(DIRECTIONS, 0)
    for example in held_out("motion"):
        centres = np.array([middle(frame) for frame in frames(example)])
        steps = np.diff(centres, axis=0)
        assert len(steps) == NUM_FRAMES - 1
        np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), atol=1e-6)
        np.testing.assert_array_equal(np.sign(steps[0].round(6)), DIRECTIONS[example.answer])
        assert 2.99 <= np.abs(steps[0]).max() <= 5.01
        counts[example.answer] += 1
    assert min(counts.values()) >= 60


@pytest.mark.parametrize("number", range(NUM_FRAMES))
def test_one_frame_does_not_tell_the_direction(number):
    """Neighbours by where the digit is in one frame guess it too often to be called chance, but far from well."""
    from sklearn.neighbors import KNeighborsClassifier

    def places(found):
        return [middle(frames(example)[number]) for example in found], [example.answer for example in found]

    known = list(examples_with_truth("motion", "train", 1000))
    guess = KNeighborsClassifier(25).fit(*places(known))
    assert 0.25 < guess.score(*places(held_out("motion"))) < 0.6


def test_shuffled_frames_are_the_same_in_another_order():
    for number, example in enumerate(held_out("motion")[:20]):
        shuffled = shuffled_frames(example, number)
        ours, theirs = ([frame.tobytes() for frame in frames(e)] for e in (example, shuffled))
        assert ours != theirs and sorted(ours) == sorted(theirs)
        assert shuffled.answer == example.answer and said(shuffled) == said(example)


@pytest.fixture(scope="module")
def tiny():
    """Processor and configuration of the package's tiny checkpoint."""
    config = Glm4vConfig.from_dict(read_json_object(TINY_CHECKPOINT / "config.json"))
    return Glm4vProcessor.from_pretrained(TINY_CHECKPOINT), config


def test_the_released_processor_does_not_resize(tiny):
    """Patches of 14 pixels: as many as the pictures have."""
    grids = {"reading": [[6, 6]], "grounding1": [[8, 8]], "grounding2": [[8, 8]], "motion": [[4, 4]] * 2}
    for task, expected in grids.items():
        (record,) = examples(task, "train", 1)
        sample = encode(record, *tiny)
        assert sample.frames.tolist() == expected
        learned = sample.targets[sample.targets != IGNORED].tolist()
        text = tiny[0].tokenizer.decode(learned, skip_special_tokens=False)
        assert text == record.messages[-1]["content"][0]["text"] + "<|user|>"


def test_errors():
    with pytest.raises(DataError, match="task: found 'writing', expected one of reading"):
        examples("writing", "train", 1)
    with pytest.raises(DataError, match="split: found 'test', expected 'train' or 'held-out'"):
        examples("reading", "test", 1)


def test_rounds_show_every_digit_before_any_again():
    found = [e.answer for e in itertools.islice(examples_with_truth("reading", "held-out", 2 * NUM_HELD_OUT), 360)]
    assert sorted(found) == sorted(map(str, digits("held-out").labels))
