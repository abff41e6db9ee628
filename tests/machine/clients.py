"""Clients of the appliance, on plain sockets: one target per socket family and type."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USER_ID = 1000
VMADDR_CID_LOCAL = 1


@dataclass(frozen=True, slots=True)
class Target:
    """One socket of the appliance, and how a client of it is bound ("" is the kernel's choice)."""

    name: str
    family: int
    kind: int
    address: Any
    bound_to: str | None = None


def unix_targets(folder: str) -> list[Target]:
    """Returns the targets that a template's own socket unit makes in the folder."""
    unix, datagram = socket.AF_UNIX, socket.SOCK_DGRAM
    return [
        Target("unix", unix, socket.SOCK_STREAM, f"{folder}/stream"),
        Target("unix-seqpacket", unix, socket.SOCK_SEQPACKET, f"{folder}/seqpacket"),
        Target("unix-dgram-autobound", unix, datagram, f"{folder}/datagram", ""),
        Target("unix-dgram-abstract", unix, datagram, f"{folder}/datagram", "\0echo-test-client"),
        Target("unix-dgram-path", unix, datagram, f"{folder}/datagram", f"{folder}/client"),
    ]


def inet_targets(port: int = 3000) -> list[Target]:
    """Returns the targets that the drop-in of the instance "demo" adds, vsock aside."""
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    return [
        Target("tcp4", socket.AF_INET, stream, ("127.0.0.1", port)),
        Target("tcp6", socket.AF_INET6, stream, ("::1", port)),
        Target("udp4", socket.AF_INET, datagram, ("127.0.0.1", port)),
        Target("udp6", socket.AF_INET6, datagram, ("::1", port)),
    ]


def vsock_loopback() -> bool:
    """Tells whether this kernel carries vsock from a machine to itself (module vsock_loopback)."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((VMADDR_CID_LOCAL, socket.VMADDR_PORT_ANY))
        except OSError:
            return False
    return True


DEMO_FOLDER = f"/run/user/{USER_ID}/echo-appliance/demo"
DEMO = [*inet_targets(), *unix_targets(DEMO_FOLDER)]
TCP = DEMO[0]
UDP = DEMO[2]
UNIX = DEMO[4]
VSOCK = Target("vsock", socket.AF_VSOCK, socket.SOCK_STREAM, (VMADDR_CID_LOCAL, 3000))


@contextlib.contextmanager
def connect(target: Target, timeout: float = 20) -> Iterator[socket.socket]:
    """Gives a connected client socket; every call on it ends within the timeout, in seconds."""
    with socket.socket(target.family, target.kind) as client:
        client.settimeout(timeout)
        if target.bound_to is not None:
            _bind_as_user(client, target.bound_to)
        try:
            client.connect(target.address)
            yield client
        finally:
            if target.bound_to and not target.bound_to.startswith("\0"):
                Path(target.bound_to).unlink()


def _bind_as_user(client: socket.socket, path: str) -> None:
    """Binds with the user's identity: a reply may only be written to a file of the same user."""
    os.seteuid(USER_ID)
    try:
        client.bind(path)
    finally:
        os.seteuid(0)


def receive(client: socket.socket, size: int) -> bytes:
    """Returns size octets of a stream (fewer at its end), or one message of another type."""
    if client.type != socket.SOCK_STREAM:
        return client.recv(65536)
    data = bytearray()
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return bytes(data)


def echo(target: Target, payload: bytes = b"hello\n", timeout: float = 20) -> bytes:
    """Sends the payload on a fresh socket and returns what came back."""
    with connect(target, timeout) as client:
        client.sendall(payload)
        return receive(client, len(payload))
