"""IPv4 packets.  Source: RFC 791; what hosts must drop: RFC 1122 section 3.2.1."""

import struct

from ...errors import ParseError
from ..checksum import checksum, is_valid

HEADER_SIZE = 20
MINIMUM_MTU = 68

ICMP = 1
TCP = 6
UDP = 17

DONT_FRAGMENT = 0x4000
MORE_FRAGMENTS = 0x2000
OFFSET_MASK = 0x1FFF

_END_OF_OPTIONS, _NO_OPERATION = 0, 1
_SOURCE_ROUTES = (131, 137)  # loose and strict

_HEADER = struct.Struct("!BBHHHBBH4s4s")


class Packet:
    """One packet, or one fragment of it.  Options are in `header`; a router would need them."""

    __slots__ = (
        "addresses", "destination", "flags_and_offset", "header", "identification", "payload",
        "protocol", "source", "ttl",
    )  # fmt: skip

    def __init__(
        self,
        source: bytes,
        destination: bytes,
        protocol: int,
        payload: memoryview,
        *,
        ttl: int = 64,
        identification: int = 0,
        flags_and_offset: int = DONT_FRAGMENT,
        header: memoryview | None = None,
    ) -> None:
        self.source = source
        self.destination = destination
        self.protocol = protocol
        self.payload = payload
        self.ttl = ttl
        self.identification = identification
        self.flags_and_offset = flags_and_offset
        self.header = header  # as it came, for the ICMP error that quotes it
        self.addresses = source + destination

    @property
    def is_fragment(self) -> bool:
        """Whether other packets have the rest of its payload."""
        return bool(self.flags_and_offset & (MORE_FRAGMENTS | OFFSET_MASK))

    @property
    def offset(self) -> int:
        """Where in the whole payload this fragment's begins."""
        return (self.flags_and_offset & OFFSET_MASK) * 8

    @property
    def more_follow(self) -> bool:
        """Whether it is a fragment that is not the last."""
        return bool(self.flags_and_offset & MORE_FRAGMENTS)


def parse(octets: memoryview) -> Packet:
    """Return the packet, without the padding that Ethernet may have added.  Raises ParseError."""
    if len(octets) < HEADER_SIZE:
        raise ParseError("ipv4-truncated")
    (version_and_size, _tos, length, identification, flags_and_offset, ttl, protocol, _checksum,
     source, destination) = _HEADER.unpack_from(octets)  # fmt: skip
    header_size = (version_and_size & 0x0F) * 4
    if version_and_size >> 4 != 4 or header_size < HEADER_SIZE:
        raise ParseError("ipv4-bad-header")
    if not header_size <= length <= len(octets):
        raise ParseError("ipv4-bad-length")
    header = octets[:header_size]
    if not is_valid(header):
        raise ParseError("ipv4-bad-checksum")
    return Packet(
        source, destination, protocol, octets[header_size:length], ttl=ttl,
        identification=identification, flags_and_offset=flags_and_offset, header=header,
    )  # fmt: skip


def check_options(header: memoryview) -> None:
    """Raise ParseError where a packet was led here by a source route, or its options do not fit.

    Linux refuses them likewise: with one, a stranger can have answers to a forged source.
    """
    at = HEADER_SIZE
    while at < len(header) and header[at] != _END_OF_OPTIONS:
        if header[at] == _NO_OPERATION:
            at += 1
            continue
        length = header[at + 1] if at + 1 < len(header) else 0
        if length < 2 or at + length > len(header):
            raise ParseError("ipv4-bad-option")
        if header[at] in _SOURCE_ROUTES:
            raise ParseError("ipv4-source-route")
        at += length


def serialize_header(packet: Packet, payload_size: int) -> bytes:
    """Return the 20 octets before a payload of this size."""
    fields = (0x45, 0, HEADER_SIZE + payload_size, packet.identification,
              packet.flags_and_offset, packet.ttl, packet.protocol)  # fmt: skip
    sum_of = checksum(_HEADER.pack(*fields, 0, packet.source, packet.destination))
    return _HEADER.pack(*fields, sum_of, packet.source, packet.destination)


def is_group(address: bytes) -> bool:
    """Whether it is a multicast address, or broadcast on every link."""
    return address[0] >= 224


def cannot_be_source(address: bytes) -> bool:
    """Whether no honest packet on a link comes from there: RFC 1122 section 3.2.1.3, martians."""
    return address[0] in (0, 127) or address[0] >= 224
