"""When the driver reads on, and when it answers: real frames through a pair of message sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from echo_appliance.loop import Loop
from echo_appliance.netstack.device import adopt
from echo_appliance.netstack.driver import FRAMES_PER_TURN, Driver
from tests.unit.netstack.framed import THEIRS_FIRST, Peer


class Driven:
    """A host of a Peer's whose frames come from a descriptor."""

    def __init__(self) -> None:
        self.peer = Peer()
        self.loop = Loop()
        self.other_end, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.device = adopt(ours.detach(), "link", None)
        self.lost: list[str] = []
        self.driver = Driver(self.loop, self.device, self.peer.host.interface, self.lost.append)
        self.lingers = False  # after the last turn
        self._reads = 0
        self._seq = THEIRS_FIRST
        read = self.device.read

        def counted() -> tuple[memoryview, bool] | None:
            self._reads += 1
            return read()

        self.device.read = counted  # type: ignore[method-assign]

    def come(self, frames: int) -> None:
        """Have so many frames lie there, with an octet each."""
        for _ in range(frames):
            self.other_end.send(self.peer.frame(self.peer.segment(b"x", seq=self._seq)))
            self._seq += 1

    def turn(self) -> tuple[int, int]:
        """Let the driver be told that there is something; return attempts to read, and frames."""
        before, self._reads = self.device.received_frames, 0
        self.driver._on_readable(0)
        self.lingers, self.loop._lingers = self.loop._lingers, False
        return self._reads, self.device.received_frames - before

    def stays_awake(self) -> bool:
        """Have a turn; return whether the loop stays awake after it."""
        self.turn()
        return self.lingers

    def close(self) -> None:
        self.other_end.close()
        self.driver.close()
        self.loop.close()


@pytest.fixture
def driven() -> Iterator[Driven]:
    driven = Driven()
    yield driven
    driven.close()


def test_frames_that_come_one_by_one_are_not_looked_behind(driven: Driven) -> None:
    turns = []
    for _ in range(20):
        driven.come(1)
        turns.append(driven.turn())
    assert {frames for _, frames in turns} == {1}
    assert sum(reads for reads, _ in turns) <= 24, "one time in six it is tried"


def test_burst_is_soon_read_by_the_batch(driven: Driven) -> None:
    driven.come(100)
    turns = [driven.turn() for _ in range(8)]
    assert [frames for _, frames in turns] == [1, 1, 1, 1, 1, FRAMES_PER_TURN, FRAMES_PER_TURN, 31]
    assert driven.peer.connection.read(200) == b"x" * 100


def test_after_a_burst_frames_are_read_one_by_one_again(driven: Driven) -> None:
    driven.come(40)
    while driven.turn()[1]:
        pass
    driven.come(1)
    assert driven.turn() == (1, 1)


@pytest.fixture
def brisk(driven: Driven) -> Driven:
    """A driver whose frames come soon after each other."""
    driven.loop.brisk = True
    driven.come(20)
    return driven


def test_driver_stays_awake_while_each_frame_comes_soon_after_the_last(brisk: Driven) -> None:
    assert brisk.stays_awake()
    brisk.loop.brisk = False
    assert not brisk.stays_awake()


def test_driver_sleeps_between_batches(brisk: Driven) -> None:
    turns = [brisk.turn()[1] for _ in range(6)]
    assert turns == [1, 1, 1, 1, 1, 15]
    brisk.come(FRAMES_PER_TURN)
    assert not brisk.stays_awake()


def test_driver_sleeps_while_its_peer_has_much_to_take_in(brisk: Driven) -> None:
    brisk.device.send(bytes(14), bytes(64 << 10))
    assert not brisk.stays_awake()
    brisk.device.send(bytes(14), bytes(100))
    assert brisk.stays_awake()


def test_what_came_before_the_end_of_the_device_is_held_for_nobody(driven: Driven) -> None:
    """The device fails in the midst of a batch; who ends its connections then flushes."""
    driven.come(5 + 3)
    for _ in range(5):
        driven.turn()
    driven.other_end.close()
    assert driven.turn() == (4, 3)
    assert driven.lost == ["its other end was closed"]
    driven.peer.connection.abort()
    driven.driver.touch(driven.peer.connection)
    driven.driver._flush()
    assert not driven.peer.host.interface.streams.endpoint.connections
