"""ICMPv6 types, and neighbour discovery's messages.  Source: RFC 4443; RFC 4861.

The frame around them is icmp.Message.  Router discovery and redirects are left
alone: our routes are what the command line says.
"""

from ...errors import ParseError
from . import icmp

DESTINATION_UNREACHABLE = 1
PACKET_TOO_BIG = 2
TIME_EXCEEDED = 3
PARAMETER_PROBLEM = 4
ECHO_REQUEST = 128
ECHO_REPLY = 129
NEIGHBOUR_SOLICITATION = 135
NEIGHBOUR_ADVERTISEMENT = 136

PORT_UNREACHABLE = 4
UNKNOWN_NEXT_HEADER = 1
UNKNOWN_OPTION = 2
REASSEMBLY_TIME_EXCEEDED = 1

FIRST_INFORMATIONAL = 128  # all below are errors: section 2.1

QUOTE_LIMIT = 1280 - 40 - icmp.HEADER_SIZE  # section 2.4 (c)
HOP_LIMIT = 255  # of neighbour discovery: nobody beyond the link can send it (RFC 4861, 7.1)

_SOURCE_ADDRESS = 1
_TARGET_ADDRESS = 2
_SOLICITED = 0x40000000
_OVERRIDE = 0x20000000


class Neighbour:
    """What a solicitation or an advertisement says.

    `hardware` is None where the option is missing, as in duplicate address detection.
    """

    __slots__ = ("hardware", "is_solicitation", "override", "solicited", "target")

    def __init__(
        self,
        target: bytes,
        hardware: bytes | None,
        *,
        is_solicitation: bool,
        solicited: bool = False,
        override: bool = False,
    ) -> None:
        self.target = target
        self.hardware = hardware
        self.is_solicitation = is_solicitation
        self.solicited = solicited
        self.override = override


def parse_neighbour(message: icmp.Message) -> Neighbour:
    """Return what a message of one of the two types says.  Raises ParseError."""
    if message.code or len(message.payload) < 16:
        raise ParseError("nd-malformed")
    target = bytes(message.payload[:16])
    if target[0] == 0xFF:  # section 7.1.1: a group has no neighbour
        raise ParseError("nd-malformed")
    is_solicitation = message.type == NEIGHBOUR_SOLICITATION
    wanted = _SOURCE_ADDRESS if is_solicitation else _TARGET_ADDRESS
    hardware = _find_option(message.payload[16:], wanted)
    return Neighbour(
        target,
        hardware,
        is_solicitation=is_solicitation,
        solicited=bool(message.rest & _SOLICITED),
        override=bool(message.rest & _OVERRIDE),
    )


def _find_option(options: "bytes | memoryview", wanted: int) -> bytes | None:
    """Return the hardware address in the option of this type.  All options must be well formed."""
    found = None
    while options:
        if len(options) < 8 or not 0 < options[1] * 8 <= len(options):
            raise ParseError("nd-malformed")  # section 4.6: a length of zero would never end
        if options[0] == wanted:
            found = bytes(options[2:8])
            if options[1] != 1 or found[0] & 1:
                raise ParseError("nd-malformed")
        options = options[options[1] * 8 :]
    return found


def serialize_neighbour(neighbour: Neighbour) -> icmp.Message:
    """Return the message that says it."""
    kind, option = NEIGHBOUR_ADVERTISEMENT, _TARGET_ADDRESS
    if neighbour.is_solicitation:
        kind, option = NEIGHBOUR_SOLICITATION, _SOURCE_ADDRESS
    flags = neighbour.solicited * _SOLICITED | neighbour.override * _OVERRIDE
    payload = neighbour.target
    if neighbour.hardware is not None:
        payload += bytes((option, 1)) + neighbour.hardware
    return icmp.Message(kind, 0, flags, payload)
