"""IPv6 packets and the extension headers that hosts skip.  Source: RFC 8200; RFC 4291."""

import struct

from ...errors import ParseError

HEADER_SIZE = 40
MINIMUM_MTU = 1280

HOP_BY_HOP = 0
TCP = 6
UDP = 17
ROUTING = 43
FRAGMENT = 44
ICMPV6 = 58
NO_NEXT_HEADER = 59
DESTINATION_OPTIONS = 60

ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")
UNSPECIFIED = bytes(16)
_LOOPBACK = bytes(15) + b"\x01"
_SOLICITED_NODE = bytes.fromhex("ff0200000000000000000001ff")

_HEADER = struct.Struct("!IHBB16s16s")
_FRAGMENT = struct.Struct("!BBHI")
FRAGMENT_SIZE = _FRAGMENT.size

_PAD1 = 0  # the only option without a length; all that we know may be skipped

# RFC 8504 section 5.3 lets hosts limit the chain; attackers' chains are long, others' are not.
_EXTENSIONS_LIMIT = 8


class Packet:
    """One packet, or one fragment of it; `protocol` is what follows the extension headers."""

    __slots__ = (
        "addresses", "destination", "header", "hop_limit", "identification", "more_follow",
        "offset", "payload", "pointer", "protocol", "source", "unknown_option",
    )  # fmt: skip

    def __init__(
        self,
        source: bytes,
        destination: bytes,
        protocol: int,
        payload: memoryview,
        *,
        hop_limit: int = 64,
        header: memoryview | None = None,
    ) -> None:
        self.source = source
        self.destination = destination
        self.protocol = protocol
        self.payload = payload
        self.hop_limit = hop_limit
        self.header = header  # as it came, extensions included
        self.addresses = source + destination
        self.pointer = 6  # where in the packet the number stands that `protocol` is
        self.identification = -1  # of the whole that it is a fragment of
        self.offset = 0
        self.more_follow = False
        self.unknown_option = 0  # where the first is that is not to be skipped (section 4.2)

    @property
    def is_fragment(self) -> bool:
        """Whether other packets have the rest; an "atomic" one is whole (RFC 6946)."""
        return self.more_follow or self.offset > 0


def parse(octets: memoryview) -> Packet:
    """Return the packet, behind its extension headers.  Raises ParseError."""
    if len(octets) < HEADER_SIZE:
        raise ParseError("ipv6-truncated")
    version, length, protocol, hop_limit, source, destination = _HEADER.unpack_from(octets)
    if version >> 28 != 6:
        raise ParseError("ipv6-bad-header")
    end = HEADER_SIZE + length
    if end > len(octets):
        raise ParseError("ipv6-bad-length")
    packet = Packet(source, destination, protocol, octets[HEADER_SIZE:end], hop_limit=hop_limit)
    start = HEADER_SIZE
    if protocol in _EXTENSIONS:
        start = _skip_extensions(packet, octets[:end], HEADER_SIZE)
    packet.header = octets[:start]
    return packet


def skip_extensions(packet: Packet) -> None:
    """Move the payload of a packet that was in fragments behind the headers that it begins with.

    Raises ParseError.
    """
    packet.offset, packet.more_follow = 0, False
    if packet.protocol in _EXTENSIONS:
        _skip_extensions(packet, packet.payload, 0)


def _skip_extensions(packet: Packet, octets: memoryview, start: int) -> int:
    """Move the packet's payload behind the extension headers; return where it starts."""
    for _ in range(_EXTENSIONS_LIMIT):
        if packet.protocol not in _EXTENSIONS:
            packet.payload = octets[start:]
            return start
        if packet.protocol == HOP_BY_HOP and start != HEADER_SIZE:
            raise ParseError("ipv6-bad-extension")  # RFC 8200 section 4.1: only right at first
        start = _EXTENSIONS[packet.protocol](packet, octets, start)
        if packet.is_fragment:  # headers of what was cut are looked at once that is whole
            packet.payload = octets[start:]
            return start
    raise ParseError("ipv6-too-many-extensions")


def _skip_options(packet: Packet, octets: memoryview, start: int) -> int:
    end, at = _skip_header(packet, octets, start), start + 2
    while at < end:
        if octets[at] == _PAD1:
            at += 1
            continue
        if at + 2 > end or at + 2 + octets[at + 1] > end:
            raise ParseError("ipv6-bad-extension")
        if octets[at] >> 6 and not packet.unknown_option:
            packet.unknown_option = at
        at += 2 + octets[at + 1]
    return end


def _skip_header(packet: Packet, octets: memoryview, start: int) -> int:
    if start + 8 > len(octets):
        raise ParseError("ipv6-bad-extension")
    end = start + 8 + octets[start + 1] * 8
    if end > len(octets):
        raise ParseError("ipv6-bad-extension")
    packet.protocol, packet.pointer = octets[start], start
    return end


def _skip_routing(packet: Packet, octets: memoryview, start: int) -> int:
    end = _skip_header(packet, octets, start)
    if octets[start + 3]:  # segments left: we would have to forward it, which hosts do not
        raise ParseError("ipv6-source-route")
    return end


def _take_fragment(packet: Packet, octets: memoryview, start: int) -> int:
    if start + _FRAGMENT.size > len(octets) or packet.identification >= 0:
        raise ParseError("ipv6-bad-extension")
    packet.protocol, _, offset, packet.identification = _FRAGMENT.unpack_from(octets, start)
    packet.pointer = start
    packet.offset = offset & 0xFFF8
    packet.more_follow = bool(offset & 1)
    return start + _FRAGMENT.size


_EXTENSIONS = {
    HOP_BY_HOP: _skip_options,
    ROUTING: _skip_routing,
    FRAGMENT: _take_fragment,
    DESTINATION_OPTIONS: _skip_options,
}


def serialize_header(packet: Packet, payload_size: int) -> bytes:
    """Return the 40 octets before a payload of this size."""
    return _HEADER.pack(
        6 << 28, payload_size, packet.protocol, packet.hop_limit, packet.source, packet.destination
    )


def serialize_fragment(protocol: int, offset: int, identification: int, more_follow: bool) -> bytes:
    """Return the fragment header."""
    return _FRAGMENT.pack(protocol, 0, offset | more_follow, identification)


def is_group(address: bytes) -> bool:
    """Whether it is a multicast address."""
    return address[0] == 0xFF


def is_link_local(address: bytes) -> bool:
    """Whether it means something on its link only (fe80::/10)."""
    return address[0] == 0xFE and address[1] & 0xC0 == 0x80


def cannot_be_source(address: bytes) -> bool:
    """Whether no honest packet comes from there; `unspecified` is for ND alone to judge."""
    return address[0] == 0xFF or address == _LOOPBACK


def solicited_node(address: bytes) -> bytes:
    """Return the group that is asked for the owner of an address.  RFC 4291 section 2.7.1."""
    return _SOLICITED_NODE + address[13:]
