"""Boxes: IoU against pycocotools, pairing against scipy's assignment, the rest by hand."""

import random

import numpy as np
import pytest
from pycocotools import mask
from scipy.optimize import linear_sum_assignment

from eval.metrics import METRICS
from eval.metrics.boxes import iou, match_boxes
from eval.metrics.metric import Score
from eval.tasks import find_task
from glm4v_jax.errors import DataError

ITEM = {"boxes": [[20, 10, 120, 60]], "width": 200, "height": 100}
PERFECT = "<think>[0,0,9,9]</think><answer><|begin_of_box|>[[100,100,600,600]]<|end_of_box|></answer>"


def random_boxes(rng, count, size=100):
    corners = np.sort(rng.uniform(0, size, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4)


class TestIou:
    def test_values_equal_pycocotools(self):
        rng = np.random.default_rng(0)
        ours, others = random_boxes(rng, 1000), random_boxes(rng, 1000)
        as_sizes = [np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1) for b in (ours, others)]
        theirs = [mask.iou(a[None], b[None], [0]).item() for a, b in zip(*as_sizes, strict=True)]
        found = [iou(a, b) for a, b in zip(ours.tolist(), others.tolist(), strict=True)]
        np.testing.assert_allclose(found, theirs, atol=1e-12)
        assert 200 < np.count_nonzero(found) < 1000

    @pytest.mark.parametrize(
        ("box", "other", "expected"),
        [
            ((0, 0, 2, 2), (0, 0, 2, 2), 1), ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3), ((0, 0, 2, 2), (2, 0, 4, 2), 0),
            ((0, 0, 0, 0), (0, 0, 0, 0), 0), ((2, 2, 0, 0), (0, 0, 2, 2), 0), ((0, 0, 4, 4), (1, 1, 3, 3), 0.25),
        ],
    )  # fmt: skip
    def test_values(self, box, other, expected):
        assert iou(box, other) == pytest.approx(expected)


class TestRefcoco:
    def test_an_iou_of_half_is_a_hit(self):
        assert METRICS["refcoco"].score(PERFECT, ITEM) == (1.0, [20, 10, 120, 60], {"iou": 1.0})
        # Half of the box: IoU 0.5 exactly.
        assert METRICS["refcoco"].score("[100,100,350,600]", ITEM)[::2] == (1.0, {"iou": 0.5})
        value, _, parts = METRICS["refcoco"].score("[100,100,349,600]", ITEM)
        assert value == 0 and parts["iou"] == pytest.approx(0.498)

    def test_the_first_of_several_counts_unless_one_is_expected(self):
        two = f"{PERFECT[:-22]}, [0,0,1,1]]<|end_of_box|></answer>"
        assert METRICS["refcoco"].score(two, ITEM).value == 1
        assert METRICS["box_iou"].score(two, ITEM)[::2] == (0.0, {"iou": 0.0})
        assert METRICS["box_iou"].score(PERFECT, ITEM).value == 1

    def test_corners_are_ordered_and_clipped(self):
        assert METRICS["refcoco"].score("[600,600,100,100]", ITEM).value == 1
        assert METRICS["refcoco-pixel"].score("[20,10,120,6000]", ITEM).parsed == [20, 10, 120, 100]

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("refcoco-unit", "(0.1, 0.1, 0.6, 0.6)"),
            ("refcoco-pixel", "[20, 10, 120, 60]"),
            ("refcoco-lmms", "At [0.1, 0.1, 0.6, 0.6] or [0, 0, 1, 1]"),
            ("refcoco-vlmevalkit", "[0.1, 0.1, 0.6, 0.6]"),
            ("refcoco-vlmevalkit", "[100 100 600 600]"),
            ("refcoco-vlmevalkit", "from 100, 100 to 600, 600"),
        ],
    )
    def test_scales_of_harnesses(self, name, text):
        assert METRICS[name].score(text, ITEM).parts["iou"] == pytest.approx(1)

    @pytest.mark.parametrize(
        ("text", "overlap"),
        [
            # As `parse_float_sequence_within` and `compute_iou` of lmms-eval, tasks/refcoco/utils_rec.py, have it.
            ("[0.1, 0.1, 0.6, 1.6]", 1 / 3),  # not clipped
            ("[0.6, 0.1, 0.1, 0.6]", 0), ("[100, 100, 600, 600]", 0), ("[0.1 0.1 0.6 0.6]", 0),
            ("(0.1, 0.1, 0.6, 0.6)", 0), ("[.1, .1, .6, .6]", 0), ("[[0.1, 0.1, 0.6, 0.6]]", 1),
            ("[-0.1, 0, 1, 1]", 5 / 22),
        ],
    )  # fmt: skip
    def test_boxes_of_lmms_eval(self, text, overlap):
        score = METRICS[find_task("refcoco@lmms-eval").metric].score(text, ITEM)
        assert score.parts.get("iou", 0) == pytest.approx(overlap)
        assert score.value == (overlap >= 0.5)

    def test_the_guessed_scale_may_be_wrong(self):
        # Pixels of a small image are taken for thousandths.
        assert METRICS["refcoco-vlmevalkit"].score("[20, 10, 120, 60]", ITEM).value == 0
        wide = {"boxes": [[20, 10, 1200, 60]], "width": 2000, "height": 100}
        assert METRICS["refcoco-vlmevalkit"].score("[20, 10, 1200, 60]", wide).value == 1

    @pytest.mark.parametrize("text", ["", "here", "<think>[100,100,600,600]", "[1200,10,1300,20]"])
    def test_answers_without_boxes_are_unparsed(self, text):
        assert METRICS["refcoco"].score(text, ITEM) == (0.0, None, {})

    def test_figures_by_split(self):
        rows = [("val", 1.0, 0.8), ("val", 0.0, 0.4), ("testA", 1.0, 0.6)]
        scores = [({"split": split}, Score(value, [0], {"iou": overlap})) for split, value, overlap in rows]
        scores.append(({"split": "testA"}, Score(0.0, None)))
        figures = METRICS["refcoco"].aggregate(scores)
        expected = {"score": 0.5, "mean_iou": 0.45, "macro": 0.5, "split/testA": 0.5, "split/val": 0.5}
        assert next(iter(figures)) == "score" and figures == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"boxes": []}, "boxes: found 0; expected exactly one"),
            ({"boxes": [[3, 0, 1, 1]]}, "x1 <= x2"),
            ({"boxes": [[1, 2, 3]]}, "expected four numbers"),
            ({"boxes": None}, "boxes: found nothing; expected the field beside height, width"),
            ({"width": 0}, "width: found 0"),
        ],
    )
    def test_invalid_references_are_errors(self, change, message):
        with pytest.raises(DataError, match=message):
            METRICS["refcoco"].score(PERFECT, ITEM | change)


class TestMultiBox:
    def test_pairs_are_as_many_as_scipys_where_boxes_are_apart(self):
        rng = np.random.default_rng(0)
        places = [(x, y) for x in range(0, 1000, 100) for y in range(0, 1000, 100)]
        differ = 0
        for _ in range(200):
            order = rng.permutation(len(places))[:6]
            gold = np.array([(places[i][0], places[i][1], places[i][0] + 90, places[i][1] + 90) for i in order])
            found = (gold + rng.normal(0, 15, gold.shape))[rng.permutation(6)[: rng.integers(1, 7)]]
            overlaps = np.array([[iou(a, b) for b in gold] for a in found])
            rows, columns = linear_sum_assignment(overlaps >= 0.5, maximize=True)
            expected = int(np.sum(overlaps[rows, columns] >= 0.5))
            ours = match_boxes(found.tolist(), gold.tolist())
            assert len(ours) == expected
            differ += expected < len(found)
        assert differ > 20

    def test_greedy_takes_the_best_pair_first(self):
        gold = [(0, 0, 10, 10), (0, 0, 10, 8)]
        pairs = match_boxes([(0, 0, 10, 8), (0, 0, 10, 10)], gold)
        assert pairs == [(0, 1, 1.0), (1, 0, 1.0)]

    def test_a_box_named_twice_is_found_once(self):
        value, parsed, parts = METRICS["multi_box"].score("[[100,100,600,600],[100,100,600,600]]", ITEM)
        counts = {"matched": 1, "found": 2, "expected": 1}
        assert parts == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), **counts}
        assert value == parts["f1"] and len(parsed) == 2

    def test_no_box_is_right_where_none_is_expected(self):
        nothing = ITEM | {"boxes": []}
        assert METRICS["multi_box"].score("There is none.", nothing)[:2] == (1.0, [])
        assert METRICS["multi_box"].score("[1,2,3,4]", nothing).value == 0
        assert METRICS["multi_box"].score("", nothing)[:2] == (0.0, None)

    def test_figures_are_over_all_boxes(self):
        two = ITEM | {"boxes": [[20, 10, 120, 60], [0, 0, 10, 10]]}
        items = [ITEM, two, two]
        texts = ["[100,100,600,600]", "[[100,100,600,600],[900,900,999,999],[800,800,999,999]]", "no idea"]
        scores = [(item, METRICS["multi_box"].score(text, item)) for item, text in zip(items, texts, strict=True)]
        figures = METRICS["multi_box"].aggregate(scores)
        # 2 matched, 4 named, 5 expected; by item 1, 2/5 and 0.
        assert figures == pytest.approx({"score": 4 / 9, "precision": 0.5, "recall": 0.4, "macro_f1": 1.4 / 3})


def test_every_scale_gives_the_same_score():
    rng = random.Random(0)
    for _ in range(300):
        width, height = rng.randint(50, 2000), rng.randint(50, 2000)
        thousandths = [rng.randrange(0, 500), rng.randrange(0, 500), rng.randrange(500, 1000), rng.randrange(500, 1000)]
        sizes = (width, height, width, height)
        pixels = [value / 1000 * size for value, size in zip(thousandths, sizes, strict=True)]
        item = {"boxes": [[0.0, 0.0, width * 0.7, height * 0.8]], "width": width, "height": height}
        overlaps = [
            METRICS["refcoco"].score(str(thousandths), item).parts["iou"],
            METRICS["refcoco-unit"].score(str([value / 1000 for value in thousandths]), item).parts["iou"],
            METRICS["refcoco-pixel"].score(str(pixels), item).parts["iou"],
        ]
        assert overlaps == pytest.approx([overlaps[0]] * 3, abs=1e-9)
