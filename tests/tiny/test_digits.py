"""Digits: the split, the tasks' images and truths, and what is in them."""

import itertools
import re

import numpy as np
import pytest

from glm4v_jax.errors import DataError
from glm4v_jax.generate.text.boxes import find_boxes
from glm4v_jax.generate.text.thinking import is_well_formed, parse
from glm4v_jax.tiny.digits import (
    DIRECTIONS,
    GROUNDING_SIZE,
    NUM_FRAMES,
    NUM_HELD_OUT,
    NUM_TRAIN,
    NUM_VALIDATION,
    STEP,
    TASKS,
    digits,
    examples,
    held_out,
    make_example,
)

load_digits = pytest.importorskip("sklearn.datasets").load_digits


def image_of(example):
    """uint8 [H, W] of the example's image."""
    array = np.asarray(example.media)
    assert array.shape[2] == 3 and (array == array[..., :1]).all()
    return array[..., 0]


def frames(example):
    """uint8 [T, H, W] of the example's video."""
    return np.stack(example.media)[..., 0]


def said(example):
    """What the assistant says."""
    return example.messages[-1]["content"][0]["text"]


def middle(frame):
    """(x, y): the ink's centre of mass."""
    rows, columns = np.indices(frame.shape)
    weight = frame.astype(float)
    return (columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()


def drawn(example):
    """All of what an example shows and says."""
    shown = frames(example) if isinstance(example.media, list) else image_of(example)
    return shown.tobytes(), example.messages[0]["content"][1]["text"], said(example)


def test_split_takes_every_digit_once():
    splits = [digits(split) for split in ("train", "validation", "held-out")]
    assert [len(split.labels) for split in splits] == [NUM_TRAIN, NUM_VALIDATION, NUM_HELD_OUT]
    ours = np.concatenate([split.pixels for split in splits]).reshape(-1, 64)
    everything = load_digits().data
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], everything[np.lexsort(everything.T)])
    assert len(np.unique(ours, axis=0)) == len(ours)  # so none is on two sides
    # No class is rare on any side.
    for split, least in zip(splits, (100, 7, 25), strict=True):
        assert len(np.bincount(split.labels)) == 10 and min(np.bincount(split.labels)) >= least


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_examples(task):
    first, again, other = ([drawn(e) for e in examples(task, "train", 12, seed=seed)] for seed in (3, 3, 4))
    assert first == again and len(set(first)) == 12
    assert not set(first) & set(other)
    # A longer run begins as a shorter one.
    assert [drawn(e) for e in examples(task, "train", 5, seed=3)] == first[:5]


def test_one_example_by_the_number_of_its_digit():
    found = make_example("reading", "validation", 7, np.random.default_rng(0), "here")
    assert (found.answer, found.source) == (str(digits("validation").labels[7]), "here")
    assert found.prompt == [found.messages[0]] and found.messages[1]["role"] == "assistant"


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_in_the_format(task):
    for example in examples(task, "train", 20):
        user, assistant = example.messages
        assert (user["role"], assistant["role"]) == ("user", "assistant")
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
        shown = image_of(example)
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
    found = [int(re.search(r"\d", e.messages[0]["content"][1]["text"])[0]) for e in held_out("grounding2")]
    assert sorted(found) == sorted(digits("held-out").labels)
    # The one that is asked for is on either side as often.
    first = np.mean([boxes[0][0] < boxes[1][0] for _, _, boxes, _ in held_out("grounding2")])
    assert 0.42 < first < 0.58


def test_thoughts_name_the_places_of_digits():
    """Both digits, each at its side along the axis on which they are further apart, and the side that is asked for."""
    for example in held_out("grounding2"):
        asked = re.search(r"\d", example.messages[0]["content"][1]["text"])[0]
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
        asked = re.search(r"\d", example.messages[0]["content"][1]["text"])[0]
        assert parse(said(example)).thought == f"Only {asked}."


def test_digits_move_in_the_direction_of_the_answer():
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


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_FRAMES))
def test_one_frame_does_not_reveal_the_direction(number):
    """Neighbours by where the digit is in one frame guess it too often to be called chance, but far from well."""
    from sklearn.neighbors import KNeighborsClassifier

    def places(found):
        return [middle(frames(example)[number]) for example in found], [example.answer for example in found]

    known = list(examples("motion", "train", 1000))
    guess = KNeighborsClassifier(25).fit(*places(known))
    assert 0.25 < guess.score(*places(held_out("motion"))) < 0.6


def test_errors():
    with pytest.raises(DataError, match="task: found 'writing'; expected one of reading"):
        examples("writing", "train", 1)
    with pytest.raises(DataError, match="split: found 'test'; expected one of train, validation, held-out"):
        examples("reading", "test", 1)


def test_rounds_show_every_digit_before_any_again():
    found = [e.answer for e in itertools.islice(examples("reading", "held-out", 2 * NUM_HELD_OUT), 360)]
    assert sorted(found) == sorted(map(str, digits("held-out").labels))
