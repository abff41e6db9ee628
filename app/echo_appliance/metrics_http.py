"""Serves the metrics page on the inherited socket named `metrics`.

HTTP/1.1 for one request per connection: GET or HEAD of /metrics.  A client
that sends garbage, too much or nothing costs one of CLIENTS places for
TIMEOUT seconds, and is told which it was (400, 431, 408).

Source: RFC 9112 (HTTP/1.1), RFC 6585 section 5 (431).
"""

import select
import socket

from .accept import Acceptor
from .admission import Admission
from .inherit import Inherited
from .metrics import CONTENT_TYPE, Counters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .service import Counts, Service

CLIENTS = 16
TIMEOUT = 5.0
HEAD_LIMIT = 8 * 1024


def serve_metrics(service: "Service", inherited: Inherited, counts: "Counts") -> None:
    """Answer scrapes on a listening stream socket for as long as the service lives."""
    admission = Admission(CLIENTS, 0)

    def serve(sock: socket.socket, source: str | None) -> None:
        _Scrape(service, admission, counts, sock, source)

    # Scrapes are not what we count: a scraper must not show up in its own page.
    acceptor = Acceptor(service.loop, inherited, admission, Counters(), serve, lambda: None)
    service.add_source(acceptor, is_work=False)


def respond(head: bytes, counts: "Counts") -> bytes:
    """Return the whole response to a request head: all before the empty line, LF line ends."""
    lines = head.decode("latin-1").split("\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return _response("400 Bad Request", "not an HTTP/1 request\n")
    if any(":" not in line for line in lines[1:]):
        return _response("400 Bad Request", "a header field without a colon\n")
    method, target, _ = words
    if method not in ("GET", "HEAD"):
        return _response("405 Method Not Allowed", "GET or HEAD only\n", "Allow: GET, HEAD\r\n")
    if target.startswith("http://"):  # the absolute form, which a server must take: RFC 9112 3.2.2
        target = "/" + target.removeprefix("http://").partition("/")[2]
    if target.partition("?")[0] != "/metrics":
        return _response("404 Not Found", "the metrics are at /metrics\n")
    response = _response("200 OK", counts.page())
    return response if method == "GET" else response.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def _response(status: str, body: str, fields: str = "") -> bytes:
    kind = CONTENT_TYPE if status.startswith("200") else "text/plain; charset=utf-8"
    octets = body.encode()
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(octets)}\r\n"
        f"{fields}Connection: close\r\n\r\n"
    ).encode() + octets


class _Scrape:
    """One client of the page: reads a head, sends the response, waits for the client to close.

    Closing at once, with octets of the client unread, would send a reset, and
    that can overtake the response (RFC 9112 section 9.6).
    """

    def __init__(
        self,
        service: "Service",
        admission: Admission,
        counts: "Counts",
        sock: socket.socket,
        source: str | None,
    ) -> None:
        self._service = service
        self._admission = admission
        self._counts = counts
        self._socket = sock
        self._source = source
        self._head = bytearray()
        self._response = b""
        self._answered = False
        service.loop.watch(sock.fileno(), select.EPOLLIN, self._on_event)  # first: it may fail
        service.opened(self)
        self._timer = service.loop.call_later(TIMEOUT, self._on_timeout)

    def abort(self, _reason: str) -> None:
        """End it now."""
        self._timer.cancel()
        self._service.loop.forget(self._socket.fileno())
        self._socket.close()
        self._admission.release(self._source)
        self._service.closed(self)

    def _on_event(self, _events: int) -> None:
        try:
            if self._response:
                self._send()
            else:
                self._read()
        except BlockingIOError:
            pass
        except OSError:
            self.abort("error")

    def _read(self) -> None:
        octets = self._socket.recv(HEAD_LIMIT)
        if not octets:
            self.abort("eof")
        elif not self._answered:
            self._head += octets
            self._answer()

    def _answer(self) -> None:
        # Bare line feeds end lines too: RFC 9112 section 2.2.
        head, end, _ = bytes(self._head).replace(b"\r\n", b"\n").partition(b"\n\n")
        if end:
            self._begin(respond(head, self._counts))
        elif len(self._head) >= HEAD_LIMIT:
            words = f"the head is longer than {HEAD_LIMIT} octets\n"
            self._begin(_response("431 Request Header Fields Too Large", words))

    def _begin(self, response: bytes) -> None:
        self._answered = True
        self._response = response
        self._send()

    def _send(self) -> None:
        try:
            sent = self._socket.send(self._response)
        except BlockingIOError:
            sent = 0
        self._response = self._response[sent:]
        if not self._response:
            self._socket.shutdown(socket.SHUT_WR)
        events = select.EPOLLOUT if self._response else select.EPOLLIN
        self._service.loop.rewatch(self._socket.fileno(), events)

    def _on_timeout(self) -> None:
        if not self._answered:
            words = f"no complete request within {TIMEOUT:.0f} seconds\n"
            try:
                self._socket.send(_response("408 Request Timeout", words))
            except OSError:
                pass  # it is closed next in any case
        self.abort("timeout")
