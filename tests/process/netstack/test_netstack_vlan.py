"""A packet socket of ours sees the frames of its own link, and of no VLAN on it."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from pathlib import Path

from echo_appliance.netstack.wire import arp, ethernet
from tests.process.launcher import eventually
from tests.process.netstack.net import ADDRESSES, NETSTACK, OURS, PORT, Net, connect, ip
from tests.process.programs import running

STRANGER, HIS_ADDRESS = b"\x02\0\0\0\0\x63", b"\xc0\0\2\x63"


def test_packet_socket_leaves_frames_of_vlans_alone(net: Net) -> None:
    """The kernel takes the tag off before we see them: they would pass for our own link's."""
    ip("link", "add", "near", "type", "veth", "peer", "name", "far")
    net.up("near")
    ip("link", "set", "far", "up")
    command = [*NETSTACK, "serve", "--device", "packet:far", *ADDRESSES, "--port", str(PORT)]
    asked = arp.Message(arp.REQUEST, STRANGER, HIS_ADDRESS, bytes(6), socket.inet_aton(OURS))
    head, rest = ethernet.BROADCAST + STRANGER, b"\x08\x06" + arp.serialize(asked)
    with (
        running(command, Path("/dev/null")),
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethernet.ARP)) as near,
    ):
        near.bind(("near", ethernet.ARP))
        eventually(_is_served, "the port")
        near.send(head + b"\x81\0\0\5" + rest)
        assert not _is_answered(near, 0.5)
        near.send(head + rest)
        assert _is_answered(near, 10)


def _is_served() -> bool:
    with contextlib.suppress(OSError), connect():
        return True
    return False


def _is_answered(sock: socket.socket, seconds: float) -> bool:
    """Whether a frame to the stranger comes within this time."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and select.select([sock], [], [], left)[0]:
        if sock.recv(100)[:6] == STRANGER:
            return True
    return False
