"""Ctrl-C is not lost where Python ignores exceptions."""

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
