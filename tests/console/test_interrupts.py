"""Ctrl-C as a note first, then as an exception; it is not lost where Python or native code ignores exceptions."""

import signal

import pytest

from glm4v_jax.console.interrupts import Interrupt


def test_the_first_interrupt_is_noted_and_the_second_is_raised():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.is_set
        signal.raise_signal(signal.SIGINT)
        assert interrupt.is_set
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


FINALIZING = """
import os, signal, time
from glm4v_jax.console.interrupts import interrupt_between_imports

interrupt_between_imports()

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

try:
    Finalized()
    time.sleep(30)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_in_a_finalizer_is_not_lost(run_python):
    assert run_python(FINALIZING).strip() == "interrupted"


HASHED = """
import os, signal, time, typing
import msgspec
from glm4v_jax.console.interrupts import interrupt_between_imports

interrupt_between_imports()

class Key:
    is_pressed = False

    def __hash__(self):
        if Key.is_pressed:
            Key.is_pressed = False
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return 0

hint = typing.Annotated[int, Key()]
Key.is_pressed = True
try:
    msgspec.convert(1, hint)
    time.sleep(3)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_in_the_hash_of_a_key_is_not_lost(run_python):
    assert run_python(HASHED).strip() == "interrupted"
