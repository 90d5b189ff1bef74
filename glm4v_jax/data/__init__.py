"""Data that the package carries."""

import pathlib

TINY_CHECKPOINT = pathlib.Path(__file__).parent / "tiny"
"""A checkpoint in Hugging Face layout, of GLM-4.1V's shape but tiny and with random weights (`tools/make_tiny.py`)."""
