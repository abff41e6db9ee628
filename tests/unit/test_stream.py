"""StreamConnection against a socket whose every answer is scripted."""

import errno
import select
import socket
from typing import cast

import pytest

from echo_appliance.admission import Admission
from echo_appliance.echo.connection import Endpoint
from echo_appliance.echo.stream import StreamConnection
from echo_appliance.loop import Loop
from echo_appliance.metrics import Registry
from echo_appliance.service import Lifetimes, Service
from tests.unit.fakes import FakeLoop, FakeManager, ScriptedSocket

DESCRIPTOR = 42


class World:
    """One connection and what is around it."""

    def __init__(self, idle_timeout: float = 0.0) -> None:
        self.loop = FakeLoop()
        registry = Registry()
        self.service = Service(
            cast(Loop, self.loop), FakeManager(), registry, Lifetimes(), "demo"
        )  # fmt: skip
        self.admission = Admission(10, 1)
        self.counters = registry.counters("demo")
        endpoint = Endpoint(
            self.service, self.admission, self.counters, "demo", idle_timeout=idle_timeout
        )
        self.socket = ScriptedSocket(DESCRIPTOR)
        self.admission.admit("peer")
        self.connection = StreamConnection(endpoint, cast(socket.socket, self.socket), "peer")

    def event(self) -> None:
        self.connection.on_event(self.loop.watched[DESCRIPTOR])

    def assert_gone(self) -> None:
        assert self.socket.closed
        assert DESCRIPTOR not in self.loop.watched
        assert self.admission.open == 0
        assert self.service.open == 0
        assert self.counters.open == 0


def test_stream_data_is_sent_back() -> None:
    world = World()
    world.socket.incoming, world.socket.room = [b"hello"], [100]
    world.event()
    assert world.socket.sent == b"hello"
    assert (world.counters.received, world.counters.sent) == (5, 5)
    assert world.loop.watched[DESCRIPTOR] == select.EPOLLIN


def test_stream_peer_that_takes_a_part_is_not_read_until_it_took_all() -> None:
    world = World()
    world.socket.incoming, world.socket.room = [b"hello"], [2]
    world.event()
    assert world.connection.unsent == 3
    assert world.loop.watched[DESCRIPTOR] == select.EPOLLOUT
    world.socket.incoming, world.socket.room = [b"more"], [1]
    world.event()
    assert world.socket.incoming == [b"more"], "backpressure is not reading"
    world.socket.room = [5]
    world.event()
    assert world.socket.sent == b"hello"
    assert world.loop.watched[DESCRIPTOR] == select.EPOLLIN
    world.socket.room = [4]
    world.event()
    assert world.socket.sent == b"hellomore"


def test_stream_peer_that_takes_nothing_gets_it_later() -> None:
    world = World()
    world.socket.incoming = [b"hello"]
    world.event()
    world.event()
    assert world.connection.unsent == 5
    world.socket.room = [5]
    world.event()
    assert world.socket.sent == b"hello"


def test_stream_eof_closes_after_everything_was_sent() -> None:
    world = World()
    world.socket.incoming, world.socket.room = [b"hello", b""], [2, 3]
    world.event()
    world.event()
    assert not world.socket.closed
    world.event()
    assert world.socket.sent == b"hello"
    world.assert_gone()
    assert not world.counters.ended, "EOF is how a connection should end"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ECONNRESET, "reset"),
        (errno.ETIMEDOUT, "peer-timeout"),
        (errno.EHOSTUNREACH, "ehostunreach"),
    ],
)
def test_stream_error_when_reading_ends_it_and_is_counted(number: int, reason: str) -> None:
    world = World()
    world.socket.incoming = [OSError(number, "")]
    world.event()
    world.assert_gone()
    assert world.counters.ended == {reason: 1}


def test_stream_error_when_sending_ends_it_and_is_counted() -> None:
    world = World()
    world.socket.incoming, world.socket.room = [b"x"], [OSError(errno.EPIPE, "")]
    world.event()
    world.assert_gone()
    assert world.counters.ended == {"reset": 1}


def test_stream_error_when_flushing_ends_it_and_is_counted() -> None:
    world = World()
    world.socket.incoming, world.socket.room = [b"xy"], [1, OSError(errno.ECONNRESET, "")]
    world.event()
    world.event()
    world.assert_gone()
    assert world.counters.ended == {"reset": 1}


def test_stream_spurious_event_does_nothing() -> None:
    world = World()
    world.event()
    assert not world.socket.closed
    assert world.counters.received == 0


def test_stream_abort_with_octets_unsent_is_a_reset() -> None:
    world = World()
    world.socket.incoming, world.socket.room = [b"hello"], [2]
    world.event()
    world.connection.abort("drain-timeout")
    world.assert_gone()
    assert [option[1] for option in world.socket.options] == [socket.SO_LINGER]
    assert world.counters.ended == {"drain-timeout": 1}


def test_stream_abort_with_nothing_unsent_is_an_ordinary_end() -> None:
    world = World()
    world.connection.abort("drain-timeout")
    world.assert_gone()
    assert not world.socket.options


def test_stream_idle_for_its_time_ends() -> None:
    world = World(idle_timeout=10)
    world.loop.advance(9.9)
    assert not world.socket.closed
    world.loop.advance(0.2)
    world.assert_gone()
    assert world.counters.ended == {"idle-timeout": 1}


def test_stream_idle_time_starts_anew_with_each_octet() -> None:
    world = World(idle_timeout=10)
    for _ in range(5):
        world.loop.advance(9)
        world.socket.incoming, world.socket.room = [b"x"], [1]
        world.event()
    assert not world.socket.closed
    world.loop.advance(10)
    world.assert_gone()


def test_stream_peer_that_never_reads_is_idle_too() -> None:
    world = World(idle_timeout=10)
    world.socket.incoming = [b"hello"]
    world.event()
    world.loop.advance(10.1)
    world.assert_gone()
