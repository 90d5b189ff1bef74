"""Files that belong to a row but are named without their folder."""

import os
from collections.abc import Sequence

from eval.data.questions import Origin
from glm4v_jax.errors import DataError


def nearby(origin: Origin, field: str, names: Sequence[str], folders: Sequence[str]) -> str:
    """The first of these files that is there, relative to the data file.

    Args:
      origin: of the row.
      field: how an error names the field.
      names: of the file, in the order in which they are tried in every folder.
      folders: relative to that of the data file, "." for itself.

    Raises:
      DataError: there is none.
    """
    for folder in folders:
        for name in names:
            path = os.path.normpath(os.path.join(folder, name))
            if (origin.path.parent / path).is_file():
                return path
    places = ", ".join(os.path.normpath(origin.path.parent / folder) for folder in folders)
    raise DataError(f"field {field!r}: found {names[0]!r}, but there is no such file; expected it in one of {places}")
