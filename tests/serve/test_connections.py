"""Connections that are of no use are cut."""

import dataclasses

import pytest

from glm4v_jax.serve.connections import Watch


@dataclasses.dataclass(eq=False)
class Connection:
    """As uvicorn's protocols; its own transport."""

    cycle: object = None
    unsent: int = 0
    is_cut: bool = False
    is_ending: bool = False

    @property
    def transport(self):
        return self

    def get_write_buffer_size(self):
        return self.unsent

    def is_closing(self):
        return self.is_ending

    def abort(self):
        self.is_cut = True


@dataclasses.dataclass(eq=False)
class Cycle:
    response_complete: bool


@pytest.fixture
def time():
    return [0.0]


@pytest.mark.parametrize(
    ("connection", "is_cut"),
    [
        (Connection(), True),  # has sent nothing, or half a header
        (Connection(Cycle(True)), True),  # between requests
        (Connection(Cycle(False)), False),  # waits for an answer
        (Connection(Cycle(False), unsent=9), True),  # does not read
        (Connection(Cycle(True), unsent=9), True),
        (Connection(Cycle(False), is_ending=True), True),
    ],
)
def test_idle_connections_are_cut(connection, is_cut, time):
    watch = Watch(60, 100, lambda: time[0])
    watch.cut([connection])
    time[0] = 59
    watch.cut([connection])
    assert not connection.is_cut
    time[0] = 61
    watch.cut([connection])
    assert connection.is_cut == is_cut


def test_who_asks_or_reads_is_not_cut(time):
    watch, asks, reads = Watch(60, 100, lambda: time[0]), Connection(), Connection(Cycle(False), unsent=100)
    for second in range(0, 300, 50):
        time[0] = second
        asks.cycle = Cycle(True)
        reads.unsent -= 1
        watch.cut([asks, reads])
    assert not asks.is_cut and not reads.is_cut


def test_of_too_many_the_oldest_idle_ones_are_cut(time):
    watch, works = Watch(60, 2, lambda: time[0]), Connection(Cycle(False))
    connections = [works]
    for _ in range(3):
        connections.append(Connection())
        time[0] += 1
        watch.cut(connections)
    assert [one.is_cut for one in connections] == [False, True, True, False]
