"""Questions about charts, photographs, documents and exams: values worked out from the metrics' definitions."""

import random

import pytest

from eval.metrics import METRICS
from eval.metrics.metric import Score
from eval.metrics.vqa import normalized
from glm4v_jax.errors import DataError


def value(name, text, item):
    return METRICS[name].score(text, item).value


class TestRelaxedAccuracy:
    @pytest.mark.parametrize(
        ("text", "answer", "expected"),
        [
            ("105", "100", 1),
            ("105.1", "100", 0),
            ("95", "100", 1),
            ("94.9", "100", 0),
            ("-10", "-10.4", 1),
            ("10", "-10", 0),
            ("0.5", "50%", 1),
            ("50%", "50", 0),
            ("52%", "50%", 1),
            # As texts: a target of 0, and a number with a comma.
            ("0", "0", 1),
            ("0.0", "0", 0),
            ("1,000", "1000", 0),
            ("1,000", "1,000", 1),
            ("Blue", "blue", 1),
            ("blue.", "blue", 0),
            ("<think>9</think><answer>It is <|begin_of_box|>104<|end_of_box|></answer>", "100", 1),
        ],
    )
    def test_values(self, text, answer, expected):
        assert value("relaxed_accuracy", text, {"answer": answer}) == expected

    def test_within_five_per_cent(self):
        rng = random.Random(0)
        for _ in range(1000):
            target, share = rng.choice([-1, 1]) * rng.uniform(0.01, 1e6), rng.uniform(-0.1, 0.1)
            if abs(abs(share) - 0.05) > 1e-6:
                expected = float(abs(share) < 0.05)
                assert value("relaxed_accuracy", repr(target * (1 + share)), {"answer": repr(target)}) == expected

    def test_aggregate(self):
        rows = [("human_test", 1.0), ("human_test", 0.0), ("augmented_test", 1.0)]
        figures = METRICS["relaxed_accuracy"].aggregate([({"type": kind}, Score(of, "x")) for kind, of in rows])
        assert figures == {
            "score": pytest.approx(2 / 3),
            "type/augmented_test": 1.0,
            "type/human_test": 0.5,
        }


class TestChartqaPro:
    @pytest.mark.parametrize(
        ("text", "item", "expected"),
        [
            ("104", {"answer": "100"}, 1),
            ("104%", {"answer": "100"}, 1),
            ("2004", {"answer": "2005", "year": ["NO"]}, 1),
            ("2004", {"answer": "2005", "year": ["YES"]}, 0),
            ("2005", {"answer": "2005", "year": "YES"}, 1),
            ("0", {"answer": "0"}, 1),
            ("0.1", {"answer": "0"}, 0),
            ("Blue.", {"answer": "blue"}, 1),
            ("abc", {"answer": "abcd"}, 0.75),
            ("ab", {"answer": "abcd"}, 0),
            ("[1, 'b']", {"answer": "[1, b]"}, 1),
            ("[1, b]", {"answer": "['1', 'b']"}, 1),
            ("1", {"answer": "[1, b]"}, 0.5),
            ("[1, b, c]", {"answer": "[1, b]"}, 2 / 3),
            ("[2004, 7]", {"answer": "[2005, 7]", "year": ["YES", "NO"]}, 0.5),
            ("[2004, 2005]", {"answer": "[2005, 2005]", "year": ["YES"]}, 0.5),
            ("2004", {"answer": "2005", "year": ["YES", "NO"], "type": "Conversational"}, 1),
            ("tru", {"answer": "true", "type": "Fact Checking"}, 0),
            ("True", {"answer": "true", "type": "Fact Checking"}, 1),
        ],
    )
    def test_values(self, text, item, expected):
        assert value("chartqapro", text, item) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("text", "item", "expected"),
        [
            ("tru", {"answer": "true", "type": "Fact Checking"}, 0.75),
            ("['1', 'b']", {"answer": "[1, b]"}, 1),
            # No list in Python's notation: one element against two.
            ("[1, b]", {"answer": "['1', 'b']"}, 0),
            ("['ab', 'c']", {"answer": "[a b, c]"}, 1),
        ],
    )
    def test_as_vlmevalkit_calls_it(self, text, item, expected):
        assert value("chartqapro-vlmevalkit", text, item) == pytest.approx(expected)


class TestVqaAccuracy:
    @pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
    def test_leave_one_out(self, matches, expected):
        # With m equal answers of ten: m times min(1, (m - 1) / 3) and 10 - m times min(1, m / 3), by ten.
        item = {"answers": ["cat"] * matches + [f"dog {index}" for index in range(10 - matches)]}
        assert value("vqa_accuracy", "Cat", item) == pytest.approx(expected)

    @pytest.mark.parametrize(("answers", "expected"), [(["cat"], 1), (["dog", "cat", "cat"], 1), (["dog"], 0)])
    def test_few_answers(self, answers, expected):
        assert value("vqa_accuracy", "the cat", {"answers": answers}) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The  Dog", "dog"),
            ("two dogs", "2 dogs"),
            ("none", "0"),
            ("dont", "don't"),
            ("couldn'tve", "couldn't've"),
            ("somebody'd", "somebodyd"),
            ("red/blue", "red blue"),
            ("red, blue", "red blue"),
            ("1,000 x-rays", "1000 xrays"),
            ("x-rays", "x rays"),
            ("3.5", "3.5"),
            ("U.S.A.", "USA".lower()),
            # The misspelt lookbehind.
            ("5.", "5"),
            # The count that is a flag: the 33rd full stop stays.
            ("." * 33, "."),
        ],
    )
    def test_normalization(self, text, expected):
        assert normalized(text) == expected

    def test_variants(self):
        assert normalized("5.", is_repaired=True) == "5."
        assert normalized("dog's, cat?", is_eval_ai=True) == "dog 's cat"
        assert normalized("dog's, cat?") == "dog's cat"
        ten = ["5"] * 10
        assert value("vqa_accuracy", "5.", {"answers": ten}) == 1
        assert value("vqa_accuracy-vlmevalkit", "5.", {"answers": ten}) == 0
        assert value("vqa_accuracy-lmms", "5?", {"answers": ten}) == 1


class TestOcrbench:
    @pytest.mark.parametrize(
        ("name", "text", "item", "expected"),
        [
            ("ocrbench", "It says STOP\nHERE.", {"answer": "stop here"}, 1),
            ("ocrbench", "no", {"answers": ["a", "No"]}, 1),
            ("ocrbench", "sto p", {"answer": "stop"}, 0),
            ("ocrbench", "<think>stop</think>go", {"answer": "stop"}, 0),
            ("ocrbench", "<answer>STOP <|begin_of_box|>sign<|end_of_box|></answer>", {"answer": "stop"}, 1),
            ("ocrbench", "x ^ 2\n+ Y", {"answer": "x^2+Y", "dataset": "HME100k"}, 1),
            ("ocrbench", "x^2+y", {"answer": "x^2+Y", "type": "Handwritten Mathematical Expression Recognition"}, 0),
            ("ocrbench", "ＡＢ１", {"answer": "ab1"}, 0),
            ("ocrbench-lmms", "ＡＢ１", {"answer": "ab1"}, 1),
        ],
    )
    def test_values(self, name, text, item, expected):
        assert value(name, text, item) == expected

    def test_groups(self):
        rows = [("Regular Text Recognition", 1.0), ("Handwriting Recognition", 0.0), ("Doc-oriented VQA", 1.0)]
        figures = METRICS["ocrbench"].aggregate([({"type": kind}, Score(of, "x")) for kind, of in rows])
        assert figures["score"] == pytest.approx(2 / 3) and figures["points"] == 2
        assert figures["group/Text Recognition"] == 0.5 and figures["group/Doc-oriented VQA"] == 1
        assert figures["type/Handwriting Recognition"] == 0


INTEGER = {"answer": "3", "answer_type": "integer", "type": "free_form"}
FLOAT = {"answer": "1.2", "answer_type": "float", "precision": 1.0, "type": "free_form"}
CHOICE = {"answer": "1/2", "options": ["1/3", "1/2"], "type": "multi_choice", "answer_type": "text"}


class TestMathvista:
    @pytest.mark.parametrize(
        ("text", "item", "expected"),
        [
            ("3", INTEGER, 1),
            ("3.9", INTEGER, 1),
            ("<|begin_of_box|>3 apples<|end_of_box|>", INTEGER, 1),
            ("4", INTEGER, 0),
            ("1.23", FLOAT, 1),
            ("1.2 m", FLOAT, 1),
            ("1.26", FLOAT, 0),
            ("1", FLOAT | {"answer": "1.00", "precision": 2}, 1),
            ("(B) 1/2", CHOICE, 1),
            ("1/2", CHOICE, 1),
            ("A", CHOICE, 0),
            ("[1, 2]", {"answer": "[1, 2]", "answer_type": "list"}, 1),
            ("Yes", {"answer": "yes"}, 1),
        ],
    )
    def test_values(self, text, item, expected):
        assert value("mathvista", text, item) == expected

    def test_unparsed_or_nearest(self):
        for text, item in [("three", INTEGER), ("12", CHOICE), ("2 or 3", INTEGER)]:
            assert METRICS["mathvista"].score(text, item) == (0.0, None, {})
        assert METRICS["mathvista-official"].score("three", INTEGER) == (0.0, None, {})
        # One edit from "1/2", two from "1/3".
        assert METRICS["mathvista-official"].score("12", CHOICE) == (1.0, "1/2", {})
        assert METRICS["mathvista-official"].score("3 apples", INTEGER).parsed is None

    def test_precision_is_needed(self):
        with pytest.raises(DataError, match="precision: found nothing"):
            METRICS["mathvista"].check(FLOAT | {"precision": None})

    def test_aggregate(self):
        rows = [("VQA", ["logic", "algebra"], 1.0), ("FQA", ["logic"], 0.0)]
        scores = [({"task": task, "skills": skills}, Score(of, "x")) for task, skills, of in rows]
        assert METRICS["mathvista"].aggregate(scores) == {
            "score": 0.5,
            "task/FQA": 0.0,
            "task/VQA": 1.0,
            "skill/algebra": 1.0,
            "skill/logic": 0.5,
        }
