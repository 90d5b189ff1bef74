"""Tables, and text that cannot control a terminal."""

import re
from collections.abc import Collection, Sequence

import rich.console
import rich.table
import rich.text

# A terminal obeys these: a model's text must not move the cursor or ring the bell.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Wide enough for any table: what reads a pipe wants whole lines.
_NO_TERMINAL_WIDTH = 10_000


def printable(text: str) -> str:
    r"""Escape the control characters that a terminal would obey; keep tabs and line ends.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    # Half of a surrogate pair, which a tokenizer can produce, cannot be encoded.
    return _CONTROLS.sub(_escape, text.encode(errors="backslashreplace").decode())


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str] = (),
    bold: Collection[int] = (),
    header: bool = True,
) -> None:
    """Print a table: folded to the width of a terminal; elsewhere plain, aligned, one line per row.

    >>> print_table(("name", "size"), [("a", "10 B"), ("longer", "7 B")], right=["size"])
    name    size
    a       10 B
    longer   7 B

    Args:
      columns: titles.
      rows: cells, as many as there are columns.
      right: titles of the columns to align to the right; these are never folded.
      bold: numbers of the rows to emphasise on a terminal.
      header: whether to print the titles.
    """
    console = rich.console.Console()
    is_terminal = console.is_terminal
    if not is_terminal:
        console = rich.console.Console(width=_NO_TERMINAL_WIDTH)
    table = rich.table.Table(box=None, pad_edge=False, show_header=header)
    for column in columns:
        is_right = column in right
        table.add_column(
            rich.text.Text(printable(column)), justify="right" if is_right else "left", no_wrap=is_right,
            overflow="fold",
        )  # fmt: skip
    for number, row in enumerate(rows):
        style = "bold" if number in bold else None
        table.add_row(*(rich.text.Text(printable(cell)) for cell in row), style=style)
    if is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def _escape(match: re.Match[str]) -> str:
    return "" if match[0] == "\r" else f"\\x{ord(match[0]):02x}"
