"""bench.ocr on a tiny model: the package's side; the sums around both."""

import json

import numpy as np
import PIL.Image
import pytest

from bench import ocr, ocr_sides
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.tiny import TINY_CHECKPOINT

pytestmark = pytest.mark.slow


class Stub:
    """A side that takes the same time for everything."""

    def __init__(self, seconds, tokens=(1, 2)):
        self.results = {
            "load": {"seconds": seconds, "weights": 1},
            "page": {"seconds": seconds, "compile": 0.5},
            "decode": {"decode": seconds},
            "answer": list(tokens),
            "bandwidth": {"numpy": 1e9},
            "facts": dict.fromkeys(("jax", "torch", "transformers"), "1"),
            "steps": {"step": seconds},
        }

    def __call__(self, task, **arguments):
        return self.results.get(task, 100)


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.npz"
    config = Glm4vConfig.from_pretrained(TINY_CHECKPOINT)
    assert ocr.write_page(path, config, PIL.Image.new("RGB", (84, 112))) == 16 + 2 + 3 * 4
    return path


@pytest.mark.parametrize(("seconds", "tokens", "passed"), [(1.0, (1, 2), True), (1.0, (1, 3), False),
                                                            (2.0, (1, 2), False)])  # fmt: skip
def test_a_run_passes_with_the_aimed_speed_and_the_same_tokens(page, seconds, tokens, passed):
    sides = {"float32": Stub(seconds), "int8": Stub(1.0), "transformers": Stub(2.0, tokens)}
    figures = ocr.run(sides, "", page, rounds=2, threads=2)
    assert figures["passed"] == passed
    assert json.loads(json.dumps(figures)) == figures
    assert [len(table.rows) for table in ocr.tables(figures)] == [3, 2]
    # Equal costs: a draft and its verification cost two steps, which two tokens pay.
    draft = figures["drafts"][0]
    assert draft["pays_above"]["median"] == 1
    assert draft["speed"]["a page"]["median"] == pytest.approx(1.81 / 2)


def test_this_side_goes_on_after_the_page(page):
    side = ocr_sides.Ours("float32")
    side.load(str(TINY_CHECKPOINT), str(page), new_tokens=9)
    assert side.page()["seconds"] > 0
    assert all(side.decode(4)["decode"] > 0 for _ in range(2))
    assert len(side.answer()) == 9
    side.free()
    assert all(side.steps(tokens, mtp)["step"] > 0 for tokens, mtp in ((1, False), (2, False), (1, True)))


def test_the_page_is_drawn_in_its_size():
    page = np.asarray(ocr.draw_page(310, 438))
    assert page.shape == (438, 310, 3)
    assert page.min() < 100
    assert page.max() == 255
