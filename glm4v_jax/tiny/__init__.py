"""The tiny model that the package carries, and a chat template of its family."""

import pathlib

TINY_CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"
"""A checkpoint in Hugging Face layout, of GLM-4.1V's shape but tiny: it reads, finds and follows handwritten digits
(`digits`; docs/tiny.md; `make tiny` trains it)."""

FAMILY_TEMPLATE = pathlib.Path(__file__).parent / "family_chat_template.jinja"
"""chat_template.jinja of GLM-OCR (MIT license), character for character; GLM-4.6V-Flash's is of the same kind."""
