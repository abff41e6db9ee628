"""Reads what a route must know before it can lead a client on: PROXY header, ClientHello.

Bounded by octets (the parsers say when it is too much) and by HEAD_SECONDS in
all, so a client that sends an octet per second, or nothing, costs no more.
"""

import select

from ..errors import ParseError
from . import proxy_protocol, sni

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Protocol

    from ..loop import Loop

    class Reader(Protocol):
        """Who wants to know; each call may end the head by cancel()."""

        def proxied(self, header: proxy_protocol.Header) -> None: ...
        def head_read(self, octets: bytes, hello: sni.ClientHello | None) -> None: ...
        def head_failed(self, reason: str, answer: bytes) -> None: ...


HEAD_SECONDS = 10.0
_READ_SIZE = 16 * 1024


class Head:
    """The first octets of one client.  Borrows the socket until it calls its reader back."""

    __slots__ = ("_hello", "_loop", "_octets", "_proxy", "_reader", "_socket", "_timer")

    def __init__(
        self, loop: "Loop", sock: "socket.socket", reader: "Reader", *, proxy: bool, tls: bool
    ) -> None:
        self._loop = loop
        self._socket = sock
        self._reader: Reader | None = reader
        self._proxy = proxy  # a PROXY header is still to come
        self._hello = sni.HelloReader() if tls else None
        self._octets = bytearray()  # that the backend is to get
        loop.watch(sock.fileno(), select.EPOLLIN, self._on_event)
        self._timer = loop.call_later(HEAD_SECONDS, self._on_timeout)

    def cancel(self) -> None:
        """Stop, without a word to the reader."""
        if self._reader is not None:
            self._reader = None
            self._timer.cancel()
            self._loop.forget(self._socket.fileno())

    def _on_event(self, _events: int) -> None:
        try:
            octets = self._socket.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self._fail("reset")
            return
        if not octets:
            self._fail("head-cut-short")
        elif self._proxy:
            self._read_proxy(octets)
        else:
            self._read_hello(octets)

    def _read_proxy(self, octets: bytes) -> None:
        self._octets += octets
        try:
            found = proxy_protocol.parse(bytes(self._octets))
        except ParseError:
            self._fail("proxy-malformed")
            return
        if found is None:
            return
        header, size = found
        rest = bytes(self._octets[size:])
        self._octets.clear()
        self._proxy = False
        if self._reader is not None:
            self._reader.proxied(header)
        self._read_hello(rest)

    def _read_hello(self, octets: bytes) -> None:
        self._octets += octets
        hello = None
        if self._hello is not None:
            try:
                hello = self._hello.feed(octets)
            except ParseError:
                self._fail("tls-malformed", sni.alert(sni.DECODE_ERROR))
                return
            if hello is None:
                return
        reader = self._reader
        if reader is not None:
            self.cancel()
            reader.head_read(bytes(self._octets), hello)

    def _on_timeout(self) -> None:
        self._fail("head-timeout")

    def _fail(self, reason: str, answer: bytes = b"") -> None:
        reader = self._reader
        if reader is not None:
            self.cancel()
            reader.head_failed(reason, answer)
