"""From READY=1 to the last octet: what the service manager hears, and what a signal does."""

from __future__ import annotations

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.process import pages
from tests.process.launcher import COMMAND, Launcher, Server, eventually
from tests.process.peers import (
    Sockets,
    assert_silent,
    exchange,
    pattern,
    receive,
    receive_to_end,
    reset,
    round_trip,
    stall,
)

# -- what the service manager is told ----------------------------------------


def test_life_ready_comes_once_with_what_is_served(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    appliance = launch.start([server], names=["demo"])
    host, port = server.getsockname()
    assert appliance.notified.take() == [
        "READY=1",
        f"STATUS=serving demo (inet stream {host}:{port})",
    ]
    assert appliance.stderr == ""


def test_life_path_with_a_line_feed_stays_in_its_line(launch: Launcher, sockets: Sockets) -> None:
    path = sockets.path() + "\nSTOPPING=1"
    appliance = launch.start([sockets.listen(socket.AF_UNIX, path)])
    assert len(appliance.notified.take()) == 2, "READY=1 and STATUS=, no more"


def test_life_status_says_what_was_done(launch: Launcher, sockets: Sockets) -> None:
    server, udp = sockets.listen(), sockets.bind()
    appliance = launch.start([server, udp], names=["tcp", "udp"])
    round_trip(sockets.connect(server), b"12345")
    for _ in range(3):
        round_trip(sockets.connect(udp), b"123")
    wanted = "; 1 connections open, 1 taken, 3 datagrams, 14 octets received"
    eventually(lambda: any(s.endswith(wanted) for s in appliance.notified.take()), wanted)


def test_life_stopping_is_told_with_the_reason(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    appliance = launch.start([server])
    client = sockets.connect(server)
    round_trip(client)
    appliance.signal()
    appliance.notified.wait("STOPPING=1")
    assert appliance.notified.take()[-1] == "STATUS=SIGTERM: finishing 1 connections"
    client.close()
    assert appliance.wait() == 0


def test_life_no_service_manager_is_no_trouble(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    appliance = launch.start([server], ready=False, environment={"NOTIFY_SOCKET": None})
    client = sockets.connect(server)
    round_trip(client)
    client.close()
    assert appliance.stop() == 0
    assert appliance.stderr == ""


def test_life_service_manager_that_is_gone_is_told_and_survived(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen()
    changed: dict[str, str | None] = {"NOTIFY_SOCKET": sockets.path()}
    appliance = launch.start([server], ready=False, environment=changed)
    client = sockets.connect(server)
    round_trip(client)
    client.close()
    assert "cannot notify the service manager" in appliance.stderr
    assert appliance.stop() == 0


def test_life_watchdog_is_fed_at_half_its_time(launch: Launcher, sockets: Sockets) -> None:
    changed: dict[str, str | None] = {"WATCHDOG_USEC": "200000", "WATCHDOG_PID": "$PID"}
    appliance = launch.start([sockets.listen()], environment=changed)

    def fed() -> list[float]:
        appliance.notified.take()
        times = appliance.notified.times("WATCHDOG=1")
        return times if len(times) >= 6 else []

    times = eventually(fed, "six times")
    assert 0.09 < (times[5] - times[0]) / 5 < 0.15


def test_life_service_manager_that_does_not_read_stops_nobody(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen()
    appliance = launch.start([server], environment={"WATCHDOG_USEC": "20000"})
    another = sockets.keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    another.connect("\0" + appliance.notified.address[1:])
    another.setblocking(False)

    def full() -> bool:
        try:
            another.send(b"X=1")
        except BlockingIOError:
            return True
        return False

    eventually(full, "a full queue")
    client = sockets.connect(server)
    for _ in range(50):
        round_trip(client)


def test_life_watchdog_is_not_fed_by_a_process_that_stands(
    launch: Launcher, sockets: Sockets
) -> None:
    changed: dict[str, str | None] = {"WATCHDOG_USEC": "100000"}
    appliance = launch.start([sockets.listen()], environment=changed)
    appliance.notified.wait("WATCHDOG=1")
    appliance.freeze()
    fed = appliance.notified.take().count("WATCHDOG=1")
    appliance.assert_sleeps(0.3)
    assert appliance.notified.take().count("WATCHDOG=1") == fed
    appliance.thaw()


@pytest.mark.parametrize(
    "changed",
    [{"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}, {"WATCHDOG_PID": "$PID"}],
    ids=["of-another-process", "without-a-time"],
)
def test_life_watchdog_that_is_not_ours_is_not_fed(
    launch: Launcher, sockets: Sockets, changed: dict[str, str | None]
) -> None:
    appliance = launch.start([sockets.listen()], environment=changed)
    appliance.assert_sleeps(0.2)
    assert "WATCHDOG=1" not in appliance.notified.take()


def test_life_watchdog_time_that_is_nonsense_is_told(launch: Launcher, sockets: Sockets) -> None:
    appliance = launch.start([sockets.listen()], environment={"WATCHDOG_USEC": "soon"})
    eventually(lambda: "WATCHDOG_USEC='soon' is not a number" in appliance.stderr, "its word")
    assert appliance.stop() == 0


# -- signals -----------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_life_signal_when_nothing_is_open_ends_at_once(
    launch: Launcher, sockets: Sockets, number: signal.Signals
) -> None:
    appliance = launch.start([sockets.listen(), sockets.bind()], "--drain", "60")
    appliance.signal(number)
    assert appliance.wait(5) == 0
    assert appliance.stderr == ""


def test_life_sigterm_under_load_loses_no_octet(
    launch: Launcher, sockets: Sockets, payload: bytes
) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--drain", "60")
    clients = [sockets.connect(server) for _ in range(8)]
    parts = [payload[n << 23 : (n + 1) << 23] for n in range(8)]
    for client, part in zip(clients, parts, strict=True):
        round_trip(client, part[:1000])  # accepted for sure
    with ThreadPoolExecutor(len(clients)) as threads:
        answers = [
            threads.submit(exchange, client, part, eager=number % 2 == 0)
            for number, (client, part) in enumerate(zip(clients, parts, strict=True))
        ]
        appliance.signal()
        appliance.notified.wait("STOPPING=1")
        assert [answer.result() for answer in answers] == parts
    assert appliance.wait() == 0


def test_life_sigterm_leaves_new_clients_to_the_next_process(
    launch: Launcher, sockets: Sockets
) -> None:
    server, udp = sockets.listen(), sockets.bind()
    first = launch.start([server, udp])
    held = sockets.connect(server)
    round_trip(held)
    first.signal()
    first.notified.wait("STOPPING=1")
    late, datagram = sockets.connect(server), sockets.connect(udp)
    late.sendall(b"next")
    datagram.send(b"next")
    for _ in range(3):
        round_trip(held)  # still served, by the first; which turns, and takes nothing new
    for client in (late, datagram):
        assert_silent(client)
    second = launch.start([server, udp])
    assert (receive(late, 4), datagram.recv(4)) == (b"next", b"next")
    for client in (held, late):
        client.close()
    assert (first.wait(), second.stop()) == (0, 0)


def test_life_drain_that_takes_too_long_ends_by_reset(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--drain", "0.3")
    idle = sockets.connect(server)
    round_trip(idle)
    stalled = stall(sockets, server, appliance)
    started = time.monotonic()
    appliance.signal()
    assert appliance.wait() == 0
    assert time.monotonic() - started >= 0.3
    # Some of the answer is lost: better an error than a stream that ends early and looks whole.
    with pytest.raises(ConnectionResetError):
        receive_to_end(stalled)
    assert idle.recv(1) == b"", "nothing was owed here, so it ends in order"


def test_life_drain_of_0_waits_for_nobody(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--drain", "0")
    client = sockets.connect(server)
    round_trip(client)
    appliance.signal()
    assert appliance.wait(5) == 0


def test_life_second_signal_ends_at_once(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    appliance = launch.start([server], "--drain", "60")
    client = sockets.connect(server)
    round_trip(client)
    appliance.signal(signal.SIGTERM)
    appliance.notified.wait("STOPPING=1")
    round_trip(client)
    appliance.signal(signal.SIGINT)
    assert appliance.wait(5) == 128 + signal.SIGINT


def test_life_start_sleep_lets_clients_wait_and_then_serves(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen()
    started = time.monotonic()
    appliance = launch.start([server], "--start-sleep", "0.4", ready=False)
    client = sockets.connect(server)
    client.sendall(b"early")
    assert receive(client, 5) == b"early"
    assert time.monotonic() - started >= 0.4
    appliance.notified.wait("READY=1")


def test_life_sigterm_during_start_sleep_ends_at_once(launch: Launcher, sockets: Sockets) -> None:
    appliance = launch.start([sockets.listen()], "--start-sleep", "60", ready=False)
    eventually(lambda: _catches(appliance, signal.SIGTERM), "its signal handler")
    assert appliance.stop() == 0
    assert not [line for line in appliance.notified.take() if line.startswith("READY")]


def _catches(appliance: Server, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    with open(f"/proc/{appliance.pid}/status") as status:
        [mask] = [line.split()[1] for line in status if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


# -- debug -------------------------------------------------------------------


def test_life_debug_says_octets_and_names(launch: Launcher, sockets: Sockets) -> None:
    servers = [sockets.listen(), sockets.bind(), sockets.bind(socket.AF_UNIX)]
    packets = sockets.listen(socket.AF_UNIX, kind=socket.SOCK_SEQPACKET)
    names = ["tcp", "udp", "unix-datagrams", "packets"]
    appliance = launch.start([*servers, packets], "--debug", names=names)
    for size, server in enumerate((*servers, packets), 100):
        round_trip(sockets.connect(server), pattern(size))
    for size, name in enumerate(names, 100):
        for words in (f"received {size} octets", f"sent {size} octets"):
            eventually(partial(_said, appliance, words, f"'{name}'"), f"{words} on {name}")


def _said(appliance: Server, *words: str) -> bool:
    """Whether a line of its log holds all of these."""
    return any(all(word in line for word in words) for line in appliance.stderr.splitlines())


def test_life_without_debug_nothing_is_said(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    appliance = launch.start([server])
    for _ in range(10):
        client = sockets.connect(server)
        round_trip(client)
        reset(client)
    assert appliance.stop() == 0
    assert appliance.stderr == ""


def test_life_log_that_takes_nothing_is_no_reason_to_end(
    launch: Launcher, sockets: Sockets
) -> None:
    server = sockets.listen()
    into_the_full = ("/bin/sh", "-c", 'exec "$@" 2>/dev/full', "sh", *COMMAND, "echo")
    appliance = launch.start([server], "--debug", command=into_the_full)
    for _ in range(200):
        client = sockets.connect(server)
        round_trip(client)
        client.close()
    assert appliance.stop() == 0


# -- descriptors -------------------------------------------------------------


def test_life_descriptors_do_not_leak(launch: Launcher, sockets: Sockets, payload: bytes) -> None:
    server, udp = sockets.listen(), sockets.bind()
    packets = sockets.listen(socket.AF_UNIX, kind=socket.SOCK_SEQPACKET)
    metrics = sockets.listen()
    appliance = launch.start(
        [server, udp, packets, metrics],
        "--max-connections-per-source",
        "20",
        names=["tcp", "udp", "packets", "metrics"],
    )
    round_trip(sockets.connect(udp))
    before = appliance.descriptors
    for turn in range(60):
        held = [sockets.connect(server) for _ in range(8)]
        message = sockets.connect(packets)
        for client in (*held, message):
            round_trip(client)
        held[0].sendall(payload[: 1 << 16])
        for client in held[:4]:
            reset(client)
        held[4].shutdown(socket.SHUT_WR)
        for client in (*held[4:], message):
            client.close()
        round_trip(sockets.connect(udp))
        if turn % 10 == 0:
            pages.scrape(metrics)
            pages.ask(metrics, b"rubbish\r\n\r\n")
    held = [sockets.connect(server) for _ in range(20)]
    for client in held:
        round_trip(client)
    for _ in range(10):
        assert sockets.connect(server).recv(1) == b"", "its source has its share"
    for client in held:
        client.close()
    eventually(lambda: appliance.descriptors == before, lambda: f"{before} descriptors again")


def test_life_descriptors_that_clients_send_are_not_taken(
    launch: Launcher, sockets: Sockets
) -> None:
    stream = sockets.listen(socket.AF_UNIX)
    packets = sockets.listen(socket.AF_UNIX, kind=socket.SOCK_SEQPACKET)
    datagrams = sockets.bind(socket.AF_UNIX)
    appliance = launch.start([stream, packets, datagrams])
    clients = [sockets.connect(server) for server in (stream, packets, datagrams)]
    for client in clients:
        round_trip(client)
    before = appliance.descriptors
    for client in clients:
        for _ in range(50):
            socket.send_fds(client, [b"gift"], [0, 1, 2])
            assert client.recv(100) == b"gift"
    eventually(lambda: appliance.descriptors == before, lambda: f"{before} descriptors again")
