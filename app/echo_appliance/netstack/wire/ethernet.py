"""Ethernet II frames.  Source: IEEE 802.3 clause 3; RFC 894; RFC 7042 for group addresses."""

import struct

from ...errors import ParseError

HEADER_SIZE = 14
BROADCAST = b"\xff" * 6

IPV4 = 0x0800
ARP = 0x0806
IPV6 = 0x86DD

_HEADER = struct.Struct("!6s6sH")


class Frame:
    """One frame.  `payload` is a view into whatever was parsed, padding included."""

    __slots__ = ("destination", "ethertype", "payload", "source")

    def __init__(
        self, destination: bytes, source: bytes, ethertype: int, payload: memoryview
    ) -> None:
        self.destination = destination
        self.source = source
        self.ethertype = ethertype
        self.payload = payload


def parse(octets: memoryview) -> Frame:
    """Return the frame.  Raises ParseError; copies nothing but the addresses."""
    if len(octets) < HEADER_SIZE:
        raise ParseError("ethernet-truncated")
    destination, source, ethertype = _HEADER.unpack_from(octets)
    return Frame(destination, source, ethertype, octets[HEADER_SIZE:])


def serialize_header(destination: bytes, source: bytes, ethertype: int) -> bytes:
    """Return the 14 octets before the payload."""
    return _HEADER.pack(destination, source, ethertype)


def is_group(address: bytes) -> bool:
    """Whether it names several stations: multicast or broadcast."""
    return bool(address[0] & 1)


def group_of_ipv6(address: bytes) -> bytes:
    """Return the frame address of an IPv6 multicast group.  RFC 2464 section 7."""
    return b"\x33\x33" + address[12:]


def format_address(address: bytes) -> str:
    """Return it as people write it: 02:00:00:00:00:01."""
    return address.hex(":")


def parse_address(text: str) -> bytes:
    """Read a station's address as people write it.  Raises ParseError, in words for the user."""
    try:
        address = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        address = b""
    if len(address) != 6 or text.count(":") != 5 or is_group(address) or not any(address):
        raise ParseError(f"{text!r} is not a station's hardware address, such as 02:00:00:00:00:01")
    return address
