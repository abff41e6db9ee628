"""Clients: which socket a connection or a datagram reached, and what is answered."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Sequence

PATIENCE = 3.0  # seconds for what must come; on the loopback it comes at once
QUIET = 0.15  # seconds in which what must not come would have come


def reached(listeners: Sequence[socket.socket], address: str, port: int) -> int | None:
    """Connect to the address; return which listener got it, None where the connection failed."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(QUIET)
        # Closed by a reset: those that wait for TIME_WAIT's end use up the client's ports.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            client.connect((address, port))
        except OSError:
            return None
        ready, _, _ = select.select(listeners, [], [], PATIENCE)
        assert len(ready) == 1, "one connection, one listener"
        connection, _ = ready[0].accept()
        with connection:
            assert connection.getsockname()[:2] == (address, port)
            client.close()  # first
        return list(listeners).index(ready[0])


def received(sockets: Sequence[socket.socket], address: str, port: int) -> int | None:
    """Send a datagram to the address; return which socket got it, None where none did."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.sendto(b"datagram", (address, port))
        ready, _, _ = select.select(sockets, [], [], QUIET)
        if not ready:
            return None
        assert ready[0].recv(100) == b"datagram"
        return list(sockets).index(ready[0])


def connected(address: str, port: int) -> socket.socket:
    """Return a UDP client to which only an answer from that address and port arrives."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.connect((address, port))
    return sock


def ask(client: socket.socket, octets: bytes) -> bytes:
    """Send a datagram; return the answer."""
    client.send(octets)
    return client.recv(2000)


def is_empty(sock: socket.socket) -> bool:
    """Whether nothing waits in a socket: whoever shares it has taken it all."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
