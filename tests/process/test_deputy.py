"""What comes from outside must not make the appliance speak to itself, or for somebody else.

A unix client names the address of its answer, and the appliance looks that name
up in its own namespaces.  From another namespace anybody can take any name.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process import pages
from tests.process.conftest import InNamespace, lacking
from tests.process.launcher import Launcher
from tests.process.peers import Sockets, receive_to_end, round_trip

REFUSED = ("dropped_datagrams_total", "unix", "refused-address")

# In a mount namespace of its own: bind to TAKEN, which is somebody else's path outside, and
# send to SERVER, whose directory stays visible under another name.
_CLIENT = """
import socket, sys
client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
client.bind(sys.argv[1])
client.sendto(b"WATCHDOG=trigger", sys.argv[2])
"""


def test_deputy_client_with_our_own_abstract_name_is_not_answered(
    launch: Launcher, sockets: Sockets, in_namespace: InNamespace
) -> None:
    name = f"\0echo-test-{os.getpid()}"
    server, named = sockets.bind(socket.AF_UNIX), sockets.bind(socket.AF_UNIX, name)
    metrics = sockets.listen()
    appliance = launch.start([server, named, metrics], names=["unix", "unix", "metrics"])
    client = in_namespace(lambda: sockets.client(server, name))
    client.sendto(b"round and round", server.getsockname())
    pages.until(metrics, {REFUSED: 1})
    appliance.assert_sleeps()


def test_deputy_client_with_the_service_managers_name_is_not_answered(
    launch: Launcher, sockets: Sockets, in_namespace: InNamespace
) -> None:
    server, metrics = sockets.bind(socket.AF_UNIX), sockets.listen()
    appliance = launch.start([server, metrics], names=["unix", "metrics"])
    name = "\0" + appliance.notified.address[1:]
    client = in_namespace(lambda: sockets.client(server, name))
    client.sendto(b"WATCHDOG=trigger", server.getsockname())
    pages.until(metrics, {REFUSED: 1})
    assert "WATCHDOG=trigger" not in appliance.notified.take()


def test_deputy_client_with_our_own_path_is_not_answered(
    launch: Launcher, sockets: Sockets, short_path: Path
) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        lacking("a mount namespace needs root and unshare(1)")
    here, elsewhere = short_path / "here", short_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    server = sockets.bind(socket.AF_UNIX, str(here / "datagram"))
    metrics = sockets.listen()
    appliance = launch.start([server, metrics], names=["unix", "metrics"])
    # Spelled otherwise, too: it is the file that counts.
    taken = f"{here}/./datagram"
    mounts = f"mount --bind {here} {elsewhere} && mount -t tmpfs none {here}"
    client = [sys.executable, "-I", "-S", "-c", _CLIENT, taken, str(elsewhere / "datagram")]
    subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "_", *client], check=True
    )
    pages.until(metrics, {REFUSED: 1})
    appliance.assert_sleeps()


@pytest.mark.parametrize("options", [(), ("--debug",)])
def test_deputy_inetd_style_no_word_of_ours_gets_into_the_peers_data(
    sockets: Sockets, options: tuple[str, ...]
) -> None:
    ours, theirs = sockets.pair()
    # As systemd's StandardInput=socket has it: output and errors are the connection as well.
    with subprocess.Popen(
        [sys.executable, "-m", "echo_appliance", "echo", *options],
        stdin=theirs.fileno(),
        stdout=theirs.fileno(),
        stderr=theirs.fileno(),
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "app")},
    ) as process:
        theirs.close()
        ours.sendall(b"hello")
        ours.shutdown(socket.SHUT_WR)
        assert receive_to_end(ours) == b"hello"
        assert process.wait() == 0


def test_deputy_many_sockets_are_still_announced_in_what_systemd_takes(
    launch: Launcher, sockets: Sockets
) -> None:
    servers = [sockets.listen(socket.AF_UNIX) for _ in range(90)]
    appliance = launch.start(servers)
    status = appliance.notified.first("STATUS=")
    assert status is not None
    assert len(status) < 2048, "systemd ignores notifications above 4,096 octets whole"
    assert status.endswith(" more")
    round_trip(sockets.connect(servers[-1]))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_deputy_socket_shut_down_by_another_holder_is_left_and_told(
    launch: Launcher, sockets: Sockets, family: int, kind: socket.SocketKind
) -> None:
    make = sockets.listen if kind == socket.SOCK_STREAM else sockets.bind
    server, other = make(family), sockets.listen()
    appliance = launch.start([server, other])
    try:
        server.shutdown(socket.SHUT_RDWR)
    except OSError:
        assert kind == socket.SOCK_DGRAM, "ENOTCONN, but it takes effect"
    round_trip(sockets.connect(other))
    appliance.assert_sleeps()
    assert "shut down by somebody who holds it too" in appliance.stderr


# Options that a .socket unit may set, and their kin: level, number.
_OTHERS = {
    "PassPacketInfo": [(socket.IPPROTO_IP, 8)],
    "Timestamping": [(socket.SOL_SOCKET, 29)],
    "TOS and TTL": [(socket.IPPROTO_IP, 13), (socket.IPPROTO_IP, 12)],
    "all": [(0, 8), (socket.SOL_SOCKET, 35), (0, 13), (0, 12), (socket.SOL_SOCKET, 40)],
}


@pytest.mark.parametrize("others", _OTHERS)
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_datagram_with_other_control_messages_is_answered_from_where_it_was_sent(
    launch: Launcher, sockets: Sockets, family: int, others: str
) -> None:
    server = sockets.bind(family, "0.0.0.0" if family == socket.AF_INET else "::")
    for level, option in _OTHERS[others]:
        server.setsockopt(level, option, 1)
    if family == socket.AF_INET6 and others in ("PassPacketInfo", "all"):
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    launch.start([server])
    port = server.getsockname()[1]
    client = sockets.client(server)
    to = "127.0.0.5" if family == socket.AF_INET else "::ffff:127.0.0.5"
    for turn in range(3):
        client.sendto(bytes((turn,)), (to, port))
        answer, source = client.recvfrom(100)
        assert (answer, source[:2]) == (bytes((turn,)), (to, port))
