"""Rewards: a table of cases, and any text at all."""

import json
import pathlib
import random
import time

import pytest

from glm4v_jax.errors import DataError
from glm4v_jax.generate.text.thinking import BOX, END_BOX, TAGS
from train.rl.config import FIELDS, VerifierConfig
from train.rl.verifiers import Verifier, is_loop

CASES = [json.loads(line) for line in (pathlib.Path(__file__).parent / "verifier_cases.jsonl").open(encoding="utf-8")]
"""kind, item, the text or the content of its box, value, reason, and options of the verifier."""
REFERENCES = {case["kind"]: case["item"] for case in CASES}
ALL = "\n".join(case.get("box", "") for case in CASES if len(case.get("box", "")) < 200)


def test_answers_have_the_rewards_of_the_table():
    assert len(CASES) >= 150 and {case["kind"] for case in CASES} == FIELDS.keys()
    wrong = []
    for case in CASES:
        verifier = Verifier(VerifierConfig(kind=case["kind"], **case.get("options", {})))
        text = case.get("text", f"<think></think><answer>{BOX}{case.get('box')}{END_BOX}</answer>")
        reward = verifier.score(text, case["item"])
        if (reward.value, reward.reason) != (pytest.approx(case["value"]), case["reason"]):
            wrong.append((case, reward))
    assert not wrong, "\n".join(map(str, wrong))


def test_any_text_has_a_reward_soon():
    draw = random.Random(0)
    pieces = [
        *TAGS,
        *ALL.split("\n"),
        "\\boxed{",
        "}",
        "[",
        "{",
        "(",
        "9",
        ".",
        ",",
        "-",
        "e",
        " ",
        "\n",
        "的",
        "é",
        "\ud800",
    ]
    verifiers = [(Verifier(VerifierConfig(kind=kind)), item) for kind, item in REFERENCES.items()]
    slowest = 0.0
    for number in range(10_000):
        verifier, item = verifiers[number % len(verifiers)]
        inside = "".join(draw.choices(pieces, k=draw.randrange(1, 12)))
        text = f"<answer>{BOX}{inside}{END_BOX}" if number % 3 else inside
        start = time.process_time()
        reward = verifier.score(text, item)
        slowest = max(slowest, time.process_time() - start)
        assert 0 <= reward.value <= 1, (text, reward)
        json.dumps(reward)
    assert slowest < 1  # in the rule of a kind; a text of usual length takes less than a millisecond


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("piece", ["9", "[1,1,2,2]", "((", "-", "\\frac{", "a b ", "{'a':", "<answer>", "1,000", "é\n"])
def test_long_texts_take_no_more_than_their_length(kind, piece):
    text = f"<answer>{BOX}{''.join(f'{piece}{i % 7}' for i in range(3000))}{END_BOX}"
    start = time.process_time()
    reward = Verifier(VerifierConfig(kind=kind)).score(text, REFERENCES[kind])
    assert 0 <= reward.value <= 1 and time.process_time() - start < 2


@pytest.mark.parametrize(
    ("kind", "item", "field"),
    [
        ("math", {}, "answer"), ("ocr", {"answers": []}, "answers"), ("grounding", {"boxes": [[1, 2, 3, 4]]}, "width"),
        ("grounding", {"boxes": [[3, 2, 1, 4]], "width": 9, "height": 9}, "boxes"),
        ("gui", {"answer": "tap"}, "answer"),
        ("choice", {"options": {"A": "red"}, "answer": "B"}, "answer"),
    ],
)  # fmt: skip
def test_a_reference_that_cannot_be_compared_with_is_named(kind, item, field):
    with pytest.raises(DataError, match=f"^{field}: found .*; expected "):
        Verifier(VerifierConfig(kind=kind)).check(item)


@pytest.mark.parametrize("case", [case for case in CASES if case["value"] == 1 and "box" in case][::5], ids=str)
def test_references_are_right(case):
    verifier = Verifier(VerifierConfig(kind=case["kind"], **case.get("options", {})))
    verifier.check(case["item"])
    assert verifier.score(verifier.reference_text(case["item"]), case["item"]).value == 1


def test_a_loop_is_found_wherever_it_stands():
    draw = random.Random(1)
    noise = ["".join(draw.choices("abcdefghij ", k=draw.randrange(40))) for _ in range(12)]
    window = "".join(draw.choices("klmnopqrst ", k=50))
    assert is_loop("".join(piece + window for piece in noise[:10]))
    assert not is_loop("".join(piece + window for piece in noise[:9]) + "x" * 300)
    assert not is_loop("".join(str(number) for number in range(20_000)))
