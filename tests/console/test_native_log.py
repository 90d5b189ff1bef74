"""What JAX's native code says at the end, in a line."""

import pytest

from glm4v_jax.console.native_log import translate

WARNING = (
    "W1122 21:13:35.204060    5140 preemption_sync_manager.cc:147] Failed to retrieve preemption notice: UNAVAILABLE\n"
    "Additional GRPC error information from remote target coordination_service while calling /GetKeyValue:\n"
    ':UNKNOWN:Error received from peer  {grpc_status:14, grpc_message:"Socket closed"}\n'
)
STACK = "*** Check failure stack trace: ***\n    @     0x7fc87  absl::SendToLog()\n    @     0x7fc8  (unknown)\n"
FATAL = (
    "F1122 21:13:35.204179    5140 client.h:80] Terminating process because the JAX distributed service detected fatal "
    "errors. This most likely indicates that another task died; see the other task logs. absl::Status: "
)
SILENT = (
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}\n"
    "The tasks have crashed. Check the task logs for an earlier error.\n\n"
    "RPC: /xla.coordination.CoordinationService/PollForError\n"
)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (SILENT.format("1"), "process 1 is gone: nothing was heard of it for too long"),
        (SILENT.format("1\n12"), "processes 1, 12 are gone: nothing was heard of them for too long"),
        ("UNAVAILABLE: Failed to send RPC to coordination service. Either the leader died\n", "process 0 is gone"),
        (
            "ABORTED: 1 unexpectedly tried to connect with a different incarnation.\n",
            "--process-id 1: found two processes with it; expected one",
        ),
        (
            "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/RegisterTask\n",
            "found fewer processes than --num-processes when the time was over; expected all of them to be started",
        ),
    ],
)
def test_last_words(said, expected):
    lines = (WARNING + FATAL + said + STACK).splitlines(keepends=True)
    assert list(translate(lines, "glm4v: error: ")) == [f"glm4v: error: {expected}\n"]


def test_last_words_that_are_new():
    (line,) = translate([f"{FATAL}INTERNAL: something else\n"], "")
    assert line.startswith("lost the other processes: F1122") and line.endswith("INTERNAL: something else\n")


def test_other_lines_pass():
    other = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"
    stack = "    @     0x7fc872820634  somebody else's\n"
    gloo = "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"
    mixed = "[Gloo] Rank [Gloo] Rank 3 is connected to 3 peer ranks. Expected number of connected\n peer ranks is : 3\n"
    lines = (stack + gloo + WARNING + other + mixed).splitlines(keepends=True)
    assert "".join(translate(lines, "")) == stack + other
    assert list(translate(["3 peers\n", "Rank of Gloo\n"], "")) == ["3 peers\n", "Rank of Gloo\n"]
    ends = [f"{gloo[:-1]}{gloo}", "\n", "\n", "said\n", "\n"]
    assert list(translate(ends, "")) == ["said\n", "\n"]
