"""forward: ours beside systemd-socket-proxyd and haproxy (one thread), before the same backends.

The relay runs on one core, its clients and backends on the other.
"""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench import core
from bench.core import ROOT, Cores, Options, Running, Series, Server
from bench.echo_bench import ENTRY_POINT
from bench.report import Row, Section, Target
from tests.unit import hellos

OURS, PROXYD, HAPROXY, DIRECT = "forward", "systemd-socket-proxyd", "haproxy", "direct"
WITH_TLS = "forward, by server name"
RELAYS = (OURS, PROXYD, HAPROXY)

PROXYD_PATH = "/usr/lib/systemd/systemd-socket-proxyd"
TOOLS = {
    "gcc": "gcc libc6-dev",
    "haproxy": "haproxy",
    "iperf3": "iperf3",
    "redis-server": "redis-server",
    "redis-benchmark": "redis-tools",
    PROXYD_PATH: "systemd",
}

_HAPROXY = """\
global
 nbthread 1
 maxconn 9900
defaults
 mode tcp
 timeout connect 5s
 timeout client 5m
 timeout server 5m
listen bench
 bind "127.0.0.1:${PORT}"
 server backend "127.0.0.1:${BACKEND}"
"""


def relay(name: str, backend: int, folder: Path) -> Server:
    """Return how to start a relay that leads to this loopback port."""
    app = {"PYTHONPATH": str(ROOT / "app"), "LISTEN_FDNAMES": "bench"}
    ours = (sys.executable, "-c", ENTRY_POINT, "forward")
    to = f"tcp:127.0.0.1:{backend}"
    if name == PROXYD:
        return Server(name, (PROXYD_PATH, "-c", "20000", f"127.0.0.1:{backend}"), takes=1)
    if name == HAPROXY:
        file = folder / "haproxy.cfg"
        file.write_text(_HAPROXY)
        script = f"PORT={{port}} BACKEND={backend} exec haproxy -db -q -f {file}"
        return Server(name, ("sh", "-c", script), takes=0)
    if name == WITH_TLS:
        file = folder / "tls.toml"
        file.write_text(f'[[route.bench.tls]]\nserver-name = "*.example.org"\nto = "{to}"\n')
        return Server(name, (*ours, "--config", str(file)), app, takes=1)
    return Server(name, (*ours, "--to", to), app, takes=1)


@contextlib.contextmanager
def running(server: Server, cores: Cores) -> Iterator[Running]:
    """Start a relay on a free port; unlike core.running, ask it nothing."""
    stream, datagram = core.bound_pair()
    port = stream.getsockname()[1]
    with stream, datagram:
        datagram.close()
        if not server.takes:
            stream.close()
        sockets = (stream,)[: server.takes]
        process = core.spawn((cores.server,), sockets, server.on(port), subprocess.DEVNULL)
    try:
        if not server.takes:
            wait_for(port)
        yield Running(process, port)
    finally:
        core.stop(process)


def wait_for(port: int) -> None:
    """Return as soon as something accepts connections there."""
    deadline = time.monotonic() + 10
    while True:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            raise core.BenchError(f"nothing listens on port {port}")
        time.sleep(0.02)


@contextlib.contextmanager
def backend(kind: str, cores: Cores, folder: Path) -> Iterator[int]:
    """Run the C echo server, iperf3 or redis on the clients' core; give its port."""
    stream, datagram = core.bound_pair()
    port = stream.getsockname()[1]
    commands: dict[str, Sequence[str | Path]] = {
        "echo": (core.build("echo.c", "echo"),),
        "iperf3": ("iperf3", "-s", "-p", str(port), "--logfile", f"{folder}/iperf3.log"),
        "redis": (
            "redis-server", "--port", str(port), "--save", "", "--dir", str(folder),
            "--logfile", str(folder / "redis.log"),
        ),
    }  # fmt: skip
    with stream, datagram:
        sockets = (stream,) if kind == "echo" else ()
        if not sockets:
            stream.close()
        server = Server(kind, commands[kind])
        process = core.spawn((cores.client,), sockets, server, subprocess.DEVNULL)
    try:
        wait_for(port)
        yield port
    finally:
        core.stop(process)


# -- what is measured: each returns one figure of a relay on this port ---------------


def by_load(mode: str, word: str, seconds: float, live: Running) -> float:
    """Run load.c against it."""
    command = (core.build("load.c", "load"), mode, str(live.port), str(seconds))
    return core.run_client(command)[word]


def iperf3(seconds: float, live: Running) -> float:
    """Megabytes per second in four streams, one way (socket-proxyd loses late answers)."""
    duration = str(max(1, round(seconds)))
    words = ["iperf3", "-c", "127.0.0.1", "-p", str(live.port), "-P", "4", "-t", duration, "-J"]
    for _ in range(10):
        done = subprocess.run(words, capture_output=True, text=True, timeout=core.PATIENCE)
        result = json.loads(done.stdout)
        if "error" not in result:
            return float(result["end"]["sum_received"]["bits_per_second"]) / 8e6
        time.sleep(0.2)  # it serves one client at a time, and wait_for() was one
    raise core.BenchError(f"iperf3: {result['error']}")


def redis(pipeline: int, _seconds: float, live: Running) -> float:
    """Requests per second, of GET and SET together, with 50 clients."""
    count = str(10_000 * min(pipeline, 4))
    words = ["redis-benchmark", "-p", str(live.port), "-P", str(pipeline), "-n", count, "-c", "50"]
    words += ["-t", "get,set", "--csv"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=core.PATIENCE)
    rates = [float(line.split(",")[1].strip('"')) for line in done.stdout.splitlines()[1:]]
    return len(rates) / sum(1 / rate for rate in rates)


def converse(port: int, octets: bytes) -> None:
    """Connect, send, take it back, close."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(octets)
        missing = len(octets)
        while missing:
            missing -= len(client.recv(missing)) or missing


def connections(seconds: float, live: Running) -> float:
    """New connections per second, one after the other, with one octet each."""
    count, began = 0, time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        converse(live.port, b"x")
        count += 1
    return count / passed


def processor_us(_seconds: float, live: Running) -> float:
    """CPU time per connection that sends a ClientHello, in microseconds."""
    before, count = live.cpu_seconds(), 3000
    for _ in range(count):
        converse(live.port, hellos.TLS13)
    return (live.cpu_seconds() - before) / count * 1e6


def idle(_seconds: float, live: Running) -> float:
    """Resident MiB with as many idle connections as the descriptors allow, 10,000 at most."""
    many = min(10_000, (core.open_files_limit() - 200) // 2)
    command = [str(core.build("load.c", "load")), "idle", str(live.port), str(many)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as client:
        if client.stdin is None or client.stdout is None:
            raise RuntimeError("no pipes")
        client.stdout.readline()
        rss = live.rss_mib()
        client.stdin.close()
    return rss


Measure = Callable[[float, Running], float]

# key -> title, unit, backend, contestants, measure, less is better
WORKLOADS: dict[str, tuple[str, str, str, tuple[str, ...], Measure, bool]] = {
    "latency": ("1 connection, 64 octets: median round trip", "µs", "echo", (*RELAYS, DIRECT),
                functools.partial(by_load, "latency", "median_us"), True),
    "messages": ("64 connections, 1 KiB: messages per second", "/s", "echo", RELAYS,
                 functools.partial(by_load, "messages", "per_second"), False),
    "bulk": ("iperf3, 4 streams: MB per second", "MB/s", "iperf3", RELAYS, iperf3, False),
    "redis-1": ("redis-benchmark -P 1, GET and SET", "/s", "redis", RELAYS,
                functools.partial(redis, 1), False),
    "redis-16": ("redis-benchmark -P 16, GET and SET", "/s", "redis", RELAYS,
                 functools.partial(redis, 16), False),
    "connections": ("new connections per second", "/s", "echo", RELAYS, connections, False),
    "rss": ("10,000 idle connections: resident memory", "MiB", "echo", (OURS,), idle, True),
    "tls": ("CPU time per connection with a ClientHello", "µs", "echo", (OURS, WITH_TLS),
            processor_us, True),
}  # fmt: skip


def run(options: Options) -> Section:
    """Measure everything; minutes."""
    core.require(TOOLS)
    cores = core.claim_cores()
    os.environ.pop("LISTEN_FDNAMES", None)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, (title, unit, kind, who, measure, less) in WORKLOADS.items():
            with backend(kind, cores, Path(folder)) as port:
                cases = {
                    name: functools.partial(
                        figure, name, kind, port, cores, Path(folder), measure, options.seconds
                    )
                    for name in who
                }
                series = core.alternate(cases, options.rounds, title)
            rows[key] = Row(title, unit, series, less_is_better=less)
    return Section(
        mode="forward",
        ours=OURS,
        plot="results-forward.svg",
        rows=list(rows.values()),
        targets=_targets({key: row.series for key, row in rows.items()}),
        tools=("gcc", "systemd", "haproxy", "iperf3", "redis"),
    )


def figure(
    name: str, kind: str, port: int, cores: Cores, folder: Path, measure: Measure, seconds: float
) -> float:
    """Start a relay to the backend, or take the backend itself, and measure it."""
    if name == DIRECT:
        with subprocess.Popen(["sleep", "0"]) as nothing:
            return measure(seconds, Running(nothing, port))
    with running(relay(name, port, folder), cores) as live:
        # Started, and its first connection behind it: only the echo can be asked for that.
        if kind == "echo":
            converse(live.port, hellos.TLS13)
        else:
            time.sleep(0.3)
        return measure(seconds, live)


def _targets(got: Mapping[str, Mapping[str, Series]]) -> list[Target]:
    """The issue's table "What it must reach", against what was measured in this run."""
    latency, messages, bulk = got["latency"], got["messages"], got["bulk"]
    added = [latency[OURS].minus(latency[DIRECT]), latency[PROXYD].minus(latency[DIRECT])]
    return [
        Target("64 x 1 KiB, of socket-proxyd", messages[OURS].over(messages[PROXYD]), 2.0),
        Target("64 x 1 KiB, of haproxy", messages[OURS].over(messages[HAPROXY]), 0.85),
        Target("round trip added, of socket-proxyd's", added[0] / added[1], 1.05, at_most=True),
        Target("bulk, of socket-proxyd", bulk[OURS].over(bulk[PROXYD]), 1.15),
        Target("bulk, of haproxy", bulk[OURS].over(bulk[HAPROXY]), 1.2),
        *(
            Target(f"{key}, of socket-proxyd", got[key][OURS].over(got[key][PROXYD]), 1.5)
            for key in ("redis-1", "redis-16")
        ),
        Target("new connections, of socket-proxyd",
               got["connections"][OURS].over(got["connections"][PROXYD]), 1.0),
        Target("RSS with the idle connections", got["rss"][OURS].median, 60 / 1.048576, "MiB",
               at_most=True),
        Target("CPU time added by the server name", got["tls"][WITH_TLS].minus(got["tls"][OURS]),
               300, "µs", at_most=True),
    ]  # fmt: skip
