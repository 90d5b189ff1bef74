"""Where things are."""

import pathlib

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
