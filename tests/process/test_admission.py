"""Who is let in, for how long, and when the process may go home."""

from __future__ import annotations

import random
import select
import socket
import threading
import time

import pytest

from tests.process import pages
from tests.process.launcher import COMMAND, DEADLINE, Launcher, Server, eventually
from tests.process.peers import (
    Sockets,
    assert_silent,
    pattern,
    receive,
    receive_to_end,
    reset,
    round_trip,
    stall,
)

# -- limits ------------------------------------------------------------------


def test_admission_above_the_limit_waits_and_is_served_later(
    launch: Launcher, sockets: Sockets
) -> None:
    server, metrics = sockets.listen(), sockets.listen()
    appliance = launch.start([server, metrics], "--max-connections", "2", names=["echo", "metrics"])
    inside = [sockets.connect(server) for _ in range(2)]
    for client in inside:
        round_trip(client)
    outside = [sockets.connect(server) for _ in range(3)]
    for client in outside:
        client.sendall(b"let me in")
    appliance.assert_sleeps()
    for client in outside:
        assert_silent(client)
    round_trip(inside[0])
    assert pages.scrape(metrics)[("connections", "echo")] == 2
    for leaving, entering in zip([*inside, *outside], outside, strict=False):
        leaving.close()
        assert receive(entering, 9) == b"let me in"
    assert pages.scrape(metrics)[("connections_total", "echo")] == 5


def test_admission_limit_counts_all_sockets_together(launch: Launcher, sockets: Sockets) -> None:
    servers = [sockets.listen(), sockets.listen(socket.AF_UNIX), sockets.listen(socket.AF_INET6)]
    appliance = launch.start(servers, "--max-connections", "1")
    inside = sockets.connect(servers[0])
    round_trip(inside)
    outside = [sockets.connect(server) for server in servers]
    for client in outside:
        client.sendall(b"x")
    appliance.assert_sleeps(0.1)
    for client in outside:
        assert_silent(client)
    inside.close()
    for _ in servers:
        # In whatever order they get in: each leaves room for one more.
        done = eventually(lambda: [c for c in outside if _has_come(c)], "one that is let in")
        outside.remove(done[0])
        assert done[0].recv(1) == b"x"
        done[0].close()


def _has_come(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def test_admission_source_with_its_share_is_closed_and_counted(
    launch: Launcher, sockets: Sockets
) -> None:
    server, metrics = sockets.listen(socket.AF_INET6, "::"), sockets.listen()
    other = sockets.listen()
    launch.start(
        [server, metrics, other],
        *("--max-connections-per-source", "2"),
        names=["echo", "metrics", "other"],
    )
    hosts = ("127.0.0.1", "::1")
    held = {host: [sockets.connect(server, host=host) for _ in range(2)] for host in hosts}
    for clients in held.values():
        for client in clients:
            round_trip(client)
    for host in hosts:
        assert sockets.connect(server, host=host).recv(1) == b""
    assert sockets.connect(other).recv(1) == b"", "the same source, by another socket"
    round_trip(sockets.connect(server, host="127.0.0.1", source=("127.0.0.2", 0)))
    page = pages.scrape(metrics)
    assert page[("connections_refused_total", "echo", "source-limit")] == 2
    held["::1"][0].close()
    pages.until(metrics, {("connections", "echo"): 4})
    round_trip(sockets.connect(server, host="::1"))


def test_admission_out_of_descriptors_waits_without_spinning_and_recovers(
    launch: Launcher, sockets: Sockets
) -> None:
    server, udp = sockets.listen(), sockets.bind()
    appliance = launch.start([server, udp], "--max-connections", "0", most_files=40)
    clients = [sockets.connect(server) for _ in range(60)]
    for client in clients:
        client.sendall(b"x")
    eventually(lambda: "accepting pauses" in appliance.stderr, "its word")
    appliance.assert_sleeps(0.6)
    assert appliance.stderr.count("accepting pauses") == 1, "said once, not at each try"
    assert "LimitNOFILE=" in appliance.stderr
    round_trip(sockets.connect(udp))
    served = [client for client in clients if _has_come(client)]
    assert 20 < len(served) < 40
    waiting = [client for client in clients if client not in served]
    for client in served:
        client.close()
    for client in waiting:
        client.settimeout(10)
        assert client.recv(1) == b"x"


def test_admission_default_limit_leaves_descriptors_over(
    launch: Launcher, sockets: Sockets
) -> None:
    server, metrics = sockets.listen(), sockets.listen()
    appliance = launch.start([server, metrics], names=["echo", "metrics"], most_files=100)
    clients = [sockets.connect(server) for _ in range(80)]
    for client in clients:
        client.sendall(b"x")
    assert clients[0].recv(1) == b"x"
    page = pages.until(metrics, {("connections", "echo"): 100 - 64})
    assert ("connections_refused_total", "echo", "resources") not in page
    assert appliance.stderr == ""


# -- idle connections --------------------------------------------------------


def test_admission_idle_connection_is_ended_and_an_active_one_is_not(
    launch: Launcher, sockets: Sockets
) -> None:
    server, metrics = sockets.listen(), sockets.listen()
    launch.start([server, metrics], "--idle-timeout", "0.3", names=["echo", "metrics"])
    active, since = sockets.connect(server), time.monotonic()
    idle = sockets.connect(server)
    idle.setblocking(False)
    while not _ended(idle):
        round_trip(active)
        assert time.monotonic() < since + 10, "the idle one was not ended"
    assert 0.25 < time.monotonic() - since < 3
    round_trip(active)
    page = pages.scrape(metrics)
    assert page[("connections_ended_total", "echo", "idle-timeout")] == 1
    assert page[("connections", "echo")] == 1


def _ended(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


def test_admission_stalled_connection_is_reset_when_its_time_is_up(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--idle-timeout", "0.3")
    stalled = stall(sockets, server, appliance)
    poll = select.poll()
    poll.register(stalled, 0)  # for errors only: it takes nothing until the end
    assert poll.poll(DEADLINE * 1000)
    with pytest.raises(ConnectionResetError):  # its data is cut short, and it must know
        receive_to_end(stalled)


# -- idle exit ---------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_exit_idle_unused_process_ends_with_0(
    launch: Launcher, sockets: Sockets, workers: str
) -> None:
    started = time.monotonic()
    appliance = launch.start([sockets.listen()], "--exit-idle", "0.2", "--workers", workers)
    assert appliance.wait() == 0
    assert time.monotonic() - started >= 0.2
    assert appliance.notified.take()[-2:] == ["STOPPING=1", "STATUS=idle: finishing 0 connections"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_exit_idle_open_connection_keeps_the_process(
    launch: Launcher, sockets: Sockets, workers: str
) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--exit-idle", "0.2", "--workers", workers)
    client = sockets.connect(server)
    round_trip(client)
    appliance.assert_sleeps(0.5)
    assert "STOPPING=1" not in appliance.notified.take()
    round_trip(client)
    client.close()
    assert appliance.wait() == 0


def test_exit_idle_datagrams_keep_the_process(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.bind()
    appliance = launch.start([server], "--exit-idle", "0.3")
    client = sockets.connect(server)
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        round_trip(client)
    assert "STOPPING=1" not in appliance.notified.take()
    assert appliance.wait() == 0


def test_exit_idle_scrape_in_progress_is_answered(launch: Launcher, sockets: Sockets) -> None:
    server, metrics = sockets.listen(), sockets.listen()
    appliance = launch.start([server, metrics], "--exit-idle", "0.1", names=["echo", "metrics"])
    scraper = sockets.connect(metrics)
    scraper.sendall(b"GET /metrics HTTP/1.1\r\n")
    appliance.assert_sleeps()
    scraper.sendall(b"\r\n")
    assert receive_to_end(scraper).startswith(b"HTTP/1.1 200 OK")
    scraper.close()
    assert appliance.wait() == 0


class Supervisor(threading.Thread):
    """What systemd is to us: it holds the sockets, and starts us when one has something to read."""

    def __init__(self, launch: Launcher, server: socket.socket, *options: str) -> None:
        super().__init__()
        self._launch, self._server, self._options = launch, server, options
        self.statuses: list[int] = []
        self.over = False

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._server, select.POLLIN)
        while not self.over:
            if poll.poll(50):
                appliance: Server = self._launch.start(
                    [self._server], *self._options, ready=False, command=(*COMMAND, "echo")
                )
                self.statuses.append(appliance.wait())
                assert appliance.stderr == "", appliance.stderr
                self._launch.forget(appliance)


@pytest.mark.parametrize(
    ("kind", "workers", "clients"),
    [(socket.SOCK_STREAM, 1, 140), (socket.SOCK_DGRAM, 1, 60), (socket.SOCK_STREAM, 2, 40)],
    ids=["stream", "dgram", "workers"],
)
def test_exit_idle_raced_by_new_clients_loses_none(
    launch: Launcher, sockets: Sockets, kind: socket.SocketKind, workers: int, clients: int
) -> None:
    idle = 0.004
    server = sockets.listen() if kind == socket.SOCK_STREAM else sockets.bind()
    options = ("--exit-idle", str(idle), "--workers", str(workers))
    supervisor = Supervisor(launch, server, *options)
    supervisor.start()
    pauses = random.Random(1)  # noqa: S311 - the same race in every run
    try:
        for _ in range(clients):
            client = sockets.connect(server)
            round_trip(client, pattern(100))
            if kind == socket.SOCK_STREAM and pauses.random() < 0.3:
                reset(client)
            client.close()
            # A client at every moment around the exit: that is what the test is.
            threading.Event().wait(pauses.uniform(0.7, 1.5) * idle)
    finally:
        supervisor.over = True
        supervisor.join()
    assert set(supervisor.statuses) == {0}
    assert clients / 10 < len(supervisor.statuses) <= clients, "exits and clients must meet"
