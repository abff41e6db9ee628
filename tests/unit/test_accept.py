"""An Acceptor's pauses, on a real listening socket and a loop that can be made to refuse it."""

import errno
import select
import socket
from collections.abc import Iterator
from typing import cast

import pytest

from echo_appliance.accept import Acceptor
from echo_appliance.admission import Admission
from echo_appliance.inherit import Inherited
from echo_appliance.loop import Loop
from echo_appliance.metrics import Counters
from tests.unit.fakes import FakeLoop, nothing_taken


@pytest.fixture
def listening() -> Iterator[Inherited]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield Inherited("demo", sock)


def test_acceptor_that_epoll_refuses_to_take_back_tries_again_later(
    listening: Inherited, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, counters = FakeLoop(), Counters()
    acceptor = Acceptor(
        cast(Loop, loop), listening, Admission(1, 0), counters, nothing_taken, lambda: None
    )
    acceptor.start()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no watches left")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "watch", refuse)
        acceptor.look_again()
        loop.advance(1.0)
        assert not loop.watched
    assert counters.refused == {"resources": 1}, "told once, however often it was tried"
    loop.advance(1.0)
    assert listening.socket.fileno() in loop.watched


def test_acceptor_accepts_the_more_at_a_time_the_longer_the_queue_stays(
    listening: Inherited,
) -> None:
    loop, taken = FakeLoop(), list[socket.socket]()
    acceptor = Acceptor(
        cast(Loop, loop), listening, Admission(0, 0), Counters(),
        lambda connection, _: taken.append(connection), lambda: None,
    )  # fmt: skip
    acceptor.start()
    listening.socket.listen(100)
    clients = [socket.create_connection(listening.socket.getsockname()) for _ in range(40)]
    counts = []
    for turn in (1, 2, 3, 4, 5, 9, 10):  # others have their turn in between, and it begins again
        loop.turn, before = turn, len(taken)
        loop.handlers[listening.socket.fileno()](select.EPOLLIN)
        counts.append(len(taken) - before)
    assert counts == [1, 2, 4, 8, 16, 1, 2]
    for sock in (*clients, *taken):
        sock.close()
