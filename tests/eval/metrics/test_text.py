"""Texts: ANLS with either boundary and error rates against the libraries that define them, the rest by hand."""

import random

import anls_star
import jiwer
import pytest
from anls import anls_score

from eval.metrics import METRICS
from glm4v_jax.errors import DataError


def random_text(rng, low=0):
    return "".join(rng.choice("aAbBc  dé中") for _ in range(rng.randrange(low, 9)))


def random_pairs(count):
    """Of which about half are near each other."""
    rng = random.Random(0)
    for _ in range(count):
        gold = [random_text(rng, 1) for _ in range(rng.randint(1, 3))]
        answer = random_text(rng)
        if rng.random() < 0.5:
            answer = "".join(character for character in rng.choice(gold) if rng.random() < 0.8)
        yield answer, gold


def plain(text):
    return " ".join(text.lower().split())


class TestAnls:
    def test_values_equal_the_package_anls(self):
        seen = set()
        for answer, gold in random_pairs(1000):
            if not answer.strip():
                continue
            theirs = anls_score(prediction=plain(answer), gold_labels=[plain(text) for text in gold], threshold=0.5)
            value = METRICS["anls"].score(answer, {"answers": gold}).value
            assert value == pytest.approx(theirs, abs=1e-12)
            seen.add(value)
        assert {0.0, 1.0} < seen

    def test_inclusive_values_equal_anls_star(self):
        boundary = 0
        for answer, gold in random_pairs(1000):
            if not answer.strip():
                continue
            value = METRICS["anls-inclusive"].score(answer, {"answers": gold}).value
            assert value == pytest.approx(anls_star.anls_score(tuple(gold), answer), abs=1e-12)
            boundary += value == 0.5
        assert boundary > 10

    @pytest.mark.parametrize(
        ("name", "answer", "gold", "value"),
        [
            ("anls", "abc", "ABCD", 0.75), ("anls", "ab", "abcd", 0), ("anls-inclusive", "ab", "abcd", 0.5),
            ("anls-harness", "ab", "abcd", 0.5), ("anls", "a   b", "a b", 1),
            # One edit of three letters, or of the five that were written.
            ("anls", "a   c", "a b", 2 / 3), ("anls-harness", "a   c", "a b", 0.8),
            # The harnesses divide by the length in capitals: STRASSE, FINE.
            ("anls", "straße", "strase", 5 / 6), ("anls-harness", "straße", "strase", 6 / 7),
            ("anls-harness", "ﬁne", "ﬁle", 0.75), ("anls-harness", "ß", "s", 0.5),
        ],
    )  # fmt: skip
    def test_boundary_and_lengths(self, name, answer, gold, value):
        assert METRICS[name].score(answer, {"answer": gold}).value == pytest.approx(value)


class TestErrorRates:
    @pytest.mark.parametrize(("name", "theirs"), [("cer", jiwer.cer), ("wer", jiwer.wer)])
    def test_rates_equal_jiwer(self, name, theirs):
        scores = []
        references, answers = [], []
        for answer, (gold, *_) in random_pairs(1000):
            if not gold.strip() or not answer.strip():
                continue
            reference, hypothesis = " ".join(gold.split()), " ".join(answer.split())
            score = METRICS[name].score(answer, {"answer": gold})
            rate = theirs(reference, hypothesis)
            assert score.parts["error_rate"] == pytest.approx(rate, abs=1e-12)
            assert score.value == pytest.approx(max(0, 1 - rate), abs=1e-12)
            references.append(reference)
            answers.append(hypothesis)
            scores.append(({"answer": gold}, score))
        figures = METRICS[name].aggregate(scores)
        assert figures["error_rate"] == pytest.approx(theirs(references, answers), abs=1e-12)
        assert figures["score"] == pytest.approx(max(0, 1 - figures["error_rate"]))

    def test_an_empty_answer_has_deleted_everything(self):
        value, parsed, parts = METRICS["cer"].score("", {"answer": "abcd"})
        assert (value, parsed, parts) == (0.0, None, {"error_rate": 1.0, "edits": 4.0, "length": 4.0})

    def test_the_best_of_several_references_counts(self):
        text = "<think>no</think><answer>It says <|begin_of_box|>one two<|end_of_box|></answer>"
        assert METRICS["wer"].score(text, {"answers": ["three", "one two"]}).value == 1

    def test_a_rate_above_one_scores_zero(self):
        score = METRICS["cer"].score("abcdef", {"answer": "x"})
        assert score.value == 0 and score.parts["error_rate"] == 6

    def test_similarity_ignores_whitespace(self):
        assert METRICS["ocr_similarity"].score("a bcd", {"answer": "ab c"}).value == 0.75


class TestExactMatch:
    @pytest.mark.parametrize(
        ("text", "answer", "value"),
        [
            ("<|begin_of_box|>Seven <|end_of_box|>", "seven", 1),
            ("<think>8</think><answer>a  b", "A B", 1),
            ("7.0", "7", 0),
            ("7", "<think>x</think><answer><|begin_of_box|>7<|end_of_box|></answer>", 1),
            ("7", 7, 1),
            ("b", "b", 1),
        ],
    )
    def test_values(self, text, answer, value):
        assert METRICS["exact_match"].score(text, {"answer": answer}).value == value

    def test_any_of_several(self):
        assert METRICS["exact_match"].score("b", {"answers": ["a", "b"]}).value == 1

    @pytest.mark.parametrize("item", [{}, {"answer": None}, {"answers": []}, {"answers": "a"}])
    def test_references_without_answers_are_errors(self, item):
        with pytest.raises(DataError, match=r"answers?: "):
            METRICS["exact_match"].score("b", item)
