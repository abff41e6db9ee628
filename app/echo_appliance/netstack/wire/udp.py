"""UDP datagrams.  Source: RFC 768; the zero checksum over IPv6: RFC 8200 section 8.1."""

import struct

from ...errors import ParseError
from ..checksum import checksum, is_valid, pseudo_header_sum

PROTOCOL = 17
HEADER_SIZE = 8

_HEADER = struct.Struct("!HHHH")


class Datagram:
    """One datagram; its payload is a view into what was parsed."""

    __slots__ = ("destination_port", "payload", "source_port")

    def __init__(
        self, source_port: int, destination_port: int, payload: "bytes | memoryview"
    ) -> None:
        self.source_port = source_port
        self.destination_port = destination_port
        self.payload = payload


def parse(octets: memoryview, addresses: bytes, *, verified: bool = False) -> Datagram:
    """Return the datagram that went between `addresses`, source and destination in a row.

    Raises ParseError.  A datagram whose checksum somebody `verified` is not summed again.
    """
    if len(octets) < HEADER_SIZE:
        raise ParseError("udp-truncated")
    source_port, destination_port, length, sum_of = _HEADER.unpack_from(octets)
    if not HEADER_SIZE <= length <= len(octets):
        raise ParseError("udp-bad-length")
    if sum_of == 0:
        if len(addresses) == 32:
            raise ParseError("udp-no-checksum")
    elif not (verified or is_valid(octets[:length], _pseudo(addresses, length))):
        raise ParseError("udp-bad-checksum")
    return Datagram(source_port, destination_port, octets[HEADER_SIZE:length])


def serialize(datagram: Datagram, addresses: bytes) -> bytes:
    """Return the octets that go between these addresses."""
    length = HEADER_SIZE + len(datagram.payload)
    ports = (datagram.source_port, datagram.destination_port, length)
    octets = _HEADER.pack(*ports, 0) + datagram.payload
    sum_of = checksum(octets, _pseudo(addresses, length)) or 0xFFFF  # zero says: no checksum
    return _HEADER.pack(*ports, sum_of) + datagram.payload


def _pseudo(addresses: bytes, length: int) -> int:
    return pseudo_header_sum(addresses, PROTOCOL, length)
