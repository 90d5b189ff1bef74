"""Sphinx with Markdown pages (MyST), the Furo theme and API pages from docstrings.

`make docs` builds the pages into build/docs; a warning is an error. Nothing is fetched to build or to view them.
"""

import re
from typing import Any

import glm4v_jax

project = "glm4v_jax"
version = release = glm4v_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"glm4v_jax {release}"
html_show_sourcelink = False
html_show_copyright = False
myst_heading_anchors = 4  # links such as page.md#heading

# Docstrings write code between single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# As napoleon knows them, the text of "Returns" up to a colon is a type, and "a, b: text" is one attribute.
napoleon_custom_sections = [("Attributes", "params_style"), "Returns", "Yields"]
python_maximum_signature_line_length = 88

_CODE = re.compile(r"(`+[^`]*`+)")
_MODULE = re.compile(r"\b(?:glm4v_jax|jax|jaxlib|jaxtyping|numpy|collections|pathlib)\.(?:[a-z_0-9]+\.)*(?=[A-Z])")


def prepare_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape what is markup to docutils and plain text in our docstrings: `**options`, `[*N, D]`.

    Names of arguments that fill more than a line are put on one.
    """
    for number in range(len(lines) - 1, 0, -1):
        if re.fullmatch(r" +(\w+, )+\w+,", lines[number - 1]):
            lines[number - 1] += f" {lines.pop(number).lstrip()}"
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = _CODE.split(line)
            parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
            lines[number] = "".join(parts)


def shorten_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Leave out the modules of classes: `Mesh`, not `jax._src.mesh.Mesh`."""
    return tuple(text and _MODULE.sub("", text) for text in (signature, result))  # type: ignore[return-value]


def setup(app: Any) -> None:
    """Connect the two functions above; Sphinx calls this."""
    app.connect("autodoc-process-docstring", prepare_docstring, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", shorten_signature)
