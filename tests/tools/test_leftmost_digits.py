"""The task of `make rl`: the answer is the leftmost digit, and its files are problems that a job takes."""

import PIL.Image
import pytest

from glm4v_jax.data.media import source_of
from glm4v_jax.tiny.digits import GROUNDING_SIZE, digits
from tools.leftmost_digits import NEW, TIERS, questions, write_problems
from train.rl.config import VerifierConfig
from train.rl.judging import Judges
from train.rl.problems import read_problems
from train.rl.self_test import self_test
from train.rl.verifiers import make_verifiers

pytest.importorskip("sklearn")


@pytest.mark.parametrize("tier", NEW)
def test_digits_stand_side_by_side_and_the_answer_is_the_leftmost(tier, monkeypatch):
    drawn = []

    def put(canvas, pixels, size, left, top):
        drawn.append((left, size, pixels.tobytes()))
        assert 0 <= top <= len(canvas) - size

    monkeypatch.setattr("tools.leftmost_digits.put_digit", put)
    labels = {pixels.tobytes(): label for pixels, label in zip(*digits("train"), strict=True)}
    number = int(tier[-1])
    for place, example in enumerate(questions(tier, "train", 50)):
        here = drawn[place * number : (place + 1) * number]
        ends = [0, *(left + size for left, size, _ in here)]
        assert all(left >= end for (left, _, _), end in zip(here, ends, strict=False)) and ends[-1] <= GROUNDING_SIZE
        found = [labels[pixels] for _, _, pixels in here]
        assert str(found[0]) == example.answer and found[0] not in found[1:]


def test_questions_follow_from_the_seed_and_are_of_their_side_of_the_split():
    ours, again = questions("left2", "held-out", 8), questions("left2", "held-out", 8)
    assert [one.media.tobytes() for one in ours] == [one.media.tobytes() for one in again]
    others = [*questions("left2", "train", 8), *questions("left2", "held-out", 8, seed=1)]
    assert not {one.media.tobytes() for one in ours} & {one.media.tobytes() for one in others}


def test_a_job_takes_the_problems(tmp_path):
    path = write_problems(tmp_path, dict.fromkeys(TIERS, 6), seed=0)
    verifiers = make_verifiers({tier: VerifierConfig(kind="counting") for tier in TIERS})
    problems = read_problems([str(path)], verifiers)
    with Judges(verifiers) as judges:
        self_test(judges, problems.examples())
    assert [problems.domains.count(tier) for tier in TIERS] == [6] * 4
    asked = questions("left3", "train", 6)[2]
    problem = problems[problems.keys.index(asked.source)]
    assert problem.item == {"answer": asked.answer}
    assert problem.messages[0]["content"][1] == asked.messages[0]["content"][1]
    image = PIL.Image.open(source_of(problem.messages[0]["content"][0]))
    assert image.tobytes() == asked.media.tobytes()
