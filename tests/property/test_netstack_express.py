"""The express road leads where the long one does, and what is cut late arrives whole.

Two hosts that differ in nothing but that one of them has no express road are
told the same, by a peer whose frames get lost, copied, out of order, damaged,
and forged with right checksums: they must say the same.  Frame by frame they do
where they send, too; batch by batch where they only take, since of the
acknowledgments of one batch the last may stand for all.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Sequence

import pytest

from echo_appliance.netstack.addresses import parse_network
from echo_appliance.netstack.checksum import checksum, pseudo_header_sum
from echo_appliance.netstack.interface import Interface
from echo_appliance.netstack.tcp.connection import Connection
from echo_appliance.netstack.tcp.settings import Settings
from tests.unit.netstack.hosts import Drops, Port

ECHO = 7
MACS = (b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02")
NETWORKS = (("192.0.2.1/24", "2001:db8::1/64"), ("192.0.2.2/24", "2001:db8::2/64"))
ADDRESSES = {
    4: [socket.inet_aton(f"192.0.2.{last}") for last in (1, 2)],
    6: [socket.inet_pton(socket.AF_INET6, f"2001:db8::{last}") for last in (1, 2)],
}
SEEDS, SEEDS_PER_TEST = 120, 20


class Spy:
    """An express road that counts who takes it; or one that is closed."""

    def __init__(self, interface: Interface, *, is_open: bool) -> None:
        self.taken = 0
        self.handed_over = 0  # joined, as far as they could be
        self._express = interface._express
        self._is_open = is_open
        interface._express = self  # type: ignore[assignment]
        endpoint = interface.streams.endpoint
        receive_next = endpoint.receive_next

        def on_next(*fields: object) -> bool:
            taken = receive_next(*fields)  # type: ignore[arg-type]
            self.handed_over += taken
            return taken

        endpoint.receive_next = on_next  # type: ignore[assignment, method-assign]

    def take(self, octets: memoryview, now: float, verified: bool) -> bool:
        taken = self._is_open and self._express.take(octets, now, verified)
        self.taken += taken
        return taken

    def settle(self, now: float) -> None:
        self._express.settle(now)


class Host:
    """A whole stack, without a device."""

    def __init__(self, index: int, mtu: int = 1500, *, express: bool = True) -> None:
        self.port = Port(mtu)
        self.drops = Drops()
        networks = [parse_network(text) for text in NETWORKS[index]]
        self.interface = Interface(
            self.port, MACS[index], networks, [], self.drops, bytes((index,)) * 32,  # type: ignore[arg-type]
            Settings(receive_limit=200_000, send_limit=150_000, nagle=False),
        )  # fmt: skip
        self.spy = Spy(self.interface, is_open=express)
        self.endpoint = self.interface.streams.endpoint
        for addresses in ADDRESSES.values():
            self.interface.link.neighbours.heard(
                addresses[1 - index], MACS[1 - index], 0.0, solicited=True, create=True
            )

    def receive(self, frames: list[bytes], now: float) -> None:
        """Take in a batch, and answer it."""
        for frame in frames:
            self.interface.receive(memoryview(bytearray(frame)), now)
        self.interface.flush(now)

    def pass_time(self, now: float) -> None:
        due = self.interface.deadline()
        if due is not None and due <= now:
            self.interface.on_deadline(now)

    def sent(self) -> list[bytes]:
        frames, self.port.frames[:] = list(self.port.frames), []
        return frames


def discard(connection: Connection) -> None:
    """Take all; close when the peer has."""
    connection.consume(connection.readable)
    if connection.at_eof:
        connection.close()


def echo(connection: Connection) -> None:
    """Send back what fits; close when the peer has."""
    connection.write(connection.read(connection.writable))
    if connection.at_eof:
        connection.close()


class Client:
    """Sends octets, and keeps what comes back."""

    def __init__(self, host: Host, version: int, data: bytes) -> None:
        self.back = b""
        self._rest = data
        local, remote = ADDRESSES[version]
        self.connection = host.endpoint.connect(local, remote, ECHO, 0.0)
        self.connection.application = self.progress

    def progress(self, connection: Connection) -> None:
        self.back += connection.read(1 << 20)
        self._rest = self._rest[connection.write(self._rest) :]
        if not self._rest:
            connection.close()


# -- faults ------------------------------------------------------------------


def repaired(frame: bytearray) -> bytes:
    """Return the frame with right checksums."""
    if frame[12] == 0x08:
        start, addresses = 34, frame[26:34]
        frame[24:26] = bytes(2)
        frame[24:26] = checksum(frame[14:34]).to_bytes(2, "big")
        end = 14 + int.from_bytes(frame[16:18], "big")
    else:
        start, addresses, end = 54, frame[22:54], len(frame)
    frame[start + 16 : start + 18] = bytes(2)
    so_far = pseudo_header_sum(addresses, 6, end - start)
    frame[start + 16 : start + 18] = checksum(frame[start:end], so_far).to_bytes(2, "big")
    return bytes(frame)


def forged(frame: bytes, chance: random.Random) -> bytes:
    """Return the frame with another value in one or two fields of TCP's or IP's, sums right."""
    out = bytearray(frame)
    start = 34 if out[12] == 0x08 else 54
    for _ in range(chance.choice((1, 1, 2))):
        at, size = chance.choice(
            (
                (start + 4, 4), (start + 8, 4),  # seq, ack
                (start + 12, 1), (start + 13, 1),  # offset, flags
                (start + 14, 2), (start + 18, 2),  # window, urgent pointer
                (start + 20, 4), (start + 24, 4), (start + 28, 4),  # the options
                (0, 1), (14, 1), (20, 2) if start == 34 else (18, 2), (22, 1),  # Ethernet, IP
            )
        )  # fmt: skip
        if at + size > len(out):
            continue
        value = int.from_bytes(out[at : at + size], "big")
        step = chance.choice((1, -1, 1448, -1448, chance.getrandbits(31), 1 << (size * 8 - 1)))
        out[at : at + size] = ((value + step) % (1 << size * 8)).to_bytes(size, "big")
    return repaired(out)


def troubled(
    frames: list[bytes], chance: random.Random, trouble: float, *, forge: bool
) -> list[bytes]:
    """Return what a bad link makes of frames, and, if it is to forge, a bad neighbour."""
    out = []
    for frame in frames:
        if chance.random() < trouble:
            continue
        out.append(frame)
        if chance.random() < trouble:
            out.append(frame)
        if chance.random() < trouble:
            damaged = bytearray(frame)
            damaged[chance.randrange(len(frame))] ^= 1 << chance.randrange(8)
            out.append(bytes(damaged))
        if forge and chance.random() < trouble:
            out.append(forged(frame, chance) if len(frame) >= 66 else frame[: chance.randrange(60)])
        if chance.random() < trouble:
            chance.shuffle(out)
    return out


# -- the properties ----------------------------------------------------------


def _compare(
    seed: int, version: int, application: Callable[[Connection], None], sizes: Sequence[int]
) -> Host:
    """Let both hosts hear the same, in batches of these sizes; return the one with the road."""
    chance = random.Random(seed)  # noqa: S311 - chance that can be repeated
    fast, slow = Host(1), Host(1, express=False)
    peer = Host(0, chance.choice((1280, 1500)))  # its full segments need not be ours
    for host in (fast, slow):
        host.endpoint.listen(ECHO, lambda one: setattr(one, "application", application))
    for _ in range(chance.choice((1, 1, 2))):
        Client(peer, version, chance.randbytes(chance.choice((10, 30_000, 300_000))))
    peer.interface.flush(0.0)
    now, trouble = 0.0, chance.choice((0.0, 0.01, 0.1))
    for _ in range(100):
        now += chance.choice((0.001, 0.001, 0.001, 0.05, 1.0))
        frames = troubled(peer.sent(), chance, trouble, forge=True)
        while frames:
            size = chance.choice(sizes)
            batch, frames = frames[:size], frames[size:]
            for host in (fast, slow):
                host.receive(batch, now)
            told = [frame.hex() for frame in batch]
            assert fast.port.frames == slow.port.frames, f"seed {seed}: after {told}"
        for host in (fast, slow):
            host.pass_time(now)
        answers = fast.sent()
        assert answers == slow.sent()
        peer.receive(troubled(answers, chance, trouble / 2, forge=True), now)
        peer.pass_time(now)
    assert fast.drops == slow.drops
    assert fast.endpoint.counters == slow.endpoint.counters
    assert not slow.spy.taken
    return fast


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_express_road_leads_where_the_long_one_does(first: int, version: int) -> None:
    seeds = range(first, first + SEEDS_PER_TEST)
    taken = sum(_compare(seed, version, echo, [1]).spy.taken for seed in seeds)
    assert taken > 300, f"{taken} frames: it was not tested"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_joined_segments_are_answered_as_if_they_had_come_apart(first: int, version: int) -> None:
    hosts = [
        _compare(seed, version, discard, [1, 2, 3, 32])
        for seed in range(first, first + SEEDS_PER_TEST)
    ]
    joined = sum(host.spy.taken - host.spy.handed_over for host in hosts)
    assert joined > 300, f"{joined} frames: it was not tested"


def _converse(chance: random.Random, ends: tuple[Host, Host], connection: Connection) -> None:
    """Carry frames between two hosts, in batches, until the connection has all that comes."""
    now = 0.0
    under_way: tuple[list[bytes], list[bytes]] = ([], [])
    trouble = chance.choice((0.0, 0.01, 0.05))
    for _ in range(20_000):
        if connection.at_eof:
            return
        dues = [due for host in ends if (due := host.interface.deadline()) is not None]
        idle = not any(under_way) and not any(host.port.frames for host in ends)
        now = max(now + 0.0005, min(dues, default=now) if idle else 0.0)
        for host, frames in zip(ends, under_way, strict=True):
            size = chance.choice((1, 2, 32))
            batch, frames[:] = frames[:size], frames[size:]
            host.receive(batch, now)
            host.pass_time(now)
        for host, frames in zip(ends, reversed(under_way), strict=True):
            frames += troubled(host.sent(), chance, trouble, forge=False)
    raise AssertionError("not done")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_what_is_cut_late_arrives_whole(first: int, version: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        chance = random.Random(seed)  # noqa: S311
        mtu = chance.choice((1280, 1500, 9000))
        client, server = Host(0, mtu), Host(1, mtu)
        server.endpoint.listen(ECHO, lambda one: setattr(one, "application", echo))
        data = chance.randbytes(chance.choice((1, 50_000, 300_000)))
        talk = Client(client, version, data)
        client.interface.flush(0.0)
        _converse(chance, (client, server), talk.connection)
        assert talk.back == data, f"seed {seed}"
        assert talk.connection.error is None
