"""Echoes byte streams.

Backpressure is not reading.  What a peer sent and does not take back waits
here, and until it is gone nothing more is read: the kernel's buffers fill, and
the peer's own sends block.  So a connection costs at most READ_SIZE octets of
ours, whatever its peer does, and nothing while it keeps up.
"""

import select
import socket

from ..buffer import VIEW
from .connection import Connection, Endpoint

# One large read does what several small ones would, in one turn of the loop.  Bulk echo by
# size, in MB/s, where uvloop with flow control does 2,600-2,800: 64 KiB 1,390, 256 KiB 2,370,
# 384 KiB 2,940, 512 KiB 3,260.  Much larger ones leave the processor's cache, and each
# octet of it is what a stalled connection may cost.
READ_SIZE = 384 * 1024

_view = VIEW[:READ_SIZE]


class StreamConnection(Connection):
    """One peer's byte stream, sent back in order and whole."""

    __slots__ = ("_counters", "_recv_into", "_send", "_unsent")

    def __init__(self, endpoint: Endpoint, sock: socket.socket, source: str | None) -> None:
        self._counters = endpoint.counters
        self._recv_into = sock.recv_into
        self._send = sock.send
        self._unsent: memoryview | None = None  # there only while the peer is slow to read
        super().__init__(endpoint, sock, source)

    @property
    def unsent(self) -> int:
        """How many octets were read and not sent back yet."""
        return len(self._unsent) if self._unsent else 0

    # The hot path: one read, one write, no call of our own between them, no allocation but the
    # slice: 0.9 of the C reference's messages per second.  Neither os.read/os.write, nor edge
    # triggering, nor closures were faster.
    def on_event(self, _events: int) -> None:
        """Read and send back; at EOF everything has been sent, so end."""
        if self._unsent is not None:
            self._flush(self._unsent)
            return
        try:
            received = self._recv_into(_view)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if not received:
            self._close()
            return
        try:
            sent = self._send(_view[:received])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._fail(error)
            return
        counters = self._counters
        counters.received += received
        counters.sent += sent
        endpoint = self._endpoint
        if endpoint.watches:
            self._note(received, sent)
        if sent < received:
            self._unsent = memoryview(bytes(_view[sent:received]))
            endpoint.loop.rewatch(self._socket.fileno(), select.EPOLLOUT)

    def _flush(self, unsent: memoryview) -> None:
        try:
            sent = self._send(unsent)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        endpoint = self._endpoint
        endpoint.counters.sent += sent
        if endpoint.watches:
            self._note(0, sent)
        if sent < len(unsent):
            self._unsent = unsent[sent:]
        else:
            self._unsent = None
            endpoint.loop.rewatch(self._socket.fileno(), select.EPOLLIN)
