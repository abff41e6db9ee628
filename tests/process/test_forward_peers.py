"""The forwarder between programs of others: redis, openssl, curl, haproxy, nginx, iperf3."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from echo_appliance.forward.proxy_protocol import Family, Header, serialize_v2
from tests.process import pages, programs
from tests.process.forwarding import FAMILIES, Forwarding
from tests.process.launcher import COMMAND, Launcher, eventually
from tests.process.peers import Sockets, receive, receive_to_end
from tests.unit import hellos


@pytest.fixture
def forward(launch: Launcher, sockets: Sockets, short_path: Path) -> Forwarding:
    """Starts forwarders."""
    return Forwarding(launch, sockets, short_path)


def port_of(sock: socket.socket) -> str:
    return str(sock.getsockname()[1])


def run(*command: str, stdin: str = "", status: int = 0) -> str:
    """Run a client to its end; return all it said."""
    done = subprocess.run(list(command), input=stdin, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


# -- redis: the demonstration that this mode began with ----------------------------


def test_forward_redis_answers_ping(
    forward: Forwarding, sockets: Sockets, short_path: Path
) -> None:
    cli = programs.find("redis-cli", "redis-tools")
    with programs.redis(short_path) as port:
        front = sockets.listen()
        forward.to(front, f"tcp:127.0.0.1:{port}")
        assert run(cli, "-p", port_of(front), "ping") == "PONG\n"
        assert run(cli, "-p", port_of(front), "set", "key", "v" * 100_000) == "OK\n"
        assert run(cli, "-p", port_of(front), "get", "key") == "v" * 100_000 + "\n"
        benchmark = programs.find("redis-benchmark", "redis-tools")
        words = ("-p", port_of(front), "-q", "-n", "2000", "-c", "50", "-P", "16", "-t", "get,set")
        assert "requests per second" in run(benchmark, *words)


def test_forward_redis_by_systemd_socket_activate(short_path: Path) -> None:
    activate = programs.find("systemd-socket-activate", "systemd")
    cli = programs.find("redis-cli", "redis-tools")
    port = programs.free_port()
    with programs.redis(short_path) as backend:
        command = [activate, "-l", f"127.0.0.1:{port}", *COMMAND, "forward"]
        to = ["--to", f"tcp:127.0.0.1:{backend}", "--exit-idle", "1"]
        with programs.running([*command, *to], short_path / "log") as process:
            eventually(lambda: listens(port), "the port to be there")
            assert run(cli, "-p", str(port), "ping") == "PONG\n"
            assert process.wait(15) == 0


def listens(port: int) -> bool:
    # Not by connecting: that would be the connection which starts the forwarder.
    return f"0100007F:{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text()


# -- TLS ---------------------------------------------------------------------------


class Tls:
    """Two servers behind one front, by name, and what to ask them with."""

    def __init__(self, front: socket.socket, metrics: socket.socket) -> None:
        self.front = front
        self.metrics = metrics
        self._openssl = programs.find("openssl", "openssl")

    def subject(self, *options: str, status: int = 0) -> str:
        """Return whose certificate a client is shown, or all it says about the failure."""
        where = f"127.0.0.1:{port_of(self.front)}"
        words = ("s_client", "-connect", where, *options)
        return run(self._openssl, *words, stdin="Q\n", status=status)


@pytest.fixture
def tls(forward: Forwarding, sockets: Sockets, short_path: Path) -> Iterator[Tls]:
    """Give one.example and *.two.example, each its own server, and no default."""
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(programs.tls_server(short_path, "one.example"))
        two = stack.enter_context(programs.tls_server(short_path, "two.example"))
        h2 = stack.enter_context(programs.tls_server(short_path, "h2.example", "-alpn", "h2"))
        front, metrics = sockets.listen(), sockets.listen()
        rules = [
            (["one.example"], [], one),
            (["two.example", "*.two.example"], [], two),
            (["both.example"], ["h2"], h2),
            (["both.example"], ["http/1.1"], one),
        ]
        text = "".join(
            f"[[route.web.tls]]\nserver-name = {json.dumps(names)}\nalpn = {json.dumps(alpn)}\n"
            f'to = "tcp:127.0.0.1:{port}"\n'
            for names, alpn, port in rules
        )
        forward.config(text, web=front, metrics=metrics)
        yield Tls(front, metrics)


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_sni_leads_to_the_server_of_that_name(tls: Tls, version: str) -> None:
    assert "CN = one.example" in tls.subject("-servername", "one.example", version)
    assert "CN = two.example" in tls.subject("-servername", "a.two.example", version)
    assert "CN = two.example" in tls.subject("-servername", "TWO.example", version)


def test_sni_alpn_is_the_second_key(tls: Tls) -> None:
    both = ("-servername", "both.example")
    assert "CN = h2.example" in tls.subject(*both, "-alpn", "h2,http/1.1")
    assert "CN = one.example" in tls.subject(*both, "-alpn", "http/1.1")
    assert "no application protocol" in tls.subject(*both, "-alpn", "x", status=1)


def test_sni_unknown_or_missing_names_get_an_alert(tls: Tls) -> None:
    words = "unrecognized name"
    assert words in tls.subject("-servername", "other.example", status=1)
    assert words in tls.subject("-noservername", status=1)
    page = pages.scrape(tls.metrics)
    assert page["connections_ended_total", "web", "tls-name-unknown"] == 2


def test_sni_curl_gets_a_page(tls: Tls) -> None:
    curl = programs.find("curl", "curl")
    port = port_of(tls.front)
    where = ("--resolve", f"one.example:{port}:127.0.0.1", f"https://one.example:{port}/")
    assert "s_server" in run(curl, "-sk", "--max-time", "20", *where)


def test_sni_hello_in_small_segments_is_read(
    forward: Forwarding, sockets: Sockets, short_path: Path
) -> None:
    # An MSS of 100: the kernel cuts what the client sends, here a ClientHello of 339 octets.
    front = sockets.bind(kind=socket.SOCK_STREAM)
    front.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 100)
    front.listen()
    with programs.tls_server(short_path, "one.example") as port:
        text = '[[route.web.tls]]\nserver-name = "one.example"\n'
        forward.config(f'{text}to = "tcp:127.0.0.1:{port}"\n', web=front)
        found = Tls(front, front).subject("-servername", "one.example", "-alpn", "h2,http/1.1")
        assert "CN = one.example" in found


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_sni_large_hello_is_read(tls: Tls, version: str) -> None:
    # 10 KB of it: more than one segment, and almost the record's 16 KiB.
    many = ",".join(f"{number:03}{'x' * 100}" for number in range(100))
    words = ("-servername", "one.example", version, "-alpn", many)
    assert "CN = one.example" in tls.subject(*words)


def test_sni_hello_octet_by_octet_reaches_the_backend_untouched(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    to = f'to = "tcp:127.0.0.1:{port_of(backend)}"\n'
    forward.config(f'[[route.web.tls]]\nserver-name = "*.example"\n{to}', web=front)
    message = hellos.hello(hellos.server_name(b"large.example"), (21, bytes(2000)))
    octets = hellos.records(message, [7, 1, 500]) + b"early data"
    client = sockets.connect(front)
    for octet in octets:
        client.send(bytes((octet,)))
    accepted = sockets.keep(backend.accept()[0])
    assert receive(accepted, len(octets)) == octets
    client.sendall(b"more")
    assert receive(accepted, 4) == b"more"


@pytest.mark.parametrize(
    ("octets", "reason", "answer"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "tls-malformed", bytes.fromhex("15030100020232")),
        (b"\x16\3\1\x40\0" + bytes(3), None, b""),
        (b"", "head-cut-short", b""),
    ],
)
def test_sni_what_is_no_hello_is_closed_and_counted(
    forward: Forwarding, sockets: Sockets, octets: bytes, reason: str | None, answer: bytes
) -> None:
    front, metrics = sockets.listen(), sockets.listen()
    rule = '[[route.web.tls]]\nserver-name = "*"\nto = "tcp:127.0.0.1:1"\n'
    forwarder = forward.config(rule, web=front, metrics=metrics)
    client = sockets.connect(front)
    client.sendall(octets)
    if reason is None:  # it may still become one: that takes as long as it may take
        forwarder.assert_sleeps()
        return
    client.shutdown(socket.SHUT_WR)
    assert receive_to_end(client) == answer
    assert pages.scrape(metrics)["connections_ended_total", "web", reason] == 1


def test_sni_flood_that_never_ends_its_hello_is_cut(forward: Forwarding, sockets: Sockets) -> None:
    front, metrics = sockets.listen(), sockets.listen()
    rule = '[[route.web.tls]]\nserver-name = "*"\nto = "tcp:127.0.0.1:1"\n'
    forwarder = forward.config(rule, web=front, metrics=metrics)
    flood = hellos.records(b"\1\0\x40\0" + bytes(16_000), [1])
    clients = [sockets.connect(front) for _ in range(20)]
    before = forwarder.rss
    for client in clients:
        client.sendall(flood)
    slow = sockets.connect(front)
    octets = (flood[at : at + 1] for at in range(len(flood)))
    began = time.monotonic()
    ended = ("connections_ended_total", "web", "head-timeout")
    while pages.scrape(metrics).get(ended, 0) < 21:
        assert time.monotonic() - began < 25
        with contextlib.suppress(OSError):
            slow.send(next(octets))  # an octet per second does not help either
        time.sleep(1)
    assert time.monotonic() - began > 8
    assert forwarder.rss - before < len(clients) * 400_000


# -- the PROXY protocol ----------------------------------------------------------------


@pytest.mark.parametrize("version", ["", "-v2"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_proxy_protocol_of_haproxy_is_believed(
    forward: Forwarding, sockets: Sockets, short_path: Path, version: str, host: str
) -> None:
    front, backend = sockets.listen(), sockets.listen()
    text = (
        f'[route.web]\nto = "tcp:127.0.0.1:{port_of(backend)}"\n'
        'accept-proxy-from = ["127.0.0.0/8"]\nallow = ["127.0.0.1", "::1"]\n'
    )
    forwarder = forward.config(text, "--access-log", "json", web=front)
    proxy_port = programs.free_port()
    listen = f"listen x\n bind {host}:{proxy_port}\n server s 127.0.0.1:{port_of(front)}"
    with programs.haproxy(short_path, f"{listen} send-proxy{version}\n"):
        client = connect_to(sockets, host, proxy_port)
        client.sendall(b"hello")
        accepted = sockets.keep(backend.accept()[0])
        assert receive(accepted, 5) == b"hello"
        name = client.getsockname()
        client.close()
        accepted.close()
        line = json.loads(eventually(lambda: forwarder.stderr, "the log line").splitlines()[-1])
        shown = f"[{host}]:{name[1]}" if ":" in host else f"{host}:{name[1]}"
        assert line["client"] == shown


def connect_to(sockets: Sockets, host: str, port: int) -> socket.socket:
    """Connect as soon as somebody listens there."""

    def attempt() -> socket.socket | None:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if sock.connect_ex((host, port)):
            sock.close()
            return None
        return sock

    found = eventually(attempt, f"{host}:{port} to be served")
    assert found is not None
    return sockets.keep(found)


def test_proxy_header_of_a_stranger_is_refused_and_counted(
    forward: Forwarding, sockets: Sockets
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    text = f'[route.web]\nto = "tcp:127.0.0.1:{port_of(backend)}"\n'
    forward.config(f'{text}accept-proxy-from = ["192.0.2.1"]\n', web=front, metrics=metrics)
    with contextlib.suppress(ConnectionResetError):
        client = sockets.connect(front)
        client.sendall(b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n")
        assert client.recv(1) == b""
    assert pages.scrape(metrics)["connections_refused_total", "web", "proxy-untrusted"] == 1


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "proxy-malformed"),
        (b"PROXY TCP4 9.9.9.9 2.2.2.2 1 2\r\n", "denied"),
    ],
)
def test_proxy_clients_are_judged_by_the_header(
    forward: Forwarding, sockets: Sockets, octets: bytes, reason: str
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    forward.config(
        f'[route.web]\nto = "tcp:127.0.0.1:{port_of(backend)}"\n'
        'accept-proxy-from = "127.0.0.1"\ndeny = "9.9.9.9"\nmax-connections-per-source = 1\n',
        web=front, metrics=metrics,
    )  # fmt: skip
    client = sockets.connect(front)
    client.sendall(octets)
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""
    assert pages.scrape(metrics)["connections_ended_total", "web", reason] == 1
    for host in ("8.8.8.8", "8.8.4.4"):  # two of one proxy: each counts for itself
        good = sockets.connect(front)
        good.sendall(f"PROXY TCP4 {host} 2.2.2.2 1 2\r\nhello".encode())
        assert receive(sockets.keep(backend.accept()[0]), 5) == b"hello"


ANONYMOUS = {
    "UNKNOWN": b"PROXY UNKNOWN 9.9.9.9 2.2.2.2 1 2\r\n",
    "LOCAL": serialize_v2(Header(Family.UNSPEC, local=True)),
    "UNSPEC": bytes.fromhex("0d0a0d0a000d0a515549540a21000000"),
}


@pytest.mark.parametrize("header", list(ANONYMOUS))
@pytest.mark.parametrize("family", ["inet", "inet6", "unix"])
def test_proxy_header_without_a_client_leaves_the_proxy_to_be_judged(
    forward: Forwarding, sockets: Sockets, family: str, header: str
) -> None:
    fronts = {name: sockets.listen(*FAMILIES[family]) for name in ("open", "allowed", "denied")}
    metrics, backend = sockets.listen(), sockets.listen()
    trusted = 'accept-proxy-from = ["127.0.0.1", "::1", "unix"]\n'
    rules = {
        "open": 'deny = ["9.9.9.9"]',
        "allowed": 'allow = ["127.0.0.1", "::1", "unix"]\nmax-connections-per-source = 1',
        "denied": 'allow = ["9.9.9.9"]',
    }
    to = f'to = "tcp:127.0.0.1:{port_of(backend)}"\n'
    text = "".join(f"[route.{name}]\n{to}{trusted}{rule}\n" for name, rule in rules.items())
    forward.config(text, metrics=metrics, **fronts)
    for name in ("open", "allowed"):
        sockets.connect(fronts[name]).sendall(ANONYMOUS[header] + b"hello")
        assert receive(sockets.keep(backend.accept()[0]), 5) == b"hello"
    sockets.connect(fronts["denied"]).sendall(ANONYMOUS[header])
    pages.until(metrics, {("connections_ended_total", "denied", "denied"): 1})
    if family != "unix":  # where there are sources, it is one
        sockets.connect(fronts["allowed"]).sendall(ANONYMOUS[header])
        pages.until(metrics, {("connections_ended_total", "allowed", "source-limit"): 1})


@pytest.mark.parametrize(
    ("allow", "name", "logged"),
    [
        ("unix", "", "127.0.0.1:"),
        ("unix", "/run/with\nline", r"/run/with\nline"),
        ("unix", "\0abstract", "@abstract"),
        ("10.0.0.0/8", "10.0.0.1", None),  # a path like any other
        ("10.0.0.0/8", "", None),
        ("vsock", "/run/web", None),
    ],
)
def test_proxy_clients_on_unix_sockets_are_judged_as_such(
    forward: Forwarding, sockets: Sockets, allow: str, name: str, logged: str | None
) -> None:
    front, metrics, backend = sockets.listen(), sockets.listen(), sockets.listen()
    forwarder = forward.config(
        f'[route.web]\nto = "tcp:127.0.0.1:{port_of(backend)}"\n'
        f'accept-proxy-from = "127.0.0.1"\nallow = "{allow}"\n',
        "--access-log", "json", web=front, metrics=metrics,
    )  # fmt: skip
    client = sockets.connect(front)
    client.sendall(serialize_v2(Header(Family.UNIX, (name, 0), ("/run/proxy", 0))) + b"hello")
    if logged is None:
        pages.until(metrics, {("connections_ended_total", "web", "denied"): 1})
        return
    accepted = sockets.keep(backend.accept()[0])
    assert receive(accepted, 5) == b"hello"
    for sock in (client, accepted):
        sock.close()
    line = json.loads(eventually(lambda: forwarder.stderr, "the log line"))
    assert line["client"].startswith(logged)


# haproxy 2.6 refuses the unix addresses of version 2; nginx skips them.
@pytest.mark.parametrize(
    ("family", "version"),
    [("inet", "v1"), ("inet", "v2"), ("inet6", "v1"), ("inet6", "v2"), ("unix", "v1")],
)
def test_proxy_protocol_is_understood_by_haproxy(
    forward: Forwarding, sockets: Sockets, short_path: Path, family: str, version: str
) -> None:
    front, port = sockets.listen(*FAMILIES[family]), programs.free_port()
    # haproxy answers with the source that it was told.
    text = (
        f"frontend x\n mode http\n bind 127.0.0.1:{port} accept-proxy\n"
        ' http-request return status 200 content-type text/plain lf-string "<%[src]:%[src_port]>"\n'
    )
    with programs.haproxy(short_path, text):
        page, client = ask_by_proxy(forward, sockets, front, f"tcp:127.0.0.1:{port}", version)
    if family != "unix":
        name = client.getsockname()
        assert f"<{name[0]}:{name[1]}>".encode() in page


@pytest.mark.parametrize("family", ["inet", "inet6", "unix"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_proxy_protocol_is_understood_by_nginx(
    forward: Forwarding, sockets: Sockets, short_path: Path, family: str, version: str
) -> None:
    front, path = sockets.listen(*FAMILIES[family]), str(short_path / "web")
    server = f'listen unix:{path} proxy_protocol; return 200 "<$proxy_protocol_addr>";'
    with programs.nginx(short_path, server):
        page, client = ask_by_proxy(forward, sockets, front, f"unix:{path}", version)
    if family != "unix":
        assert f"<{client.getsockname()[0]}>".encode() in page


def ask_by_proxy(
    forward: Forwarding, sockets: Sockets, front: socket.socket, to: str, version: str
) -> tuple[bytes, socket.socket]:
    """Ask a web server that wants a PROXY header; return its page, and who asked."""
    forward.to(front, to, options=["--proxy-protocol", version, "--connect-retry", "10"])
    client = sockets.connect(front)
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    page = receive_to_end(client)
    assert page.startswith(b"HTTP/1.1 200"), page
    return page, client


# -- nginx, iperf3 -----------------------------------------------------------------------


def test_forward_nginx_on_a_unix_socket_serves_curl(
    forward: Forwarding, sockets: Sockets, short_path: Path
) -> None:
    path, front = str(short_path / "web"), sockets.listen()
    (short_path / "large").write_bytes(b"0123456789" * 1_000_000)
    with programs.nginx(short_path, f"listen unix:{path}; root {short_path};"):
        forward.to(front, f"unix:{path}", options=["--connect-retry", "10"])
        url = f"http://127.0.0.1:{port_of(front)}/large"
        curl = programs.find("curl", "curl")
        assert len(run(curl, "-s", "--max-time", "20", url)) == 10_000_000


@pytest.mark.parametrize("direction", [(), ("-R",)], ids=["to", "from"])
def test_forward_iperf3(
    forward: Forwarding, sockets: Sockets, short_path: Path, direction: tuple[str, ...]
) -> None:
    iperf3, port = programs.find("iperf3", "iperf3"), programs.free_port()
    front = sockets.listen()
    forward.to(front, f"tcp:127.0.0.1:{port}")
    with programs.iperf3_server(short_path, port):
        words = ("-c", "127.0.0.1", "-p", port_of(front), "-P", "4", "-n", "32M", "-J")
        ended = json.loads(run(iperf3, *words, *direction))["end"]
    assert ended["sum_sent"]["bytes"] >= 32 << 20
    assert ended["sum_received"]["bytes"] > 0
