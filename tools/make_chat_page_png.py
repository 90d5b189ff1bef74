"""Writes docs/images/chat_page.png: the chat page of a real server with the tiny model, as a browser shows it.

Needs a Chromium of the system's, and playwright of the `test` extra.

    python -m tools.make_chat_page_png
"""

import argparse
import pathlib
import re
import subprocess
import sys

from tools.make_report_png import browser, save

OUT = pathlib.Path(__file__).parent.parent / "docs" / "images" / "chat_page.png"
WIDTH, HEIGHT = 1000, 920


def main() -> None:
    """Starts a server, asks it, and takes a screenshot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    chosen = parser.parse_args()
    command = [sys.executable, "-m", "glm4v_jax", "serve", "--port", "0", "--no-warmup"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            addresses = (re.search(r"http://\S+", line) for line in server.stderr)
            address = next(filter(None, addresses), None)
            if address is None:
                raise SystemExit("the server ended before it named its address")
            save(screenshot_of(address[0]), chosen.out)
        finally:
            server.terminate()


def screenshot_of(address: str) -> bytes:
    """The page after the question that it offers, its thought open, as PNG."""
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(address)
        page.get_by_role("button", name="Locate the").click(timeout=120_000)
        page.locator(".facts", has_text="tokens in").wait_for(timeout=120_000)
        # The first answer took as long as compiling does.
        page.get_by_role("button", name="Retry").click()
        page.locator(".facts", has_text="tokens in").wait_for()
        page.locator("details.thought summary").click()
        page.locator("figcaption", has_text="in pixels").wait_for()
        page.evaluate("scrollTo(0, 0)")
        return page.screenshot()


if __name__ == "__main__":
    main()
