"""What every command is tested with: a directory to work in, something to show, and no weights where none are due."""

import pytest
from helpers_cli import refuse_weights, save_film


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path, monkeypatch):
    """Where files go by default."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def film():
    """Two seconds at two frames a second, as an animated picture."""
    save_film("film.gif")
    return "film.gif"


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are asked for."""
    refuse_weights(monkeypatch)
