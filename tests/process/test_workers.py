"""Several processes on the same sockets: served, counted, replaced and ended as one."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from tests.process import pages
from tests.process.launcher import (
    Launcher,
    Server,
    assert_sleeps,
    eventually,
    freeze,
    frozen,
    in_session,
    stat_fields,
)
from tests.process.peers import Sockets, exchange, pattern, receive, round_trip


def _connect_to(sockets: Sockets, server: socket.socket, appliance: Server, worker: int) -> (
    socket.socket
):  # fmt: skip
    """Return a client that this worker serves: the others stand still while it is accepted."""
    others = [pid for pid in appliance.workers if pid != worker]
    for pid in others:
        freeze(pid)
    client = sockets.connect(server)
    round_trip(client)
    for pid in others:
        os.kill(pid, signal.SIGCONT)
    return client


def _open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_workers_share_all_sockets(launch: Launcher, sockets: Sockets) -> None:
    server, udp = sockets.listen(), sockets.bind()
    packets = sockets.listen(socket.AF_UNIX, kind=socket.SOCK_SEQPACKET)
    appliance = launch.start([server, udp, packets], "--workers", "3")
    assert len(appliance.workers) == 3
    for worker in appliance.workers:
        round_trip(_connect_to(sockets, server, appliance, worker), pattern(100_000))
        for one in (udp, packets):
            round_trip(_connect_to(sockets, one, appliance, worker))
    assert appliance.notified.take()[0] == "READY=1"
    assert appliance.notified.take().count("READY=1") == 1


def test_workers_clients_are_spread_and_each_is_served_whole(
    launch: Launcher, sockets: Sockets, payload: bytes
) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--workers", "2")
    parts = [payload[n << 21 : (n + 1) << 21] for n in range(16)]
    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(
            lambda part: exchange(sockets.connect(server), part, eager=True), parts
        )
        assert list(answers) == parts
    assert len(appliance.workers) == 2


def test_workers_metrics_are_the_sum(launch: Launcher, sockets: Sockets) -> None:
    server, udp, metrics = sockets.listen(), sockets.bind(), sockets.listen()
    appliance = launch.start(
        [server, udp, metrics], "--workers", "2", names=["tcp", "udp", "metrics"]
    )
    for worker in appliance.workers:
        client = _connect_to(sockets, server, appliance, worker)
        round_trip(client, pattern(1000))
        round_trip(_connect_to(sockets, udp, appliance, worker), pattern(10))
    pages.until(
        metrics,
        {
            ("connections_total", "tcp"): 2,
            ("connections", "tcp"): 2,
            ("received_octets_total", "tcp"): 2 * (1000 + len(b"hello")),
            ("sent_octets_total", "tcp"): 2 * (1000 + len(b"hello")),
            ("received_datagrams_total", "udp"): 4,
        },
    )
    eventually(
        lambda: any("2 connections open, 2 taken" in s for s in appliance.notified.take()),
        "a STATUS of all workers",
    )


def test_workers_limit_holds_for_all_together(launch: Launcher, sockets: Sockets) -> None:
    limit = 3  # which two workers cannot share evenly
    server, metrics = sockets.listen(), sockets.listen()
    appliance = launch.start(
        [server, metrics],
        *("--workers", "2", "--max-connections", str(limit)),
        names=["echo", "metrics"],
    )
    clients = [sockets.connect(server) for _ in range(8)]
    for client in clients:
        client.sendall(b"x")
    pages.until(metrics, {("connections", "echo"): limit})
    for pid in (appliance.pid, *appliance.workers):
        assert_sleeps(pid, 0.2)
    assert pages.scrape(metrics)[("connections", "echo")] == limit
    assert sum(bool(select.select([client], [], [], 0)[0]) for client in clients) == limit


def test_workers_one_that_is_killed_is_replaced(launch: Launcher, sockets: Sockets) -> None:
    server, metrics = sockets.listen(), sockets.listen()
    appliance = launch.start([server, metrics], "--workers", "2", names=["echo", "metrics"])
    first, second = appliance.workers
    lost = _connect_to(sockets, server, appliance, first)
    kept = _connect_to(sockets, server, appliance, second)
    pages.until(metrics, {("connections", "echo"): 2})
    os.kill(first, signal.SIGKILL)
    assert lost.recv(1) == b""
    round_trip(kept)
    eventually(lambda: len(set(appliance.workers) - {first}) == 2, "another")
    assert f"worker {first} ended by signal 9; starting another" in appliance.stderr
    [third] = [pid for pid in appliance.workers if pid != second]
    round_trip(_connect_to(sockets, server, appliance, third))
    # What the dead one had counted still counts; what it had open does not.
    pages.until(metrics, {("connections_total", "echo"): 3, ("connections", "echo"): 2})


def test_workers_one_that_cannot_be_replaced_yet_is_replaced_later(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--workers", "2")
    first, second = appliance.workers
    usual = resource.prlimit(appliance.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(appliance.pid, resource.RLIMIT_NOFILE, (3, usual[1]))  # no link can be made
    os.kill(first, signal.SIGKILL)
    eventually(lambda: "cannot be started: Too many open files" in appliance.stderr, "a failure")
    round_trip(_connect_to(sockets, server, appliance, second))
    resource.prlimit(appliance.pid, resource.RLIMIT_NOFILE, usual)
    eventually(lambda: len(appliance.workers) == 2, "another worker")
    round_trip(_connect_to(sockets, server, appliance, appliance.workers[1]))


def test_workers_that_are_killed_again_and_again_leak_nothing(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--workers", "2")
    before = appliance.descriptors
    worker_before = max(map(_open_files, appliance.workers))
    for _ in range(2):
        victims = appliance.workers
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        eventually(
            lambda: len(appliance.workers) == 2 and not set(victims) & set(appliance.workers),  # noqa: B023
            "two others",
        )
    for worker in appliance.workers:
        round_trip(_connect_to(sockets, server, appliance, worker))
    eventually(lambda: appliance.descriptors <= before, lambda: f"{before} descriptors again")
    assert max(map(_open_files, appliance.workers)) <= worker_before + 1  # and a connection


def test_workers_drain_loses_no_octet(launch: Launcher, sockets: Sockets, payload: bytes) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--workers", "2", "--drain", "60")
    clients = [_connect_to(sockets, server, appliance, w) for w in appliance.workers * 2]
    parts = [payload[n << 22 : (n + 1) << 22] for n in range(4)]
    with ThreadPoolExecutor(len(clients)) as threads:
        answers = [
            threads.submit(exchange, client, part, eager=True)
            for client, part in zip(clients, parts, strict=True)
        ]
        appliance.signal()
        appliance.notified.wait("STOPPING=1")
        assert [answer.result() for answer in answers] == parts
    assert appliance.wait() == 0
    assert appliance.stderr == ""


def test_workers_drain_that_takes_too_long_is_cut(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--workers", "2", "--drain", "0.2")
    client = sockets.connect(server)
    round_trip(client)
    appliance.signal()
    assert appliance.wait(5) == 0
    assert client.recv(1) == b""


def test_workers_one_that_hangs_does_not_outlive_the_drain(
    launch: Launcher, sockets: Sockets
) -> None:
    appliance = launch.start([sockets.listen()], "--workers", "2", "--drain", "0.2")
    freeze(appliance.workers[0])
    appliance.signal()
    assert appliance.wait(5) == 0


def test_workers_second_signal_ends_all_at_once(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--workers", "2", "--drain", "60")
    client = sockets.connect(server)
    round_trip(client)
    appliance.signal()
    appliance.notified.wait("STOPPING=1")
    round_trip(client)
    appliance.signal()
    assert appliance.wait(5) == 128 + signal.SIGTERM
    assert client.recv(1) == b"", "the worker must go with its supervisor"
    eventually(lambda: not in_session(appliance.pid), "the end of the workers")


def test_workers_all_are_signalled_together_as_systemd_does(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--workers", "2", "--drain", "60")
    client = sockets.connect(server)
    round_trip(client)
    # KillMode=control-group: workers may hear it before their supervisor does.
    with frozen(appliance.pid):
        workers = appliance.workers
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(AssertionError):  # those who end at it have ended then
            eventually(lambda: any(stat_fields(pid)[0] == "Z" for pid in workers), "", 0.5)
        appliance.signal()
    appliance.notified.wait("STOPPING=1")
    round_trip(client)
    client.close()
    assert appliance.wait() == 0
    assert appliance.stderr == "", "no worker died, so none is to be replaced"


def test_workers_end_with_a_supervisor_that_is_killed(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--workers", "2")
    client = sockets.connect(server)
    round_trip(client)
    appliance.signal(signal.SIGKILL)
    assert appliance.wait() == -signal.SIGKILL
    eventually(lambda: not in_session(appliance.pid), "the end of the workers", 5)


def test_workers_end_with_a_killed_supervisor_also_when_one_was_replaced(
    launch: Launcher, sockets: Sockets
) -> None:
    appliance = launch.start([sockets.listen()], "--workers", "2")
    victim = appliance.workers[0]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: len(set(appliance.workers) - {victim}) == 2, "another")
    appliance.signal(signal.SIGKILL)
    eventually(lambda: not in_session(appliance.pid), "the end of the workers", 5)


def test_workers_watchdog_is_fed_while_all_of_them_turn(launch: Launcher, sockets: Sockets) -> None:
    # systemd sets both: the watchdog is the supervisor's, and the workers must report to it.
    changed: dict[str, str | None] = {"WATCHDOG_USEC": "200000", "WATCHDOG_PID": "$PID"}
    appliance = launch.start([sockets.listen()], "--workers", "2", environment=changed)

    def fed(times: int) -> bool:
        return appliance.notified.take().count("WATCHDOG=1") >= times

    eventually(lambda: fed(8), "eight times", 5)
    assert "does not answer" not in appliance.stderr
    freeze(appliance.workers[0])
    eventually(lambda: "a worker does not answer" in appliance.stderr, "its word")
    before = appliance.notified.take().count("WATCHDOG=1")
    appliance.assert_sleeps(0.3)
    assert appliance.notified.take().count("WATCHDOG=1") == before
    os.kill(appliance.workers[0], signal.SIGCONT)
    eventually(lambda: fed(before + 2), "to be fed again")


def test_workers_idle_exit_waits_for_the_connection_of_each(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--workers", "2", "--exit-idle", "0.3", "--drain", "0.1")
    first, second = appliance.workers
    held = _connect_to(sockets, server, appliance, first)
    # The second goes idle and says so; then it gets a connection; then the first goes idle.
    appliance.assert_sleeps(0.5)
    late = _connect_to(sockets, server, appliance, second)
    held.close()
    appliance.assert_sleeps(0.7)
    assert not appliance.exited, "a connection is open"
    round_trip(late)
    late.close()
    assert appliance.wait() == 0


def test_workers_start_sleep_comes_before_all(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    started = time.monotonic()
    appliance = launch.start([server], "--workers", "2", "--start-sleep", "0.3", ready=False)
    client = sockets.connect(server)
    client.sendall(b"early")
    assert receive(client, 5) == b"early"
    assert 0.3 <= time.monotonic() - started < 3
    appliance.notified.wait("READY=1")
    assert len(appliance.workers) == 2
