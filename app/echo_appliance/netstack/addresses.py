"""IP addresses of both versions: 4 or 16 octets inside, text only at the edges.

Octets compare, slice and serve as keys with nothing in between, which is what a
packet's way needs; ipaddress's objects would be made for each packet anew.
"""

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton  # pure functions: no socket is made

from ..errors import ParseError
from ..text import whole_number
from .wire import ipv4, ipv6

LIMITED_BROADCAST = b"\xff" * 4


class Network:
    """An address and how many of its leading bits name the link that it is on."""

    __slots__ = ("_mask", "_number", "address", "broadcast", "length")

    def __init__(self, address: bytes, length: int) -> None:
        bits = len(address) * 8
        self.address = address
        self.length = length
        self._mask = (1 << bits) - (1 << (bits - length))
        self._number = int.from_bytes(address, "big") & self._mask
        last = self._number | ~self._mask & ((1 << bits) - 1)
        # RFC 3021: on a link of two there is none.
        has_broadcast = bits == 32 and length < 31
        self.broadcast = last.to_bytes(4, "big") if has_broadcast else None

    def __contains__(self, address: bytes) -> bool:
        return (
            len(address) == len(self.address)
            and int.from_bytes(address, "big") & self._mask == self._number
        )

    def __str__(self) -> str:
        return f"{format_ip(self.address)}/{self.length}"


def format_ip(address: bytes) -> str:
    """Return an address as people write it."""
    return inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)


def format_endpoint(address: bytes, port: int) -> str:
    """Return an address and a port as people write them: 192.0.2.1:80, [2001:db8::1]:80."""
    text = format_ip(address)
    return f"[{text}]:{port}" if len(address) == 16 else f"{text}:{port}"


def parse_ip(text: str) -> bytes:
    """Read an address of either version.  Raises ParseError, in words for the user."""
    try:
        return inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except (OSError, ValueError):
        raise ParseError(f"{text!r} is not an IPv4 or IPv6 address") from None


def parse_unicast(text: str) -> bytes:
    """Read an address that one host can have.  Raises ParseError, in words for the user."""
    address = parse_ip(text)
    if len(address) == 4:
        one = not ipv4.cannot_be_source(address)
    else:
        one = not ipv6.cannot_be_source(address) and address != ipv6.UNSPECIFIED
    if not one:
        raise ParseError(f"{text} is not an address that one host on a link can have")
    return address


def parse_network(text: str) -> Network:
    """Read ADDRESS/LENGTH, our address on a link.  Raises ParseError, in words for the user."""
    host, slash, digits = text.partition("/")
    address = parse_unicast(host)
    length = whole_number(digits)
    if not slash or length is None or not 1 <= length <= len(address) * 8:
        example = "192.0.2.2/24" if len(address) == 4 else "2001:db8::2/64"
        raise ParseError(f"{text!r} needs the length of its link's prefix, as in {example}")
    network = Network(address, length)
    if address == network.broadcast:
        raise ParseError(f"{text} is its link's broadcast address: take another")
    return network
