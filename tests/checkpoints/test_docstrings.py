"""The examples in the docstrings of `glm4v_jax.checkpoints` and `glm4v_jax.files` do what they say."""

import doctest
import importlib
import pkgutil

import pytest

from glm4v_jax import checkpoints

MODULES = [f"glm4v_jax.checkpoints.{module.name}" for module in pkgutil.iter_modules(checkpoints.__path__)]


@pytest.mark.parametrize("name", ["glm4v_jax.files", *MODULES])
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
