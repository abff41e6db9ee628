"""Forward to a port of a VM behind a user-space vsock device's unix socket; the tests are both."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import sys
import termios
from pathlib import Path

import pytest

from tests.process import pages
from tests.process.forwarding import Forwarding
from tests.process.launcher import Launcher, Server, eventually
from tests.process.peers import Sockets, pattern, receive, receive_to_end, reset

ASKED = b"CONNECT 3000\n"
YES = b"OK 1073741824\n"


@pytest.fixture
def forward(launch: Launcher, sockets: Sockets, short_path: Path) -> Forwarding:
    """Starts forwarders."""
    return Forwarding(launch, sockets, short_path)


class Scene:
    """A forwarder to a device, and its metrics."""

    def __init__(self, forward: Forwarding, sockets: Sockets, route: str = "") -> None:
        self._sockets = sockets
        self.device = sockets.listen(socket.AF_UNIX)
        self.front, self.metrics = sockets.listen(), sockets.listen()
        to = f'[route.vm]\nto = ["vsock-uds:{self.device.getsockname()}:3000"]\n{route}'
        self.server: Server = forward.config(to, vm=self.front, metrics=self.metrics)

    def client(self, words: bytes = b"") -> socket.socket:
        """Return a client that has said so much."""
        client = self._sockets.connect(self.front)
        client.sendall(words)
        return client

    def asked(self) -> socket.socket:
        """Return the connection on which the device was asked for the port."""
        accepted = self._sockets.keep(self.device.accept()[0])
        assert receive(accepted, len(ASKED)) == ASKED
        return accepted

    def await_end(self, reason: str) -> None:
        """Return when a connection was counted as ended so."""
        ended = ("connections_ended_total", "vm", reason)
        eventually(lambda: pages.scrape(self.metrics).get(ended) == 1, reason)


def unread(sock: socket.socket) -> int:
    """Return how many octets a unix socket's peer has not read, in the kernel's accounting."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


@pytest.fixture
def scene(forward: Forwarding, sockets: Sockets) -> Scene:
    """A forwarder with one target, the device."""
    return Scene(forward, sockets)


def test_forward_vsock_device_is_asked_for_the_port_before_anything_else(scene: Scene) -> None:
    client = scene.client(b"early")
    guest = scene.asked()
    guest.setblocking(False)
    with pytest.raises(BlockingIOError):
        guest.recv(1)  # the client's words are for the guest, who is not there yet
    guest.settimeout(15)
    guest.sendall(YES)
    assert receive(guest, 5) == b"early"
    for sender, receiver in ((client, guest), (guest, client)):
        octets = pattern(300_000)
        sender.sendall(octets)
        assert receive(receiver, len(octets)) == octets
    guest.shutdown(socket.SHUT_WR)
    assert receive_to_end(client) == b""
    client.sendall(b"and on")
    client.close()
    assert receive_to_end(guest) == b"and on"
    assert scene.server.stop() == 0


def test_forward_vsock_device_whose_guest_speaks_first_loses_no_octet(scene: Scene) -> None:
    client = scene.client()
    guest = scene.asked()
    guest.sendall(YES + b"220 at once\nand more\n")
    assert receive(client, 21) == b"220 at once\nand more\n"


def test_forward_vsock_device_that_answers_in_pieces_is_understood(scene: Scene) -> None:
    client = scene.client(b"x")
    guest = scene.asked()
    for octet in YES:
        guest.sendall(bytes([octet]))
        eventually(lambda: unread(guest) == 0, "it to be read")
    assert receive(guest, 1) == b"x"
    guest.sendall(b"y")
    assert receive(client, 1) == b"y"


@pytest.mark.parametrize("way", ["eof", "reset"])
def test_forward_vsock_device_without_a_listening_guest_is_a_refusal(
    scene: Scene, way: str
) -> None:
    client = scene.client()
    guest = scene.asked()
    if way == "reset":
        reset(guest)  # where octets of ours are unread, a unix socket says so, too
    guest.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    scene.await_end("connect-refused")


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n", b"O" * 200, b"\n", b"OK " * 40, b"OKAY\n"]
)
def test_forward_socket_that_is_no_vsock_device_is_left(scene: Scene, answer: bytes) -> None:
    client = scene.client()
    other = scene.asked()
    with contextlib.suppress(BrokenPipeError):
        other.sendall(answer)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    scene.await_end("no-vsock-device")
    with contextlib.suppress(ConnectionResetError):
        assert other.recv(1) == b""


def test_forward_vsock_device_that_is_silent_is_given_up_in_time(
    forward: Forwarding, sockets: Sockets
) -> None:
    scene = Scene(forward, sockets, "connect-timeout = 0.3\n")
    client = scene.client(b"x")
    scene.asked().sendall(b"OK")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    scene.await_end("connect-timeout")


def test_forward_vsock_device_whose_guest_boots_late_is_asked_again(
    forward: Forwarding, sockets: Sockets
) -> None:
    scene = Scene(forward, sockets, "connect-retry = 20\n")
    client = scene.client(b"patient")
    for _ in range(3):
        scene.asked().close()
    guest = scene.asked()
    guest.sendall(YES)
    assert receive(guest, 7) == b"patient"
    guest.sendall(b"!")
    assert receive(client, 1) == b"!"


def test_forward_vsock_device_that_is_not_there_is_followed_by_the_next_target(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, device, other = sockets.listen(), sockets.listen(socket.AF_UNIX), sockets.listen()
    forward.to(front, f"vsock-uds:{device.getsockname()}:3000", other)
    client = sockets.connect(front)
    client.sendall(b"?")
    sockets.keep(device.accept()[0]).close()
    accepted = sockets.keep(other.accept()[0])
    assert receive(accepted, 1) == b"?"
    accepted.sendall(b"!")
    assert receive(client, 1) == b"!"


def test_forward_client_that_leaves_while_the_device_thinks_ends_the_dial(scene: Scene) -> None:
    client = scene.client()
    guest = scene.asked()
    reset(client)
    scene.await_end("client-gone")
    assert guest.recv(1) == b""
    # And nothing of it is left that would harm the next one.
    client = scene.client(b"x")
    guest = scene.asked()
    guest.sendall(YES)
    assert receive(guest, 1) == b"x"
    guest.sendall(b"y")
    assert receive(client, 1) == b"y"
