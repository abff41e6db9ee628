"""The client: what it says of servers that echo, and of those that do not."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.process.launcher import COMMAND, Launcher
from tests.process.peers import Sockets, reset

Done = subprocess.CompletedProcess[str]


def probe(*arguments: str | bytes) -> Done:
    """Run the probe to its end; it never shows a traceback."""
    done = subprocess.run(
        [*COMMAND, "probe", *arguments], capture_output=True, text=True, timeout=30
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def target_of(server: socket.socket) -> str:
    """Return the target that names a socket."""
    address = server.getsockname()
    if server.family == socket.AF_UNIX:
        kinds = {socket.SOCK_DGRAM: "unix-dgram", socket.SOCK_SEQPACKET: "unix-seqpacket"}
        name = "@" + address[1:].decode() if isinstance(address, bytes) else address
        return f"{kinds.get(server.type, 'unix')}:{name}"
    scheme = "udp" if server.type == socket.SOCK_DGRAM else "tcp"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{scheme}:{host}:{address[1]}"


@pytest.fixture
def targets(launch: Launcher, sockets: Sockets) -> list[str]:
    """One of each form, all served by one appliance."""
    servers = [
        sockets.listen(),
        sockets.listen(socket.AF_INET6),
        sockets.listen(socket.AF_UNIX),
        sockets.listen(socket.AF_UNIX, ""),
        sockets.listen(socket.AF_UNIX, kind=socket.SOCK_SEQPACKET),
        sockets.listen(socket.AF_UNIX, "", kind=socket.SOCK_SEQPACKET),
        sockets.bind(),
        sockets.bind(socket.AF_INET6),
        sockets.bind(socket.AF_UNIX),
        sockets.bind(socket.AF_UNIX, ""),
    ]
    launch.start(servers)
    return [target_of(server) for server in servers]


# -- servers that echo -------------------------------------------------------


def test_probe_every_target_form_is_ok(targets: list[str]) -> None:
    done = probe(*targets)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(targets)
    number = r"\d+\.\d+"
    for target, line in zip(targets, lines, strict=True):
        assert re.fullmatch(
            rf"{re.escape(target)} ok: 1 x 64 octets, "
            rf"round trip min {number} median {number} max {number} ms",
            line,
        ), line


def test_probe_name_of_a_host_is_resolved(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    launch.start([server])
    done = probe(f"tcp:localhost:{server.getsockname()[1]}")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_probe_size_and_count_are_kept(targets: list[str]) -> None:
    done = probe("--size", "65507", "--count", "5", *targets)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" ok: 5 x 65507 octets, ") == len(targets)


def test_probe_payload_larger_than_all_buffers_comes_back(
    launch: Launcher, sockets: Sockets
) -> None:
    servers = [sockets.listen(), sockets.listen(socket.AF_UNIX)]
    launch.start(servers)
    done = probe("--size", str(16 << 20), *map(target_of, servers))
    assert done.returncode == 0, done.stdout


def test_probe_json_tells_all(targets: list[str], sockets: Sockets) -> None:
    gone = "unix:" + sockets.path()
    done = probe("--json", "--count", "3", "--size", "10", *targets, gone)
    assert done.returncode == 1
    results: list[dict[str, Any]] = json.loads(done.stdout)
    assert [result["target"] for result in results] == [*targets, gone]
    for result in results[:-1]:
        assert (result["ok"], result["error"]) == (True, None)
        assert (result["octets"], result["echoed"]) == (10, 3)
        trip = result["round_trip"]
        assert 0 < trip["min"] <= trip["median"] <= trip["max"] < 5
    assert (results[-1]["ok"], results[-1]["echoed"]) == (False, 0)
    assert "no such socket" in results[-1]["error"]
    assert results[-1]["round_trip"] == {"min": None, "median": None, "max": None}


# -- servers that do not -----------------------------------------------------


class Misbehaving:
    """A listening socket and a thread that does something wrong with each connection."""

    def __init__(
        self,
        sockets: Sockets,
        serve: Callable[[socket.socket], None],
        family: int = socket.AF_INET,
    ) -> None:
        self.server = sockets.listen(family)
        self.server.settimeout(None)
        self._serve = serve
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                client, _ = self.server.accept()
                with client:
                    self._serve(client)
        except OSError:
            pass  # closed: the test is over


def _failure(done: Done) -> str:
    assert (done.returncode, done.stderr) == (1, "")
    _, failed, words = done.stdout.rstrip("\n").partition(" failed: ")
    assert failed, done.stdout
    return words


def _eof_after_10(client: socket.socket) -> None:
    client.sendall(client.recv(64)[:10])


def _change_octet_7(client: socket.socket) -> None:
    octets = bytearray(client.recv(64))
    octets[7] ^= 1
    client.sendall(octets)
    client.recv(1)


def _send_more(client: socket.socket) -> None:
    client.sendall(client.recv(64) + b"!!")
    client.recv(1)


def _half(client: socket.socket) -> None:
    client.sendall(client.recv(64)[:32])
    client.recv(1)


def _reset(client: socket.socket) -> None:
    client.recv(64)
    reset(client)


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        (_eof_after_10, "EOF after 10 octets"),
        (_change_octet_7, "octet 7 came back changed"),
        (_send_more, "2 octets more came back than were sent"),
        (_half, "timed out after 0.3 s, 32 octets came back"),
        (_reset, "reset by the peer"),
    ],
)
def test_probe_server_that_does_not_echo_is_told_in_words(
    sockets: Sockets, serve: Callable[[socket.socket], None], words: str
) -> None:
    wrong = Misbehaving(sockets, serve)
    assert _failure(probe("--timeout", "0.3", target_of(wrong.server))) == words


def test_probe_nobody_there_is_told_in_words(sockets: Sockets) -> None:
    gone = [
        sockets.listen(),
        sockets.bind(),
        sockets.listen(socket.AF_UNIX),
        sockets.bind(socket.AF_UNIX),
        sockets.listen(socket.AF_UNIX, ""),
    ]
    targets = [target_of(server) for server in gone]
    for server in gone:
        server.close()
    for target in targets:
        assert _failure(probe(target)) == "refused: nobody listens there"
    for scheme in ("unix", "unix-dgram", "unix-seqpacket"):
        assert _failure(probe(f"{scheme}:{sockets.path()}")) == "no such socket"


def test_probe_wrong_kind_of_unix_socket_is_told_in_words(sockets: Sockets) -> None:
    path = sockets.listen(socket.AF_UNIX).getsockname()
    assert _failure(probe(f"unix-dgram:{path}"))


@pytest.mark.parametrize("kind", ["tcp", "udp", "unix"])
def test_probe_server_that_does_not_answer_times_out(sockets: Sockets, kind: str) -> None:
    server = {
        "tcp": lambda: sockets.listen(),
        "udp": lambda: sockets.bind(),
        "unix": lambda: sockets.listen(socket.AF_UNIX),
    }[kind]()
    started = time.monotonic()
    words = _failure(probe("--timeout", "0.3", target_of(server)))
    assert words == "timed out after 0.3 s, 0 octets came back"
    assert 0.3 <= time.monotonic() - started < 5


def test_probe_backlog_that_is_full_times_out(sockets: Sockets) -> None:
    server = sockets.listen(socket.AF_UNIX, backlog=0)
    sockets.connect(server)
    words = _failure(probe("--timeout", "0.3", target_of(server)))
    assert words == "timed out after 0.3 s"


def test_probe_one_failure_among_successes_fails(targets: list[str], sockets: Sockets) -> None:
    gone = "unix:" + sockets.path()
    done = probe(targets[0], gone, targets[1])
    assert done.returncode == 1
    words = [line.split(" ")[1].rstrip(":") for line in done.stdout.splitlines()]
    assert words == ["ok", "failed", "ok"]


@pytest.mark.parametrize("target", ["tcp:a..b:80", f"tcp:{'x' * 64}.test:80"])
def test_probe_name_that_cannot_be_one_is_told_in_words(target: str) -> None:
    assert "resolved" in _failure(probe(target))


def test_probe_path_that_is_no_text_is_told_in_words(sockets: Sockets) -> None:
    done = probe(os.fsencode(f"unix:{sockets.path()}") + b"\xff")
    assert done.returncode == 1
    assert "failed: no such socket" in done.stdout


def test_probe_path_that_is_no_text_is_reached(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen(socket.AF_UNIX, os.fsencode(sockets.path()) + b"\xff")
    launch.start([server])
    assert probe(b"unix:" + os.fsencode(server.getsockname())).returncode == 0


def test_probe_vsock_is_tried_and_told_in_words() -> None:
    # CID 2 is the host, CID 1 the loopback: where nobody listens, or no vsock is, it says so.
    done = probe("--timeout", "0.2", "vsock:1:1", "vsock-seqpacket:1:1")
    assert (done.returncode, done.stderr) == (1, "")
    assert len(re.findall(r" failed: .+\n", done.stdout)) == 2


# -- a VM's port behind a unix socket ----------------------------------------


def _device(answer: bytes, reset_instead: bool = False) -> Callable[[socket.socket], None]:
    """A vsock device in user space: takes CONNECT, answers, and then is the guest, which echoes."""

    def serve(client: socket.socket) -> None:
        asked = b""
        while not asked.endswith(b"\n"):
            asked += client.recv(1)  # one octet: what follows is the guest's
        if asked != b"CONNECT 3000\n" or reset_instead:
            return
        for part in (answer[:2], answer[2:]):
            client.sendall(part)
        while octets := client.recv(1 << 16):
            client.sendall(octets)

    return serve


def _hybrid(sockets: Sockets, serve: Callable[[socket.socket], None]) -> str:
    device = Misbehaving(sockets, serve, socket.AF_UNIX)
    return f"vsock-uds:{device.server.getsockname()}:3000"


def test_probe_vsock_device_is_asked_for_the_port_and_echoes(sockets: Sockets) -> None:
    target = _hybrid(sockets, _device(b"OK 1073741824\n"))
    done = probe("--count", "3", "--size", "100000", target)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert " ok: 3 x 100000 octets" in done.stdout


def test_probe_vsock_device_without_guest_is_told_in_words(sockets: Sockets) -> None:
    target = _hybrid(sockets, _device(b"", reset_instead=True))
    assert _failure(probe(target)) == "no guest is up there, or nobody listens on its port 3000"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b"O" * 100])
def test_probe_socket_that_is_no_vsock_device_is_told_in_words(
    sockets: Sockets, answer: bytes
) -> None:
    assert "not a vsock device" in _failure(probe(_hybrid(sockets, _device(answer))))


def test_probe_vsock_device_that_is_silent_times_out(sockets: Sockets) -> None:
    server = sockets.listen(socket.AF_UNIX)  # takes the connection, and no more
    target = f"vsock-uds:{server.getsockname()}:3000"
    assert _failure(probe("--timeout", "0.3", target)) == "timed out after 0.3 s"


# -- its command line --------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("", "must begin with one of tcp, udp"),
        ("tcp", "must begin with"),
        ("http:127.0.0.1:80", "must begin with"),
        ("tcp:127.0.0.1", "needs an address and a port"),
        ("tcp::80", "needs an address and a port"),
        ("tcp:127.0.0.1:", "is not a port"),
        ("tcp:127.0.0.1:http", "is not a port"),
        ("tcp:127.0.0.1:65536", "is not a port"),
        ("udp:127.0.0.1:0", "port 0"),
        ("tcp:127.0.0.1:-1", "is not a port"),
        ("tcp:::1:80", "in brackets"),
        ("tcp:[::1:80", "in brackets"),
        ("tcp:[127.0.0.1]:80", "is not an IPv6 address"),
        ("unix:", "needs a path"),
        ("unix:@", "needs a path"),
        ("unix:" + "x" * 108, "107 octets"),
        ("vsock:1", "vsock:1:3000"),
        ("vsock-uds:/run/vm.vsock", "vsock-uds:/run/vm.vsock:3000"),
        ("vsock:here:1", "is not a CID"),
        ("vsock:1:4294967296", "is not a port"),
        ("tcp:127.0.0.1:" + "9" * 5000, "is not a port"),
    ],
)
def test_probe_bad_target_is_told_before_anything_is_sent(target: str, words: str) -> None:
    done = probe("unix:/nowhere", target)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--size", "0", "unix:/x"],
        ["--size", "many", "unix:/x"],
        ["--size", "9" * 5000, "unix:/x"],
        ["--size", "99999999999999999", "unix:/x"],
        ["--count", "-1", "unix:/x"],
        ["--timeout", "nan", "unix:/x"],
        ["--timeout", "soon", "unix:/x"],
        ["--sise", "3", "unix:/x"],
        ["--size", "65508", "udp:127.0.0.1:9999"],
    ],
)
def test_probe_bad_options_are_told_in_one_line(options: list[str]) -> None:
    done = probe(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_probe_interrupted_ends_quietly(sockets: Sockets) -> None:
    server = sockets.listen()
    server.settimeout(10)
    with subprocess.Popen(
        [*COMMAND, "probe", target_of(server)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            client, _ = server.accept()  # it is connected, and waits for the answer
            with client:
                process.send_signal(signal.SIGINT)
                output, _ = process.communicate(timeout=10)
        finally:
            process.kill()
    assert (process.returncode, output) == (130, b"")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_probe_whose_result_cannot_be_written_says_so(
    launch: Launcher, sockets: Sockets, form: list[str]
) -> None:
    server = sockets.listen()
    launch.start([server])
    command = shlex.join([*COMMAND, "probe", *form, target_of(server)])
    done = subprocess.run(["sh", "-c", f"{command} >/dev/full"], capture_output=True, text=True)
    line = "echo-appliance: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)
    done = subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, text=True)
    line = "echo-appliance: standard output cannot be written: Bad file descriptor\n"
    assert (done.returncode, done.stderr) == (1, line)
