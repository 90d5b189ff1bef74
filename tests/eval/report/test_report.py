"""The page of a run, in a browser if one is installed."""

import base64
import io
import os
import re

import numpy as np
import PIL.Image
import pytest

from eval.report.report import split_thought, write_report
from eval.report.thumbnails import LONGEST_SIDE, MAX_FRAMES, show
from glm4v_jax.errors import DataError
from tests.eval.helpers_eval import INJECTION, item, result, summary_of

BOXES = {"boxes": [[100, 50, 300, 150]], "width": 400, "height": 200}


def noise(width=400, height=200, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), np.uint8)
    return PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC)


def image(**arguments):
    return {"type": "image", "image": noise(**arguments)}


@pytest.fixture(scope="module")
def run():
    """Items and results, one of every kind."""
    frames = [np.asarray(noise(80, 40, seed)) for seed in range(12)]
    items = [
        item("right", "Locate the cat.", BOXES, [image()], "one"),
        item("wrong", "Locate the dog.", BOXES, [image(seed=1)], "one"),
        item("point", "Click on OK.", BOXES, [image(seed=2)], "two"),
        item("video", "Which way does it move?", None, [{"type": "video", "video": frames, "fps": 2.0}], "two"),
        item("cut", "How many?", None, [image(width=84, height=84)]),
        item("cut-but-parsed", "How many?"),
        item("silent", "Why?"),
        item("unclear", "Who?"),
        item("lost", "Where?", None, [{"type": "image", "image": "there/is/no/such.png"}]),
        item(INJECTION, INJECTION, {"answer": INJECTION, INJECTION: INJECTION}, group=INJECTION),
    ]
    results = [
        result(items[0], "<think>It is there.</think><answer>[[250,250,750,750]]</answer>", 1.0, [100, 50, 300, 150]),
        result(items[1], "[[0,0,500,500]]", 0.0, [[0, 0, 200, 100]], parts={"iou": 0.14}, new_tokens=900),
        result(items[2], "[500, 500]", 1.0, [200, 100]),
        result(items[3], "left"),
        result(items[4], "<think>One, two, <b>three", 0.0, None, "truncated", is_truncated=True),
        result(items[5], "7 or", is_truncated=True),
        result(items[6], "<think>Hm.</think>", 0.0, None, "no_answer"),
        result(items[7], "perhaps", 0.0, None, "parse_failure"),
        result(items[8], "", 0.0, None, "error", error="there/is/no/such.png: no such file"),
        result(items[9], f"<think>{INJECTION}</think>{INJECTION}", 0.25, INJECTION, parts={INJECTION: 1.0}),
    ]
    return items, results


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(*run, summary_of(run[1], model=INJECTION, options={"stop": [INJECTION]}), path)
    return path


def test_the_page_is_one_file_and_loads_no_other(report):
    text = report.read_text(encoding="utf-8")
    assert os.listdir(report.parent) == ["report.html"]
    assert not re.search(r"""(src|href)="(?!data:|#)""", text)
    assert "url(" not in text and "@import" not in text and "://" not in text


def test_texts_of_model_and_data_are_escaped(report):
    text = report.read_text(encoding="utf-8")
    assert "window.broken" in text
    assert "<script>window.broken" not in text and "<img src=x" not in text and "<b>three" not in text
    assert text.count("<script>") == 1 and text.count("<article ") == 10 == text.count("</article>")


def test_equal_runs_make_equal_files(run, report, tmp_path):
    summary = summary_of(run[1], model=INJECTION, options={"stop": [INJECTION]})
    write_report(*run, summary, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == report.read_bytes()


def test_a_large_run_shows_the_lowest_scores_and_counts_the_others(tmp_path):
    items = [item(f"item-{index}") for index in range(20)]
    results = [result(item, score=float(index % 4 > 0)) for index, item in enumerate(items)]
    write_report(items, results, summary_of(results), tmp_path / "report.html", limit=7)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r"<h2[^>]*>item-(\d+)</h2>", text)
    assert shown == ["0", "1", "2", "4", "8", "12", "16"]
    assert "13 of 20 items are not shown: 0 wrong, 13 right." in text


def test_unpaired_surrogates_are_written_as_escapes(tmp_path):
    items = [item("a")]
    results = [result(items[0], output="half a pair: \ud83d")]
    write_report(items, results, summary_of(results), tmp_path / "report.html")
    assert "half a pair: \\ud83d" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_failed_page_leaves_the_earlier_one(run, tmp_path):
    (tmp_path / "report.html").write_text("before")
    items, results = run
    with pytest.raises(DataError, match=r"found 9 of other items; expected those of the 10 items"):
        write_report(items, results[1:], {}, tmp_path / "report.html")
    with pytest.raises(Exception, match=r"undefined|no attribute"):
        write_report(items, results, {}, tmp_path / "report.html")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    ("output", "thought"),
    [
        ("7", ""),
        ("<think>Hm.</think><answer>7</answer>", "<think>Hm.</think>"),
        ("Hm.</think>7", "Hm.</think>"),
        ("<think>Hm. 1, 2, 3", "<think>Hm. 1, 2, 3"),
        ("<think>Hm.<answer>7", "<think>Hm."),
    ],
)
def test_an_output_is_split_after_its_thought(output, thought):
    assert split_thought(output) == (thought, output[len(thought) :])


def test_thumbnails_are_small_and_frames_are_few(tmp_path):
    noise(2000, 1000).save(tmp_path / "large.png")
    frames = [np.asarray(noise(80, 40, seed)) for seed in range(12)]
    content = [
        {"type": "image", "url": str(tmp_path / "large.png")}, {"type": "video", "video": frames, "fps": 2.0},
        {"type": "image", "image": noise(20, 10), "max_pixels": 784},
    ]  # fmt: skip
    large, small, video = show([{"role": "user", "content": content}])
    assert (large.size, large.thumbnails[0].width, large.thumbnails[0].is_enlarged) == ((2000, 1000), 400, False)
    assert LONGEST_SIDE == 512 and decoded(large).size == (512, 256)
    assert (small.thumbnails[0].width, small.thumbnails[0].height, small.thumbnails[0].is_enlarged) == (160, 80, True)
    assert video.frames == 12 and len(video.thumbnails) == MAX_FRAMES
    assert [thumbnail.time for thumbnail in video.thumbnails] == [0.0, 1.0, 1.5, 2.5, 3.0, 4.0, 4.5, 5.5]


def decoded(shown):
    return PIL.Image.open(io.BytesIO(base64.b64decode(shown.thumbnails[0].address.split(",")[1])))


def test_a_video_file_is_shown(tmp_path):
    frames = [noise(80, 40, seed) for seed in range(12)]
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:], duration=250)
    (video,) = show([{"role": "user", "content": [{"type": "video", "video": str(tmp_path / "video.gif")}]}])
    assert video.problem is None and video.frames == 12 and len(video.thumbnails) == MAX_FRAMES
    assert video.thumbnails[-1].time == pytest.approx(11 * 0.25)


class Opened:
    """A page, with its errors and requests."""

    def __init__(self, browser, report, **options):
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        self.errors, self.requests = [], []
        self.page.on("console", self.note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())

    def note(self, message):
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def visible(self):
        return self.page.locator("article:visible h2").all_text_contents()

    def choose(self, label):
        self.page.get_by_role("radio", name=re.compile(f"^{label} ")).check()


@pytest.fixture
def opened(browser, report):
    opened = Opened(browser, report)
    yield opened
    opened.page.close()


@pytest.mark.slow
def test_images_load_and_boxes_lie_over_them(opened):
    page = opened.page
    assert page.locator("img").count() == 3 + MAX_FRAMES + 1
    page.evaluate("Promise.all(Array.from(document.images, (image) => image.decode()))")
    assert min(page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")) > 0

    assert page.locator(".mark.reference:visible").count() == 3
    assert page.locator(".mark.predicted:visible").count() == 3
    card = page.locator("article", has=page.get_by_role("heading", name="wrong", exact=True))
    ground = card.locator("img").bounding_box()
    # Reference: 100 to 300 of 400 pixels, 50 to 150 of 200; predicted: from the corner to the middle.
    for kind, (left, top, width, height) in {
        "reference": (1 / 4, 1 / 4, 1 / 2, 1 / 2),
        "predicted": (0, 0, 1 / 2, 1 / 2),
    }.items():
        box = card.locator(f".mark.{kind} rect.line").evaluate(
            "line => { const box = line.getBBox(), there = line.getScreenCTM();"
            " return [there.e + box.x * there.a, there.f + box.y * there.d,"
            " box.width * there.a, box.height * there.d]; }"
        )
        expected = [
            ground["x"] + left * ground["width"], ground["y"] + top * ground["height"],
            width * ground["width"], height * ground["height"],
        ]  # fmt: skip
        assert box == pytest.approx(expected, abs=0.5)
    assert page.locator("article path.line").count() == 1
    assert opened.errors == []


def test_boxes_can_be_hidden(opened):
    opened.page.get_by_label("predicted").uncheck()
    assert opened.page.locator(".mark.predicted:visible").count() == 0
    assert opened.page.locator(".mark.reference:visible").count() == 3
    opened.page.get_by_label("reference").uncheck()
    assert opened.page.locator(".mark:visible").count() == 0


@pytest.mark.slow
def test_filters_search_and_sorting(opened):
    page = opened.page
    everything = ["right", "wrong", "point", "video", "cut", "cut-but-parsed", "silent", "unclear", "lost", INJECTION]
    assert opened.visible() == everything
    for label, expected in {
        "right": ["right", "point", "video", "cut-but-parsed"],
        "wrong": ["wrong", "cut", "silent", "unclear", "lost", INJECTION], "not parsed": ["unclear"],
        "no answer": ["silent"], "cut off, not parsed": ["cut"], "cut off": ["cut", "cut-but-parsed"],
        "error": ["lost"], "all": everything,
    }.items():  # fmt: skip
        opened.choose(label)
        assert opened.visible() == expected, label
        assert page.locator("#count").inner_text() == f"{len(expected)} of 10 items"
        chosen = page.get_by_role("radio", checked=True).evaluate("radio => radio.labels[0].innerText")
        assert chosen.split()[-1] == str(len(expected))

    page.get_by_label("Group").select_option("two")
    assert opened.visible() == ["point", "video"]
    page.get_by_label("Group").select_option(INJECTION)
    assert opened.visible() == [INJECTION]
    page.get_by_role("button", name="Reset").click()
    page.locator("#count", has_text="10 of 10 items").wait_for()

    page.get_by_label("Search").fill("LOCATE dog")
    assert opened.visible() == ["wrong"]
    page.get_by_label("Search").fill("")
    page.get_by_label("Sort").select_option("worst")
    assert opened.visible()[-5:] == [INJECTION, "right", "point", "video", "cut-but-parsed"]
    page.get_by_label("Sort").select_option("longest")
    assert opened.visible()[0] == "wrong"
    assert opened.errors == []


def test_the_page_works_with_the_keyboard(opened):
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_role("radio", name=re.compile("^all ")).focus()
    page.keyboard.press("ArrowDown")
    assert opened.visible()[0] == "wrong" and len(opened.visible()) == 6
    thought = page.locator("article:visible details").first
    thought.locator("summary").focus()
    page.keyboard.press("Enter")
    assert thought.get_attribute("open") is not None


def test_markup_of_a_model_does_not_run(opened):
    page = opened.page
    card = page.locator("article").last
    assert card.locator("h2").text_content() == INJECTION
    assert card.locator("pre").all_text_contents()[-1] == INJECTION
    assert page.evaluate("window.broken") is None
    # Even without escaping, the page's policy does not let it run.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.broken = 3\">')")
    page.wait_for_timeout(100)
    assert page.evaluate("window.broken") is None


def test_the_page_makes_no_requests(opened, report):
    assert [url for url in opened.requests if not url.startswith("data:")] == [report.as_uri()]


def test_without_scripts_all_items_are_shown(browser, report):
    opened = Opened(browser, report, java_script_enabled=False)
    assert len(opened.visible()) == 10
    assert not opened.page.locator("#filters").is_visible()
    assert opened.page.get_by_text("Scripts are off").is_visible()
    opened.page.get_by_label("predicted").uncheck()
    assert opened.page.locator(".mark.predicted:visible").count() == 0
    opened.page.close()


def test_a_narrow_screen_scrolls_in_one_direction(browser, report):
    opened = Opened(browser, report)
    opened.page.set_viewport_size({"width": 380, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 380
    opened.page.close()
