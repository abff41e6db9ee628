"""Sockets to hand over, and clients to talk to them with: plain Python sockets throughout."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Any

from tests.process.launcher import DEADLINE, Server, eventually, frozen

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: close() sends a reset

Address = Any  # what socket.getsockname() gives: its type depends on the family


class Sockets:
    """Makes sockets and closes them all at the end of a test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made = contextlib.ExitStack()
        self._count = 0

    def close(self) -> None:
        """Close every one."""
        self._made.close()

    def keep(self, sock: socket.socket) -> socket.socket:
        """Close this one, too, at the end."""
        sock.settimeout(DEADLINE)
        return self._made.enter_context(sock)

    def path(self) -> str:
        """Return a path for a unix socket that nothing uses."""
        self._count += 1
        return str(self._directory / f"s{self._count}")

    # -- to hand over --------------------------------------------------------

    def listen(
        self,
        family: int = socket.AF_INET,
        address: Address = None,
        kind: int = socket.SOCK_STREAM,
        backlog: int = 1024,
    ) -> socket.socket:
        """Return a listening socket; for inet families `address` is a host or host and port."""
        sock = self.bind(family, address, kind)
        sock.listen(backlog)
        return sock

    def bind(
        self, family: int = socket.AF_INET, address: Address = None, kind: int = socket.SOCK_DGRAM
    ) -> socket.socket:
        """Return a bound socket; its address is the loopback's unless given."""
        sock = self.keep(socket.socket(family, kind))
        if family == socket.AF_INET6:  # whatever this machine's default is
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if address is None:
            defaults: dict[int, str] = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
            address = defaults.get(family) or self.path()
        internet = family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, str)
        sock.bind((address, 0) if internet else address)
        return sock

    def pair(self, kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
        """Return two connected unix sockets: ours, and the one to hand over."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        return self.keep(ours), self.keep(theirs)

    # -- clients -------------------------------------------------------------

    def connect(
        self,
        server: socket.socket,
        *,
        host: str | None = None,
        source: Address = None,
        receive_buffer: int = 0,
    ) -> socket.socket:
        """Return a client that is connected to a listening (or a datagram) socket."""
        family, address = server.family, server.getsockname()
        if host is not None:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            address = (host, address[1])
        sock = self.keep(socket.socket(family, server.type))
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if family in (socket.AF_INET, socket.AF_INET6) and server.type == socket.SOCK_STREAM:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if source is not None:
            sock.bind(source)
        elif family == socket.AF_UNIX and server.type == socket.SOCK_DGRAM:
            sock.bind("")
        sock.connect(address)
        return sock

    def client(self, server: socket.socket, source: Address = None) -> socket.socket:
        """Return a datagram client that is bound, but not connected."""
        sock = self.keep(socket.socket(server.family, socket.SOCK_DGRAM))
        if source is not None:
            sock.bind(source)
        return sock


def round_trip(sock: socket.socket, payload: bytes = b"hello") -> None:
    """Send, receive as much, and compare."""
    sock.sendall(payload)
    assert receive(sock, len(payload)) == payload


def receive(sock: socket.socket, size: int) -> bytes:
    """Return exactly this many octets of a stream."""
    octets = b""
    while len(octets) < size:
        more = sock.recv(size - len(octets))
        assert more, f"EOF after {len(octets)} of {size} octets"
        octets += more
    return octets


def receive_to_end(sock: socket.socket) -> bytes:
    """Return all octets up to EOF."""
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def assert_silent(sock: socket.socket) -> None:
    """Nothing has arrived: no octets, no end, no error."""
    assert not select.select([sock], [], [], 0)[0], "something came"


def reset(sock: socket.socket) -> None:
    """Close a TCP connection by a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.close()


def stuff(sock: socket.socket, payload: memoryview, quiet: float = 0.1) -> int:
    """Send, and read nothing, until no more is taken for a while; return how much was.

    What is taken in the meantime goes into buffers: the kernel's two, and the appliance's own.
    """
    sock.setblocking(False)
    sent = 0
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    while sent < len(payload) and poll.poll(quiet * 1000):
        with contextlib.suppress(BlockingIOError):
            sent += sock.send(payload[sent : sent + (1 << 20)])
    sock.settimeout(DEADLINE)
    return sent


def stall(sockets: Sockets, server: socket.socket, appliance: Server) -> socket.socket:
    """Return a client that is owed much which it does not take, while it has nothing to say.

    The appliance has read all of it in one go, and holds what did not fit the small buffers to
    the client.  (With octets left unread any close would be a reset, by the kernel.)
    """
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # for those accepted from now
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
    client = sockets.connect(server, receive_buffer=8 << 10)
    round_trip(client)
    with frozen(appliance.pid):
        client.sendall(bytes(300_000))
        eventually(lambda: _unsent(client) == 0, "all of it on the other side")
    return client


def _unsent(sock: socket.socket) -> int:
    """How many octets of a TCP socket the peer's kernel has not confirmed (SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def exchange(
    sock: socket.socket, payload: bytes, *, eager: bool, read_size: int = 1 << 18
) -> bytes:
    """Send the payload, half-close, and return what comes back until EOF.

    An eager client reads whenever it can; the other one only when it can no longer send, and
    then a little, so that every buffer between it and itself is full all the time.
    """
    unsent, answer = memoryview(payload), bytearray()
    sock.setblocking(False)
    poll = select.poll()
    give_up = time.monotonic() + 4 * DEADLINE
    while True:
        assert time.monotonic() < give_up, f"{len(unsent)} unsent, {len(answer)} came back"
        poll.register(sock, select.POLLIN | (select.POLLOUT if unsent else 0))
        ready = dict(poll.poll(DEADLINE * 1000))[sock.fileno()]
        if ready & select.POLLOUT and unsent:
            unsent = unsent[sock.send(unsent[: 1 << 18]) :]
            if not unsent:
                sock.shutdown(socket.SHUT_WR)
        if ready & ~select.POLLOUT and (eager or not ready & select.POLLOUT):
            octets = sock.recv(read_size)
            if not octets:
                return bytes(answer)
            answer += octets


def pattern(size: int) -> bytes:
    """Return octets that repeat nowhere, so that none can be lost or moved unnoticed."""
    return os.urandom(size)
