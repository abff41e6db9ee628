"""The type that socket.socket is a Python layer above, for sockets of which many are made.

That layer costs each connection 2 to 3 us of its 100, and offers nothing that is used here.
"""

import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import cast

    PlainSocket = cast("type[socket.socket]", socket.SocketType)
else:
    PlainSocket = socket.SocketType


def accept(listening: socket.socket, family: int, kind: int) -> "tuple[socket.socket, object]":
    """Accept a connection on a socket of that family and type; return it and the peer's address.

    It is non-blocking, and closed on exec.
    """
    descriptor, address = listening._accept()  # type: ignore[attr-defined]  # what accept() wraps
    connection = PlainSocket(family, kind, 0, descriptor)
    connection.setblocking(False)
    return connection, address
