"""Our stack speaks to the kernel: ping, connect, dump; packet sockets; what cannot work."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.launcher import eventually, in_session
from tests.process.netstack.net import (
    ADDRESSES,
    KERNEL,
    KERNEL6,
    NETSTACK,
    OURS,
    OURS6,
    PORT,
    Net,
    connect,
    echo,
    ip,
)
from tests.process.peers import pattern
from tests.process.programs import find, running

TAP = ("--device", "tap:tap0", *ADDRESSES)
WALK_THROUGH = 20_480  # octets each way, as in Gotcp's tutorial


@pytest.fixture
def tap(net: Net) -> Net:
    net.persistent_tap()
    return net


@contextlib.contextmanager
def kernel_echo(address: str = KERNEL) -> Iterator[int]:
    """An echo server of the kernel's, for one connection; give its port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, 0), family=family)

    def serve() -> None:
        with contextlib.suppress(OSError):
            client, _ = server.accept()
            with client:
                while octets := client.recv(65536):
                    client.sendall(octets)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(20)


# -- ping --------------------------------------------------------------------


@pytest.mark.parametrize(("peer", "size"), [(KERNEL, 56), (KERNEL6, 56), (KERNEL, 30_000)])
def test_ping_of_the_kernel_shows_a_line_for_each_reply(tap: Net, peer: str, size: int) -> None:
    done = tap.run("ping", *TAP, "--count", "3", "--interval", "0.05", "--size", str(size), peer)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for number in range(3):
        expected = rf"{size + 8} octets from {peer}: icmp_seq={number} ttl=64 time=\d+\.\d\d\d ms"
        assert re.fullmatch(expected, lines[number])
    assert lines[3] == "3 sent, 3 received, 0 % lost"


def test_ping_of_nobody_tells_so(tap: Net) -> None:
    words = ("--count", "2", "--interval", "0.05", "--timeout", "0.3")
    done = tap.run("ping", *TAP, *words, "192.0.2.77")
    assert (done.returncode, done.stdout) == (1, "2 sent, 0 received, 100 % lost\n")


def test_ping_until_a_signal_ends_with_a_summary(tap: Net) -> None:
    command = [*NETSTACK, "ping", *TAP, "--interval", "0.05", KERNEL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "icmp_seq=0" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert " 0 % lost" in process.stdout.read()
    assert process.returncode == 0


# -- connect -----------------------------------------------------------------


@pytest.mark.parametrize("peer", [KERNEL, KERNEL6])
@pytest.mark.parametrize("size", [0, WALK_THROUGH, 3_000_000])
def test_connect_sends_a_file_and_shows_what_comes_back(
    tap: Net, tmp_path: Path, peer: str, size: int
) -> None:
    file = tmp_path / "data"
    file.write_bytes(pattern(size))
    with kernel_echo(peer) as port:
        to = f"[{peer}]:{port}" if ":" in peer else f"{peer}:{port}"
        command = [*NETSTACK, "connect", *TAP, "--trace", "--send", str(file), to]
        done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.stdout == file.read_bytes()
    states = re.findall(r"\[([A-Z0-9-]+)\]", done.stderr.decode())
    assert states[:2] == ["SYN-SENT", "ESTABLISHED"]
    assert "FIN-WAIT-1" in states or "CLOSE-WAIT" in states
    assert done.returncode == 0


def test_connect_reads_into_memory_that_was_used_before(tap: Net, tmp_path: Path) -> None:
    file = tmp_path / "data"
    faults = []
    for size in (0, 32 << 20):
        file.write_bytes(bytes(size))
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        with kernel_echo() as port:
            command = [*NETSTACK, "connect", *TAP, "--send", str(file), f"{KERNEL}:{port}"]
            subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=True)
        faults.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before)
    # 8,192 pages went each way; the 512 that two windows have would do.
    assert faults[1] - faults[0] < 2048


def test_connect_moves_standard_input_as_it_comes(tap: Net) -> None:
    with kernel_echo() as port:
        command = [*NETSTACK, "connect", *TAP, f"{KERNEL}:{port}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for word in (b"first\n", b"second\n"):
                process.stdin.write(word)
                process.stdin.flush()
                assert process.stdout.readline() == word
            process.stdin.close()
            assert process.stdout.read() == b""
    assert process.returncode == 0


def test_serve_walk_through_of_the_tutorial(net: Net) -> None:
    server = net.serve(net.tap(), "--trace")
    data = pattern(WALK_THROUGH)
    with connect() as sock:
        assert echo(data, sock) == data
    eventually(lambda: server.stderr.count("[CLOSED]") == 1, "the connection's end")
    states = re.findall(r"\[([A-Z0-9-]+)\]", server.stderr)
    assert states == [
        "LISTEN", "SYN-RECEIVED", "ESTABLISHED", "CLOSE-WAIT", "LAST-ACK", "CLOSED",
    ]  # fmt: skip


def test_connect_to_a_closed_port_is_refused(tap: Net) -> None:
    assert tap.fails("connect", *TAP, f"{KERNEL}:9") == f"echo-appliance: {KERNEL}:9: refused\n"


def test_connect_to_nobody_gives_up(tap: Net) -> None:
    line = tap.fails("connect", *TAP, "--timeout", "0.5", "192.0.2.77:9")
    assert "nobody answers" in line


def test_connect_beyond_the_link_takes_the_gateway(tap: Net) -> None:
    ip("address", "add", "198.51.100.1/32", "dev", "lo")
    with kernel_echo("198.51.100.1") as port:
        words = ("--gateway", KERNEL, f"198.51.100.1:{port}")
        done = tap.run("connect", *TAP, *words, input="by way of the gateway")
    assert (done.stdout, done.returncode) == ("by way of the gateway", 0)


# -- dump --------------------------------------------------------------------


def test_dump_shows_each_frame_in_a_line_and_writes_a_capture(tap: Net, tmp_path: Path) -> None:
    file = tmp_path / "capture.pcap"
    command = [*NETSTACK, "dump", "--device", "tap:tap0", "--pcap", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        eventually(lambda: "LOWER_UP" in ip("link", "show", "tap0"), "the link")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("192.0.2.77", 9))
        line = next(line for line in process.stdout if "192.0.2.77" in line)
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{6} ARP, Request who-has 192.0.2.77 tell 192.0.2.1, length 28\n", line
    )
    done = subprocess.run(
        [find("tshark", "tshark"), "-r", str(file), "-Y", "arp.dst.proto_ipv4 == 192.0.2.77"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "Who has 192.0.2.77? Tell 192.0.2.1" in done.stdout, done.stderr


def test_capture_of_all_that_we_send_is_right_to_the_last_checksum(
    net: Net, tmp_path: Path
) -> None:
    """Segments that our side has cut and summed, of a connection with all of its states."""
    file = tmp_path / "capture.pcap"
    server = net.serve(net.tap(vnet=False), "--pcap", str(file))
    for address in (OURS, OURS6):
        data = pattern(100_001)
        with connect(PORT, address) as sock:
            assert echo(data, sock) == data
        with pytest.raises(ConnectionRefusedError):
            connect(4321, address)
        _udp_and_ping(address)
    assert server.stop() == 0
    bad = _tshark(file, "(ip.checksum.status == 0 || tcp.checksum.status == 0 || "
                  "udp.checksum.status == 0 || icmp.checksum.status == 0 || "
                  "icmpv6.checksum.status == 0 || _ws.malformed) && "
                  f"(ip.src == {OURS} || ipv6.src == {OURS6})")  # fmt: skip
    assert bad == "", bad
    assert len(_tshark(file, f"tcp && ip.src == {OURS}").splitlines()) > 50
    assert len(_tshark(file, f"tcp && ipv6.src == {OURS6}").splitlines()) > 50


def _udp_and_ping(address: str) -> None:
    subprocess.run([find("ping", "iputils-ping"), "-c", "1", "-s", "3000", address],
                   check=True, capture_output=True)  # fmt: skip
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET,
                       socket.SOCK_DGRAM) as sock:  # fmt: skip
        sock.settimeout(10)
        sock.sendto(b"x" * 5_000, (address, PORT))
        assert len(sock.recv(65535)) == 5_000


def _tshark(file: Path, display_filter: str) -> str:
    checks = [
        word for name in ("ip", "tcp", "udp") for word in ("-o", f"{name}.check_checksum:TRUE")
    ]
    done = subprocess.run(
        [find("tshark", "tshark"), *checks, "-r", str(file), "-Y", display_filter],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- packet sockets ----------------------------------------------------------


@pytest.fixture
def wire(net: Net) -> Net:
    """Two interfaces joined by a wire: the kernel speaks on one, we look at the other."""
    ip("link", "add", "near", "type", "veth", "peer", "name", "far")
    net.up("near")
    ip("link", "set", "far", "up")
    return net


def test_packet_socket_serves_beside_the_kernel(wire: Net) -> None:
    command = [*NETSTACK, "serve", "--device", "packet:far", *ADDRESSES, "--port", str(PORT)]
    with running(command, Path("/dev/null")):
        data = pattern(2_000_000)
        for address in (OURS, OURS6):
            eventually(lambda: _reachable(address), "the port")  # noqa: B023
            with connect(PORT, address) as sock:
                assert echo(data, sock) == data


def _reachable(address: str) -> bool:
    try:
        connect(PORT, address).close()
    except OSError:
        return False
    return True


def test_packet_socket_keeps_the_kernel_away_from_its_own_address(
    wire: Net, tmp_path: Path
) -> None:
    """As in the tutorial, where the kernel has the address; even a kill lets it back."""
    find("nft", "nftables")
    ip("address", "add", f"{OURS}/24", "dev", "far")
    ip("route", "del", "192.0.2.0/24", "dev", "far")
    # So that the kernel speaks to its own address by the wire.
    ip("rule", "add", "pref", "1", "iif", "far", "lookup", "local")
    ip("rule", "add", "pref", "2", "to", OURS, "lookup", "77")
    ip("route", "add", OURS, "dev", "near", "src", KERNEL, "table", "77")
    ip("rule", "add", "pref", "3", "lookup", "local")
    ip("rule", "del", "pref", "0")
    command = [*NETSTACK, "serve", "--device", "packet:far", "--address", f"{OURS}/24",
               "--claim", "0", "--port", str(PORT)]  # fmt: skip
    log = tmp_path / "log"
    with running(command, log) as process:
        eventually(lambda: "ingress" in _rules() and _reachable(OURS), lambda: log.read_text())
        data = pattern(500_000)
        with connect() as sock:
            assert echo(data, sock) == data
        process.send_signal(signal.SIGKILL)
        eventually(lambda: _rules() == "", _rules)
    eventually(lambda: not in_session(process.pid), "nft to end")


def _rules() -> str:
    return subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True).stdout


# -- what cannot work --------------------------------------------------------


def test_serve_tells_what_is_wrong_in_a_line(tap: Net) -> None:
    ip("link", "add", "bridge0", "type", "bridge")
    for words, expected in {
        ("--port", "7"): "no --address",
        (*ADDRESSES, "--port", "7"): "--device: give fd:NAME",
        ("--device", "eth0", *ADDRESSES, "--port", "7"): "--device: 'eth0' is none",
        ("--device", "fd:link", *ADDRESSES, "--port", "7"): "no descriptor named 'link'",
        ("--device", "packet:nosuch", *ADDRESSES, "--port", "7"): "no interface nosuch",
        ("--device", "tap:bridge0", *ADDRESSES, "--port", "7"): "which is not a tap",
        ("--device", "tap:a/b", *ADDRESSES, "--port", "7"): "is not an interface's name",
        (*TAP, "--tap", "tap0", "--port", "7"): "--tap is for a descriptor",
        TAP: "no --port",
        (*TAP, "--port", "7", "--port", "7=discard"): "is given twice",
        (*TAP, "--port", "70000"): "is not a port",
        (*TAP, "--port", "7=nonsense"): "or echo, or discard",
        (*TAP, "--port", "7=tcp:name:80"): "give a target by its address",
        (*TAP, "--port", "7=vsock-uds:/run/vm:80"): "a VM is relayed to by vsock:CID:PORT",
        (*TAP, "--port", "7", "--mtu", "1000"): "1280 to 65535",
        (*TAP, "--port", "7", "--mtu", "65536"): "out of range",
        (*TAP, "--port", "7", "--mac", "01:00:00:00:00:00"): "is not a station's",
        (*TAP, "--port", "7", "--gateway", "10.0.0.1"): "is on the link of no --address",
        (*TAP, "--port", "7", "--workers", "2"): "unknown option --workers",
        (*TAP, "--address", "192.0.2.255/24", "--port", "7"): "broadcast address",
        (*TAP, "--address", "224.0.0.1/24", "--port", "7"): "one host on a link",
        (*TAP, "--address", "192.0.2.3", "--port", "7"): "needs the length",
        (*TAP, "--pcap", "/nonexistent/x", "--port", "7"): "cannot be written",
    }.items():  # fmt: skip
        assert expected in tap.fails("serve", *words), words
    assert "is not a netstack verb" in tap.fails("frobnicate")


def test_address_that_is_in_use_on_the_link_is_refused(net: Net) -> None:
    descriptor = net.tap()
    for address in (f"{KERNEL}/24", f"{KERNEL6}/64"):
        expected = rf"{address.split('/')[0]} is in use on the link, by ([0-9a-f:]+): take another"
        with pytest.raises(AssertionError, match=expected):
            # So long, since the kernel's IPv6 may take a second to see that the link is up.
            net.serve(descriptor, "--claim", "3", addresses=("--address", address))


def test_tap_that_somebody_has_is_refused(tap: Net) -> None:
    command = [*NETSTACK, "dump", "--device", "tap:tap0"]
    with running(command, Path("/dev/null")):
        eventually(lambda: "LOWER_UP" in ip("link", "show", "tap0"), "the link")
        assert "somebody else is attached" in tap.fails("serve", *TAP, "--port", "7")


def test_descriptor_of_another_kind_is_refused(net: Net, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file, socket.socket() as stream:
        tun = open("/dev/net/tun", "r+b", buffering=0)  # noqa: SIM115
        with tun:
            for descriptor, expected in (
                (file.fileno(), "neither a tap nor a socket"),
                (stream.fileno(), "carries no frames"),
                (tun.fileno(), "not attached to a tap: say which one with --tap"),
            ):
                with pytest.raises(AssertionError, match=expected):
                    net.serve(descriptor)
