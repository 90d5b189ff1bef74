"""Fixtures of commands."""

from helpers_commands import film, in_a_directory, no_weights  # noqa: F401
