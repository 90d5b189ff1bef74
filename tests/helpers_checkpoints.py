"""Where the checkpoint of the tests is."""

import pathlib

RANDOM_CHECKPOINT = pathlib.Path(__file__).parent / "random_checkpoint"
"""In Hugging Face layout, of GLM-4.1V's shape but tiny and with random weights (`tools/make_random.py`): it says
whatever, for as long as it may. The package's own (`glm4v_jax.tiny.TINY_CHECKPOINT`) is trained, and stops."""
