"""What commands share: files that take another's place, and what errors say in a line."""

import errno
import os
import pathlib

import pytest

from glm4v_jax.errors import one_line
from glm4v_jax.files import replacing


def test_what_cannot_be_written_is_named_and_what_was_there_stays():
    path = pathlib.Path("sheet.png")
    path.write_text("old")
    for failing in ("written", "put in place"):
        with pytest.raises(OSError, match="Read-only") as caught, replacing(path) as aside:
            aside.write_text("new")
            if failing == "written":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(aside))
            aside.unlink()
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(aside), None, str(path))
        assert one_line(caught.value) == "sheet.png: Read-only file system"
        assert (path.read_text(), os.listdir()) == ("old", ["sheet.png"])
    with replacing(path) as aside:
        aside.write_text("new")
    assert (path.read_text(), os.listdir()) == ("new", ["sheet.png"])


def test_an_empty_name_can_be_seen():
    assert one_line(FileNotFoundError(errno.ENOENT, "No such file or directory", "")) == "'': No such file or directory"
