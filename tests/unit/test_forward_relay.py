"""A relay between two sockets whose every answer is scripted."""

import errno
import gc
import socket
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import cast

import pytest

from echo_appliance.forward.relay import Relay, Side
from echo_appliance.loop import Loop
from tests.unit.fakes import FakeLoop, ScriptedSocket

ALL = 1 << 20
RESET = OSError(errno.ECONNRESET, "")
SIDES = ("client", "backend")


class World:
    """A relay and what is around it; the owner remembers how it ended."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.sockets = {"client": ScriptedSocket(10), "backend": ScriptedSocket(11)}
        client, backend = (cast(socket.socket, one) for one in self.sockets.values())
        self.relay = Relay(cast(Loop, self.loop), self, client, backend)
        self.ended: list[tuple[str, bool]] = []

    def relay_ended(self, reason: str, reset: bool) -> None:
        self.ended.append((reason, reset))
        self.relay.end()

    def started(self) -> "World":
        self.relay.start()
        assert self.watched == {"client": EPOLLIN, "backend": EPOLLIN}
        return self

    @property
    def watched(self) -> dict[str, int]:
        return {
            name: self.loop.watched[sock.descriptor]
            for name, sock in self.sockets.items()
            if sock.descriptor in self.loop.watched
        }

    def event(self, name: str, events: int) -> None:
        descriptor = self.sockets[name].descriptor
        asked = self.loop.watched[descriptor] | EPOLLERR | EPOLLHUP
        assert events & asked == events, "epoll reports what was asked for, and no more"
        self.loop.handlers[descriptor](events)

    def hear(self, name: str, *octets: bytes | OSError, events: int = EPOLLIN) -> None:
        """Let this side send; each part is an event of its own."""
        for part in octets:
            self.sockets[name].incoming.append(part)
            self.event(name, events)

    def stall(self, name: str, octets: bytes, room: int = 0) -> None:
        """Let this side send what the other takes only `room` octets of."""
        if room:
            self.sockets[other(name)].room.append(room)
        self.hear(name, octets)


def other(name: str) -> str:
    return "backend" if name == "client" else "client"


# -- the start -----------------------------------------------------------------


def test_relay_start_passes_on_what_the_client_has_said_already() -> None:
    world = World()
    world.sockets["client"].incoming.append(b"early")
    world.sockets["backend"].room.append(ALL)
    world.started()
    assert world.sockets["backend"].sent == b"early"


@pytest.mark.parametrize("room", [0, 3])
def test_relay_start_keeps_what_the_backend_does_not_take_at_once(room: int) -> None:
    world = World()
    world.sockets["client"].incoming.append(b"early")
    world.sockets["backend"].room += [room] if room else []
    world.relay.start()
    assert world.watched == {"client": 0, "backend": EPOLLIN | EPOLLOUT}
    world.sockets["backend"].room.append(ALL)
    world.event("backend", EPOLLOUT)
    assert world.sockets["backend"].sent == b"early"
    assert world.watched == {"client": EPOLLIN, "backend": EPOLLIN}
    assert not world.ended


def test_relay_start_sends_the_head_first() -> None:
    world = World()
    world.sockets["client"].incoming.append(b"octets")
    world.sockets["backend"].room += [ALL, ALL]
    world.relay.start(b"head ")
    assert world.sockets["backend"].sent == b"head octets"


@pytest.mark.parametrize("room", [0, 3])
def test_relay_start_with_a_head_that_stalls_reads_no_more(room: int) -> None:
    world = World()
    world.sockets["client"].incoming.append(b"octets")
    world.sockets["backend"].room += [room] if room else []
    world.relay.start(b"head ")
    assert world.watched == {"client": 0, "backend": EPOLLIN | EPOLLOUT}
    assert world.sockets["client"].incoming == [b"octets"]
    world.sockets["backend"].room += [ALL, ALL]
    world.event("backend", EPOLLOUT)
    world.event("client", EPOLLIN)
    assert world.sockets["backend"].sent == b"head octets"


def test_relay_start_after_a_reset_ends_and_waits_for_nothing() -> None:
    world = World()
    world.sockets["client"].incoming.append(RESET)
    world.relay.start()
    assert world.ended == [("reset", True)]
    assert not world.loop.watched


def test_relay_start_after_the_clients_end_still_sees_its_errors() -> None:
    world = World()
    world.sockets["client"].incoming.append(b"")
    world.relay.start()
    assert world.sockets["backend"].shut == 1
    assert world.watched == {"client": 0, "backend": EPOLLIN}
    world.sockets["client"].error = errno.ECONNRESET
    world.event("client", EPOLLERR | EPOLLHUP)
    assert world.ended == [("reset", True)]


# -- octets --------------------------------------------------------------------


@pytest.mark.parametrize("name", SIDES)
def test_relay_octets_reach_the_other_side_and_are_counted(name: str) -> None:
    world = World().started()
    there = world.sockets[other(name)]
    there.room += [ALL, ALL]
    world.hear(name, b"one", b"two")
    assert there.sent == b"onetwo"
    assert (world.relay.client.octets, world.relay.backend.octets) == (
        (6, 0) if name == "client" else (0, 6)
    )
    assert not world.relay.unsent


@pytest.mark.parametrize("name", SIDES)
def test_relay_event_without_octets_does_nothing(name: str) -> None:
    world = World().started()
    world.event(name, EPOLLIN)
    assert world.watched == {"client": EPOLLIN, "backend": EPOLLIN}
    assert not world.ended


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("room", [0, 4])
def test_relay_slow_side_stops_the_reading_of_the_other(name: str, room: int) -> None:
    world = World().started()
    there = world.sockets[other(name)]
    world.stall(name, b"0123456789", room)
    assert world.watched == {name: 0, other(name): EPOLLIN | EPOLLOUT}
    assert world.relay.unsent == 10 - room
    world.event(other(name), EPOLLOUT)  # EAGAIN again
    there.room.append(3)
    world.event(other(name), EPOLLOUT)
    assert world.watched == {name: 0, other(name): EPOLLIN | EPOLLOUT}
    there.room.append(ALL)
    world.event(other(name), EPOLLOUT)
    assert there.sent == b"0123456789"
    assert world.watched == {"client": EPOLLIN, "backend": EPOLLIN}


def test_relay_side_that_is_slow_is_still_read() -> None:
    world = World().started()
    world.stall("client", b"question")
    world.sockets["client"].room.append(ALL)
    world.hear("backend", b"answer")
    assert world.sockets["client"].sent == b"answer"
    # Readable and writable at once: both directions get their turn.
    world.sockets["client"].room.append(ALL)
    world.sockets["backend"].room.append(ALL)
    world.hear("backend", b"!", events=EPOLLIN | EPOLLOUT)
    assert world.sockets["backend"].sent == b"question"
    assert world.sockets["client"].sent == b"answer!"


def test_relay_both_directions_may_stall() -> None:
    world = World().started()
    world.stall("client", b"there")
    world.stall("backend", b"here")
    assert world.watched == {"client": EPOLLOUT, "backend": EPOLLOUT}
    assert world.relay.unsent == 9
    for name in SIDES:
        world.sockets[name].room.append(ALL)
        world.event(name, EPOLLOUT)
    assert world.watched == {"client": EPOLLIN, "backend": EPOLLIN}


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize(
    ("brisk", "many", "room", "lingers"),
    [
        (True, 4096, ALL, True),
        (True, 4097, ALL, False),  # who takes that in has more to do than to answer
        (True, 4096, 4095, False),  # nobody answers a slow one
        (False, 1, ALL, False),
    ],
)
def test_relay_looks_for_the_answer_to_a_little_that_came_at_once(
    name: str, brisk: bool, many: int, room: int, lingers: bool
) -> None:
    world = World().started()
    world.loop.brisk = brisk
    world.sockets[other(name)].room.append(room)
    world.hear(name, bytes(many))
    assert world.loop.lingers == lingers


@pytest.mark.parametrize("brisk", [True, False])
@pytest.mark.parametrize("name", SIDES)
def test_relay_looks_for_what_follows_an_end_that_came_at_once(name: str, brisk: bool) -> None:
    world = World().started()
    world.loop.brisk = brisk
    world.hear(name, b"")
    assert world.loop.lingers == brisk


# -- ends ----------------------------------------------------------------------


@pytest.mark.parametrize("first", SIDES)
def test_relay_half_close_passes_and_the_other_direction_goes_on(first: str) -> None:
    world = World().started()
    late = other(first)
    world.hear(first, b"")
    assert world.sockets[late].shut == 1
    assert world.watched == {first: 0, late: EPOLLIN}
    world.sockets[first].room.append(ALL)
    world.hear(late, b"late answer")
    assert world.sockets[first].sent == b"late answer"
    assert not world.ended
    world.hear(late, b"")
    assert world.ended == [("eof", False)]
    assert not world.loop.watched


@pytest.mark.parametrize("first", SIDES)
def test_relay_end_is_passed_on_after_the_last_octet(first: str) -> None:
    world = World().started()
    late = other(first)
    world.stall(first, b"last words", 4)
    world.hear(late, b"")  # the other direction is over at once
    assert world.sockets[first].shut == 1
    assert world.watched == {first: 0, late: EPOLLOUT}
    world.sockets[late].room.append(ALL)
    world.event(late, EPOLLOUT)
    assert world.sockets[late].sent == b"last words"
    assert world.sockets[late].shut == 0, "more may come"
    world.hear(first, b"")
    assert world.ended == [("eof", False)]


def test_relay_end_behind_stalled_octets_waits_for_them() -> None:
    world = World().started()
    world.hear("backend", b"")
    world.stall("client", b"octets")
    # The client is not read while it is owed patience: its end is found when they are gone.
    world.sockets["backend"].room.append(ALL)
    world.event("backend", EPOLLOUT)
    assert not world.ended
    world.hear("client", b"")
    assert world.ended == [("eof", False)]
    assert world.sockets["backend"].sent == b"octets"


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ECONNRESET, "reset"),
        (errno.EPIPE, "reset"),
        (errno.ETIMEDOUT, "peer-timeout"),
        (errno.EHOSTUNREACH, "ehostunreach"),
    ],
)
def test_relay_error_of_one_side_is_a_reset_for_both(name: str, number: int, reason: str) -> None:
    world = World().started()
    world.hear(name, OSError(number, ""), events=EPOLLIN | EPOLLERR | EPOLLHUP)
    assert world.ended == [(reason, True)]
    assert not world.loop.watched


@pytest.mark.parametrize("name", SIDES)
def test_relay_error_when_sending_ends_it(name: str) -> None:
    world = World().started()
    world.sockets[other(name)].room.append(OSError(errno.EPIPE, ""))
    world.hear(name, b"octets")
    assert world.ended == [("reset", True)]


@pytest.mark.parametrize("name", SIDES)
def test_relay_error_when_sending_the_rest_ends_it(name: str) -> None:
    world = World().started()
    world.stall(name, b"octets")
    world.sockets[other(name)].room.append(OSError(errno.ECONNRESET, ""))
    world.event(other(name), EPOLLOUT)
    assert world.ended == [("reset", True)]
    assert not world.loop.watched


@pytest.mark.parametrize("stalled", [False, True])
@pytest.mark.parametrize(
    ("number", "last", "reset"),
    [
        (errno.EPIPE, b"", False),  # it has ended as it should, and the octets came too late
        (errno.EPIPE, RESET, True),
        (errno.ECONNRESET, b"", True),  # to tell the error once is all that the kernel does
    ],
)
@pytest.mark.parametrize("name", SIDES)
def test_relay_last_words_of_a_side_that_takes_no_more_are_delivered(
    name: str, number: int, last: bytes | OSError, reset: bool, stalled: bool
) -> None:
    world = World().started()
    here, there = world.sockets[name], world.sockets[other(name)]
    if stalled:
        world.stall(name, b"question")
    there.incoming += [b"answer", b"!", last]
    there.room.append(OSError(number, ""))
    here.room += [ALL, ALL]
    if stalled:
        world.event(other(name), EPOLLOUT | EPOLLIN)
    else:
        world.hear(name, b"question")
    assert here.sent == b"answer!"
    assert world.ended == [("reset", reset)]
    assert not world.loop.watched


@pytest.mark.parametrize("room", [[], [3]])
def test_relay_last_words_are_not_waited_for(room: list[int]) -> None:
    world = World().started()
    world.sockets["backend"].incoming += [b"answer", b"!"]
    world.sockets["backend"].room.append(OSError(errno.EPIPE, ""))
    world.sockets["client"].room += room
    world.hear("client", b"question")
    assert world.sockets["client"].sent == b"answer"[: sum(room)]
    assert world.ended == [("reset", True)]


def test_relay_start_with_a_head_that_nobody_takes_delivers_the_last_words() -> None:
    world = World()
    world.sockets["backend"].incoming += [b"go away", b""]
    world.sockets["backend"].room.append(OSError(errno.EPIPE, ""))
    world.sockets["client"].room.append(ALL)
    world.relay.start(b"head")
    assert world.sockets["client"].sent == b"go away"
    assert world.ended == [("reset", False)]
    assert not world.loop.watched


@pytest.mark.parametrize("name", SIDES)
def test_relay_octets_before_a_reset_are_delivered(name: str) -> None:
    world = World().started()
    world.sockets[other(name)].room.append(ALL)
    world.hear(name, b"answer", RESET, events=EPOLLIN | EPOLLERR | EPOLLHUP)
    assert world.sockets[other(name)].sent == b"answer"
    assert world.ended == [("reset", True)]


@pytest.mark.parametrize("name", SIDES)
def test_relay_reset_of_a_side_that_is_not_read_is_seen(name: str) -> None:
    world = World().started()
    world.stall(name, b"octets")
    world.sockets[name].error = errno.ECONNRESET
    world.event(name, EPOLLERR | EPOLLHUP)
    assert world.ended == [("reset", True)]


def test_relay_error_queue_without_an_error_is_no_end() -> None:
    world = World().started()
    world.stall("client", b"octets")
    world.event("client", EPOLLERR)
    assert not world.ended


@pytest.mark.parametrize("name", SIDES)
def test_relay_side_that_hung_up_is_left_alone_until_it_can_be_read(name: str) -> None:
    world = World().started()
    world.stall(name, b"octets")
    # It neither sends nor takes any more: epoll would say so for ever.
    world.event(name, EPOLLHUP)
    assert world.watched == {other(name): EPOLLIN | EPOLLOUT}
    world.sockets[other(name)].room.append(ALL)
    world.event(other(name), EPOLLOUT)
    assert world.watched == {"client": EPOLLIN, "backend": EPOLLIN}
    world.hear(name, b"", events=EPOLLIN | EPOLLHUP)
    assert world.sockets[other(name)].shut == 1


def test_relay_that_is_over_leaves_nothing_to_the_garbage_collector() -> None:
    world = World().started()
    world.sockets["backend"].room.append(ALL)
    world.hear("client", b"octets", b"")
    world.hear("backend", b"")
    assert world.ended == [("eof", False)]
    sides = {id(world.relay.client), id(world.relay.backend)}
    gc.disable()
    try:
        del world
        left = [one for one in gc.get_objects() if isinstance(one, Side)]
    finally:
        gc.enable()
    assert not sides & set(map(id, left))


@pytest.mark.parametrize("name", SIDES)
def test_relay_shutdown_that_fails_is_a_reset_that_came_before(name: str) -> None:
    world = World().started()
    world.sockets[other(name)].shutdown_error = OSError(errno.ENOTCONN, "")
    world.hear(name, b"")
    assert world.ended == [("reset", True)]
