"""Data: what the package carries, and how files of rows with pictures and videos are read."""

import pathlib

TINY_CHECKPOINT = pathlib.Path(__file__).parent / "tiny"
"""A checkpoint in Hugging Face layout, of GLM-4.1V's shape but tiny: it reads, finds and follows handwritten digits
(`digits`; docs/tiny.md; `make tiny` trains it)."""
