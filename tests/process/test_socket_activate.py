"""Under the real systemd-socket-activate: it listens, waits for the first client, and executes us.

Most tests hand it the sockets, which it passes through: so no free port needs to be guessed.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence

import pytest

from tests.process import pages
from tests.process.conftest import lacking
from tests.process.launcher import COMMAND, Launcher, Server, eventually, in_session
from tests.process.peers import Address, Sockets, pattern, receive_to_end, round_trip


class Activate:
    """activate(sockets, its options..., ours=...) -> the process, first its own, then ours."""

    def __init__(self, launch: Launcher) -> None:
        found = shutil.which("systemd-socket-activate")
        if found is None:
            lacking("systemd-socket-activate not found: install systemd")
        self._program: str = found
        self._launch = launch

    def __call__(
        self, passed: Sequence[socket.socket], *options: str, ours: Sequence[str] = ()
    ) -> Server:
        environment = ("-E", "PATH", "-E", "NOTIFY_SOCKET")
        return self._launch.start(
            passed,
            ready=False,
            # It passes sockets through, but takes none at all for a mistake.
            environment={} if passed else {"LISTEN_FDS": None},
            command=(self._program, *environment, *options, *COMMAND, "echo", *ours),
        )


@pytest.fixture
def activate(launch: Launcher) -> Activate:
    """Starts systemd-socket-activate, which will start the appliance."""
    return Activate(launch)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_INET6, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET),
        (socket.AF_INET, socket.SOCK_DGRAM),
        (socket.AF_INET6, socket.SOCK_DGRAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
    ],
)
def test_activate_first_client_starts_us_and_is_served(
    activate: Activate, sockets: Sockets, family: int, kind: socket.SocketKind
) -> None:
    datagrams = kind == socket.SOCK_DGRAM
    server = sockets.bind(family) if datagrams else sockets.listen(family, kind=kind)
    appliance = activate([server])
    client = sockets.connect(server)
    round_trip(client, pattern(5000))
    assert appliance.notified.wait("STATUS=").startswith("STATUS=serving unknown (")
    round_trip(client, b"again")
    client.close()
    assert appliance.stop() == 0


def test_activate_many_sockets_with_names_are_served_by_one_process(
    activate: Activate, sockets: Sockets
) -> None:
    tcp, unix, udp = sockets.listen(), sockets.listen(socket.AF_UNIX), sockets.bind()
    metrics = sockets.listen()
    appliance = activate([tcp, unix, udp, metrics], "--fdname=tcp:unix:udp:metrics")
    for server in (tcp, unix, udp):
        client = sockets.connect(server)
        round_trip(client)
        client.close()
    page = pages.until(metrics, {("connections", name): 0 for name in ("tcp", "unix", "udp")})
    assert page[("connections_total", "tcp")] == page[("connections_total", "unix")] == 1
    assert page[("sent_datagrams_total", "udp")] == 1
    assert appliance.stop() == 0


def test_activate_scrape_alone_starts_us(activate: Activate, sockets: Sockets) -> None:
    server, metrics = sockets.listen(), sockets.listen()
    activate([server, metrics], "--fdname=echo:metrics")
    assert pages.scrape(metrics)[("connections_total", "echo")] == 0


def test_activate_accept_serves_each_connection_in_a_process_of_its_own(
    activate: Activate, sockets: Sockets
) -> None:
    server = sockets.listen()
    appliance = activate([server], "--accept")
    clients = [sockets.connect(server) for _ in range(3)]
    for client in clients:
        round_trip(client, pattern(5000))
    assert len(appliance.workers) == 3
    for client in clients:
        client.shutdown(socket.SHUT_WR)
        assert receive_to_end(client) == b""
    eventually(lambda: in_session(appliance.pid) == [appliance.pid], "the end of each")
    eventually(lambda: appliance.stderr.count("died with code 0") == 3, lambda: appliance.stderr)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_activate_inetd_with_accept_serves_the_connection_on_standard_input(
    activate: Activate, sockets: Sockets, family: int
) -> None:
    server = sockets.listen(family)
    appliance = activate([server], "--accept", "--inetd")
    client = sockets.connect(server)
    round_trip(client, pattern(5000))
    assert "stdin (" in appliance.notified.wait("STATUS=")
    client.close()
    eventually(lambda: "died with code 0" in appliance.stderr, lambda: appliance.stderr)


def test_activate_inetd_wait_serves_the_listening_socket_on_standard_input(
    activate: Activate, sockets: Sockets
) -> None:
    server = sockets.listen()
    appliance = activate([server], "--inetd")
    for _ in range(3):
        client = sockets.connect(server)
        round_trip(client)
        client.close()
    appliance.notified.wait("READY=1")
    assert appliance.stop() == 0


# -- sockets that it makes itself --------------------------------------------


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _connect_when_bound(
    sockets: Sockets, family: int, kind: socket.SocketKind, address: Address
) -> socket.socket:
    def connect() -> socket.socket | None:
        sock = socket.socket(family, kind)
        try:
            if (family, kind) == (socket.AF_UNIX, socket.SOCK_DGRAM):
                sock.bind("")
            sock.connect(address)
        except OSError:
            sock.close()
            return None
        return sock

    return sockets.keep(eventually(connect, f"somebody at {address}"))


def test_activate_listens_itself_on_streams(activate: Activate, sockets: Sockets) -> None:
    port, path = _free_port(), sockets.path()
    appliance = activate([], "-l", f"127.0.0.1:{port}", "-l", f"[::1]:{port}", "-l", path)
    for family, address in (
        (socket.AF_INET, ("127.0.0.1", port)),
        (socket.AF_INET6, ("::1", port)),
        (socket.AF_UNIX, path),
    ):
        round_trip(_connect_when_bound(sockets, family, socket.SOCK_STREAM, address))
    assert appliance.notified.wait("STATUS=").count("stream") == 3


def test_activate_listens_itself_on_datagrams(activate: Activate, sockets: Sockets) -> None:
    path = sockets.path()
    appliance = activate([], "--datagram", "-l", path, "-l", "@" + path)
    client = _connect_when_bound(sockets, socket.AF_UNIX, socket.SOCK_DGRAM, path)
    round_trip(client, pattern(65_507))
    other = _connect_when_bound(sockets, socket.AF_UNIX, socket.SOCK_DGRAM, "\0" + path)
    round_trip(other)
    assert appliance.notified.wait("STATUS=").count("unix dgram") == 2


def test_activate_listens_itself_on_vsock(activate: Activate, sockets: Sockets) -> None:
    path, port = sockets.path(), _free_port()
    try:
        with socket.socket(socket.AF_VSOCK) as probe:
            probe.bind((socket.VMADDR_CID_ANY, port))
    except OSError as error:
        lacking(f"no vsock on this kernel ({error}): load the module vsock")
    appliance = activate([], "-l", f"vsock:{socket.VMADDR_CID_ANY}:{port}", "-l", path)
    round_trip(_connect_when_bound(sockets, socket.AF_UNIX, socket.SOCK_STREAM, path))
    served = f"(vsock stream {socket.VMADDR_CID_ANY}:{port})"
    assert served in appliance.notified.wait("STATUS=")


def test_activate_exit_idle_leaves_the_client_to_the_next_start(
    activate: Activate, sockets: Sockets
) -> None:
    server = sockets.listen()
    for _ in range(2):
        appliance = activate([server], ours=["--exit-idle", "0.1"])
        client = sockets.connect(server)
        round_trip(client)
        client.close()
        assert appliance.wait() == 0
