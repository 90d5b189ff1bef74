"""The examples in the docstrings of `eval` and `glm4v_jax.data` do what they say."""

import doctest
import importlib
import pkgutil

import pytest

import eval as evaluation
from glm4v_jax import data

MODULES = [
    module.name
    for package in (evaluation, data)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if module.name not in ("eval.lmms", "eval.__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
