"""Writes docs/images/report.png: the page of a real evaluation, as a browser shows it.

The tiny model is asked where digits are. Needs a Chromium of the system's, and playwright of the `test` extra.

    python -m tools.make_report_png
"""

import argparse
import contextlib
import io
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import PIL.Image
import playwright.sync_api

from eval.commands import main as evaluate
from eval.read_items import read_items
from eval.report.report import write_report
from eval.results import REPORT, RESULTS, read_results
from eval.summary import read_summary
from eval.tasks import find_task
from glm4v_jax.tiny import TINY_CHECKPOINT

OUT = pathlib.Path(__file__).parent.parent / "docs" / "images" / "report.png"
TASK, ITEMS = "digits-grounding", 120
WIDTH, HEIGHT = 1280, 1060
COLOURS = 256
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Evaluates, and takes a screenshot of the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(TINY_CHECKPOINT), help="checkpoint to ask")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = pathlib.Path(directory)
        arguments = ["--task", TASK, "--limit", str(ITEMS), "--model", chosen.model, "--out", str(run)]
        if status := evaluate(arguments):
            raise SystemExit(status)
        # Where the checkpoint lies on this machine is nobody's business.
        summary = {**read_summary(run), "model": pathlib.Path(chosen.model).name}
        items = read_items(find_task(TASK), (), limit=ITEMS)
        write_report(items, read_results(run / RESULTS), summary, run / REPORT)
        taken = screenshot_of(run / REPORT)
    save(taken, chosen.out)


def screenshot_of(page: pathlib.Path) -> bytes:
    """What a browser shows of a page, its lowest scores first, as PNG."""
    with browser() as chromium:
        opened = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        opened.goto(page.resolve().as_uri())
        opened.get_by_label("Sort").select_option("worst")
        opened.get_by_label("Sort").blur()
        return opened.screenshot()


@contextlib.contextmanager
def browser() -> Iterator[playwright.sync_api.Browser]:
    """A Chromium of the system's; SystemExit if there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit(f"found none of {', '.join(BROWSERS)}; expected one: apt-get install chromium")
    with playwright.sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def save(taken: bytes, path: pathlib.Path) -> None:
    """Write a screenshot with few colours, which makes a small file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.open(io.BytesIO(taken)).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
