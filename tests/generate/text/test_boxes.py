"""Boxes and points in answers, their pixels, and their drawing."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glm4v_jax.errors import GenerationError
from glm4v_jax.generate.text.boxes import draw_boxes, find_boxes, find_points, to_pixels
from glm4v_jax.generate.text.thinking import TAGS

BOX = (12.0, 34.0, 560.0, 789.0)


class TestFind:
    @pytest.mark.parametrize(
        "text",
        [
            "[12, 34, 560, 789]",
            "[[12,34,560,789]]",
            "(12, 34, 560, 789)",
            "((12 34 560 789))",
            "<12,34,560,789>",
            "{12;34;560;789}",
            "[ 12 , 34 ,\n560 , 789 , ]",
            "[12.0, 34.00, 560., +789]",
            "The dog is at [12, 34, 560, 789].",
            '{"bbox_2d": [12, 34, 560, 789], "label": "dog"}',
            "\\boxed{[12, 34, 560, 789]}",
            "狗在【１２，３４，５６０，７８９】。",
            "（12、34、560、789）",
            "<think>[1, 2, 3, 4]</think><answer>[12, 34, 560, 789]",
            "<think>[1, 2, 3, 4]</think>\n[12, 34, 560, 789]",
            "<answer>[1, 2, 3, 4], rather <|begin_of_box|>[[12, 34, 560, 789]]<|end_of_box|></answer>",
            "<answer><|begin_of_box|>dog<|end_of_box|> at [12, 34, 560, 789]",
            "<|begin_of_box|>(12,34,560,789)",
        ],
    )
    def test_one_box(self, text):
        assert find_boxes(text) == [BOX]

    @pytest.mark.parametrize(
        "text",
        [
            "[[12, 34, 560, 789], [0, 0, 1000, 999.5]]",
            "[12, 34, 560, 789] and (0, 0, 1000, 999.5)",
            "1. <12 34 560 789>\n2. {0,0,1000,999.5}",
            "<|begin_of_box|>[12, 34, 560, 789]<|end_of_box|><|begin_of_box|>[0, 0, 1000, 999.5]<|end_of_box|>",
        ],
    )
    def test_several_boxes(self, text):
        assert find_boxes(text) == [BOX, (0.0, 0.0, 1000.0, 999.5)]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "no box",
            "12, 34, 560, 789",
            "[12, 34, 560]",
            "[12, 34, 560, 789, 800]",
            "[12, 34, 560, 1001]",
            "[-1, 34, 560, 789]",
            "(2021, 2022, 2023, 2024)",
            "[a, b, c, d]",
            "[1-2-3-4]",
            "<think>[12, 34, 560, 789]",
            "[" + "9" * 400 + ", 1, 1, 1]",
        ],
    )
    def test_no_box(self, text):
        assert find_boxes(text) == []

    def test_corners_stay_as_written(self):
        assert find_boxes("[560, 789, 12, 34]") == [(560.0, 789.0, 12.0, 34.0)]

    def test_points(self):
        assert find_points("click (100, 250.5) then [[3 4]]") == [(100.0, 250.5), (3.0, 4.0)]
        assert find_points("left_click(start_box='[500,20]')") == [(500.0, 20.0)]
        assert find_points("[12, 34, 560, 789]") == []
        assert find_points("(1, 2) <|begin_of_box|>[3, 4]<|end_of_box|>") == [(3.0, 4.0)]

    def test_other_scales(self):
        assert find_boxes("[10, 20, 1500, 400]") == []
        assert find_boxes("[10, 20, 1500, 400]", limit=math.inf) == [(10, 20, 1500, 400)]
        assert find_boxes(f"[10, 20, {'9' * 400}, 400]", limit=math.inf) == []
        assert find_boxes("[0.1, 0.2, 0.3, 1], [1, 2, 3, 4]", limit=1) == [(0.1, 0.2, 0.3, 1)]
        assert find_points("(1500, 20)", limit=math.inf) == [(1500, 20)]

    def test_never_raises(self):
        draw = random.Random(0)
        pieces = [
            *"[](){}<>【】（），、,;. -+0123456789eE\n\\\ufffd猫²٣",
            *TAGS,
            "[12, ",
            "34, 5",
            "NaN",
            "1e999",
            "None",
        ]
        for _ in range(10_000):
            text = "".join(draw.choices(pieces, k=draw.randrange(40)))
            for found, size in ((find_boxes(text), 4), (find_points(text), 2)):
                assert all(len(box) == size and all(0 <= value <= 1000 for value in box) for box in found)
                to_pixels(found, 640, 480)

    @given(st.text())
    def test_never_raises_on_unicode(self, text):
        find_boxes(text)
        find_points(text)

    @pytest.mark.parametrize("text", ["[" * 50_000, "[1" + " " * 50_000, "[" + "1" * 50_000, "[1, " * 20_000])
    def test_no_text_takes_long(self, text):
        assert find_boxes(text) == find_points(text) == []


class TestPixels:
    def test_each_axis_by_its_own_size(self):
        assert to_pixels([(0, 0, 1000, 1000), (250, 500, 500, 750)], 400, 300) == [
            (0, 0, 400, 300),
            (100, 150, 200, 225),
        ]

    def test_corners_are_put_in_order(self):
        assert to_pixels([(500, 100, 100, 500)], 1000, 1000) == [(100, 100, 500, 500)]

    def test_clipped_to_the_picture(self):
        assert to_pixels([(-50, 10, 1200, 2000)], 640, 480) == [(0, 5, 640, 480)]

    def test_a_point_is_a_pixel_of_the_picture(self):
        assert to_pixels([(1000, 1000), (0, 500)], 640, 480) == [(639, 479), (0, 240)]

    @given(st.tuples(*[st.floats(0, 1000)] * 4), st.integers(1, 5000), st.integers(1, 5000))
    def test_nearest_pixel(self, box, width, height):
        (pixels,) = to_pixels([box], width, height)
        assert pixels[0] <= pixels[2] <= width
        assert pixels[1] <= pixels[3] <= height
        assert abs(pixels[0] - min(box[0], box[2]) * width / 1000) <= 0.5 + 1e-9
        assert abs(pixels[3] - max(box[1], box[3]) * height / 1000) <= 0.5 + 1e-9

    @pytest.mark.parametrize("box", [(1, 2, 3), (1, 2, 3, float("nan")), (1, float("inf"))])
    def test_errors(self, box):
        with pytest.raises(GenerationError, match="box: found"):
            to_pixels([box], 10, 10)
        with pytest.raises(GenerationError, match="image: found 0 x 10"):
            to_pixels([], 0, 10)


class TestDraw:
    @pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), (255, 225, 25), (128, 128, 128)])
    def test_seen_on_every_ground(self, ground):
        image = Image.new("RGB", (400, 300), ground)
        drawn = draw_boxes(image, [(250, 250, 750, 750)])
        assert np.asarray(image).reshape(-1, 3).tolist() == [list(ground)] * (400 * 300)
        difference = np.abs(np.asarray(drawn, int) - np.asarray(image, int)).max(-1)
        changed = difference > 100
        rows, columns = np.nonzero(changed)
        assert rows.min() >= 75 and rows.max() < 225 and columns.min() >= 100 and columns.max() < 300
        # Every line across the box meets its left and its right side.
        assert changed[80:220, 100:110].any(1).all() and changed[80:220, 290:300].any(1).all()
        assert not changed[100:200, 125:275].any()

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
    def test_modes(self, mode):
        assert draw_boxes(Image.new(mode, (40, 30)), [(0, 0, 1000, 1000)]).mode == "RGB"


def test_one_box_and_one_label_need_no_list():
    image, box = Image.new("RGB", (200, 100)), (100, 200, 500, 600)
    assert to_pixels(box, 200, 100) == to_pixels([box], 200, 100)
    assert to_pixels((100.0, 200), 200, 100) == to_pixels([(100, 200)], 200, 100)
    assert draw_boxes(image, box, "cat").tobytes() == draw_boxes(image, [box], ["cat"]).tobytes()
    assert draw_boxes(image, [box] * 3, "cat").tobytes() == draw_boxes(image, [box] * 3, ["cat"]).tobytes()

    @pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5), (3000, 20)])
    def test_small_pictures_and_empty_boxes(self, size):
        boxes = [(0, 0, 1000, 1000), (1000, 1000, 1000, 1000), (500, 500, 500, 500), (990, 0, 1000, 10), (999, 999)]
        assert draw_boxes(Image.new("RGB", size), boxes, labels=["one", "", "drei", "四", "five"]).size == size

    def test_labels(self):
        image = Image.new("RGB", (300, 200), "gray")
        plain, labelled = draw_boxes(image, [BOX, BOX]), draw_boxes(image, [BOX, BOX], labels=["dog"])
        assert plain != labelled
        with pytest.raises(GenerationError, match="labels: found 2 for 1 box;"):
            draw_boxes(image, [BOX], labels=["a", "b"])
