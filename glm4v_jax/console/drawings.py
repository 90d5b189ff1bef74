"""Drawings that a command writes: PNG files, which replace earlier ones of this package and no other file."""

import errno
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from glm4v_jax.errors import MediaError, named
from glm4v_jax.files import is_same_file, replacing

if TYPE_CHECKING:
    import PIL.Image

SOFTWARE = "glm4v"
"""In the metadata of a drawing, so that a later one may overwrite it."""


def check_png(option: str, out: str, files: Sequence[str] = (), *, overwrite: bool | None = None) -> None:
    """Check the path of a drawing before anything slow begins; `option` names it in errors.

    `overwrite`: whether any file may be replaced; None where the command has no such option.

    Raises:
      MediaError: it does not end in .png, or is one of the files that are read.
      OSError: its directory does not exist, or a file that is not a drawing has its name.
    """
    path = pathlib.Path(out)
    if path.suffix.lower() != ".png":
        raise MediaError(f"{option}: found {named(out)}; expected a name that ends in .png")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    if not path.exists():
        return
    if any(is_same_file(path, file) for file in files):
        raise MediaError(f"{option}: found {out}, one of the inputs; expected another name")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "found a directory; expected the name of a PNG", out)
    if not overwrite and not _is_drawing(path):
        advice = "choose another name" if overwrite is None else "pass --overwrite to overwrite it"
        raise FileExistsError(
            errno.EEXIST, f"found a file that is not a drawing of this command; expected none; {advice}", out
        )


def _is_drawing(path: pathlib.Path) -> bool:
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            return image.format == "PNG" and str(image.info.get("Software")).startswith(SOFTWARE)
    except Exception:  # Pillow's format readers raise many kinds of errors on other files.
        return False


def write_png(image: "PIL.Image.Image", out: str | pathlib.Path) -> None:
    """Write a drawing, completely or not at all."""
    import PIL.PngImagePlugin

    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("Software", SOFTWARE)
    with replacing(pathlib.Path(out)) as aside:
        image.save(aside, "PNG", optimize=True, pnginfo=info)
