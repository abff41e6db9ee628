"""Lists of peers, as allow, deny and accept-proxy-from have them.

An entry is an IP address or prefix, `unix` (any peer on a unix socket) or
`vsock:CID` (`vsock` for all).  Knows no I/O.
"""

import socket

from ..errors import ParseError
from ..text import whole_number

_BITS = {socket.AF_INET: 32, socket.AF_INET6: 128}

UNIX = "unix"
VSOCK = "vsock"


class Peers:
    """A set of peers; `source in peers` asks for one, as accept.Acceptor names it."""

    __slots__ = ("_others", "_prefixes", "texts")

    def __init__(self, texts: "list[str]") -> None:
        """Raises ParseError for an entry that means nothing."""
        self.texts = texts
        # (bits of the family, bits that do not count) -> values of those that do
        self._prefixes: dict[tuple[int, int], set[int]] = {}
        self._others: set[str] = set()
        for text in texts:
            self._add(text)

    def __contains__(self, source: str | None) -> bool:
        if source is None:
            return UNIX in self._others
        address = _address(source.partition("%")[0])
        if address is None:  # a CID: it has neither dots nor colons
            return VSOCK in self._others or f"{VSOCK}:{source}" in self._others
        bits, value = _unmapped(*address)
        return any(
            value >> rest in values
            for (size, rest), values in self._prefixes.items()
            if size == bits
        )

    def _add(self, text: str) -> None:
        kind, _, cid = text.partition(":")
        if text in (UNIX, VSOCK) or (kind == VSOCK and cid.isascii() and cid.isdigit()):
            self._others.add(text)
            return
        host, slash, length = text.partition("/")
        address = _address(host)
        if address is None:
            raise ParseError(
                f"{text!r} is no peer: write an address, a prefix like 10.0.0.0/8, unix or vsock"
            )
        bits, value = address
        rest = bits - _prefix_length(text, length, bits) if slash else 0
        if rest <= 32:
            bits, value = _unmapped(bits, value)
        if value >> rest << rest != value:
            raise ParseError(f"{text!r} has bits set beyond its length: which prefix is meant?")
        self._prefixes.setdefault((bits, rest), set()).add(value >> rest)


def _address(text: str) -> tuple[int, int] | None:
    """Return how many bits the address has, and its value."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        octets = socket.inet_pton(family, text)
    except (OSError, ValueError):
        return None
    return _BITS[family], int.from_bytes(octets, "big")


def _unmapped(bits: int, value: int) -> tuple[int, int]:
    """Return the IPv4 address that an IPv6 one stands for (RFC 4291 section 2.5.5.2)."""
    if bits == 128 and value >> 32 == 0xFFFF:
        return 32, value & 0xFFFFFFFF
    return bits, value


def _prefix_length(text: str, length: str, bits: int) -> int:
    number = whole_number(length)
    if number is None or number > bits:
        raise ParseError(f"{text!r}: a prefix's length is a number from 0 to {bits}")
    return number
