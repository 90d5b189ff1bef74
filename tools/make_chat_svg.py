"""Writes docs/chat.svg: a real `glm4v chat` with the tiny model, as its terminal shows it.

The model's weights are random and so is what it says. It rarely begins with `<think>`; of the seeds from 0 on, the
first with which it does is taken, so that the picture shows a thought.

    python -m tools.make_chat_svg
"""

import io
import itertools
import pathlib
import re
import tempfile

import PIL.Image
import rich.console
import rich.text
import skimage.data

from glm4v_jax.compilation_cache import use_compilation_cache
from glm4v_jax.data import TINY_CHECKPOINT
from tests.helpers_terminal import Terminal

OUT = pathlib.Path(__file__).parent.parent / "docs" / "chat.svg"
PICTURE, QUESTION = "chelsea.png", "What is this?"
BUDGET = 24
DRAWING = {"do_sample": True, "temperature": 1.2, "top_k": 0, "top_p": 1.0}
WIDTH = 110

_CODES = re.compile(r"\x1b\[\?\d+[hl]|\x1b\[2K|\x1b\[1A|\r|\n|\x07|\x1b\[K")


def main() -> None:
    """Talks, and draws what the terminal shows."""
    with tempfile.TemporaryDirectory() as directory:
        picture = pathlib.Path(directory, PICTURE)
        PIL.Image.fromarray(skimage.data.chelsea()).save(picture)
        screen = talk(directory, thinking_seed(picture))
    console = rich.console.Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(rich.text.Text.from_ansi(screen))
    svg = console.export_svg(title="glm4v chat (a tiny model with random weights)")
    # Nothing is loaded from elsewhere: a font that the reader has will do.
    OUT.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


def thinking_seed(picture: pathlib.Path) -> int:
    """The first seed with which the answer begins with a thought."""
    use_compilation_cache()
    from glm4v_jax.generate.engine import Engine

    engine = Engine.from_pretrained(TINY_CHECKPOINT)
    think = engine.processor.tokenizer.convert_tokens_to_ids("<think>")
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": QUESTION}]
    prompt = engine.prompt([{"role": "user", "content": content}])
    for seed in itertools.count():
        if engine.generate(prompt, max_new_tokens=1, seed=seed, **DRAWING).tokens[0] == think:
            return seed
    raise AssertionError


def talk(directory: str, seed: int) -> str:
    """What the terminal shows at the end, as lines with colour codes."""
    drawing = [
        part
        for name, value in DRAWING.items()
        for part in ([f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", value])
    ]
    command = ["chat", "--seed", seed, "--max-new-tokens", BUDGET, "--think-budget", BUDGET, *drawing]
    terminal = Terminal(*command, directory=directory, width=WIDTH)
    for line in (
        f"/image {PICTURE}",
        QUESTION,
        "/set think_budget",
        "And what colour is it?",
        "/stats",
        "/save talk.md",
        "/quit",
    ):
        terminal.wait_for("> ")
        terminal.send(f"{line}\n")
        terminal.wait_for("\n")
    terminal.end()
    return f"$ glm4v {' '.join(map(str, command))}\n{shown(terminal.output)}"


def shown(output: str) -> str:
    """The lines that are left on a screen after everything that was written on it, with their colours."""
    rows, row, place = [""], 0, 0
    for match in [*_CODES.finditer(output), None]:
        rows[row] += output[place : match.start() if match else None]
        if match is None:
            break
        place = match.end()
        if match[0] == "\n":
            row += 1
            if row == len(rows):
                rows.append("")
        elif match[0] == "\x1b[1A":
            row -= 1
        elif match[0] == "\x1b[2K":
            rows[row] = ""
    return "\n".join(rows).rstrip()


if __name__ == "__main__":
    main()
