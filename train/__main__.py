"""`python -m train`."""

from glm4v_jax.console.program import run_module

if __name__ == "__main__":
    run_module("train")
