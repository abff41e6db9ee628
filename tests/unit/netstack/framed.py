"""One connection of a host's, whose other end speaks in frames."""

from __future__ import annotations

from echo_appliance.netstack.checksum import checksum, pseudo_header_sum
from echo_appliance.netstack.tcp.connection import Connection
from echo_appliance.netstack.wire import ethernet, ipv4, ipv6, tcp
from echo_appliance.netstack.wire.tcp import ACK, SYN, Segment
from tests.unit.netstack.hosts import OUR_MAC, OURS, OURS6, THEIR_MAC, THEIRS, THEIRS6, Host

PORT, THEIR_PORT = 7, 40000
THEIRS_FIRST = 1001
ADDRESSES = {4: (THEIRS, OURS), 6: (THEIRS6, OURS6)}


class Peer:
    """The other end of one connection of a host's, told by frames."""

    def __init__(self, version: int = 4) -> None:
        self.version = version
        self.host = Host()
        self.host.meet()
        self.opened: list[Connection] = []
        self.host.interface.streams.endpoint.listen(PORT, self.opened.append)
        syn = Segment(THEIR_PORT, PORT, THEIRS_FIRST - 1, 0, SYN, 60000, timestamp=(100, 0))
        syn.mss, syn.sack_permitted = 1460, True
        self.receive(self.frame(syn))
        [answer] = self.host.sent()
        self.next = tcp.parse(memoryview(answer)[self.start :]).seq + 1
        self.receive(self.frame(self.segment()))
        [self.connection] = self.opened
        self.taken: list[tuple[int, int, int]] = []  # seq, ack, window of what TCP was handed
        self._watch()

    @property
    def start(self) -> int:
        """Where TCP begins in a frame."""
        return 34 if self.version == 4 else 54

    def _watch(self) -> None:
        endpoint = self.host.interface.streams.endpoint
        receive_next, receive = endpoint.receive_next, endpoint.receive

        def on_next(key: object, seq: int, ack: int, window: int, *rest: object) -> bool:
            taken = receive_next(key, seq, ack, window, *rest)  # type: ignore[arg-type]
            if taken:
                self.taken.append((seq, ack, window))
            return taken

        def on_any(remote: bytes, local: bytes, segment: Segment, now: float) -> None:
            self.taken.append((segment.seq, segment.ack, segment.window))
            receive(remote, local, segment, now)

        endpoint.receive_next = on_next  # type: ignore[assignment, method-assign]
        endpoint.receive = on_any  # type: ignore[method-assign]

    def segment(
        self, payload: bytes = b"", flags: int = ACK, stamp: int = 101, **fields: int
    ) -> Segment:
        """Return their next segment, with the usual option."""
        seq, ack = fields.get("seq", THEIRS_FIRST), fields.get("ack", getattr(self, "next", 0))
        window = fields.get("window", 50000)
        return Segment(THEIR_PORT, PORT, seq, ack, flags, window, payload, (stamp, 0))

    def frame(self, segment: Segment) -> bytearray:
        """Return it in a frame."""
        octets = tcp.serialize(segment) + segment.payload
        source, destination = ADDRESSES[self.version]
        if self.version == 4:
            packet = ipv4.Packet(source, destination, ipv4.TCP, memoryview(octets))
            head = ipv4.serialize_header(packet, len(octets))
        else:
            packet6 = ipv6.Packet(source, destination, ipv6.TCP, memoryview(octets))
            head = ipv6.serialize_header(packet6, len(octets))
        ethertype = ethernet.IPV4 if self.version == 4 else ethernet.IPV6
        start = ethernet.serialize_header(OUR_MAC, THEIR_MAC, ethertype)
        return self.repaired(bytearray(start + head + octets))

    def repaired(self, frame: bytearray) -> bytearray:
        """Fill in TCP's checksum, and IPv4's."""
        if self.version == 4:
            frame[24:26] = bytes(2)
            frame[24:26] = checksum(frame[14:34]).to_bytes(2, "big")
        at = self.start
        frame[at + 16 : at + 18] = bytes(2)
        addresses = frame[26:34] if self.version == 4 else frame[22:54]
        so_far = pseudo_header_sum(addresses, 6, len(frame) - at)
        frame[at + 16 : at + 18] = checksum(frame[at:], so_far).to_bytes(2, "big")
        return frame

    def receive(self, *frames: bytearray, now: float = 1.0) -> None:
        """Hand in a batch."""
        for frame in frames:
            self.host.interface.receive(memoryview(frame), now)
        self.host.interface.flush(now)

    def takes(self, frame: bytearray) -> bool:
        """Whether the express road takes a frame; what it holds, TCP is then given."""
        express = self.host.interface._express
        taken = express.take(memoryview(frame), 1.0, False)
        express.settle(1.0)
        return taken
