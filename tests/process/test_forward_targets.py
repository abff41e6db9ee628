"""How the forwarder finds a backend: waiting, retrying, racing, skipping; rules and limits."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process import pages
from tests.process.conftest import lacking
from tests.process.forwarding import Forwarding, target, vsock_loops_back
from tests.process.launcher import COMMAND, Launcher, Server, eventually
from tests.process.peers import Sockets, receive, receive_to_end, reset


@pytest.fixture
def forward(launch: Launcher, sockets: Sockets, short_path: Path) -> Forwarding:
    """Starts forwarders."""
    return Forwarding(launch, sockets, short_path)


def nobody(sockets: Sockets, family: int = socket.AF_INET) -> socket.socket:
    """Return a socket that is bound and does not listen: connecting to it is refused."""
    return sockets.bind(family, kind=socket.SOCK_STREAM)


def full(sockets: Sockets, host: str) -> socket.socket:
    """Return a listening socket whose backlog is full: connecting to it gets no answer at all."""
    server = sockets.listen(address=host, backlog=0)
    for _ in range(2):
        client = sockets.keep(socket.socket())
        client.setblocking(False)
        client.connect_ex(server.getsockname())
    return server


def asks(front: socket.socket, sockets: Sockets, backend: socket.socket) -> socket.socket:
    """Connect, and see that this backend gets it; return the client."""
    client = sockets.connect(front)
    client.sendall(b"?")
    accepted = sockets.keep(backend.accept()[0])
    assert receive(accepted, 1) == b"?"
    accepted.sendall(b"!")
    assert receive(client, 1) == b"!"
    return client


def assert_reset(client: socket.socket) -> None:
    """What a client sees that cannot be served."""
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def assert_refused(front: socket.socket, sockets: Sockets, source: object = None) -> None:
    """The same from the start; the reset may be there before connect() has returned."""

    def connect_and_read() -> bytes:
        return sockets.connect(front, source=source).recv(1)

    with pytest.raises(ConnectionResetError):
        connect_and_read()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_forward_backend_that_starts_late_is_waited_for(
    forward: Forwarding, sockets: Sockets, family: int
) -> None:
    front, backend = sockets.listen(), nobody(sockets, family)
    forwarder = forward.to(front, target(backend), options=["--connect-retry", "20"])
    client = sockets.connect(front)
    client.sendall(b"early")
    forwarder.assert_sleeps(3.0)
    backend.listen()
    accepted = sockets.keep(backend.accept()[0])
    assert receive(accepted, 5) == b"early"


@pytest.mark.parametrize("here", [socket.AF_INET, socket.AF_UNIX])
def test_forward_client_that_has_said_all_waits_on_for_its_answer(
    forward: Forwarding, sockets: Sockets, here: int
) -> None:
    # A half-close is no end: nobody can tell it from a close until something is sent.
    front, backend = sockets.listen(here), nobody(sockets)
    forwarder = forward.to(front, target(backend), options=["--connect-retry", "20"])
    client = sockets.connect(front)
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    forwarder.assert_sleeps(0.5)
    backend.listen()
    accepted = sockets.keep(backend.accept()[0])
    assert receive_to_end(accepted) == b"question"
    accepted.sendall(b"answer")
    accepted.close()
    assert receive_to_end(client) == b"answer"


@pytest.mark.parametrize("here", [socket.AF_INET, socket.AF_UNIX])
def test_forward_client_that_closes_while_it_waits_is_heard_and_then_gone(
    forward: Forwarding, sockets: Sockets, here: int
) -> None:
    front, metrics, backend = sockets.listen(here), sockets.listen(), nobody(sockets)
    text = f'[route.web]\nto = "{target(backend)}"\nconnect-retry = 20\n'
    forwarder = forward.config(text, web=front, metrics=metrics)
    client = sockets.connect(front)
    client.sendall(b"last words")
    client.close()
    forwarder.assert_sleeps(0.5)
    backend.listen()
    accepted = sockets.keep(backend.accept()[0])
    assert receive_to_end(accepted) == b"last words"
    accepted.close()
    pages.until(metrics, {("connections", "web"): 0})


def test_forward_client_that_gives_up_waiting_ends_the_dial(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), nobody(sockets)
    forward.config(
        f'[route.web]\nto = "{target(backend)}"\nconnect-retry = 60\n', web=front, metrics=metrics
    )
    reset(sockets.connect(front))
    ended = ("connections_ended_total", "web", "client-gone")
    eventually(lambda: pages.scrape(metrics).get(ended) == 1, "the client's end to be noticed")


def test_forward_without_retry_a_dead_backend_resets_the_client(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), nobody(sockets)
    forward.config(f'[route.web]\nto = "{target(backend)}"\n', web=front, metrics=metrics)
    assert_refused(front, sockets)
    page = pages.scrape(metrics)
    assert page["connections_ended_total", "web", "connect-refused"] == 1
    assert page["connections", "web"] == 0


def test_forward_backend_that_does_not_answer_is_given_up_in_time(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, silent, alive = sockets.listen(), full(sockets, "127.0.0.1"), sockets.listen()
    forward.to(front, silent, alive, options=["--connect-timeout", "0.5"])
    began = time.monotonic()
    asks(front, sockets, alive)
    assert 0.4 < time.monotonic() - began < 3
    began = time.monotonic()
    asks(front, sockets, alive)
    assert time.monotonic() - began < 0.4, "a backend that failed is to be skipped for a while"


def test_forward_first_alive_prefers_the_first_target(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, one, other = sockets.listen(), sockets.listen(), sockets.listen()
    forward.to(front, one, other)
    for _ in range(3):
        asks(front, sockets, one)
    one.close()
    for _ in range(3):
        asks(front, sockets, other)


def test_forward_round_robin_takes_turns_and_skips_the_dead(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, dead = sockets.listen(), nobody(sockets)
    alive = [sockets.listen(), sockets.listen()]
    forward.to(front, alive[0], target(dead), alive[1], options=["--balance", "round-robin"])
    clients = [sockets.connect(front) for _ in range(9)]
    eventually(lambda: len(clients) == 9, "")
    served = [0, 0]
    for number, backend in enumerate(alive):
        backend.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                sockets.keep(backend.accept()[0])
                served[number] += 1
    assert sum(served) == 9
    assert min(served) >= 3


def test_forward_unix_backlog_that_is_full_is_waited_for(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen(socket.AF_UNIX, backlog=0)
    forwarder = forward.to(front, backend)
    clients = [sockets.connect(front) for _ in range(4)]
    forwarder.assert_sleeps()
    for client in clients:
        client.sendall(b"?")
    for _ in clients:
        assert receive(sockets.keep(backend.accept()[0]), 1) == b"?"


# -- vsock ---------------------------------------------------------------------


@pytest.fixture
def vsock(sockets: Sockets) -> socket.socket:
    """A listening vsock socket."""
    try:
        sock = sockets.keep(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
    except OSError as error:
        lacking(f"no vsock on this kernel ({error}): load the module vsock")
    sock.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
    sock.listen()
    return sock


def test_forward_vsock_backend_is_reached_as_far_as_the_kernel_goes(
    forward: Forwarding, sockets: Sockets, vsock: socket.socket
) -> None:
    loops_back = vsock_loops_back(vsock)
    front, metrics = sockets.listen(), sockets.listen()
    options = ("--connect-timeout", "1")
    forward.config(f'[route.web]\nto = "{target(vsock)}"\n', *options, web=front, metrics=metrics)
    if loops_back:
        asks(front, sockets, vsock)
        return
    # Without vsock_loopback its packets are lost; a guest of the vm tier does the real thing.
    client = sockets.connect(front)
    assert_reset(client)
    ended = {key[2] for key in pages.scrape(metrics) if key[0] == "connections_ended_total"}
    assert ended <= {"connect-timeout", "connect-enodev"}


def test_forward_vsock_backend_that_nobody_serves_is_passed_over(
    forward: Forwarding, sockets: Sockets, vsock: socket.socket
) -> None:
    front, backend, dead = sockets.listen(), sockets.listen(), target(vsock)
    vsock.close()
    forwarder = forward.to(front, dead, target(backend), options=["--connect-timeout", "0.5"])
    for _ in range(3):
        asks(front, sockets, backend)
    forwarder.assert_sleeps()


def test_forward_vsock_backend_that_is_not_there_is_waited_for(
    forward: Forwarding, sockets: Sockets, vsock: socket.socket
) -> None:
    front, metrics, dead = sockets.listen(), sockets.listen(), target(vsock)
    vsock.close()
    forwarder = forward.config(
        f'[route.web]\nto = "{dead}"\nconnect-retry = 1.5\nconnect-timeout = 0.2\n',
        web=front, metrics=metrics,
    )  # fmt: skip
    began = time.monotonic()
    assert_reset(sockets.connect(front))
    assert 1.4 < time.monotonic() - began < 6
    forwarder.assert_sleeps()


# -- names ---------------------------------------------------------------------


@contextlib.contextmanager
def hosts(launch: Launcher, directory: Path, text: str) -> Iterator[list[str]]:
    """Give the command line of a forwarder that sees another /etc/hosts."""
    if os.geteuid() != 0:
        lacking("another /etc/hosts needs a mount namespace: run as root")
    file = directory / "hosts"
    file.write_text(text)
    unshare = shutil.which("unshare")
    assert unshare, "util-linux is missing"
    script = f'mount --bind {file} /etc/hosts && exec "$@"'
    yield [unshare, "--mount", "sh", "-c", script, "sh", *COMMAND, "forward"]


def test_forward_name_with_a_dead_address_is_raced(
    launch: Launcher, sockets: Sockets, short_path: Path
) -> None:
    silent = full(sockets, "127.0.0.2")
    port = silent.getsockname()[1]
    alive = sockets.listen(address=("127.0.0.3", port))
    front = sockets.listen()
    text = "127.0.0.2 both.example\n127.0.0.3 both.example\n"
    with hosts(launch, short_path, text) as command:
        launch.start([front], "--to", f"tcp:both.example:{port}", command=command)
        began = time.monotonic()
        asks(front, sockets, alive)
        assert time.monotonic() - began < 2, "the second address is tried after 250 ms"
        began = time.monotonic()
        asks(front, sockets, alive)
        assert time.monotonic() - began < 0.2, "the address that answered is asked first"


def answers(front: socket.socket, sockets: Sockets, backend: socket.socket) -> None:
    """Send datagrams until the backend gets one, and see its answer."""
    client = sockets.connect(front)

    def arrives() -> bool:
        client.send(b"?")
        return bool(select.select([backend], [], [], 0.05)[0])

    eventually(arrives, "a datagram at the backend that lives")
    _, session = backend.recvfrom(10)
    backend.sendto(b"!", session)
    assert client.recv(10) == b"!"


def test_forward_datagrams_go_to_the_next_target_when_one_refuses(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, metrics, dead, alive = sockets.bind(), sockets.listen(), sockets.bind(), sockets.bind()
    to = json.dumps([target(dead), target(alive)])
    dead.close()
    forward.config(f"[route.dns]\nto = {to}\n", dns=front, metrics=metrics)
    answers(front, sockets, alive)
    ended = ("connections_ended_total", "dns", "backend-refused")
    assert pages.scrape(metrics)[ended] == 1
    client = sockets.connect(front)
    client.send(b"?")
    alive.recv(10)  # the first datagram of the next client arrives
    assert pages.scrape(metrics)[ended] == 1, "the one that refused is asked last"


def test_forward_datagrams_go_to_the_next_address_when_one_refuses(
    launch: Launcher, sockets: Sockets, short_path: Path
) -> None:
    front, alive = sockets.bind(), sockets.bind(address="127.0.0.3")
    text = "127.0.0.2 both.example\n127.0.0.3 both.example\n"
    with hosts(launch, short_path, text) as command:
        port = alive.getsockname()[1]
        launch.start([front], "--to", f"udp:both.example:{port}", command=command)
        answers(front, sockets, alive)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_forward_name_leads_to_either_family(
    launch: Launcher, sockets: Sockets, short_path: Path, family: int
) -> None:
    front, backend = sockets.listen(), sockets.listen(family)
    with hosts(launch, short_path, "127.0.0.1 both.example\n::1 both.example\n") as command:
        launch.start(
            [front], "--to", f"tcp:both.example:{backend.getsockname()[1]}", command=command
        )
        asks(front, sockets, backend)


def test_forward_name_that_nobody_knows_ends_the_connection(
    launch: Launcher, sockets: Sockets, short_path: Path
) -> None:
    front, metrics = sockets.listen(), sockets.listen()
    with hosts(launch, short_path, "127.0.0.1 localhost\n") as command:
        launch.start(
            [front, metrics], "--to", "tcp:nobody.invalid:80", "--connect-timeout", "3",
            names=["web", "metrics"], command=command,
        )  # fmt: skip
        assert_refused(front, sockets)
    ended = [key for key in pages.scrape(metrics) if key[0] == "connections_ended_total"]
    assert ended
    assert ended[0][2] in ("name-not-resolved", "connect-timeout")


# -- rules and limits ------------------------------------------------------------


def test_forward_denied_clients_are_refused_and_counted(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    forward.config(
        f'[route.web]\nto = "{target(backend)}"\nallow = ["127.0.0.0/8"]\ndeny = ["127.0.0.9"]\n',
        web=front, metrics=metrics,
    )  # fmt: skip
    assert_refused(front, sockets, ("127.0.0.9", 0))
    asks(front, sockets, backend)
    assert pages.scrape(metrics)["connections_refused_total", "web", "denied"] == 1


def test_forward_rules_apply_to_a_connection_that_was_passed(
    forward: Forwarding, sockets: Sockets
) -> None:
    server, backend = sockets.listen(), sockets.listen()
    for rule, served in (("allow", True), ("deny", False)):
        client = sockets.connect(server)
        accepted = sockets.keep(server.accept()[0])
        forward.config(
            f'[route.web]\nto = "{target(backend)}"\n{rule} = ["127.0.0.1"]\n', web=accepted
        )
        accepted.close()
        if served:
            client.sendall(b"?")
            assert receive(sockets.keep(backend.accept()[0]), 1) == b"?"
        else:
            assert_reset(client)


def test_forward_route_limit_holds_others_back_until_there_is_room(
    forward: Forwarding, sockets: Sockets
) -> None:
    one, other, backend = sockets.listen(), sockets.listen(), sockets.listen()
    to = f'to = "{target(backend)}"\n'
    forward.config(f"[route.a]\n{to}max-connections = 1\n[route.b]\n{to}", a=one, b=other)
    first = asks(one, sockets, backend)
    waiting = sockets.connect(one)
    waiting.sendall(b"?")
    for _ in range(3):
        asks(other, sockets, backend)
    reset(first)
    assert receive(sockets.keep(backend.accept()[0]), 1) == b"?"


def test_forward_source_limit_refuses_one_source_only(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    limit = "max-connections-per-source = 2\n"
    forward.config(f'[route.web]\nto = "{target(backend)}"\n{limit}', web=front)
    clients = [asks(front, sockets, backend) for _ in range(2)]
    refused = sockets.connect(front)
    with contextlib.suppress(ConnectionResetError):
        assert refused.recv(1) == b""
    other = sockets.connect(front, source=("127.0.0.5", 0))
    other.sendall(b"?")
    assert receive(sockets.keep(backend.accept()[0]), 1) == b"?"
    assert clients


def test_forward_idle_connection_is_ended_and_a_busy_one_is_not(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forward.config(f'[route.web]\nto = "{target(backend)}"\nidle-timeout = 0.8\n', web=front)
    idle, _ = forward.joined(front, backend)
    busy, accepted = forward.joined(front, backend)
    began = time.monotonic()
    idle.settimeout(0.1)
    ended = False
    while not ended:
        assert time.monotonic() - began < 10
        busy.sendall(b"x")
        receive(accepted, 1)
        with contextlib.suppress(TimeoutError):
            ended = idle.recv(1) == b""
    assert time.monotonic() - began >= 0.7
    busy.sendall(b"x")
    receive(accepted, 1)


def test_forward_lifetime_ends_a_busy_connection(forward: Forwarding, sockets: Sockets) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forward.config(f'[route.web]\nto = "{target(backend)}"\nlifetime = 0.5\n', web=front)
    client, _ = forward.joined(front, backend)
    assert client.recv(1) == b""


def kept_alive(sock: socket.socket) -> bool:
    """Whether the keepalive timer (tr=2) of this socket's peer runs, which is the forwarder's."""
    ports = [f":{name[1]:04X}" for name in (sock.getpeername(), sock.getsockname())]
    for line in Path("/proc/net/tcp").read_text().splitlines():
        fields = line.split()
        if [fields[1][-5:], fields[2][-5:]] == ports:
            return fields[5].startswith("02:")
    raise AssertionError(f"no connection of {ports}")


def test_forward_keepalive_is_set_on_both_sides(forward: Forwarding, sockets: Sockets) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forward.to(front, backend, options=["--keepalive", "7"])
    for sock in forward.joined(front, backend):
        eventually(functools.partial(kept_alive, sock), "the timer")


def test_forward_reload_changes_the_keepalive_of_new_connections(
    forward: Forwarding, sockets: Sockets
) -> None:
    # Of listening sockets; beside a datagram socket and a connection that was passed and is over.
    backend, answers = sockets.listen(), sockets.bind()
    fronts = {"tcp": sockets.listen(), "udp": sockets.bind()}
    client = sockets.connect(backend)
    passed = {"one": sockets.keep(backend.accept()[0])}

    def text(line: str) -> str:
        return (
            f'[defaults]\n{line}\n[route.udp]\nto = "{target(answers)}"\n'
            f'[route."*"]\nto = "{target(backend)}"\n'
        )

    forwarder = forward.config(text(""), **fronts, **passed)
    passed["one"].close()
    accepted = sockets.keep(backend.accept()[0])
    client.close()
    accepted.close()
    assert not kept_alive(forward.joined(fronts["tcp"], backend)[0])
    for number, (line, kept) in enumerate((("keepalive = 7", True), ("", False)), 1):
        forward.write(text(line))
        reload(forwarder, "is in force", number)
        pair = forward.joined(fronts["tcp"], backend)
        pair[0].sendall(b"?")
        receive(pair[1], 1)
        assert [kept_alive(sock) for sock in pair] == [kept, kept]
    assert "refused" not in forwarder.stderr


# -- configuration ---------------------------------------------------------------


def test_forward_routes_by_descriptor_name(forward: Forwarding, sockets: Sockets) -> None:
    backends = {name: sockets.listen() for name in ("a", "b", "*")}
    text = "".join(f'[route."{name}"]\nto = "{target(one)}"\n' for name, one in backends.items())
    fronts = {name: sockets.listen() for name in ("a", "b", "c")}
    forward.config(text, **fronts)
    asks(fronts["a"], sockets, backends["a"])
    asks(fronts["b"], sockets, backends["b"])
    asks(fronts["c"], sockets, backends["*"])


def test_forward_reload_moves_new_connections_and_keeps_open_ones(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, one, other = sockets.listen(), sockets.listen(), sockets.listen()
    forwarder = forward.config(f'[route.web]\nto = "{target(one)}"\n', web=front)
    client, accepted = forward.joined(front, one)
    forward.write(f'[route.web]\nto = "{target(other)}"\n')
    reload(forwarder, "is in force")
    asks(front, sockets, other)
    client.sendall(b"old")
    assert receive(accepted, 3) == b"old"


def test_forward_reload_of_a_bad_file_is_refused_in_one_line(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.config(f'[route.web]\nto = "{target(backend)}"\n', web=front)
    for number, text in enumerate(("[route.web\n", '[route.x]\nto = "tcp:h:1"\n', ""), 1):
        forward.write(text)
        reload(forwarder, "the old configuration stays", number)
        asks(front, sockets, backend)
    assert len(forwarder.stderr.splitlines()) == 3


def test_forward_reload_that_lifts_a_limit_lets_those_in_who_wait(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    route = f'[route.web]\nto = "{target(backend)}"\n'
    forwarder = forward.config(f"{route}max-connections = 1\n", web=front)
    asks(front, sockets, backend)
    waiting = sockets.connect(front)
    waiting.sendall(b"?")
    forwarder.assert_sleeps()
    forward.write(route)
    reload(forwarder, "is in force")
    assert receive(sockets.keep(backend.accept()[0]), 1) == b"?"


def test_forward_reload_counts_the_open_connections_on(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    route = f'[route.web]\nto = "{target(backend)}"\n'
    forwarder = forward.config(f"{route}max-connections = 2\n", web=front)
    first, _ = asks(front, sockets, backend), asks(front, sockets, backend)
    forward.write(f"{route}max-connections = 2\nidle-timeout = 60\n")
    reload(forwarder, "is in force")
    waiting = sockets.connect(front)
    waiting.sendall(b"?")
    assert not select.select([backend], [], [], 0.3)[0], "three where two may be"
    forward.write(f"{route}max-connections = 9\nmax-connections-per-source = 3\n")
    reload(forwarder, "is in force", 2)
    assert receive(sockets.keep(backend.accept()[0]), 1) == b"?"
    refused = sockets.connect(front)
    with contextlib.suppress(ConnectionResetError):
        assert refused.recv(1) == b"", "a fourth of this source"
    for sock in (first, waiting):
        reset(sock)

    def is_served() -> bool:
        with contextlib.suppress(OSError):
            sockets.connect(front).sendall(b"?")
        return bool(select.select([backend], [], [], 0.1)[0])

    eventually(is_served, "those that ended to be counted out")


def test_forward_reload_counts_the_open_sessions_on(forward: Forwarding, sockets: Sockets) -> None:
    front, backend = sockets.bind(), sockets.bind()
    route = f'[route.dns]\nto = "{target(backend)}"\n'
    forwarder = forward.config(f"{route}max-connections-per-source = 5\n", dns=front)
    sockets.connect(front).send(b"one")
    assert backend.recv(10) == b"one"
    forward.write(f"{route}max-connections-per-source = 1\n")
    reload(forwarder, "is in force")
    sockets.connect(front).send(b"two")
    sockets.connect(front, source=("127.0.0.5", 0)).send(b"three")
    assert backend.recv(10) == b"three"


def test_forward_reload_before_it_serves_changes_the_routes_only(
    forward: Forwarding, launch: Launcher, sockets: Sockets
) -> None:
    front, old, new = sockets.listen(), sockets.listen(), sockets.listen()
    forward.write(f'[route.web]\nto = "{target(old)}"\n')
    forwarder = launch.start(
        [front], "--config", str(forward.file), "--start-sleep", "3",
        names=["web"], command=(*COMMAND, "forward"), ready=False,
    )  # fmt: skip
    eventually(lambda: catches(forwarder.pid, signal.SIGHUP), "its handlers")
    forward.write(f'[route.web]\nto = "{target(new)}"\n')
    reload(forwarder, "is in force")
    client = sockets.connect(front)
    client.sendall(b"?")
    assert select.select([old, new], [], [], 30)[0] == [new]
    assert [line for line in forwarder.notified.take() if line == "READY=1"]


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for this signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [caught] = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (number - 1) & 1)


def reload(forwarder: Server, answer: str, times: int = 1) -> None:
    """SIGHUP, and wait for what it says."""
    forwarder.signal(signal.SIGHUP)
    eventually(lambda: forwarder.stderr.count(answer) >= times, answer)


@pytest.mark.parametrize("lacks", ["descriptor", "thread"])
def test_forward_name_that_cannot_be_asked_for_now_is_asked_for_again(
    forward: Forwarding, sockets: Sockets, lacks: str
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    port = backend.getsockname()[1]
    forwarder = forward.to(front, f"tcp:localhost:{port}")
    what, limit = {
        # One for the client, and none to hear from the thread.
        "descriptor": (resource.RLIMIT_NOFILE, forwarder.descriptors + 1),
        "thread": (resource.RLIMIT_AS, virtual_size(forwarder) + 1024**2),  # and a stack has 8
    }[lacks]
    usual = resource.prlimit(forwarder.pid, what)
    resource.prlimit(forwarder.pid, what, (limit, usual[1]))
    for _ in range(2):
        assert_refused(front, sockets)
    resource.prlimit(forwarder.pid, what, usual)

    def is_served() -> bool:
        with contextlib.suppress(ConnectionResetError):
            sockets.connect(front).sendall(b"?")
        return bool(select.select([backend], [], [], 0.3)[0])

    eventually(is_served, "the name to be asked for again")
    assert "localhost cannot be looked up" in forwarder.stderr


def virtual_size(server: Server) -> int:
    """Octets, as RLIMIT_AS counts them."""
    return int(Path(f"/proc/{server.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[route.web]\nto = "tcp:h:1"\nfoo = 1\n', "unknown key 'foo'"),
        ('[route.web]\nto = "tcp:h"\n', "needs an address and a port"),
        ('[route.other]\nto = "tcp:h:1"\n', "no descriptor has this name"),
        ('[route.web]\nto = "udp:h:1"\n', "a stream needs a stream's target"),
        ('[route.web]\nto = "fd:gone"\n', "no descriptor has this name"),
        ('[route.web]\nto = ["tcp:h:1", "udp:h:1"]\n', "streams and to datagrams"),
        ("[route.web]\n", "nowhere to go"),
        ("", "no routes"),
        ("[[[", "is not TOML"),
    ],
)
def test_forward_bad_configuration_is_refused_in_one_line(
    forward: Forwarding, sockets: Sockets, text: str, words: str
) -> None:
    assert words in forward.refuse(text, web=sockets.listen())


def test_forward_descriptor_without_a_route_is_refused(
    forward: Forwarding, sockets: Sockets
) -> None:
    line = forward.refuse(
        '[route.web]\nto = "tcp:h:1"\n', web=sockets.listen(), mail=sockets.listen()
    )
    assert "[route.mail]" in line


def test_forward_check_needs_no_sockets(short_path: Path) -> None:
    file = short_path / "f.toml"
    file.write_text('[route.web]\nto = ["tcp:a:1", "unix:/b"]\nbalance = "round-robin"\n')
    command = [*COMMAND, "forward", "--check", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tcp:a:1, unix:/b: round-robin" in done.stdout
    file.write_text("[route.web]\nto = 1\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1


# -- the access log ----------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "json"])
def test_forward_access_log_tells_about_each_connection(
    forward: Forwarding, sockets: Sockets, form: str
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    forwarder = forward.to(front, backend, options=["--access-log", form])
    client, accepted = forward.joined(front, backend)
    name = "{}:{}".format(*client.getsockname())
    client.sendall(b"question")
    receive(accepted, 8)
    accepted.sendall(b"no")
    receive(client, 2)
    client.close()
    receive_to_end(accepted)
    accepted.close()
    line = eventually(lambda: forwarder.stderr, "a line")
    if form == "json":
        fields = json.loads(line)
        assert fields["client"] == name
        assert (fields["received"], fields["sent"], fields["end"]) == (8, 2, "eof")
    else:
        for word in (f"client={name}", f"target={target(backend)}", "received=8", "sent=2"):
            assert word in line.split()


def test_forward_lookups_do_not_hold_up_others(forward: Forwarding, sockets: Sockets) -> None:
    # A name under .invalid is asked for at a server that may not answer at all.
    slow, front, backend = sockets.listen(), sockets.listen(), sockets.listen()
    text = f'[route.slow]\nto = "tcp:slow.invalid:1"\n[route.web]\nto = "{target(backend)}"\n'
    forward.config(text, slow=slow, web=front)
    waiting = [sockets.connect(slow) for _ in range(5)]
    began = time.monotonic()
    asks(front, sockets, backend)
    assert time.monotonic() - began < 1
    assert all(one.fileno() >= 0 for one in waiting)
