"""Writes docs/chat.svg: a real `glm4v chat` with the tiny model, as its terminal shows it.

It is shown two held-out digits, and asked where one of them is.

    python -m tools.make_chat_svg
"""

import io
import pathlib
import re
import tempfile

import rich.console
import rich.text

from glm4v_jax.tiny.digits import held_out
from tests.helpers_terminal import Terminal

OUT = pathlib.Path(__file__).parent.parent / "docs" / "chat.svg"
IMAGE = "digits.png"
NUMBER = 0
"""Of the question among the held-out ones."""
WIDTH = 110

_CODES = re.compile(r"\x1b\[\?\d+[hl]|\x1b\[2K|\x1b\[1A|\r|\n|\x07|\x1b\[K")


def main() -> None:
    """Talks, and draws what the terminal shows."""
    example = held_out("grounding2")[NUMBER]
    with tempfile.TemporaryDirectory() as directory:
        example.media.save(pathlib.Path(directory, IMAGE))
        screen = talk(directory, example.messages[0]["content"][1]["text"])
    console = rich.console.Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(rich.text.Text.from_ansi(screen))
    svg = console.export_svg(title="glm4v chat (the tiny model of the package)")
    # Nothing is loaded from elsewhere: a font that the reader has will do.
    OUT.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


def talk(directory: str, question: str) -> str:
    """What the terminal shows at the end, as lines with colour codes."""
    command = ["chat", "--greedy"]
    terminal = Terminal(*command, directory=directory, width=WIDTH, GLM4V_MODEL="")
    for line in (f"/image {IMAGE}", question, "/boxes found.png", "/stats", "/save talk.md", "/quit"):
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
