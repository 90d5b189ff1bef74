"""The examples in the docstrings of `glm4v_jax.inputs` and `glm4v_jax.batch` do what they say."""

import doctest
import importlib
import pkgutil

import pytest

from glm4v_jax import inputs

MODULES = [module.name for module in pkgutil.walk_packages(inputs.__path__, "glm4v_jax.inputs.") if not module.ispkg]
MODULES.append("glm4v_jax.batch")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
