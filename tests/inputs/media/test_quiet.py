"""What decoders log is kept off the screen, and nothing else."""

import contextlib
import io
import os
import sys

import pytest

from glm4v_jax.inputs.media.quiet import silent_decoders


@pytest.mark.parametrize("is_screen", [True, False])
def test_messages_of_python_go_where_the_program_sends_them(capfd, is_screen):
    """To file descriptor 2, or elsewhere: with --quiet to nowhere."""
    with open(2, "w", closefd=False) if is_screen else io.StringIO() as stream:
        with contextlib.redirect_stderr(stream), silent_decoders():
            print("of Python", file=sys.stderr)  # noqa: T201
            os.write(2, b"of a decoder\n")
        said = capfd.readouterr().err if is_screen else stream.getvalue()
    assert (said, capfd.readouterr().err) == ("of Python\n", "")
