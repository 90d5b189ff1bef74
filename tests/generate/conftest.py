"""An engine over the random checkpoint, and the reference with its weights, once a session."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def engine(mesh):
    """An engine of eight slots over the random checkpoint, float32.

    Its layers are stacked, as on every accelerator: programs compile in two thirds of the time. In the layout of a CPU
    are the models of `tests/hf`, one in `test_engine.py`, and what commands load in `tests/cli/test_adapter.py`, in
    `tests/eval/test_commands.py` and in processes of their own.
    """
    from helpers_checkpoints import RANDOM_CHECKPOINT

    from glm4v_jax.generate.engine import Engine
    from glm4v_jax.hf.model import Glm4vForConditionalGeneration
    from glm4v_jax.inputs.processor import Glm4vProcessor

    model = Glm4vForConditionalGeneration.from_pretrained(RANDOM_CHECKPOINT, stacked=True)
    # Room for every prompt of these tests at once: each size is a set of programs to compile.
    return Engine(model, Glm4vProcessor.from_pretrained(RANDOM_CHECKPOINT), num_slots=8, capacity=256)


@pytest.fixture(scope="session")
def make_engine(engine):
    """Engines of their own, of eight slots unless told otherwise, over the model of `engine`."""
    from glm4v_jax.generate.engine import Engine

    def make(**options):
        return Engine(engine.model, engine.processor, **{"num_slots": 8, "capacity": engine._capacity} | options)

    return make


@pytest.fixture(scope="session")
def image():
    return np.random.default_rng(3).integers(0, 256, (70, 100, 3), np.uint8)


@pytest.fixture(scope="session")
def their_tiny():
    """The reference with the random checkpoint's weights, float32. Skips without it."""
    from helpers_transformers import import_transformers
    from reference import load_theirs

    import_transformers()
    from helpers_checkpoints import RANDOM_CHECKPOINT

    model = load_theirs(RANDOM_CHECKPOINT)
    model.generation_config.eos_token_id = None
    model.generation_config.do_sample = False
    for option in ("temperature", "top_p", "top_k"):
        setattr(model.generation_config, option, None)
    return model
