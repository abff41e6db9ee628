"""Reads what a TLS ClientHello asks for: the server name and the ALPN protocols.

Nothing is decrypted and nothing is changed; what a client encrypts (ECH) stays
unseen, and its outer name is the one that counts.  Octets in, values out: knows
no I/O.

Source: RFC 8446 sections 4.1.2 and 5.1 (RFC 5246, 2246: the same layout), RFC
6066 section 3 (server_name), RFC 7301 section 3.1 (ALPN), RFC 8701 (GREASE:
unknown values are skipped).
"""

from ..errors import ParseError

HELLO_LIMIT = 16 * 1024  # octets of the message; post-quantum key shares make 2 KiB common
NAME_LIMIT = 255  # octets, RFC 1035 section 2.3.4; a name of 16 KiB of dots takes 24 ms to look up
RECORD_LIMIT = 1 << 14  # RFC 8446 section 5.1

UNRECOGNIZED_NAME = 112  # RFC 6066 section 9
NO_APPLICATION_PROTOCOL = 120  # RFC 7301 section 3.2
DECODE_ERROR = 50  # RFC 8446 section 6.2

_HANDSHAKE = 22
_CLIENT_HELLO = 1
_RECORD_HEADER = 5
_MESSAGE_HEADER = 4
_EXTENSION_SERVER_NAME = 0
_EXTENSION_ALPN = 16
_HOST_NAME = 0


class ClientHello:
    """What a route is chosen by."""

    __slots__ = ("protocols", "server_name")

    def __init__(self, server_name: str, protocols: tuple[str, ...]) -> None:
        self.server_name = server_name  # "" when the client names none
        self.protocols = protocols  # ALPN, in the client's order


class HelloReader:
    """Takes a stream's first octets as they come, until the ClientHello is complete.

    Each octet is looked at once, however few come at a time.
    """

    def __init__(self) -> None:
        self._records = bytearray()  # the record that is not complete yet
        self._message = bytearray()  # the fragments of the records that were

    def feed(self, octets: bytes) -> ClientHello | None:
        """Return the ClientHello, or None while more is needed.  Raises ParseError."""
        self._records += octets
        start = 0
        while (end := self._record_end(start)) is not None:
            self._message += self._records[start + _RECORD_HEADER : end]
            start = end
            size = self._message_size()
            if size is not None and len(self._message) >= size:
                return parse_client_hello(bytes(self._message[_MESSAGE_HEADER:size]))
        del self._records[:start]
        return None

    def _record_end(self, start: int) -> int | None:
        """Return where the record ends that begins at `start`, if it is complete."""
        records = self._records
        # Checked octet by octet, so that what is not TLS is known at once.
        if start < len(records) and records[start] != _HANDSHAKE:
            raise ParseError("not a TLS handshake")
        if start + 1 < len(records) and records[start + 1] != 3:
            raise ParseError("not a version of TLS")
        if start + _RECORD_HEADER > len(records):
            return None
        length = int.from_bytes(records[start + 3 : start + 5], "big")
        if not 0 < length <= RECORD_LIMIT:
            raise ParseError("a TLS record of impossible length")
        end = start + _RECORD_HEADER + length
        return end if end <= len(records) else None

    def _message_size(self) -> int | None:
        message = self._message
        if message[0] != _CLIENT_HELLO:
            raise ParseError("the first TLS message is not a ClientHello")
        if len(message) < _MESSAGE_HEADER:
            return None
        length = int.from_bytes(message[1:4], "big")
        if length > HELLO_LIMIT:
            raise ParseError("the ClientHello is too long")
        return _MESSAGE_HEADER + length


class _Fields:
    """Reads fields from front to back; one that is not there is a ParseError."""

    __slots__ = ("_at", "_octets")

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._octets)

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._octets):
            raise ParseError("the ClientHello is cut short")
        taken = self._octets[self._at : end]
        self._at = end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size_of_length: int) -> bytes:
        return self.take(self.number(size_of_length))


def parse_client_hello(body: bytes) -> ClientHello:
    """Return what a ClientHello's body says.  Raises ParseError."""
    fields = _Fields(body)
    fields.take(2 + 32)  # legacy_version, random
    fields.vector(1)  # legacy_session_id
    fields.vector(2)  # cipher_suites
    fields.vector(1)  # legacy_compression_methods
    if not fields:
        return ClientHello("", ())  # TLS 1.0 knows no extensions
    extensions = _Fields(fields.vector(2))
    if fields:
        raise ParseError("the ClientHello goes on after its end")
    server_name: str | None = None
    protocols: tuple[str, ...] | None = None
    while extensions:
        kind, data = extensions.number(2), extensions.vector(2)
        if kind == _EXTENSION_SERVER_NAME:
            if server_name is not None:
                raise ParseError("two server_name extensions")
            server_name = _parse_server_name(data)
        elif kind == _EXTENSION_ALPN:
            if protocols is not None:
                raise ParseError("two ALPN extensions")
            protocols = _parse_protocols(data)
    return ClientHello(server_name or "", protocols or ())


def _parse_server_name(data: bytes) -> str:
    fields = _Fields(data)
    names = _Fields(fields.vector(2))
    if fields or not names:
        raise ParseError("a server_name extension of the wrong length")
    found = ""
    while names:
        kind, name = names.number(1), names.vector(2)
        if kind == _HOST_NAME and not found:
            if not 0 < len(name) <= NAME_LIMIT:
                raise ParseError("a server name of impossible length")
            if not name.isascii() or not name.decode().isprintable():
                raise ParseError("a server name that is no host name")
            found = name.decode()
    return found


def _parse_protocols(data: bytes) -> tuple[str, ...]:
    fields = _Fields(data)
    names = _Fields(fields.vector(2))
    if fields or not names:
        raise ParseError("an ALPN extension of the wrong length")
    found = []
    while names:
        name = names.vector(1)
        if not name:
            raise ParseError("an empty ALPN protocol")
        found.append(name.decode("latin-1"))
    return tuple(found)


def alert(description: int) -> bytes:
    """Return the record of a fatal alert (RFC 8446 section 6)."""
    return bytes((21, 3, 1, 0, 2, 2, description))
