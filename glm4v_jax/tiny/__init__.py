"""The tiny model that the package carries."""

import pathlib

TINY_CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"
"""A checkpoint in Hugging Face layout, of GLM-4.1V's shape but tiny: it reads, finds and follows handwritten digits
(`digits`; docs/tiny.md; `make tiny` trains it)."""
