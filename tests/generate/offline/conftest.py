"""Fixtures of commands."""

from helpers_commands import image, in_a_directory, no_weights, run_python, video  # noqa: F401
