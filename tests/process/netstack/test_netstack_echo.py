"""The kernel speaks to our stack: ARP, ND, ICMP, UDP, TCP."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.launcher import eventually
from tests.process.netstack.net import (
    DISCARD,
    OURS,
    OURS6,
    PORT,
    Net,
    connect,
    echo,
    ip,
    metrics,
)
from tests.process.peers import pattern
from tests.process.programs import find, free_port, iperf3_server, running, wait_for

BOTH = pytest.mark.parametrize("address", [OURS, OURS6])
DEVICES = pytest.mark.parametrize("vnet", [True, False], ids=["offload", "software"])


@BOTH
@pytest.mark.parametrize("size", [0, 56, 1472, 20_000, 65_000])
def test_ping_from_the_kernel_is_answered(net: Net, address: str, size: int) -> None:
    net.serve(net.tap())
    command = [find("ping", "iputils-ping"), "-c", "3", "-i", "0.05", "-W", "5"]
    done = subprocess.run([*command, "-s", str(size), address], capture_output=True, text=True)
    assert "3 received, 0% packet loss" in done.stdout, done.stdout


@BOTH
@DEVICES
@pytest.mark.parametrize("size", [0, 1, 1_448, 1_449, 20_480, 1_000_001])
def test_tcp_octets_from_the_kernel_come_back_whole(
    net: Net, address: str, vnet: bool, size: int
) -> None:
    net.serve(net.tap(vnet=vnet))
    data = pattern(size)
    with connect(PORT, address) as sock:
        assert echo(data, sock) == data


@BOTH
@pytest.mark.parametrize("size", [0, 1, 1_472, 1_473, 9_000, 65_000])
def test_udp_datagram_from_the_kernel_comes_back_whole(net: Net, address: str, size: int) -> None:
    net.serve(net.tap())
    data = pattern(size)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.connect((address, PORT))
        sock.send(data)
        assert sock.recv(65535) == data


@BOTH
def test_closed_port_refuses_at_once(net: Net, address: str) -> None:
    net.serve(net.tap())
    with pytest.raises(ConnectionRefusedError):
        connect(4321, address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.connect((address, 4321))
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):  # ICMP port unreachable, as the kernel tells it
            sock.recv(1)


def test_discard_takes_all_and_sends_nothing(net: Net) -> None:
    net.serve(net.tap())
    with connect(DISCARD) as sock:
        assert echo(pattern(5_000_000), sock) == b""


def test_bulk_is_taken_into_memory_that_was_used_before(net: Net) -> None:
    server = net.serve(net.tap())
    with connect(DISCARD) as sock:
        assert echo(bytes(4 << 20), sock) == b""
    before = _page_faults(server.pid)
    with connect(DISCARD) as sock:
        assert echo(bytes(32 << 20), sock) == b""
    # 8,192 pages were taken in; the 256 that a window has would do.
    assert _page_faults(server.pid) - before < 1024


def _page_faults(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7])


@pytest.mark.parametrize("mtu", [1280, 1500, 9000, 65521])
def test_mtu_of_the_link_is_kept(net: Net, mtu: int) -> None:
    net.serve(net.tap(mtu=mtu), "--mtu", str(mtu))
    data = pattern(300_000)
    for address in (OURS, OURS6):
        with connect(PORT, address) as sock:
            assert echo(data, sock) == data


def test_three_connections_at_once_do_not_mix(net: Net) -> None:
    net.serve(net.tap())
    results: dict[int, bool] = {}
    payloads = {number: pattern(3_000_000 + number)[number:] for number in range(3)}
    socks = {number: connect() for number in payloads}

    def run(number: int) -> None:
        results[number] = echo(payloads[number], socks[number]) == payloads[number]

    threads = [threading.Thread(target=run, args=(number,)) for number in payloads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for sock in socks.values():
        sock.close()
    assert results == dict.fromkeys(payloads, True)


def test_connection_that_is_reset_ends_alone(net: Net) -> None:
    page = net.page()
    net.serve(net.tap(), passed=[("metrics", page)])
    with connect() as other:
        rude = connect()
        rude.send(b"x")
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        rude.close()
        eventually(
            lambda: metrics(page.getsockname()).get("connections_ended_total:reset"), "the reset"
        )
        assert echo(b"still here", other) == b"still here"


# -- life --------------------------------------------------------------------


def test_serve_is_ready_reports_and_drains(net: Net) -> None:
    server = net.serve(net.tap(), "--drain", "20", environment={"WATCHDOG_USEC": "200000"})
    server.notified.wait("WATCHDOG=1")
    with connect() as sock:
        sock.send(b"before")
        assert sock.recv(6) == b"before"
        server.signal(signal.SIGTERM)
        server.notified.wait("STOPPING=1")
        with pytest.raises(ConnectionRefusedError):
            connect()
        assert echo(b"after", sock) == b"after"
    assert server.wait() == 0


def test_serve_idle_costs_no_processor_time(net: Net) -> None:
    server = net.serve(net.tap())
    with connect() as sock:
        sock.send(b"x")
        assert sock.recv(1) == b"x"
        server.assert_sleeps(1.0)


def test_serve_exit_idle_ends(net: Net) -> None:
    server = net.serve(net.tap(), "--exit-idle", "0.3")
    with connect() as sock:
        assert echo(b"once", sock) == b"once"
    assert server.wait() == 0


def test_serve_idle_timeout_resets(net: Net) -> None:
    net.serve(net.tap(), "--idle-timeout", "0.2")
    with connect() as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)


def test_max_connections_resets_the_next(net: Net) -> None:
    net.serve(net.tap(), "--max-connections", "2")
    with connect() as one, connect() as two:
        for sock in (one, two):
            sock.send(b"x")
            assert sock.recv(1) == b"x"
        with pytest.raises(ConnectionResetError), connect() as third:
            third.recv(1)
    eventually(_echoes, "room again")


def _echoes() -> bool:
    try:
        with connect() as sock:
            return echo(b"y", sock) == b"y"
    except ConnectionResetError:
        return False


def test_tap_that_is_deleted_ends_the_service(net: Net) -> None:
    server = net.serve(net.tap())
    ip("link", "delete", "tap0")
    assert server.wait() == 1
    assert "no more frames" in server.stderr


def test_descriptors_none_is_left_after_connections(net: Net) -> None:
    server = net.serve(net.tap())
    with connect() as sock:  # what its start has open for a moment is closed by now
        assert echo(b"x", sock) == b"x"
    before = server.descriptors
    for _ in range(20):
        with connect() as sock:
            assert echo(b"x" * 5_000, sock) == b"x" * 5_000
    assert server.descriptors == before


def test_unattached_descriptor_attaches_to_a_persistent_tap(net: Net) -> None:
    net.persistent_tap()
    with open("/dev/net/tun", "r+b", buffering=0) as tun:
        net.serve(tun.fileno(), "--tap", "tap0")
    with connect() as sock:
        assert echo(b"attached", sock) == b"attached"


# -- relay -------------------------------------------------------------------


def test_relay_moves_a_web_page(net: Net, tmp_path: Path) -> None:
    page = tmp_path / "page"
    page.write_bytes(pattern(3_000_000))
    curl = find("curl", "curl")
    with web_server(tmp_path) as port:
        net.serve(net.tap(), ports=[f"80=tcp:127.0.0.1:{port}"])
        command = [curl, "--silent", "--show-error", "--max-time", "30", f"http://{OURS}/page"]
        done = subprocess.run(command, capture_output=True)
    assert done.stdout == page.read_bytes(), done.stderr


@contextlib.contextmanager
def web_server(directory: Path) -> Iterator[int]:
    """Serve the files of a directory; give the port."""
    log = directory / "web.log"
    port = free_port()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory"]
    with running([*command, str(directory), str(port)], log):
        wait_for(("127.0.0.1", port), log)
        yield port


@pytest.mark.parametrize("direction", [(), ("-R",), ("--bidir",)], ids=["to", "from", "both"])
def test_relay_bulk_by_iperf3(net: Net, tmp_path: Path, direction: tuple[str, ...]) -> None:
    iperf3, port = find("iperf3", "iperf3"), free_port()
    net.serve(net.tap(), ports=[f"{port}=tcp:127.0.0.1:{port}"])
    with iperf3_server(tmp_path, port):
        command = [iperf3, "-c", OURS, "-p", str(port), "-n", "20M", "-P", "2", *direction]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_relay_to_nobody_resets(net: Net) -> None:
    net.serve(net.tap(), ports=["80=unix:/nonexistent/socket"])
    with pytest.raises(ConnectionResetError), connect(80) as sock:
        sock.recv(1)


def test_relay_half_close_reaches_the_target_and_the_reply_comes_back(net: Net) -> None:
    answer = pattern(2_000_000)
    with socket.create_server(("127.0.0.1", 0)) as target:
        net.serve(net.tap(), ports=[f"80=tcp:127.0.0.1:{target.getsockname()[1]}"])
        with connect(80) as client:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            served, _ = target.accept()
            with served:
                served.settimeout(20)
                assert served.makefile("rb").read() == b"question"
                served.sendall(answer)
                served.shutdown(socket.SHUT_WR)
                assert client.makefile("rb").read() == answer
