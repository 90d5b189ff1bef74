"""`python -m train`."""

import sys

from glm4v_jax.console.standing import run_module

if __name__ == "__main__":
    sys.exit(run_module("train"))
