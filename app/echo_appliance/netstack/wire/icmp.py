"""ICMP for IPv4: echo, and errors both ways.  Source: RFC 792; RFC 1122 section 3.2.2; RFC 1191.

ICMPv6 has the same frame of type, code, checksum and four octets: icmpv6.py uses it.
"""

import struct

from ...errors import ParseError
from ..checksum import checksum, is_valid

ECHO_REPLY = 0
DESTINATION_UNREACHABLE = 3
ECHO_REQUEST = 8
SOURCE_QUENCH = 4  # obsolete: RFC 6633
REDIRECT = 5
TIME_EXCEEDED = 11
PARAMETER_PROBLEM = 12

PROTOCOL_UNREACHABLE = 2
PORT_UNREACHABLE = 3
FRAGMENTATION_NEEDED = 4
REASSEMBLY_TIME_EXCEEDED = 1

ERRORS = frozenset(
    (DESTINATION_UNREACHABLE, SOURCE_QUENCH, REDIRECT, TIME_EXCEEDED, PARAMETER_PROBLEM)
)

QUOTE_LIMIT = 548  # octets of the cause: 576 in all (RFC 1812 section 4.3.2.3)

_HEADER = struct.Struct("!BBHI")
HEADER_SIZE = _HEADER.size


class Message:
    """Any message: `rest` is the header's last four octets, as a number."""

    __slots__ = ("code", "payload", "rest", "type")

    def __init__(self, kind: int, code: int, rest: int, payload: "bytes | memoryview") -> None:
        self.type = kind
        self.code = code
        self.rest = rest  # of an echo: identifier and sequence number
        self.payload = payload

    @property
    def identifier(self) -> int:
        """Whose echo it is."""
        return self.rest >> 16

    @property
    def sequence(self) -> int:
        """Which of its echoes it is."""
        return self.rest & 0xFFFF


def parse(octets: memoryview, so_far: int = 0, *, verified: bool = False) -> Message:
    """Return the message.  `so_far` is the pseudo-header's sum: zero for IPv4.

    Raises ParseError.  A message whose checksum somebody `verified` is not summed again.
    """
    if len(octets) < HEADER_SIZE:
        raise ParseError("icmp-truncated")
    if not (verified or is_valid(octets, so_far)):
        raise ParseError("icmp-bad-checksum")
    kind, code, _, rest = _HEADER.unpack_from(octets)
    return Message(kind, code, rest, octets[HEADER_SIZE:])


def serialize(message: Message, so_far: int = 0) -> bytes:
    """Return the message's octets, its checksum among them."""
    octets = _HEADER.pack(message.type, message.code, 0, message.rest) + message.payload
    return octets[:2] + checksum(octets, so_far).to_bytes(2, "big") + octets[4:]
