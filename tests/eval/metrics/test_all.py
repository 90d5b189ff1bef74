"""What is true of every metric: perfect, empty and hostile answers, aggregates, intervals and errors."""

import json
import random
import time

import pytest

from eval.metrics import METRICS
from eval.statistics import clustered
from glm4v_jax.errors import DataError
from glm4v_jax.generate.text.thinking import TAGS

BOX = {"boxes": [[20.0, 10.0, 120.0, 60.0]], "width": 200, "height": 100}
CHOICES = {"options": {"A": "a cat", "B": "a dog"}, "answer": "B"}
TEXT = {"answer": "blue"}
TABLE = {"answer": "<table><tr><td>a</td><td>b</td></tr></table>"}


def item_of(name):
    if METRICS[name].fields == ("boxes", "width", "height"):
        return BOX
    if name.startswith("teds"):
        return TABLE
    return CHOICES if "options" in METRICS[name].fields else TEXT


def perfect(name):
    if item_of(name) is BOX:
        if name == "screenspot-vlmevalkit":
            return "pyautogui.click(x=40, y=30)"
        scale, unit = name.rpartition("-")[2], "[0.1, 0.1, 0.6, 0.6]"
        return {"unit": unit, "lmms": unit, "pixel": "[20, 10, 120, 60]"}.get(scale, "[100, 100, 600, 600]")
    return item_of(name)["answer"]


@pytest.mark.parametrize("name", METRICS)
class TestEvery:
    def test_a_perfect_answer_scores_one(self, name):
        metric, item = METRICS[name], item_of(name)
        metric.check(item)
        text = f"<think>A [1,2,3,4] 9</think><answer><|begin_of_box|>{perfect(name)}<|end_of_box|></answer>"
        score = metric.score(text, item)
        assert score.value == 1 and score.parsed is not None
        assert metric.name == name and metric.source
        figures = metric.aggregate([(item, score)])
        assert next(iter(figures)) == "score" and figures["score"] == 1

    @pytest.mark.parametrize("text", ["", "<think>blue B [100,100,600,600]", "<think>x</think><answer></answer>"])
    def test_empty_answers_score_zero_and_are_unparsed(self, name, text):
        score = METRICS[name].score(text, item_of(name))
        assert score.value == 0 and score.parsed is None
        figures = METRICS[name].aggregate([(item_of(name), score)])
        assert figures["score"] == 0

    def test_an_empty_answer_halves_the_score(self, name):
        scores = [(item_of(name), METRICS[name].score(text, item_of(name))) for text in (perfect(name), "")]
        assert METRICS[name].aggregate(scores)["score"] == pytest.approx(2 / 3 if name == "multi_box" else 1 / 2)

    def test_the_terms_of_all_clusters_make_the_score(self, name):
        rng = random.Random(name)
        for count in (1, 2, 40):
            scores = []
            for _ in range(count):
                item = item_of(name)
                if METRICS[name].cluster == "group":
                    item = item | {"group": str(rng.randrange(5))}
                elif name == "multi_box":
                    item = item | {"boxes": rng.choice([[], item["boxes"], item["boxes"] * 2])}
                texts = [perfect(name), f"{perfect(name)} x", "A", "[1,2,3,4]", "a long answer of many words", ""]
                text = rng.choice(texts)
                scores.append((item, METRICS[name].score(text, item)))
            clusters = clustered(scores, [item.get("group") for item, _ in scores]).values()
            above, below = zip(*map(METRICS[name].terms, clusters), strict=True)
            score = max(sum(above), 0) / sum(below) if sum(below) else 1
            assert score == pytest.approx(METRICS[name].aggregate(scores)["score"], abs=1e-12)

    def test_no_items_are_an_error(self, name):
        with pytest.raises(DataError, match="found none"):
            METRICS[name].aggregate([])

    def test_missing_fields_are_errors(self, name):
        for field in METRICS[name].fields:
            item = {key: found for key, found in item_of(name).items() if key != field}
            with pytest.raises(DataError, match=f"{field}: found nothing"):
                METRICS[name].check(item)
            with pytest.raises(DataError, match=f"{field}: found nothing"):
                METRICS[name].score(perfect(name), item)

    def test_hostile_answers_score_from_zero_to_one(self, name):
        rng = random.Random(0)
        words = [r"\boxed{", r"1,234", r"1e999", r"nan", r"inf", r"%%", r"B.", r"x=1,y=2", r"[1,2,3,4]", r"1_0"]
        pieces = [*TAGS, *words, "answer is ", "x=1, y=2", "a cat", "= ", *"}[]('\"-%0A\n .²٣\x00\ud83d\u2028"]
        for _ in range(300):
            text = "".join(rng.choice(pieces) for _ in range(rng.randrange(20)))
            score = METRICS[name].score(text, item_of(name))
            assert 0 <= score.value <= 1
            assert score.parsed is not None or score.value == 0
            json.dumps([score.parsed, dict(score.parts)], allow_nan=False)

    def test_time_is_bounded(self, name):
        for piece in (
            "[",
            "-",
            "(1,",
            "1,111",
            "1",
            ".",
            "-1e",
            "'",
            "[[1,2,3,4],",
            "answer is ",
            " ",
            "A ",
            "a\n",
            "<td>",
            "<b>",
            "\\tag{",
        ):
            text = (piece * 20_000)[:20_000]
            start = time.process_time()
            METRICS[name].score(text, item_of(name))
            assert time.process_time() - start < 1.5, piece


def test_hostile_answers_to_other_kinds_of_items():
    items = {
        "chartqapro": {"answer": "[2005, 7]", "year": ["YES", "NO"]},
        "mathvista": {"answer": "1.5", "answer_type": "float", "precision": 1, "type": "free_form"},
        "mmmu": {"answer": "1.5", "type": "open"},
        "vqa_accuracy": {"answers": ["1.5"] * 10},
    }
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choice("[]'\",.-%eE0123456789 =\n") for _ in range(rng.randrange(20)))
        for name, item in items.items():
            assert 0 <= METRICS[name].score(text, item).value <= 1
