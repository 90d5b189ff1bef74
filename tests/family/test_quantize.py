"""Weights as integers: what is quantised of each structure, and how far its logits move, beside GLM-4.1V's."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers_lora import batch_of, leaves_of, logits_of

from glm4v_jax import Glm4vConfig
from glm4v_jax.checkpoints.load import load_model
from glm4v_jax.model import quantize

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mesh")]


@pytest.fixture(scope="module")
def logits(family_checkpoint):
    """(kind, scheme) -> the model, and its logits of text and an image, computed in float32."""

    @functools.cache
    def get(kind, scheme=None):
        directory = family_checkpoint(kind)
        config = Glm4vConfig.from_pretrained(directory)
        model = load_model(directory, config, dtype="float32", quantize=quantize.for_inference(scheme))
        return model, np.asarray(logits_of(model, batch_of(config, [[4, ("image", (4, 6)), 3]])[0]))

    return get


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_all_large_weights_are_integers_and_errors_are_those_of_the_9b(scheme, logits):
    errors = {}
    for kind in ("glm4v", "ocr"):
        model, found = logits(kind, scheme)
        floats = {path for path, leaf in leaves_of(model).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert all(path.endswith((".scale", "_scale", ".bias", "position_embedding")) for path in floats), floats
        _, exact = logits(kind)
        errors[kind] = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0 < errors["ocr"] < 1.2 * errors["glm4v"] < {"int8": 0.03, "int4": 0.3}[scheme]
