"""PROXY protocol: a header before a connection's first octets that tells whose it is.

Versions 1 (text) and 2 (binary), both ways.  TLVs of version 2 are skipped when
reading and never written.  Octets in, values out: knows no I/O.

Source: "The PROXY protocol", versions 1 & 2, sections 2.1 and 2.2.
"""

import struct
from enum import Enum
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from ..errors import ParseError

V1_LIMIT = 107  # section 2.1: the longest line, CRLF included

_V1_START = b"PROXY "
_V2_START = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED = struct.Struct("!12sBBH")
_INET = struct.Struct("!4s4sHH")
_INET6 = struct.Struct("!16s16sHH")
_UNIX = struct.Struct("!108s108s")


class Family(Enum):
    """What kind of addresses a header has; the values are version 2's, for streams."""

    UNSPEC = 0x00
    INET = 0x11
    INET6 = 0x21
    UNIX = 0x31


_V1_FAMILIES = {b"TCP4": Family.INET, b"TCP6": Family.INET6}
_V1_WORDS = {family: word for word, family in _V1_FAMILIES.items()}

# Datagrams are told apart by the low half; the addresses have the same layout.
_V2_FAMILIES = {
    family.value & 0xF0 | low: family for family in Family if family.value for low in (1, 2)
} | {0: Family.UNSPEC}


class Header:
    """Whose connection it is.  `local`: the proxy's own, such as a health check.

    Addresses are (host, port); for unix (path, 0), where an abstract name
    begins with a zero octet and a client mostly has no name at all.
    """

    __slots__ = ("destination", "family", "local", "source")

    def __init__(
        self,
        family: Family,
        source: tuple[str, int] = ("", 0),
        destination: tuple[str, int] = ("", 0),
        *,
        local: bool = False,
    ) -> None:
        self.family = family
        self.source = source
        self.destination = destination
        self.local = local

    @property
    def anonymous(self) -> bool:
        """Whether it leaves open who the client is."""
        return self.local or self.family is Family.UNSPEC

    @property
    def host(self) -> str | None:
        """The IP address that rules and limits are about; a unix client has none, only a path."""
        return self.source[0] if self.family in (Family.INET, Family.INET6) else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Header) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Header{self._key()}"

    def _key(self) -> tuple[object, ...]:
        return self.family, self.source, self.destination, self.local


def parse(octets: bytes) -> tuple[Header, int] | None:
    """Return the header and its length, or None while more is needed.  Raises ParseError."""
    if octets.startswith(_V2_START[: len(octets)]):
        return _parse_v2(octets)
    if octets.startswith(_V1_START[: len(octets)]):
        return _parse_v1(octets)
    raise ParseError("no PROXY header")


def serialize_v1(header: Header) -> bytes:
    """Return the line; what version 1 cannot say is UNKNOWN to it."""
    if header.local or header.family not in _V1_WORDS:
        return b"PROXY UNKNOWN\r\n"
    word = _V1_WORDS[header.family].decode()
    (source, source_port), (destination, port) = header.source, header.destination
    return f"PROXY {word} {source} {destination} {source_port} {port}\r\n".encode()


def serialize_v2(header: Header) -> bytes:
    """Return the header in binary, without TLVs.

    A client without an address is LOCAL, as haproxy sends it; PROXY with an
    unspecified family is right by section 2.2, but haproxy 2.6 refuses it (and unix).
    """
    family = Family.UNSPEC if header.local else header.family
    addresses = _pack(family, header)
    command = 0x20 if family is Family.UNSPEC else 0x21
    return _V2_FIXED.pack(_V2_START, command, family.value, len(addresses)) + addresses


# -- version 1 -----------------------------------------------------------------


def _parse_v1(octets: bytes) -> tuple[Header, int] | None:
    line, end, _ = octets[:V1_LIMIT].partition(b"\r\n")
    if not end:
        if len(octets) >= V1_LIMIT:
            raise ParseError("a PROXY line that does not end")
        return None
    size = len(line) + 2
    words = line.split(b" ")
    if len(words) >= 2 and words[1] == b"UNKNOWN":
        return Header(Family.UNSPEC), size  # whatever follows is to be ignored
    if len(words) != 6 or words[1] not in _V1_FAMILIES:
        raise ParseError("a PROXY line of unknown form")
    family = _V1_FAMILIES[words[1]]
    source = _v1_host(family, words[2]), _v1_port(words[4])
    destination = _v1_host(family, words[3]), _v1_port(words[5])
    return Header(family, source, destination), size


def _v1_host(family: Family, word: bytes) -> str:
    try:
        text = word.decode("ascii")
        address = IPv4Address(text) if family is Family.INET else IPv6Address(text)
    except (AddressValueError, UnicodeDecodeError):
        raise ParseError("a PROXY line with an address that is none") from None
    if "%" in text:
        raise ParseError("a PROXY line with a scoped address")
    return str(address)


def _v1_port(word: bytes) -> int:
    if not (word.isdigit() and len(word) <= 5 and int(word) <= 0xFFFF):
        raise ParseError("a PROXY line with a port that is none")
    if word.startswith(b"0") and word != b"0":
        raise ParseError("a PROXY line with a port that begins with 0")
    return int(word)


# -- version 2 -----------------------------------------------------------------


def _parse_v2(octets: bytes) -> tuple[Header, int] | None:
    if len(octets) < _V2_FIXED.size:
        return None
    _, command, family_octet, length = _V2_FIXED.unpack_from(octets)
    if command not in (0x20, 0x21):
        raise ParseError("a PROXY header of unknown version or command")
    size = _V2_FIXED.size + length
    if len(octets) < size:
        return None
    if command == 0x20:
        return Header(Family.UNSPEC, local=True), size  # any addresses are to be ignored
    family = _V2_FAMILIES.get(family_octet)
    if family is None:
        raise ParseError("a PROXY header of unknown family")
    return _unpack(family, octets[_V2_FIXED.size : size]), size


def _unpack(family: Family, data: bytes) -> Header:
    if family is Family.UNSPEC:
        return Header(family)
    try:
        if family is Family.UNIX:
            source, destination = _UNIX.unpack_from(data)
            return Header(family, (_path(source), 0), (_path(destination), 0))
        form, kind = (_INET, IPv4Address) if family is Family.INET else (_INET6, IPv6Address)
        source, destination, source_port, port = form.unpack_from(data)
    except struct.error:
        raise ParseError("a PROXY header too short for its addresses") from None
    return Header(family, (str(kind(source)), source_port), (str(kind(destination)), port))


def _pack(family: Family, header: Header) -> bytes:
    (source, source_port), (destination, port) = header.source, header.destination
    if family is Family.UNSPEC:
        return b""
    if family is Family.UNIX:
        return _UNIX.pack(_encode(source), _encode(destination))
    form, kind = (_INET, IPv4Address) if family is Family.INET else (_INET6, IPv6Address)
    return form.pack(kind(source).packed, kind(destination).packed, source_port, port)


def _path(field: bytes) -> str:
    """Read a path, which ends at the first zero octet unless that is the first of all."""
    name = field[:1] + field[1:].partition(b"\0")[0]
    return "" if name == b"\0" else name.decode("utf-8", "surrogateescape")


def _encode(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")
