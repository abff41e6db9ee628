"""A whole endpoint under peers that say anything: its books agree, and its bounds hold."""

from __future__ import annotations

import random

import pytest

from echo_appliance.netstack.tcp import endpoint as endpoint_module
from echo_appliance.netstack.tcp import listener as listener_module
from echo_appliance.netstack.tcp.connection import Connection
from echo_appliance.netstack.tcp.endpoint import Endpoint
from echo_appliance.netstack.tcp.settings import Settings
from echo_appliance.netstack.tcp.states import State
from echo_appliance.netstack.wire.tcp import ACK, FIN, PSH, RST, SYN, Segment

HERE = b"\x0a\0\0\x01"
PEERS = [b"\x0a\0\0" + bytes((last,)) for last in range(2, 6)]
MASK = 0xFFFFFFFF
HALF_OPEN, CONNECTIONS, TIME_WAITS = 6, 40, 5
SEEDS, SEEDS_PER_TEST = 600, 100
FLAGS = [
    SYN,
    SYN,
    ACK,
    ACK,
    ACK,
    ACK | PSH,
    FIN | ACK,
    FIN | ACK,
    RST,
    RST | ACK,
    SYN | ACK,
    0,
    FIN,
]


class Crowd:
    """Some hosts without manners, an endpoint that serves them, and the clock of all."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - chance that can be repeated
        self.now = 0.0
        limits = Settings(receive_limit=5000, send_limit=5000)
        self.endpoint = Endpoint(bytes(32), lambda *_: (1460, 0), limits)
        self.listeners = [
            self.endpoint.listen(80, self.take), self.endpoint.listen(81, self.take, address=HERE)
        ]  # fmt: skip
        self.heard: dict[tuple[bytes, int, int], Segment] = {}  # the last that each was sent
        self.served: set[Connection] = set()  # whose application has not been told of an end

    def take(self, connection: Connection) -> None:
        connection.application = self.use
        self.served.add(connection)

    def use(self, connection: Connection) -> None:
        """Echo, mostly; at times stop, or leave."""
        chance = self.random.random
        if connection.state in (State.TIME_WAIT, State.CLOSED):
            self.served.discard(connection)
        if chance() < 0.6:
            waiting = connection.readable
            connection.consume(waiting)
            connection.write(bytes(waiting))
        if chance() < 0.05 or (connection.at_eof and chance() < 0.7):
            connection.close()
        if chance() < 0.03:
            connection.release(self.now)
        if chance() < 0.03:
            connection.abort()
        if connection.state is State.CLOSED:  # by what it did
            self.served.discard(connection)

    def segment(self) -> None:
        """Somebody says something: what is next, nearly that, or anything."""
        pick, chance = self.random.choice, self.random.random
        peer, theirs, ours = pick(PEERS), pick([4000, 4001, 4002]), pick([80, 80, 81, 82, 90])
        seq, ack = self.random.getrandbits(32), self.random.getrandbits(32)
        connection = self.endpoint.connections.get((peer, theirs, HERE, ours))
        last = self.heard.get((peer, theirs, ours))
        if connection is not None and chance() < 0.8:
            seq = connection.receiver.nxt + pick([0, 0, 0, 1, -1, 100])
            ack = connection.sender.nxt + pick([0, 0, 0, -1, 1])
        elif last is not None and chance() < 0.8:
            seq, ack = last.ack + pick([0, 0, 0, 1]), last.seq + pick([1, 1, 0, 2])
        flags = pick(FLAGS)
        said = Segment(
            theirs, ours, seq & MASK, ack & MASK, flags, pick([0, 1000, 65535]),
            memoryview(bytes(pick([0, 0, 10, 1460]))), pick([None, (int(self.now * 1000), 0)]),
            mss=1460 if flags & SYN else None,
        )  # fmt: skip
        self.endpoint.receive(peer, HERE, said, self.now)

    def wait(self) -> None:
        self.now += self.random.choice([0.001, 0.05, 0.5, 3, 70])
        while (at := self.endpoint.deadline()) is not None and at <= self.now:
            self.endpoint.on_deadline(self.now)
            self.flush()

    def flush(self) -> None:
        for item, segments in self.endpoint.to_send(self.now):
            for one in segments:
                self.heard[item.remote, one.destination_port, one.source_port] = one
        self.check()

    def check(self) -> None:
        endpoint = self.endpoint
        half_open = {c for listener in self.listeners for c in listener.half_open.values()}
        assert set(endpoint._opening) == half_open
        assert {c for c in endpoint.connections.values() if c in half_open} == half_open
        assert all(c.state is State.SYN_RECEIVED for c in half_open)
        assert all(len(listener.half_open) <= HALF_OPEN for listener in self.listeners)
        assert len(endpoint.connections) <= CONNECTIONS
        assert len(endpoint._waiting) <= TIME_WAITS
        assert all(c.state is State.TIME_WAIT for c in endpoint._waiting)
        assert len(endpoint._timers) <= 2 * len(endpoint.connections) + 65
        assert self.served <= set(endpoint.connections.values()), "who would never be told"
        for connection in endpoint.connections.values():
            assert connection.state is not State.CLOSED
            due = connection.deadline()
            assert due is None or connection.scheduled <= due, "its time would pass unseen"


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_endpoint_books_agree_whatever_peers_say(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "MAX_CONNECTIONS", CONNECTIONS)
    monkeypatch.setattr(endpoint_module, "MAX_TIME_WAIT", TIME_WAITS)
    monkeypatch.setattr(listener_module, "MAX_HALF_OPEN", HALF_OPEN)
    timers = 0
    for seed in range(first, first + SEEDS_PER_TEST):
        crowd = Crowd(seed)
        for _ in range(crowd.random.randrange(20, 300)):
            if crowd.random.random() < 0.12:
                crowd.wait()
            else:
                for _ in range(crowd.random.choice([1, 1, 1, 3, 10])):
                    crowd.segment()
                crowd.flush()
        timers += crowd.endpoint._timer_number
    assert timers > SEEDS_PER_TEST, "nothing happened"
