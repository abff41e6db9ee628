"""Two hosts on a fake link with a clock of its own: seeded loss, reordering, copies, corruption.

Segments travel as octets with a checksum, so that what is corrupted is found by
what finds it in life.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

from echo_appliance.errors import ParseError
from echo_appliance.netstack.tcp.connection import Connection
from echo_appliance.netstack.tcp.endpoint import Endpoint
from echo_appliance.netstack.tcp.settings import Settings
from echo_appliance.netstack.wire.tcp import CHECKSUM_OFFSET, Segment, parse, serialize

LEFT, RIGHT = b"\x0a\x00\x00\x01", b"\x0a\x00\x00\x02"
MSS = 1460


@dataclass(frozen=True)
class Fault:
    """Probabilities per segment; times in seconds."""

    loss: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    reorder: float = 0.0  # this share is not delayed at all, and so overtakes
    delay: float = 0.005
    limit: int = 1000  # segments under way, each direction


class Link:
    """The link, both hosts, and the clock."""

    def __init__(
        self,
        fault: Fault | None = None,
        seed: int = 0,
        settings: tuple[Settings, Settings] | None = None,
        mss: int = MSS,
        segment_limit: int = 0,
    ) -> None:
        self.now = 1000.0
        self.fault = fault or Fault()
        self.random = random.Random(seed)  # noqa: S311
        left, right = settings or (Settings(), Settings())
        self.left = Endpoint(b"l" * 32, lambda *_: (mss, segment_limit), left)
        self.right = Endpoint(b"r" * 32, lambda *_: (mss, segment_limit), right)
        self.sent = 0
        self.dropped = 0
        self.trace: Callable[[float, bytes, Segment, str], None] | None = None
        self._queue: list[tuple[float, int, Endpoint, bytes, bytes, bytes]] = []
        self._number = 0
        self._under_way = {LEFT: 0, RIGHT: 0}

    def connect(self, port: int, settings: Settings | None = None) -> Connection:
        return self.left.connect(LEFT, RIGHT, port, self.now, settings=settings)

    def transmit(self, host: Endpoint) -> None:
        """Let a host send all it has."""
        for item, segments in host.to_send(self.now):
            for segment in segments:
                for piece in cut(segment, item.send_mss):
                    self._carry(item.local, item.remote, piece)

    def _carry(self, source: bytes, destination: bytes, segment: Segment) -> None:
        fault, chance = self.fault, self.random.random
        self.sent += 1
        octets = wire(source, destination, segment)
        fate = ""
        if chance() < fault.loss or self._under_way[source] >= fault.limit:
            fate = "lost"
            self.dropped += 1
        copies = 0 if fate else 1 + (chance() < fault.duplicate)
        if self.trace is not None:
            self.trace(self.now, source, segment, fate)
        for _ in range(copies):
            at = self.now + (0.0001 if chance() < fault.reorder else fault.delay)
            sent = octets
            if chance() < fault.corrupt:
                place = int(chance() * len(octets))
                sent = octets[:place] + bytes((octets[place] ^ 1 << int(chance() * 8),))
                sent += octets[place + 1 :]
            host = self.right if destination == RIGHT else self.left
            self._number += 1
            self._under_way[source] += 1
            heapq.heappush(self._queue, (at, self._number, host, source, destination, sent))

    def step(self) -> bool:
        """Go on to the next thing that happens; False when nothing ever will."""
        for host in (self.left, self.right):
            self.transmit(host)
        times = [at for host in (self.left, self.right) if (at := host.deadline()) is not None]
        if self._queue:
            times.append(self._queue[0][0])
        if not times:
            return False
        self.now = max(self.now, min(times))
        while self._queue and self._queue[0][0] <= self.now:
            _, _, host, source, destination, octets = heapq.heappop(self._queue)
            self._under_way[source] -= 1
            self._deliver(host, source, destination, octets)
        for host in (self.left, self.right):
            host.on_deadline(self.now)
        return True

    def _deliver(self, host: Endpoint, source: bytes, destination: bytes, octets: bytes) -> None:
        if ones_complement(pseudo(source, destination, len(octets)) + octets) != 0xFFFF:
            return
        try:
            segment = parse(memoryview(bytearray(octets)))  # a buffer that nobody may keep
        except ParseError:
            return
        host.receive(source, destination, segment, self.now)
        if isinstance(segment.payload, memoryview) and not segment.payload.readonly:
            segment.payload[:] = bytes(len(segment.payload))

    def run(self, until: Callable[[], bool], limit: float = 600.0) -> None:
        """Step until a condition holds; fail after so many seconds of the link's time."""
        end = self.now + limit
        while not until():
            assert self.step() or until(), "nothing will ever happen again"
            assert self.now < end, f"not done after {limit} s"


def cut(segment: Segment, size: int) -> list[Segment]:
    """Return what a device with TSO makes of a super-segment."""
    if not size or len(segment.payload) <= size:
        return [segment]
    pieces = []
    for start in range(0, len(segment.payload), size):
        payload = segment.payload[start : start + size]
        last = start + size >= len(segment.payload)
        flags = segment.flags if last else segment.flags & ~0x09
        piece = Segment(
            segment.source_port, segment.destination_port, (segment.seq + start) & 0xFFFFFFFF,
            segment.ack, flags, segment.window, payload, segment.timestamp,
        )  # fmt: skip
        pieces.append(piece)
    return pieces


def wire(source: bytes, destination: bytes, segment: Segment) -> bytes:
    octets = serialize(segment) + segment.payload
    total = ones_complement(pseudo(source, destination, len(octets)) + octets)
    octets[CHECKSUM_OFFSET : CHECKSUM_OFFSET + 2] = (total ^ 0xFFFF).to_bytes(2, "big")
    return bytes(octets)


def pseudo(source: bytes, destination: bytes, length: int) -> bytes:
    return source + destination + bytes((0, 6)) + length.to_bytes(2, "big")


def ones_complement(octets: bytes) -> int:
    """Return the sum, 0xFFFF for what verifies; derived from RFC 1071 apart from the stack's."""
    total = 0
    if len(octets) % 2:
        octets += b"\0"
    for at in range(0, len(octets), 2):
        total += octets[at] << 8 | octets[at + 1]
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Echo:
    """An application that sends back what it reads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        connection.application = self

    def __call__(self, connection: Connection) -> None:
        for piece in connection.peek():
            taken = connection.write(piece)
            connection.consume(taken)
            if taken < len(piece):
                break
        if connection.at_eof:
            connection.close()


class Client:
    """An application that sends data, closes, and keeps what comes."""

    def __init__(self, connection: Connection, data: bytes) -> None:
        self.connection = connection
        self.received = bytearray()
        self._left = memoryview(data)
        connection.application = self

    def __call__(self, connection: Connection) -> None:
        self.received += connection.read(1 << 30)
        while self._left and connection.writable:
            taken = connection.write(bytes(self._left[: min(connection.writable, 65536)]))
            self._left = self._left[taken:]
        if not self._left:
            connection.close()

    @property
    def done(self) -> bool:
        return self.connection.at_eof or self.connection.error is not None
