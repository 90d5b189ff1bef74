"""Ctrl-C as a note first, then as an exception."""

import signal

import pytest

from glm4v_jax.cli.chat.interrupt import Interrupt


def test_the_first_interrupt_is_noted_and_the_second_is_raised():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.is_set
        signal.raise_signal(signal.SIGINT)
        assert interrupt.is_set
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
