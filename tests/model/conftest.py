"""What the tests of adapters and of quantised kernels share."""

import pytest

from glm4v_jax import Glm4vForConditionalGeneration


@pytest.fixture(scope="module")
def model(mesh, checkpoints):
    """The functional module of the base configuration, stacked, as training has it."""
    return Glm4vForConditionalGeneration.from_pretrained(checkpoints("base"), dtype="float32", stacked=True).module
