"""Paths in a line of a chat."""

import os
import pathlib

import pytest

from glm4v_jax.cli.chat.attachments import places
from glm4v_jax.errors import MediaError


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("my file.png", ["my file.png"]),
        ("'my file.png' b.png", ["my file.png", "b.png"]),
        (r"my\ file.png", ["my file.png"]),
        ("https://host/a b.png", ["https://host/a b.png"]),
        ("~/my file.png", ["~/my file.png"]),
    ],
)
def test_paths_may_have_spaces_and_quotes(monkeypatch, line, expected):
    pathlib.Path("my file.png").write_text("")
    monkeypatch.setenv("HOME", os.getcwd())
    assert places(line) == expected


@pytest.mark.parametrize("line", ["", "  ", "it's.png"])
def test_a_line_without_a_path_is_refused(line):
    with pytest.raises(MediaError):
        places(line)
