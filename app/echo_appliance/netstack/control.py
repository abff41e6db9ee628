"""ICMP of both versions: answers echoes, sends errors, takes errors in.  Knows no I/O.

What is never answered by an error: an error, a group, a fragment that is not the
first, a source that is nobody.  All else is answered at a limited rate.

Source: RFC 1122 section 3.2.2, RFC 4443 section 2.4, RFC 5927 (what to believe).
"""

from ..errors import ParseError
from .budget import Budget
from .checksum import pseudo_header_sum
from .wire import icmp, icmpv6, ipv4, ipv6

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .interface import Interface, Packet

ERRORS_PER_SECOND, ERRORS_AT_ONCE = 100, 50  # Linux: 1,000 and 50 for all, 1 per second and peer

# RFC 1122 section 4.2.3.9: these say that it will not work; the others, that it does not now.
_HARD_CODES = frozenset((icmp.PROTOCOL_UNREACHABLE, icmp.PORT_UNREACHABLE))
_WORDS = {0: "network unreachable", 1: "host unreachable", 2: "protocol unreachable",
          3: "port unreachable", 9: "prohibited", 10: "prohibited", 13: "prohibited"}  # fmt: skip
_WORDS_V6 = {0: "no route", 1: "prohibited", 3: "host unreachable", 4: "port unreachable"}


class Control:
    """ICMP's part of an interface."""

    def __init__(self, interface: "Interface") -> None:
        self._interface = interface
        self._budget = Budget(ERRORS_PER_SECOND, ERRORS_AT_ONCE)
        # What `ping` listens to: (source, message, hop limit, now), and (source, words).
        self.on_echo_reply: Callable[[bytes, icmp.Message, int, float], None] | None = None
        self.on_error: Callable[[bytes, str], None] | None = None

    # -- receiving -----------------------------------------------------------

    def parse(self, packet: "Packet", *, verified: bool) -> icmp.Message:
        """Return the packet's message.  Raises ParseError."""
        so_far = 0
        if len(packet.source) == 16:
            so_far = pseudo_header_sum(packet.addresses, ipv6.ICMPV6, len(packet.payload))
        return icmp.parse(packet.payload, so_far, verified=verified)

    def receive(self, packet: "Packet", now: float, verified: bool) -> None:
        """Take in a message that is not neighbour discovery's.  Raises ParseError."""
        message = self.parse(packet, verified=verified)
        if isinstance(packet, ipv4.Packet):
            request, reply, hops = icmp.ECHO_REQUEST, icmp.ECHO_REPLY, packet.ttl
        else:
            request, reply, hops = icmpv6.ECHO_REQUEST, icmpv6.ECHO_REPLY, packet.hop_limit
        if message.type == request:
            answer = icmp.Message(reply, 0, message.rest, message.payload)
            self.send(packet.destination, packet.source, answer, now)
        elif message.type == reply:
            if self.on_echo_reply is None:
                raise ParseError("icmp-unasked-reply")
            self.on_echo_reply(packet.source, message, hops, now)
        elif is_error(packet):
            self._receive_error(packet, message, now)
        else:
            raise ParseError("icmp-unknown-type")

    def _receive_error(self, packet: "Packet", message: icmp.Message, now: float) -> None:
        """Tell TCP, or whoever pings, what became of a packet of ours.  Raises ParseError."""
        if len(packet.source) == 4 and message.type in (icmp.SOURCE_QUENCH, icmp.REDIRECT):
            raise ParseError("icmp-not-heeded")  # RFC 9293 MUST-55; our routes are options
        mtu, words, hard = _meaning(message, is_ipv4=len(packet.source) == 4)
        remote, protocol, transport = _quoted(message.payload, self._interface.link.addresses)
        if mtu is not None:
            self._narrow(packet.destination, remote, protocol, transport, mtu, now)
        elif protocol == ipv4.TCP and len(transport) >= 8:
            self._interface.streams.refused(packet.destination, remote, transport, hard, words)
        elif protocol in (ipv4.ICMP, ipv6.ICMPV6) and self.on_error is not None:
            self.on_error(packet.source, words)

    def _narrow(
        self, local: bytes, remote: bytes, protocol: int, transport: bytes, mtu: int, now: float
    ) -> None:
        """Believe in a narrower path, if what is quoted is a segment that is on its way.

        What else we send is an answer, and whoever made us send it could forge this, too.
        """
        if protocol != ipv4.TCP or len(transport) < 8:
            raise ParseError("icmp-quote-not-ours")
        if not self._interface.streams.recognizes(local, remote, transport):
            raise ParseError("icmp-quote-not-ours")
        for way in self._interface.routes.ways_to(remote):
            if way.local == local and way.narrow(mtu, now):
                self._interface.streams.path_narrowed(way, now)

    # -- sending -------------------------------------------------------------

    def send(self, local: bytes, remote: bytes, message: icmp.Message, now: float) -> bool:
        """Send a message; False when there is no route."""
        if len(remote) == 4:
            return self._interface.send(local, remote, ipv4.ICMP, icmp.serialize(message), now)
        size = icmp.HEADER_SIZE + len(message.payload)
        so_far = pseudo_header_sum(local + remote, ipv6.ICMPV6, size)
        octets = icmp.serialize(message, so_far)
        return self._interface.send(local, remote, ipv6.ICMPV6, octets, now)

    def send_port_unreachable(self, packet: "Packet", now: float) -> None:
        """Say that nobody takes datagrams on this port."""
        if len(packet.source) == 4:
            self._send_error(packet, icmp.DESTINATION_UNREACHABLE, icmp.PORT_UNREACHABLE, 0, now)
        else:
            kind = icmpv6.DESTINATION_UNREACHABLE
            self._send_error(packet, kind, icmpv6.PORT_UNREACHABLE, 0, now)

    def send_protocol_unreachable(self, packet: "Packet", now: float) -> None:
        """Say that we do not speak this protocol."""
        if isinstance(packet, ipv4.Packet):
            kind, code = icmp.DESTINATION_UNREACHABLE, icmp.PROTOCOL_UNREACHABLE
            self._send_error(packet, kind, code, 0, now)
        elif packet.protocol != ipv6.NO_NEXT_HEADER:
            kind, code = icmpv6.PARAMETER_PROBLEM, icmpv6.UNKNOWN_NEXT_HEADER
            self._send_error(packet, kind, code, packet.pointer, now)

    def send_unknown_option(self, packet: ipv6.Packet, now: float) -> None:
        """Say which option we do not know, unless in answer to an error."""
        if not is_error(packet):
            kind, code = icmpv6.PARAMETER_PROBLEM, icmpv6.UNKNOWN_OPTION
            self._send_error(packet, kind, code, packet.unknown_option, now)

    def send_reassembly_timeout(self, first: bytes, now: float) -> None:
        """Say that the rest of a packet did not come; `first` is how its first fragment began."""
        if first[0] >> 4 == 4:
            local, remote, kind = first[16:20], first[12:16], icmp.TIME_EXCEEDED
        else:
            local, remote, kind = first[24:40], first[8:24], icmpv6.TIME_EXCEEDED
        if self._budget.take(now):
            message = icmp.Message(kind, icmp.REASSEMBLY_TIME_EXCEEDED, 0, first)
            self.send(local, remote, message, now)

    def _send_error(self, packet: "Packet", kind: int, code: int, rest: int, now: float) -> None:
        if packet.header is None or not self._budget.take(now):
            self._interface.counts.drop("icmp-error-limit")
            return
        limit = icmp.QUOTE_LIMIT if len(packet.source) == 4 else icmpv6.QUOTE_LIMIT
        quote = (bytes(packet.header) + packet.payload[:limit])[:limit]
        message = icmp.Message(kind, code, rest, quote)
        self.send(packet.destination, packet.source, message, now)


def is_error(packet: "Packet") -> bool:
    """Whether it is an ICMP error, or the first fragment of one: nothing is to be said of that."""
    if not packet.payload:
        return False
    if len(packet.source) == 4:
        return packet.protocol == ipv4.ICMP and packet.payload[0] in icmp.ERRORS
    return packet.protocol == ipv6.ICMPV6 and packet.payload[0] < icmpv6.FIRST_INFORMATIONAL


def _meaning(message: icmp.Message, *, is_ipv4: bool) -> tuple[int | None, str, bool]:
    """Return the path MTU it tells, if any; what it means in words; whether it is final."""
    if message.type == (icmp.PARAMETER_PROBLEM if is_ipv4 else icmpv6.PARAMETER_PROBLEM):
        return None, "parameter problem", False
    if not is_ipv4:
        if message.type == icmpv6.PACKET_TOO_BIG:
            return message.rest, "packet too big", False
        words = _WORDS_V6.get(message.code, "unreachable")
        if message.type == icmpv6.DESTINATION_UNREACHABLE:
            return None, words, message.code == icmpv6.PORT_UNREACHABLE
        return None, "time to live exceeded", False
    if message.type == icmp.DESTINATION_UNREACHABLE:
        if message.code == icmp.FRAGMENTATION_NEEDED:
            return message.rest & 0xFFFF, "packet too big", False
        return None, _WORDS.get(message.code, "unreachable"), message.code in _HARD_CODES
    return None, "time to live exceeded", False


def _quoted(octets: "bytes | memoryview", ours: frozenset[bytes]) -> tuple[bytes, int, bytes]:
    """Return whom the packet that it quotes went to, its protocol and its first octets after IP.

    Raises ParseError unless it is one that we may have sent: RFC 5927 section 4.
    """
    quote = bytes(octets)
    if len(quote) >= ipv4.HEADER_SIZE and quote[0] >> 4 == 4:
        size = (quote[0] & 0x0F) * 4
        source, remote, protocol = quote[12:16], quote[16:20], quote[9]
    elif len(quote) >= ipv6.HEADER_SIZE and quote[0] >> 4 == 6:
        size = ipv6.HEADER_SIZE
        source, remote, protocol = quote[8:24], quote[24:40], quote[6]
    else:
        raise ParseError("icmp-bad-quote")
    if source not in ours:
        raise ParseError("icmp-quote-not-ours")
    return remote, protocol, quote[size:]
