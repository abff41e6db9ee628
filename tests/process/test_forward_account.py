"""What the forwarder tells about itself: reasons, counters, access log, --check, watchdog."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process import pages
from tests.process.forwarding import Forwarding, in_thread, target
from tests.process.launcher import COMMAND, Launcher, Server, eventually
from tests.process.peers import RESET_ON_CLOSE, Sockets, receive, reset, stuff
from tests.unit import hellos

ENDED, REFUSED = "connections_ended_total", "connections_refused_total"


@pytest.fixture
def forward(launch: Launcher, sockets: Sockets, short_path: Path) -> Forwarding:
    """Starts forwarders."""
    return Forwarding(launch, sockets, short_path)


# -- every reason, in the page and in the log --------------------------------------------


class Scene:
    """One client and the backend it may reach; each method is a way to end."""

    def __init__(self, sockets: Sockets, front: socket.socket, backend: socket.socket) -> None:
        self.sockets = sockets
        self.front = front
        self.backend = backend

    def connect(self) -> socket.socket:
        return self.sockets.connect(self.front)

    def joined(self) -> tuple[socket.socket, socket.socket]:
        client = self.connect()
        client.sendall(b"?")
        accepted = self.sockets.keep(self.backend.accept()[0])
        assert receive(accepted, 1) == b"?"
        return client, accepted

    def nothing(self) -> None:
        """Connect, and wait for what comes."""
        self.connect()

    def end(self) -> None:
        """End as one should, both sides."""
        for sock in self.joined():
            sock.close()

    def reset_both(self) -> None:
        """Reset an open connection."""
        reset(self.joined()[0])

    def reset_silently(self) -> None:
        """Reset before anything was said."""
        reset(self.connect())

    def wait(self) -> None:
        """Be joined, and say no more."""
        self.joined()

    def twice(self) -> None:
        """Come once more while the first is open."""
        self.joined()
        self.connect()

    def saying(self, octets: bytes) -> Callable[[], None]:
        """Say this, and then no more."""

        def say() -> None:
            client = self.connect()
            client.sendall(octets)
            client.shutdown(socket.SHUT_WR)

        return say


HELLO = hellos.hello(hellos.server_name(b"known.example"))
PROXIED = b"PROXY TCP4 192.0.2.7 127.0.0.1 1 2\r\n?"
TLS = '[[route.web.tls]]\nserver-name = "known.example"\nalpn = "h2"\nto = {to}\n'
TRUSTED = 'accept-proxy-from = ["127.0.0.1"]\n'

# reason -> how the connection ends, what the route says, what the client does
ENDS: dict[str, tuple[str, str, Callable[[Scene], Callable[[], None]]]] = {
    "reset": (ENDED, "to = {to}\n", lambda scene: scene.reset_both),
    "idle-timeout": (ENDED, "to = {to}\nidle-timeout = 0.2\n", lambda scene: scene.wait),
    "lifetime": (ENDED, "to = {to}\nlifetime = 0.2\n", lambda scene: scene.wait),
    "connect-refused": (ENDED, "to = {dead}\n", lambda scene: scene.nothing),
    "connect-timeout": (ENDED, "to = {mute}\nconnect-timeout = 0.2\n", lambda s: s.nothing),
    "client-gone": (ENDED, "to = {dead}\nconnect-retry = 60\n", lambda s: s.reset_silently),
    "tls-name-unknown": (ENDED, TLS, lambda s: s.saying(hellos.TLS13)),
    "tls-no-protocol": (ENDED, TLS, lambda s: s.saying(hellos.records(HELLO, [500]))),
    "tls-malformed": (ENDED, TLS, lambda scene: scene.saying(b"GET / HTTP/1.1\r\n\r\n")),
    "head-cut-short": (ENDED, TLS, lambda scene: scene.saying(b"\x16\3\1")),
    "proxy-malformed": (ENDED, TRUSTED + "to = {to}\n", lambda s: s.saying(b"PROXY TCP9 x\r\n")),
    "denied": (REFUSED, 'to = {to}\ndeny = ["127.0.0.1"]\n', lambda scene: scene.nothing),
    "proxy-untrusted": (
        REFUSED, 'to = {to}\naccept-proxy-from = ["192.0.2.1"]\n', lambda scene: scene.nothing
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", [*ENDS, "eof"])
def test_forward_end_of_a_connection_is_counted_and_logged_by_its_reason(
    forward: Forwarding, sockets: Sockets, reason: str
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    how = (ENDED, "to = {to}\n", lambda scene: scene.end)
    metric, text, act = ENDS.get(reason, how)
    dead = sockets.bind(kind=socket.SOCK_STREAM)
    with mute(sockets) as silent:
        places = {"to": backend, "dead": dead, "mute": silent}
        words = {key: json.dumps(target(one)) for key, one in places.items()}
        forwarder = forward.config(
            f"[route.web]\n{text.format(**words)}", "--access-log", "json",
            web=front, metrics=metrics,
        )  # fmt: skip
        with contextlib.suppress(ConnectionResetError):  # before connect() has returned
            act(Scene(sockets, front, backend))()
        line = eventually(lambda: forwarder.stderr, "a line of the log")
    fields = json.loads(line)
    assert (fields["end"], fields["route"]) == (reason, "web")
    assert fields["client"].startswith("127.0.0.1")
    page = pages.scrape(metrics)
    assert page["connections", "web"] == 0
    counted = {key[2] for key, value in page.items() if key[0] in (ENDED, REFUSED) and value}
    if reason == "eof":
        assert not counted
    else:
        assert counted == {reason}
        assert page[metric, "web", reason] == 1


@contextlib.contextmanager
def mute(sockets: Sockets) -> Iterator[socket.socket]:
    """Give a listening socket that does not answer any more: its backlog is full."""
    server = sockets.listen(backlog=0)
    for _ in range(2):
        client = sockets.keep(socket.socket())
        client.setblocking(False)
        client.connect_ex(server.getsockname())
    yield server


@pytest.mark.parametrize("whose", ["route", "process"])
def test_forward_source_limit_is_counted_and_logged(
    forward: Forwarding, sockets: Sockets, whose: str
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    key = "max-connections-per-source"
    forwarder = forward.config(
        f'[route.web]\nto = "{target(backend)}"\n' + (f"{key} = 1\n" if whose == "route" else ""),
        *((f"--{key}", "1") if whose == "process" else ()), "--access-log", "json",
        web=front, metrics=metrics,
    )  # fmt: skip
    Scene(sockets, front, backend).twice()
    page = pages.until(metrics, {(REFUSED, "web", "source-limit"): 1})
    assert (page["connections", "web"], page["connections_total", "web"]) == (1, 1)
    fields = json.loads(eventually(lambda: forwarder.stderr, "a line"))
    assert (fields["route"], fields["end"]) == ("web", "source-limit")
    assert fields["client"].startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("rule", "reason"),
    [('deny = ["192.0.2.7"]', "denied"), ("max-connections-per-source = 1", "source-limit")],
)
def test_forward_client_of_a_proxy_that_may_not_come_is_counted_and_logged(
    forward: Forwarding, sockets: Sockets, rule: str, reason: str
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    forwarder = forward.config(
        f'[route.web]\nto = "{target(backend)}"\n{TRUSTED}{rule}\n', "--access-log", "json",
        web=front, metrics=metrics,
    )  # fmt: skip
    for _ in range(2):
        sockets.connect(front).sendall(PROXIED)
    pages.until(metrics, {(ENDED, "web", reason): 2 if reason == "denied" else 1})
    line = eventually(lambda: forwarder.stderr.splitlines(), "a line")[0]
    fields = json.loads(line)
    assert (fields["client"], fields["end"]) == ("192.0.2.7:1", reason)


def test_forward_drain_that_is_cut_is_logged(forward: Forwarding, sockets: Sockets) -> None:
    front, backend = sockets.listen(), sockets.listen()
    options = ["--drain", "0.2", "--access-log", "text"]
    forwarder = forward.to(front, backend, options=options)
    Scene(sockets, front, backend).wait()
    assert forwarder.stop() == 0
    assert "end=drain-timeout" in forwarder.stderr.split()


def test_forward_datagram_sessions_are_logged(forward: Forwarding, sockets: Sockets) -> None:
    front, backend = sockets.bind(), sockets.bind()
    options = ["--idle-timeout", "0.2", "--access-log", "json"]
    forwarder = forward.to(front, backend, options=options)
    client = sockets.connect(front)
    client.send(b"question")
    octets, peer = backend.recvfrom(100)
    backend.sendto(b"no", peer)
    assert (octets, client.recv(100)) == (b"question", b"no")
    fields = json.loads(eventually(lambda: forwarder.stderr, "a line"))
    assert fields["client"] == "{}:{}".format(*client.getsockname())
    assert (fields["received"], fields["sent"], fields["end"]) == (8, 2, "idle")


def test_forward_access_log_names_the_server_that_was_asked_for(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    rule = f'[[route.web.tls]]\nserver-name = "*"\nto = "{target(backend)}"\n'
    forwarder = forward.config(rule, "--access-log", "text", web=front, metrics=metrics)
    evil = b'x" end=eof route=other\\'
    client = sockets.connect(front)
    octets = hellos.records(hellos.hello(hellos.server_name(evil)), [500])
    client.sendall(octets)
    client.close()
    sockets.keep(backend.accept()[0]).close()
    eventually(lambda: forwarder.stderr.endswith("\n"), "a line")
    [line] = forwarder.stderr.splitlines()
    assert line.startswith("route=web client=127.0.0.1:")
    assert f"received={len(octets)}" in line.split(), "the backend got those of the hello, too"
    assert pages.scrape(metrics)["received_octets_total", "web"] == len(octets)
    assert "route=other" not in line.split(), "a client's words must not look like fields of ours"


def test_forward_access_log_shows_paths_that_are_no_text(
    forward: Forwarding, sockets: Sockets
) -> None:
    place = os.fsencode(sockets.path())
    front, backend = sockets.listen(socket.AF_UNIX), sockets.listen(socket.AF_UNIX, place + b"\xff")
    to = f"unix:{os.fsdecode(place)}\udcff"
    forwarder = forward.to(front, to, options=["--access-log", "json"])
    name = place + b'\xfe"\\\n'
    sockets.connect(front, source=name).close()
    sockets.keep(backend.accept()[0]).close()
    line = eventually(lambda: forwarder.stderr, "a line")
    fields = json.loads(line)
    assert "\\udc" not in line, "half a surrogate pair, which strict readers refuse"
    assert fields["target"] == f"unix:{os.fsdecode(place)}\\xff"
    assert fields["client"] == os.fsdecode(place) + r'\xfe"\\n'


def test_forward_access_log_that_nobody_reads_holds_up_nobody(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    forward.stdout = writer
    with os.fdopen(reader, "rb") as log:
        text = f'[route.web]\nto = "{target(backend)}"\n'
        forwarder = forward.config(text, "--access-log", "json", web=front, metrics=metrics)
        os.close(writer)
        many, dropped = 1200, ("dropped_log_lines_total",)
        for _ in range(many):
            Scene(sockets, front, backend).end()
        pages.until(metrics, {("connections", "web"): 0})
        lost = int(pages.scrape(metrics)[dropped])
        assert 0 < lost < 200
        for _ in range(many - lost):
            assert json.loads(log.readline())["end"] == "eof"
        Scene(sockets, front, backend).reset_both()  # and goes on as soon as somebody reads
        assert json.loads(log.readline())["end"] == "reset"
        assert pages.scrape(metrics)[dropped] == lost
        for _ in range(100):
            Scene(sockets, front, backend).end()
        began = time.monotonic()
        assert forwarder.stop() == 0
        assert time.monotonic() - began < 5, "nor is its end held up"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_forward_access_log_is_complete_when_the_process_ends(
    forward: Forwarding, sockets: Sockets, workers: str
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    options = ["--access-log", "text", "--drain", "0.2", "--workers", workers]
    forwarder = forward.to(front, backend, options=options)
    for _ in range(50):
        Scene(sockets, front, backend).wait()
    assert forwarder.stop() == 0
    assert forwarder.stderr.count("end=drain-timeout\n") == 50


def test_forward_access_log_that_is_closed_is_no_reason_to_end(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    reader, forward.stdout = os.pipe()
    text = f'[route.web]\nto = "{target(backend)}"\n'
    forward.config(text, "--access-log", "text", web=front, metrics=metrics)
    for end in (reader, forward.stdout):
        os.close(end)
    for _ in range(3):
        Scene(sockets, front, backend).end()
    pages.until(metrics, {("dropped_log_lines_total",): 3})


# -- counters by route ---------------------------------------------------------------------


def test_forward_counters_are_kept_by_route(forward: Forwarding, sockets: Sockets) -> None:
    fronts = {name: sockets.listen() for name in ("a", "b")}
    metrics, backend = sockets.listen(), sockets.listen()
    forward.config(f'[route."*"]\nto = "{target(backend)}"\n', metrics=metrics, **fronts)
    for name, there, back in (("a", 10, 20), ("b", 300, 4000), ("b", 0, 1)):
        client, accepted = forward.joined(fronts[name], backend)
        client.sendall(bytes(there))
        receive(accepted, there)
        accepted.sendall(bytes(back))
        receive(client, back)
        pages.until(metrics, {("connections", name): 1})
        for sock in (client, accepted):
            sock.close()
        pages.until(metrics, {("connections", name): 0})
    page = pages.scrape(metrics)
    assert [page[metric, "a"] for metric in _COUNTED] == [1, 10, 20]
    assert [page[metric, "b"] for metric in _COUNTED] == [2, 300, 4001]


_COUNTED = ("connections_total", "received_octets_total", "sent_octets_total")


# -- configuration ---------------------------------------------------------------------------


def test_forward_check_says_all_that_a_configuration_means(short_path: Path) -> None:
    file = short_path / "f.toml"
    file.write_text(_CONFIGURATION)
    done = check(file)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == _MEANING


def check(file: Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "forward", "--check", "--config", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_forward_check_that_cannot_be_written_is_told_in_one_line(short_path: Path) -> None:
    file = short_path / "f.toml"
    file.write_text(_CONFIGURATION)
    command = shlex.join([*COMMAND, "forward", "--check", "--config", str(file)])
    done = subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, text=True)
    line = "echo-appliance: standard output cannot be written: Bad file descriptor\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_forward_check_shows_a_path_that_is_no_text() -> None:
    command = [*COMMAND, "forward", "--check", "--to", os.fsdecode(b"unix:/run/\xff")]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in most people's locales
    done = subprocess.run(command, capture_output=True, timeout=30, env=strict)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"to unix:/run/" in done.stdout


_CONFIGURATION = """
[defaults]
connect-timeout = 2

[route.redis]
to = ["tcp:127.0.0.1:6379", "unix:/run/backends/redis"]
balance = "round-robin"
connect-retry = 30
allow = ["10.0.0.0/8", "unix"]
deny = ["10.9.0.0/16"]
max-connections = 100
max-connections-per-source = 10
idle-timeout = 300
lifetime = 86400
keepalive = 60

[route.web]
accept-proxy-from = ["192.0.2.1"]
proxy-protocol = "v2"
[[route.web.tls]]
server-name = ["example.org", "*.example.org"]
to = "vsock:3:443"
[[route.web.tls]]
server-name = "example.org"
alpn = "h2"
to = "fd:h2"
connect-timeout = 9
proxy-protocol = "none"
"""
_MEANING = """\
route redis:
  to tcp:127.0.0.1:6379, unix:/run/backends/redis
  tcp:127.0.0.1:6379, unix:/run/backends/redis: round-robin
  connecting takes at most 2 s, retried for 30 s
  only from 10.0.0.0/8, unix
  never from 10.9.0.0/16
  connections: at most 100
  connections of one source: at most 10
  seconds without data: at most 300
  seconds in all: at most 86400
  seconds of silence before a TCP keepalive: 60
route web:
  TLS example.org -> vsock:3:443
  TLS example.org with ALPN h2 -> fd:h2
  TLS *.example.org -> vsock:3:443
  connecting takes at most 2 s
  vsock:3:443: is sent the client's address by PROXY v2
  connecting takes at most 9 s
  only with a PROXY header, and only from 192.0.2.1
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[route.web]\nto = 'tcp:h:1'\n[[route.web.tls]]\nserver-name = '*'\nto = 'tcp:i:1'\n",
         "two of the kind: a default"),
        ("[[route.web.tls]]\nserver-name = '*'\nto = 'tcp:h:1'\n"
         "[[route.web.tls]]\nserver-name = '*'\nto = 'tcp:i:1'\n", "two of the kind: a default"),
        ("[route.web]\nto = 'tcp:h:1'\nallow = ['nonsense']\n", "'nonsense' is no peer"),
        ("[route.web]\nto = 'tcp:h:1'\nallow = '10.0.0.0/" + 5000 * "1" + "'\n", "from 0 to 32"),
        ("[route.web]\nto = 'tcp:h:1'\nconnect-timeout = 0\n", "no backend time to answer"),
        ("[route.web]\nto = 'tcp:h:1'\nidle-timeout = -1\n", "not a number of seconds"),
        ("[route.web]\nto = 'tcp:h:1'\nproxy-protocol = 'v3'\n", "none of 'none', 'v1', 'v2'"),
        ("[route.web]\nto = 'tcp:h:1'\nanswers-in = 'here'\n", "not the absolute path"),
        ("[route.web]\nto = 'tcp:h:1'\nanswers-in = '/" + 90 * "x" + "'\n", "too long"),
        ("[defaults]\nto = 'tcp:h:1'\n", "unknown key 'to'"),
        ("[wrong]\n", "unknown key 'wrong'"),
        ("[route.web]\nto = 'gopher:h:1'\n", "must begin with one of"),
        ("[route.web]\nto = 'unix-seqpacket:/x'\n", "only streams and datagrams"),
        ("[route.web]\nto = 'vsock:host:1'\n", "is not a CID"),
        ("[route.web]\nto = 'fd:'\n", "needs the name of a passed descriptor"),
        ("[route.web]\nto = []\n", "name at least one target"),
        ("[route.web]\nto = " + 1000 * "[" + 1000 * "]" + "\n", "nest too deeply"),
        ("[route.web]\nlifetime = " + 5000 * "1" + "\n", "Exceeds the limit"),
    ],
)  # fmt: skip
def test_forward_check_refuses_nonsense_in_one_line(
    short_path: Path, text: str, words: str
) -> None:
    file = short_path / "f.toml"
    file.write_text(text)
    done = check(file)
    assert done.returncode != 0
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_forward_reload_under_load_loses_no_connection(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backends = sockets.listen(), [sockets.listen(), sockets.listen()]
    texts = [f'[route.web]\nto = "{target(one)}"\nconnect-retry = 5\n' for one in backends]
    forwarder = forward.config(texts[0], web=front)
    over, nobody_asks = threading.Event(), threading.Event()
    wrong: list[str] = []
    counts = [0, 0, 0, 0]

    def serve(backend: socket.socket) -> None:
        backend.settimeout(0.1)
        while not nobody_asks.is_set():
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                accepted, _ = backend.accept()
                accepted.settimeout(15)
                with accepted:
                    accepted.sendall(accepted.recv(10))
                    accepted.recv(1)

    def ask(number: int) -> None:
        while not over.is_set():
            with socket.create_connection(front.getsockname(), timeout=15) as client:
                client.sendall(b"?")
                if client.recv(10) != b"?":
                    wrong.append("no answer")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            counts[number] += 1

    servers = [in_thread(functools.partial(serve, one)) for one in backends]
    clients = [in_thread(functools.partial(ask, number)) for number in range(len(counts))]
    for turn in range(1, 41):
        # Replaced, not written over: it must never be seen half written.
        new = forward.file.with_suffix(".new")
        new.write_text(texts[turn % 2] if turn % 4 else "[[[")
        new.rename(forward.file)
        forwarder.signal(signal.SIGHUP)
        said = ("is in force", "the old configuration stays")
        eventually(
            lambda: sum(forwarder.stderr.count(one) for one in said) >= turn,  # noqa: B023
            f"reload {turn}",
        )
    over.set()
    for thread in clients:
        thread.join(20)
    nobody_asks.set()
    for thread in servers:
        thread.join(20)
    assert not wrong
    assert all(counts), counts
    assert forwarder.stderr.count("the old configuration stays") == 10


# -- the watchdog ----------------------------------------------------------------------------


def fed(forwarder: Server, times: int) -> None:
    eventually(lambda: forwarder.notified.take().count("WATCHDOG=1") >= times, f"fed {times} times")


def test_forward_watchdog_is_fed_whatever_the_backends_do(
    forward: Forwarding, launch: Launcher, sockets: Sockets, payload: bytes
) -> None:
    front, backend, dead = sockets.listen(), sockets.listen(), sockets.bind(kind=socket.SOCK_STREAM)
    forward.write(
        f'[route.a]\nto = "{target(backend)}"\n'
        f'[route.b]\nto = "{target(dead)}"\nconnect-retry = 60\n'
    )
    other = sockets.listen()
    forwarder = launch.start(
        [front, other], "--config", str(forward.file), names=["a", "b"],
        environment={"WATCHDOG_USEC": "200000"}, command=(*COMMAND, "forward"),
    )  # fmt: skip
    client, _ = forward.joined(front, backend)
    stuff(client, memoryview(payload))  # a backend that does not read
    waiting = sockets.connect(other)  # one that is not there
    fed(forwarder, 10)
    times = forwarder.notified.times("WATCHDOG=1")
    assert max(after - before for before, after in itertools.pairwise(times)) < 1.0
    forwarder.freeze()
    heard = forwarder.notified.take().count("WATCHDOG=1")
    time.sleep(0.5)
    assert forwarder.notified.take().count("WATCHDOG=1") <= heard + 1
    forwarder.thaw()
    assert waiting.fileno() >= 0
