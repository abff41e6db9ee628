"""Echoes messages of connected SEQPACKET sockets (unix and vsock), boundaries kept.

One message at a time: while it cannot be sent back whole, nothing is read.
So a connection costs at most one message, of at most buffer.MESSAGE_LIMIT octets.

An empty message and the end both read as 0 octets.  On a unix socket they are
told apart by credentials: with SO_PASSCRED every message carries them, the end
does not (unix(7)).  On vsock empty messages do not exist.
"""

import select
import socket
import struct

from ..answers import let_answers_be_long
from ..buffer import VIEW
from ..errors import say
from .connection import Connection, Endpoint

# Room for struct ucred and nothing else, so that a peer cannot make us take descriptors:
# the kernel closes those that find no room.
_CREDENTIALS = socket.CMSG_LEN(struct.calcsize("3i"))

_buffers = [VIEW]


class SeqpacketConnection(Connection):
    """One peer's messages, each sent back as one."""

    __slots__ = ("_unsent",)

    def __init__(self, endpoint: Endpoint, sock: socket.socket, source: str | None) -> None:
        self._unsent: bytes | None = None
        if sock.family == socket.AF_UNIX:
            let_answers_be_long(sock)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            except OSError as error:
                say(f"{endpoint.name!r}: SO_PASSCRED refused ({error.strerror}); "
                    "an empty message will end its connection")  # fmt: skip
        super().__init__(endpoint, sock, source)

    @property
    def unsent(self) -> int:
        """How many octets were read and not sent back yet."""
        return len(self._unsent) if self._unsent else 0

    def on_event(self, _events: int) -> None:
        """Receive a message and send it back, or try again to send the last one."""
        try:
            if self._unsent is None:
                self._receive()
            else:
                self._retry(self._unsent)
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(error)

    def _receive(self) -> None:
        received, ancillary, flags, _ = self._socket.recvmsg_into(_buffers, _CREDENTIALS)
        if not received and not ancillary:
            self._close()
            return
        if flags & socket.MSG_TRUNC:
            self.abort("message-too-long")
            return
        self._count(received, 0)
        try:
            self._socket.send(VIEW[:received])
        except BlockingIOError:
            self._unsent = bytes(VIEW[:received])
            self._endpoint.loop.rewatch(self._socket.fileno(), select.EPOLLOUT)
        else:
            self._count(0, received)

    def _retry(self, message: bytes) -> None:
        self._socket.send(message)
        self._unsent = None
        self._count(0, len(message))
        self._endpoint.loop.rewatch(self._socket.fileno(), select.EPOLLIN)

    def _count(self, received: int, sent: int) -> None:
        endpoint = self._endpoint
        endpoint.counters.received += received
        endpoint.counters.sent += sent
        if endpoint.watches:
            self._note(received, sent)
