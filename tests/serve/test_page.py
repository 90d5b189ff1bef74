"""The chat page in a real browser, over a real server with the tiny model."""

import asyncio
import base64
import dataclasses
import io
import json
import re

import numpy as np
import PIL.Image
import pytest
from helpers_media import png, write_video
from helpers_serve import MODEL, wait_until

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.presets import PRESETS
from glm4v_jax.serve.call import Call
from glm4v_jax.serve.page import FILES, FOLDER, info
from glm4v_jax.serve.requests import Served, chat_request
from glm4v_jax.serve.service import ServeSettings
from glm4v_jax.tiny.digits import held_out

pytestmark = pytest.mark.slow

INJECTION = '<img src=x onerror="window.broken = 1">'
CHAT = "**/v1/chat/completions"
EXAMPLE = 1
"""The held-out question that the page offers."""


class Opened:
    """A page, with its errors, requests and sent chats."""

    def __init__(self, browser, url, **options):
        self.url = url
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        self.context.set_default_timeout(60_000)
        self.page = self.context.new_page()
        self.errors, self.requests, self.sent, self.keys = [], [], [], []
        self.page.on("console", self.note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self.note_request)
        self.page.add_init_script(
            "window.urls = 0;"
            "for (const [name, step] of [['createObjectURL', 1], ['revokeObjectURL', -1]]) {"
            "  const original = URL[name]; URL[name] = (argument) => { urls += step; return original(argument); }; }"
        )
        self.page.goto(url)

    def note(self, message):
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def note_request(self, request):
        self.requests.append(request.url)
        if request.url.endswith("/v1/chat/completions"):
            self.sent.append(request.post_data_json)
            self.keys.append(request.headers.get("authorization"))

    @property
    def last(self):
        return self.page.locator(".exchange").last

    def attach(self, content, name="image.png", kind="image/png"):
        number = self.page.locator("#attached li").count()
        self.page.set_input_files("#files", {"name": name, "mimeType": kind, "buffer": content})
        self.page.locator("#attached li").nth(number).wait_for()

    def ask(self, text):
        self.page.get_by_role("textbox", name="Message").fill(text)
        self.page.keyboard.press("Enter")

    def answered(self):
        """The last answer, when it is complete."""
        self.last.locator("footer").wait_for()
        return self.last.locator(".text").inner_text()

    def plays(self, body, status=200, **headers):
        """Answer the page's chats with this instead of the server's, until `plays_no_more`."""
        kind = "text/event-stream" if status == 200 else "application/json"
        self.page.route(CHAT, lambda route: route.fulfill(status=status, content_type=kind, body=body, headers=headers))

    def plays_no_more(self):
        self.page.unroute(CHAT)

    def expect_errors(self, text):
        """Forget errors that a test provoked; there must be some."""
        assert self.errors and all(text in error for error in self.errors), self.errors
        self.errors.clear()


@pytest.fixture
def open_page(browser, server):
    """Pages of the server, closed in the end: none has met an error or asked another host."""
    pages, (_, address) = [], server

    def open_one(**options):
        pages.append(Opened(browser, address, **options))
        return pages[-1]

    yield open_one
    for opened in pages:
        opened.context.close()
        assert opened.errors == []
        assert [url for url in opened.requests if not url.startswith((address, "data:", "blob:"))] == []


def stream(*deltas, finish="stop", **last):
    """The body of a streamed answer."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    if finish:
        chunks.append({"choices": [{"index": 0, "delta": last, "finish_reason": finish}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ("data: [DONE]\n\n" if finish else "")


def says(*texts):
    return stream(*({"content": text} for text in texts))


def error_body(message, kind="invalid_request_error"):
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}})


def noise(height, width):
    return png(PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)))


def lines_of(figure):
    """The boxes that are drawn over an image, from 0 to 1000 of its sides as the browser has them."""
    ground = figure.locator("img").bounding_box()
    boxes = figure.locator("rect.line").evaluate_all(
        "lines => lines.map(line => { const box = line.getBBox(), there = line.getScreenCTM();"
        " return [there.e + box.x * there.a, there.f + box.y * there.d,"
        " there.e + (box.x + box.width) * there.a, there.f + (box.y + box.height) * there.d]; })"
    )
    return [
        [
            1000 * (value - ground["xy"[axis % 2]]) / ground[("width", "height")[axis % 2]]
            for axis, value in enumerate(box)
        ]
        for box in boxes
    ]


# With the model.


def test_a_digit_is_located_and_its_box_drawn(open_page):
    opened = open_page()
    example = held_out("grounding2")[EXAMPLE]
    opened.attach(png(example.media), "digits.png")
    opened.ask(example.messages[0]["content"][1]["text"])
    numbers = [int(number) for number in re.findall(r"\d+", opened.answered())]
    (box,) = lines_of(opened.last.locator("figure").last)
    assert box == pytest.approx(numbers, abs=4)
    assert numbers == pytest.approx(example.boxes[0], abs=100)
    assert opened.last.locator("figcaption").last.inner_text().startswith("1 box, in pixels of the image: ")
    assert "tokens in" in opened.last.locator(".facts").inner_text()
    thought = opened.last.locator("details.thought")
    assert not thought.locator("p").is_visible()
    thought.locator("summary").click()
    assert thought.locator("p").inner_text()


def test_the_example_is_one_of_the_held_out_digits(open_page):
    example = held_out("grounding2")[EXAMPLE]
    pixels = np.asarray(PIL.Image.open(FOLDER / "example.png").convert("RGB"))
    np.testing.assert_array_equal(pixels, np.asarray(example.media))
    opened = open_page()
    offer = opened.page.get_by_role("button", name="Locate the")
    assert offer.inner_text().strip() == example.messages[0]["content"][1]["text"]
    offer.click()
    opened.answered()
    assert opened.last.locator("rect.line").count() == 1


def test_an_answer_can_be_stopped_and_asked_for_again(open_page, server, monkeypatch):
    opened, (service, _) = open_page(), server
    deltas = Call.deltas

    async def slow_deltas(call):
        async for delta in deltas(call):
            yield delta
            await asyncio.sleep(0.3)

    def endless(route):
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))

    monkeypatch.setattr(Call, "deltas", slow_deltas)
    opened.page.route(CHAT, endless)
    opened.ask("What digit is this?")
    opened.last.locator(".text p, .thought p").filter(has_text=re.compile(".")).first.wait_for(state="attached")
    opened.page.get_by_role("button", name="Stop the answer").click()
    opened.answered()
    assert opened.last.locator(".facts").inner_text().startswith("Stopped.")
    wait_until(lambda: service.live.num_running == 0)
    opened.plays_no_more()
    monkeypatch.undo()
    opened.last.get_by_role("button", name="Retry").click()
    opened.last.locator(".facts", has_text="tokens in").wait_for()
    assert opened.page.locator(".exchange").count() == 1
    opened.page.reload()
    assert opened.page.locator(".exchange").count() == 0
    opened.ask("What digit is this?")
    opened.answered()


def test_turns_are_sent_back(open_page):
    opened = open_page()
    opened.page.get_by_role("button", name="Settings").click()
    opened.page.get_by_label("System prompt").fill("Be short.")
    opened.page.get_by_label("Temperature").fill("0.5")
    opened.page.get_by_label("Max tokens").fill("12")
    opened.page.get_by_label("Preset").select_option("bench")
    assert "thinking capped at 8,192 tokens" in opened.page.get_by_role("dialog").inner_text()
    opened.page.get_by_role("button", name="Done").click()
    image = noise(84, 84)
    opened.attach(image)
    opened.plays(stream({"reasoning_content": "hm"}, {"content": "A **dog**."}))
    opened.ask("What is this?")
    opened.answered()
    opened.plays(error_body("messages[3]: found a bad thing"), 400)
    opened.ask("Refused")
    opened.answered()
    opened.expect_errors("400")
    opened.plays(says("Brown."))
    opened.ask("Which colour?")
    opened.answered()
    body = opened.sent[-1]
    system, first, answer, second = body["messages"]
    assert system == {"role": "system", "content": "Be short."}
    picture, text = first["content"]
    assert base64.b64decode(picture["image_url"]["url"].partition(",")[2]) == image
    assert text == {"type": "text", "text": "What is this?"}
    assert answer == {"role": "assistant", "content": "A **dog**."}
    assert second == {"role": "user", "content": "Which colour?"}
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0.5, 12, True)
    assert (body["thinking_token_budget"], body["answer_budget"]) == (8192, 8192)

    opened.page.get_by_role("button", name="New chat").click()
    opened.ask("Anew")
    opened.answered()
    assert [message["content"] for message in opened.sent[-1]["messages"]] == ["Be short.", "Anew"]
    assert opened.page.evaluate("window.urls") == 0
    opened.page.reload()
    opened.page.get_by_role("button", name="Settings").click()
    assert opened.page.get_by_label("Temperature").input_value() == "0.5"
    assert opened.page.get_by_label("Preset").input_value() == "bench"


def test_what_the_model_sees(open_page, tmp_path):
    opened = open_page()
    opened.attach(noise(112, 140))
    opened.page.get_by_role("button", name="What the model sees").click()
    dialog = opened.page.get_by_role("dialog", name="What the model sees of")
    dialog.locator("img").wait_for()
    assert "20 image tokens" in dialog.inner_text()
    assert "80 patches: 8 rows of 10" in dialog.inner_text()
    opened.page.keyboard.press("Escape")
    opened.page.get_by_role("button", name="Remove image.png").click()

    frames = np.stack([np.full((56, 56, 3), 60 * index, np.uint8) for index in range(4)])
    video = write_video(tmp_path / "video.mp4", frames, rate=2)
    opened.attach(video.read_bytes(), "video.mp4", "video/mp4")
    opened.page.get_by_role("button", name="What the model sees").click()
    dialog.locator("img").nth(1).wait_for()
    assert dialog.locator("figcaption").all_inner_texts() == [
        "0 #0 at 0.00 s, #1 at 0.50 s",
        "1 #2 at 1.00 s, #3 at 1.50 s",
    ]
    opened.page.keyboard.press("Escape")
    opened.attach(b"no image", "bad.png")
    opened.page.get_by_role("button", name="What the model sees").last.click()
    dialog.locator(".problem").wait_for()
    opened.expect_errors("400")


# Without the model.


def test_files_are_dropped_pasted_and_scaled_to_the_servers_limit(open_page):
    opened = open_page()
    about = opened.page.request.get(f"{opened.url}/page.json").json()
    about["limits"] |= {"pixels": 10_000, "images": 2, "body": 2**20}
    opened.page.route("**/page.json", lambda route: route.fulfill(json=about))
    opened.page.reload()
    opened.page.locator("#model", has_text=re.compile(".")).wait_for()
    give = """([type, name, content]) => {
      const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], name, { type: "image/png" }));
      const event = type === "paste"
        ? new ClipboardEvent(type, { clipboardData: data, bubbles: true, cancelable: true })
        : new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });
      document.body.dispatchEvent(event);
    }"""
    content = base64.b64encode(noise(150, 300)).decode()
    opened.page.evaluate(give, ["dragover", "dropped.png", content])
    opened.page.get_by_text("Drop images or videos").wait_for()
    opened.page.evaluate(give, ["drop", "dropped.png", content])
    opened.page.evaluate(give, ["paste", "pasted.png", base64.b64encode(noise(28, 28)).decode()])
    opened.page.evaluate(give, ["drop", "third.png", content])
    alert = opened.page.get_by_role("alert")
    alert.filter(has_text="third.png: found 3 images in this chat; the server takes 2. Start a new chat.").wait_for()
    video = {"name": "long.mp4", "mimeType": "video/mp4", "buffer": bytes(10**6)}
    opened.page.set_input_files("#files", video)
    alert.filter(has_text="long.mp4: found 1.3 MiB of files in this chat; the server takes 1.0.").wait_for()
    assert opened.page.locator("#attached figcaption").all_inner_texts() == ["dropped.png", "pasted.png"]
    assert opened.page.locator("#attached .note").first.inner_text().startswith("Sent as 141 × 70 of 300 × 150 pixels")
    opened.plays(says("Seen."))
    opened.ask("Well?")
    opened.answered()
    urls = [part["image_url"]["url"] for part in opened.sent[0]["messages"][0]["content"][:2]]
    sizes = [PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in urls]
    assert sizes == [(141, 70), (28, 28)]


def test_markup_of_a_model_does_not_run(open_page):
    opened = open_page()
    opened.attach(noise(28, 28), f"{INJECTION}.png")
    hostile = f"{INJECTION} **{INJECTION}** `{INJECTION}`\n\n```\n{INJECTION}\n```\n\n| a |\n|---|\n| {INJECTION} |"
    opened.plays(stream({"reasoning_content": INJECTION}, {"content": hostile}))
    opened.ask(INJECTION)
    opened.answered()
    assert opened.page.locator(".text").inner_text().count(INJECTION) == 5
    assert opened.last.locator("img").count() == 1
    assert opened.page.evaluate("window.broken") is None
    # Even without the page's care, its policy does not let markup in.
    inserted = opened.page.evaluate(
        "markup => { try { document.body.insertAdjacentHTML('beforeend', markup); return true; }"
        " catch (error) { return error.name; } }",
        INJECTION,
    )
    assert inserted == "TypeError"
    opened.expect_errors("TrustedHTML")


def test_markdown_becomes_elements(open_page):
    opened = open_page()
    text = (
        "# Title\nOne\ntwo **bold** `a**b**` **open\n\n1. first\n   more\n   - inner\n2. second\n\n"
        "| a | b |\n|--|:-:|\n| 1 | 2 |\n\n~~~py\nx = `1`\n\n~~~\n"
        "<answer>x < y <|begin_of_box|>7<|end_of_box|></answer>\n```\nunfinished"
    )
    opened.plays(says(*(text[start : start + 7] for start in range(0, len(text), 7))))
    opened.ask("?")
    opened.answered()
    shown = opened.last.locator(".text")
    assert shown.evaluate("shown => Array.from(shown.children, (child) => child.localName)") == [
        "h3", "p", "ol", "div", "pre", "p", "pre",
    ]  # fmt: skip
    assert shown.locator("strong").all_inner_texts() == ["bold"]
    assert shown.locator("p code").all_inner_texts() == ["a**b**"]
    assert shown.locator("> p").first.inner_text() == "One\ntwo bold a**b** **open"
    assert shown.locator("ol > li").count() == 2
    assert shown.locator("ol > li").first.inner_text() == "first\nmore\ninner"
    assert shown.locator("ol ul > li").all_inner_texts() == ["inner"]
    assert shown.locator("td").all_inner_texts() == ["1", "2"]
    assert [code.rstrip("\n") for code in shown.locator("pre").all_inner_texts()] == ["x = `1`", "unfinished"]
    assert shown.locator("> p").last.inner_text() == "x < y 7"
    assert shown.locator(".boxed").all_inner_texts() == ["7"]
    # None of these takes long, or more of the stack than there is.
    long = ["**", "**a", "`", "`a`", "<|begin_of_box|>", "<|", "- ", "\n- a", "| ", "a|\n-|\n", " ", "\n```", "1. "]
    texts = [one * 20_000 for one in long] + ["\n".join(f"{' ' * depth}- a" for depth in range(2000))]
    lengths = opened.page.evaluate(
        """async (texts) => {
          const { render, withoutMarks, withoutPartialTag } = await import("/markdown.js");
          return texts.map((text) => {
            const target = document.createElement("div");
            render(target, withoutPartialTag(text));
            return target.textContent.length + withoutMarks(text).length;
          });
        }""",
        texts,
    )
    assert len(lengths) == len(texts)


def test_boxes_of_the_response_come_before_those_of_the_text(open_page):
    opened = open_page()
    opened.attach(noise(100, 300))
    boxes = [[100, 200, 300, 400], [900, 800, 500, 600]]
    opened.plays(stream({"content": "Two: <|begin_of_box|>[[1,2,3,4]]<|end_of_box|>"}, boxes=boxes))
    opened.ask("Where?")
    opened.answered()
    figure = opened.last.locator("figure").last
    drawn = lines_of(figure)
    assert drawn[0] == pytest.approx(boxes[0], abs=4)
    assert drawn[1] == pytest.approx([500, 600, 900, 800], abs=4)
    assert figure.locator(".label").all_inner_texts() == ["1", "2"]
    assert figure.locator("figcaption").inner_text() == (
        "2 boxes, in pixels of the image: 30, 20 to 90, 40; 270, 80 to 150, 60"
    )
    # Which of several images boxes are on, no text says.
    for name in ("one.png", "two.png"):
        opened.attach(noise(28, 28), name)
    opened.ask("Where?")
    opened.answered()
    assert opened.last.locator("rect.line").count() == 0
    opened.last.get_by_role("button", name="two.png", exact=True).click()
    opened.last.locator("figcaption", has_text="2 boxes").wait_for()
    assert opened.last.locator(".boxes img").get_attribute("alt") == "two.png"


FAILURES = [
    (400, error_body("messages[0]: found a truncated image"), "messages[0]: found a truncated image"),
    (413, error_body("body: found 70 MiB."), "body: found 70 MiB. Send fewer or smaller files"),
    (500, error_body("engine: found an error."), "The server failed: engine: found an error."),
    (200, stream({"content": "Half <"}, finish=None), "The connection to the server was lost."),
    (
        200,
        f"{stream({'content': 'Half <'}, finish=None)}data: {error_body('It broke.', 'server_error')}\n\n",
        "The server failed: It broke. Retry",
    ),
]


def test_errors_are_shown_where_they_belong(open_page):
    opened = open_page()
    for status, body, shown in FAILURES:
        opened.plays(body, status)
        opened.ask("?")
        opened.last.locator("div.problem", has_text=shown).wait_for()
        if status == 200:
            assert opened.last.locator(".text").inner_text() == "Half"
        else:
            opened.expect_errors(str(status))
    opened.plays(says("Fine."))
    opened.last.get_by_role("button", name="Retry").click()
    opened.last.get_by_text("Fine.").wait_for()
    assert not opened.last.locator("div.problem").is_visible()


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(open_page):
    opened = open_page()
    opened.plays(error_body("authorization: found no key"), 401)
    opened.ask("?")
    opened.last.get_by_role("button", name="Open settings").click()
    opened.page.keyboard.type("secret")
    opened.page.get_by_role("button", name="Done").click()
    opened.plays(says("Fine."))
    opened.last.get_by_role("button", name="Retry").click()
    assert opened.answered() == "Fine."
    assert opened.keys == [None, "Bearer secret"]
    opened.expect_errors("401")

    # Without a key in the tab, the page asks at once.
    opened.page.evaluate("sessionStorage.clear()")
    problem = error_body("authorization: found no key")
    opened.page.route(
        "**/v1/models",
        lambda route: (
            route.continue_() if route.request.headers.get("authorization") else route.fulfill(status=401, body=problem)
        ),
    )
    opened.page.reload()
    opened.page.get_by_text("The server asks for an API key.").wait_for()
    opened.page.keyboard.type("secret")
    opened.page.keyboard.press("Enter")
    opened.page.locator("#model", has_text=MODEL).wait_for()
    assert "secret" not in opened.page.evaluate("JSON.stringify(localStorage)")
    opened.expect_errors("401")


def test_a_busy_and_a_starting_server_are_waited_for(open_page):
    opened = open_page()
    replies = [(429, {"Retry-After": "1"}), (503, {}), (200, {})]

    def reply(route):
        status, headers = replies.pop(0)
        body = says("At last.") if status == 200 else error_body("wait")
        kind = "text/event-stream" if status == 200 else "application/json"
        route.fulfill(status=status, headers=headers, content_type=kind, body=body)

    states = [
        (503, {"status": "starting", "message": "The server is starting: compiling."}),
        (200, {"status": "ready"}),
    ]

    def health(route):
        status, body = states.pop(0) if len(states) > 1 else states[0]
        route.fulfill(status=status, json=body)

    opened.page.clock.install()
    opened.page.route(CHAT, reply)
    opened.page.route("**/health", health)
    opened.ask("?")
    opened.last.get_by_text("The server is busy. Asking again in 1 s").wait_for()
    opened.page.clock.fast_forward(1000)
    opened.page.get_by_text("The server is starting: compiling.").wait_for()
    opened.page.clock.fast_forward(1000)
    opened.last.get_by_text("At last.").wait_for()
    assert not opened.page.locator("#banner").is_visible()
    assert all("429" in error or "503" in error for error in opened.errors)
    opened.errors.clear()


# For everybody.


def test_the_page_works_with_the_keyboard_alone(open_page):
    opened = open_page(permissions=["clipboard-read", "clipboard-write"])
    page = opened.page
    focused = "document.activeElement.ariaLabel ?? document.activeElement.textContent.trim()"
    opened.plays(says("It is **7**."))
    assert page.evaluate(focused) == "Message"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    assert opened.answered() == "It is 7."
    assert opened.sent[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focused) == "Add images or videos"
    names = []
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
        names.append(page.evaluate(focused))
    assert names == ["Edit", "Retry", "Copy as curl", "Copy"]
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "It is **7**."
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    opened.last.locator(".curl", has_text="Copied").wait_for()
    command, _, rest = page.evaluate("navigator.clipboard.readText()").partition("<<'JSON'\n")
    assert command.startswith(f"curl -N {opened.url}/v1/chat/completions ")
    assert json.loads(rest.partition("\nJSON\n")[0]) == opened.sent[0]
    for name in ("Copy", "Settings", "New chat"):
        page.keyboard.press("Shift+Tab")
        assert page.evaluate(focused) in (name, "Copied")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "Done"
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "Settings"


def test_a_screen_reader_hears_whole_sentences_once(open_page):
    opened = open_page()
    opened.plays(says("There are tw", "o.\n\n| - |\n1. On", "e is red.\nThe ot", "her is 1.5 m lo", "ng"))
    opened.ask("?")
    opened.answered()
    heard = opened.page.get_by_role("log").locator("p").all_inner_texts()
    assert " ".join(heard) == "There are two. 1. One is red. The other is 1.5 m long"
    assert "There are two." in heard[0]
    assert opened.page.get_by_role("log").get_attribute("aria-live") == "polite"
    nameless = opened.page.evaluate(
        "Array.from(document.querySelectorAll('button, input, select, textarea, img'))"
        ".filter((item) => item.checkVisibility() && !(item.ariaLabel || item.textContent.trim() || item.labels?.length"
        " || item.hasAttribute('alt'))).map((item) => item.outerHTML)"
    )
    assert nameless == []


def test_a_phone_scrolls_in_one_direction(open_page):
    opened = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    long = "word" * 60
    opened.attach(noise(56, 900), f"{long}.png")
    opened.plays(
        stream(
            {"reasoning_content": long},
            {"content": f"{long}\n\n```\n{long}\n```\n\n| {long} | {long} |\n|-|-|\n| 1 | 2 |"},
            boxes=[[0, 0, 1000, 1000]],
        )
    )
    opened.page.fill("#text", long)
    opened.page.get_by_role("button", name="Send").tap()
    opened.answered()
    opened.last.locator("figcaption", has_text="1 box").wait_for()
    width = "document.documentElement.scrollWidth"
    assert opened.page.evaluate(width) == 360
    assert opened.page.get_by_role("button", name="Take a photo").is_visible()
    for scheme in ("light", "dark"):
        opened.page.emulate_media(color_scheme=scheme)
        background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) < 384) == (scheme == "dark")
    for button in ("Settings", "What the model sees"):
        opened.page.get_by_role("button", name=button).tap()
        assert opened.page.evaluate(width) == 360
        opened.page.keyboard.press("Escape")


def test_colours_have_contrast():
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    colours = {
        name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", style)
    }

    def luminance(colour):
        channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    grounds = ("paper", "card", "tint")
    pairs = {(ink, ground): 4.5 for ink in ("ink", "faint", "wrong") for ground in grounds}
    pairs |= {("on-main", "main"): 4.5}
    # Of borders that show where a control is.
    pairs |= {(edge, ground): 3 for edge in ("strong-edge", "main") for ground in ("paper", "card")}
    for (ink, ground), least in pairs.items():
        for scheme in (0, 1):
            dark, light = sorted((luminance(colours[ink][scheme]), luminance(colours[ground][scheme])))
            assert (light + 0.05) / (dark + 0.05) >= least, (ink, ground, scheme)


def test_presets_of_the_page_are_those_of_the_package():
    base = GenerationConfig(do_sample=True, temperature=0.8, top_k=2)
    for preset in info(ServeSettings(model="tiny"))["presets"]:
        body = {"messages": [{"role": "user", "content": "?"}], "seed": 0, **preset["options"]}
        options = chat_request(body, Served("tiny", 1024)).options
        expected = dataclasses.asdict(base.replace(**PRESETS[preset["name"]].options))
        found = dataclasses.asdict(base.replace(**options))
        limits = ("max_new_tokens", "think_budget", "answer_budget", "logprobs")
        for name in limits:
            found.pop(name), expected.pop(name)
        if expected["do_sample"]:
            assert found == expected, preset["name"]
        else:
            assert not found["do_sample"]


def test_the_page_names_no_address_and_no_file_that_is_missing():
    for path in FILES.values():
        if path.suffix == ".png":
            continue
        text = path.read_text(encoding="utf-8")
        addresses = set(re.findall(r"https?://[^\s\"'`<>]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}
        for name in re.findall(r"""(?:from "\./|src="|href=")([\w.]+)["']""", text):
            assert f"/{name}" in FILES
