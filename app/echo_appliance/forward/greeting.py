"""Asks a vsock device in user space, behind a unix socket, for a port of its guest.

Who connects writes "CONNECT port", and the device answers "OK ..." in one line, after which the
stream is the guest's; a port where nobody listens is answered by the end of the connection.
Sources: Firecracker, docs/vsock.md; vhost-device-vsock, README.
"""

import errno
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..target import Target

LIMIT = 64  # octets; "OK 4294967295" and its end need 14


class Greeting:
    """The exchange on one connection, which it borrows, non-blocking."""

    __slots__ = ("_answer", "sock")

    def __init__(self, sock: socket.socket, target: "Target") -> None:
        """Ask.  Raises OSError when the device has gone already."""
        self.sock = sock
        self._answer = b""
        sock.send(b"CONNECT %d\n" % target.port)  # into an empty buffer: it goes whole

    def read(self) -> bool:
        """Take what has come of the answer; return whether that is all, and a yes.

        Leaves what follows the line, which is the guest's first words.  Raises OSError, with
        ECONNREFUSED for a port where nobody listens and EPROTO for what is no vsock device.
        """
        room = LIMIT - len(self._answer)
        try:
            seen = self.sock.recv(room, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        if not seen:
            raise OSError(errno.ECONNREFUSED, "the device closed the connection")
        line, end, _ = seen.partition(b"\n")
        self._answer += self.sock.recv(len(line + end))
        if not end and len(seen) < room and b"OK ".startswith(self._answer[:3]):
            return False
        if not (end and self._answer.startswith(b"OK ")):
            raise OSError(errno.EPROTO, "no vsock device")
        return True
