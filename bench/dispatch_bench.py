"""`python -m bench dispatch`: cost per lookup, loading, connections through it, one command.

Each run in a network namespace and bpffs of its own.  Needs root.  The cost per
lookup is that of the program by BPF_PROG_TEST_RUN, its own counters included.
"""

import json
import os
import resource
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.core import BENCH, BUILD, BenchError, Options, Series, alternate, require
from bench.report import Row, Section, Target
from echo_appliance.dispatch import libbpf
from echo_appliance.dispatch.explain import Packet
from echo_appliance.dispatch.register import register
from tests.process.dispatch.space import Space, private_space

OURS = "dispatch"
WITHOUT = "no dispatch"
BARE = "a program that only passes"
REPEAT, TRIES = 200_000, 5
SIZES = (0, 1, 1_000, 1_000_000)
LIMITS = {0: 25, 1: 60, 1_000: 150, 1_000_000: 250}  # ns
CONNECTIONS = 2_000
REPLACES, UPGRADES = 100, 20
UDP_SECONDS = 0.7
WILDCARD, PKTINFO = "wildcard port", "bound port"


def run(options: Options) -> Section:
    """Measure everything; take the rounds from the options."""
    if os.geteuid() != 0:
        raise BenchError("dispatch needs root: run as root")
    # As an installed package has it: without byte code every command would compile itself first.
    os.environ["PYTHONPYCACHEPREFIX"] = str(BUILD / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    rounds = options.rounds
    bare = _compile_bare()
    costs = {size: _lookup_costs(size, rounds, bare) for size in SIZES}
    loads = _loads(rounds)
    connections = _connections(rounds)
    udp = _udp_replies(rounds)
    commands = _commands(max(rounds, 5))
    lost, made = _lost_under_traffic()
    title = "cost per lookup, "
    rows = [
        *(Row(f"{title}{size:,} bindings", "ns", costs[size], True) for size in SIZES),
        Row("load-bindings of 1,000,000", "s", loads, True),
        Row("connections per CPU second, 100,000 bindings", "/s", connections),
        Row("UDP replies, one flow", "/s", udp),
        Row("one command", "ms", commands, True),
    ]
    targets = [
        *(
            Target(f"{title}{size:,} bindings", costs[size][OURS].median, LIMITS[size], "ns", True)
            for size in SIZES
        ),
        Target("load-bindings of 1,000,000", loads["new"].median, 4, "s", True),
        Target("the same again", loads["unchanged"].median, 3, "s", True),
        Target("connections, of those without", connections[OURS].over(connections[WITHOUT]), 0.97),
        Target("UDP wildcard replies, of PKTINFO's", udp[WILDCARD].over(udp[PKTINFO]), 0.7),
        Target("bind, from shell to done", commands["bind"].median, 60, "ms", True),
        Target(f"lost of {made} connections, {REPLACES} replaces, {UPGRADES} upgrades",
               lost, 0, "lost", True),
    ]  # fmt: skip
    return Section("dispatch", OURS, "results-dispatch.svg", rows, targets, ("clang",))


@contextmanager
def _loaded(size: int = 0) -> Iterator[Space]:
    with private_space() as space:
        space.ok("load")
        if size:
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                file.write(_bindings(size))
                file.flush()
                space.ok("load-bindings", file.name)
        yield space


def _bindings(size: int) -> str:
    """Return a file of so many: hosts spread over 10.0.0.0/8, half of them for all ports."""
    entries = [
        {"label": f"l{number % 50}", "protocol": "tcp", "port": (number & 1) * 80,
         "prefix": socket.inet_ntoa((0x0A000000 | number * 16).to_bytes(4, "big")) + "/32"}
        for number in range(size)
    ]  # fmt: skip
    return json.dumps({"bindings": entries})


def _compile_bare() -> libbpf.Loaded:
    require({"clang": "clang"})
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / "bare.bpf.o"
    include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    source = BENCH / "bare.bpf.c"
    subprocess.run(
        ["clang", "-target", "bpf", "-O2", "-g", include, "-c", source, "-o", target], check=True
    )
    return libbpf.Loaded(str(target), {})


def _lookup_costs(size: int, rounds: int, bare: libbpf.Loaded) -> dict[str, Series]:
    """Nanoseconds for a packet that is bound (where something is) and has a live socket."""
    with _loaded(size) as space:
        listener = space.tcp()
        # In the middle of all: as deep in the trie as most are.
        address = socket.inet_ntoa((0x0A000000 | size // 2 * 16).to_bytes(4, "big"))
        packet = Packet(0, socket.inet_aton(address), 80)
        with space.dispatcher() as dispatcher:
            register(dispatcher, [(f"l{number}", listener) for number in range(50)])
            programs = {OURS: dispatcher.descriptor("program"), BARE: bare.program("bare")}
            cases = {name: partial(_run, program, packet) for name, program in programs.items()}
            return alternate(cases, rounds, f"{size} bindings")


def _run(program: int, packet: Packet) -> float:
    """Return the least of a few: what disturbs such a short loop only ever adds."""
    context = packet.context()
    return float(min(libbpf.run_program(program, context, REPEAT)[2] for _ in range(TRIES)))


def _loads(rounds: int) -> dict[str, Series]:
    with _loaded() as space, tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.json") for number in range(2)]
        text = _bindings(1_000_000)
        paths[0].write_text(text)
        paths[1].write_text(text.replace('"l7"', '"m7"'))
        turn = 0

        def new() -> float:
            nonlocal turn
            turn += 1
            return _seconds(space, "load-bindings", str(paths[turn % 2]))

        def unchanged() -> float:
            return _seconds(space, "load-bindings", str(paths[turn % 2]))

        values = [(new(), unchanged()) for _ in range(rounds)]
    return {name: Series(tuple(row[index] for row in values)) for index, name in
            enumerate(("new", "unchanged"))}  # fmt: skip


def _seconds(space: Space, *words: str) -> float:
    start = time.monotonic()
    space.ok(*words)
    return time.monotonic() - start


def _connections(rounds: int) -> dict[str, Series]:
    """To a bound address through the dispatcher, and to a listener in a namespace without.

    Per second of CPU time: over loopback this thread does the work of both ends, so that is
    what the dispatcher takes from a server, and nobody else's work is in it.
    """
    with _loaded(100_000) as space:
        listener = space.tcp("127.0.0.1", backlog=1024)
        space.ok("bind", "local", "tcp", "127.1.0.0/16", "80")
        assert space.register(("local", listener)).status == 0
        steered = _here(listener)
        with private_space() as plain:
            cases = {OURS: steered, WITHOUT: _here(plain.tcp("127.1.0.1", 80, backlog=1024))}
            return alternate(cases, 3 * rounds, "connections")


def _here(listener: socket.socket) -> Callable[[], float]:
    """Return what makes connections in this network namespace, whichever it is called in."""
    netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def measure() -> float:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        libbpf.enter_netns(netns)
        try:
            start = time.thread_time()
            assert all(_reaches(listener, 80) for _ in range(CONNECTIONS))
            return CONNECTIONS / (time.thread_time() - start)
        finally:
            libbpf.enter_netns(home)
            os.close(home)

    return measure


def _udp_replies(rounds: int) -> dict[str, Series]:
    """One flow, 32 datagrams of 32 octets under way: to a wildcard port, and to the bound one."""
    with _loaded() as space:
        sock = space.udp()
        space.ok("bind", "echo", "udp", "127.1.0.0/16", "0")
        assert space.register(("echo", sock)).status == 0
        server = space.start([], (("echo", sock),), {}, mode="echo")
        try:
            targets = {WILDCARD: ("127.1.0.1", 7777), PKTINFO: sock.getsockname()}
            cases = {name: partial(_exchange, target) for name, target in targets.items()}
            return alternate(cases, rounds, "UDP replies")
        finally:
            server.terminate()
            server.communicate()


def _exchange(address: tuple[str, int]) -> float:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        client.connect(address)
        count, start = 0, time.monotonic()
        while time.monotonic() - start < UDP_SECONDS:
            for _ in range(32):
                client.send(bytes(32))
            for _ in range(32):
                client.recv(64)
            count += 32
        return count / (time.monotonic() - start)


def _commands(rounds: int) -> dict[str, Series]:
    with _loaded() as space:
        bind = ("bind", "web", "tcp", "127.1.0.0/16", "80")

        def timed(*words: str) -> Callable[[], float]:
            return lambda: 1000 * _seconds(space, *words)

        def cpu() -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            space.ok(*bind)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            return 1000 * used

        for words in (bind, ("status",), ("upgrade",)):
            space.ok(*words)  # which leaves byte code behind
        cases = {
            "bind": timed(*bind),
            "bind, CPU time": cpu,
            "status": timed("status"),
            "upgrade": timed("upgrade"),
        }
        return alternate(cases, rounds, "commands")


def _lost_under_traffic() -> tuple[int, int]:
    """How many connections were lost or went astray, and how many were made."""
    with _loaded() as space, tempfile.TemporaryDirectory() as folder:
        listener, other = (space.tcp("127.0.0.1", backlog=1024) for _ in range(2))
        listener.settimeout(1)  # what goes to the other one is missing here
        assert space.register(("web", listener), ("x", other)).status == 0
        paths = []
        for number in range(2):
            common = {"label": "web", "prefix": "127.1.0.0/16", "port": 0, "protocol": "tcp"}
            more = {"label": "x", "prefix": f"127.2.0.{number}", "port": 80, "protocol": "tcp"}
            paths.append(Path(folder, f"{number}.json"))
            paths[-1].write_text(json.dumps({"bindings": [common, more]}))
        space.ok("load-bindings", str(paths[1]))
        changes = [["load-bindings", str(paths[number % 2])] for number in range(REPLACES)]
        changes += [["upgrade"]] * UPGRADES
        lost = made = 0
        for words in changes:
            with subprocess.Popen(space.command(*words), stderr=subprocess.DEVNULL) as process:
                while process.poll() is None:
                    made += 1
                    # By ever other ports: else those of the client would run out.
                    lost += not _reaches(listener, 1 + made % 65535)
        return lost, made


def _reaches(listener: socket.socket, port: int) -> bool:
    try:
        with socket.create_connection(("127.1.0.1", port), timeout=1) as client:
            connection, peer = listener.accept()
            own = client.getsockname()
            # Closed by a reset, or the client's own ports would run out (EADDRNOTAVAIL).
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            connection.close()
            return bool(peer == own)
    except OSError:
        return False
