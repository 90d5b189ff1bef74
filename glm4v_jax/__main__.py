"""`python -m glm4v_jax`: the command line."""

from glm4v_jax.cli.main import program

program()
