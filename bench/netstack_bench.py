"""`python -m bench netstack`: our stack on a tap beside the kernel's over veth, in the same run.

The bench process sits in a network namespace of its own, with the taps and one
end of the veth; the kernel that is compared with has the other end, in another
namespace.  Needs root.  Each server runs on one core, its client on the other.
"""

import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench.core import (
    BENCH,
    ROOT,
    BenchError,
    Cores,
    Options,
    Running,
    Series,
    Server,
    alternate,
    build,
    claim_cores,
    quiet_sample,
    require,
    run_client,
    spawn,
    stop,
)
from bench.report import Row, Section, Target
from bench.stream import CONGESTION
from tests.process.launcher import Launcher
from tests.process.netstack.net import (
    NETSTACK,
    Net,
    echo,
    enter_new_network,
    ip,
    private_network,
)
from tests.process.netstack.net import (
    OURS as LOSSY_PEER,
)

OURS, SOFTWARE, KERNEL = "netstack, TSO", "netstack, MTU 1500 in Python", "kernel, veth"
ECHO, DISCARD = 7, 9
CHUNK = 256 * 1024
DATA = os.urandom(CHUNK)  # not zeros: their checksum in Python is a division that costs nothing
OUT_SIZE = 512 << 20
LOSSY_SIZE = 1 << 20
AT_ONCE, ONE_BY_ONE = 1_000, 10_000
PINGS = 5_000
# Measured with the programs of its own tutorial; of 101 to 272 ms, the least.
GOTCP_MBIT, GOTCP_CONNECT_MS = 0.1, 101.0

# The near address of each link, and the far one that is measured.
ENDS = {
    OURS: ("192.0.2.1", "192.0.2.2"),
    SOFTWARE: ("203.0.113.1", "203.0.113.2"),
    KERNEL: ("198.51.100.1", "198.51.100.2"),
}
TAPS = {OURS: "tap0", SOFTWARE: "tap1"}
HOW: dict[str, Sequence[str]] = {OURS: (), SOFTWARE: ("--software",)}


def run(options: Options) -> Section:
    """Measure everything; take rounds and seconds from the options."""
    if os.geteuid() != 0:
        raise BenchError("netstack needs root for namespaces and taps: run as root")
    require({"ping": "iputils-ping", "gcc": "gcc", "ip": "iproute2"})
    with _laboratory() as lab:
        return _measure(lab, options)


class Laboratory:
    """The links, the servers at their far ends, and the clients at the near ones."""

    def __init__(self, cores: Cores, data: Path) -> None:
        self.cores = cores
        self.data = data  # what senders read; in the page cache, since it has just been written
        self.load = build("load.c", "load")
        self.running: dict[str, list[Running]] = {}
        self._far = ThreadPoolExecutor(1, initializer=enter_new_network)

    def far(self, call: Callable[[], object]) -> object:
        """Do something in the far namespace."""
        return self._far.submit(call).result()

    def own(self, name: str) -> float:
        """CPU time of a contestant's servers."""
        return sum(one.cpu_seconds() for one in self.running[name])

    def client(self, mode: str, name: str, seconds: float) -> dict[str, float]:
        """Run the C client against a contestant's echo."""
        return run_client([self.load, mode, str(ECHO), str(seconds), ENDS[name][1]])

    def close(self) -> None:
        self._far.shutdown()


@contextmanager
def _laboratory() -> Iterator[Laboratory]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(private_network(Launcher(folder)))
        data = folder / "data"
        with open(data, "wb") as file:
            for _ in range(OUT_SIZE // CHUNK):
                file.write(DATA)
        lab = Laboratory(claim_cores(), data)
        stack.callback(lab.close)
        _make_veth(lab)
        log = stack.enter_context(open(folder / "log", "wb"))
        for name, tap in TAPS.items():
            ip("tuntap", "add", tap, "mode", "tap", "vnet_hdr")
            ip("address", "add", f"{ENDS[name][0]}/24", "dev", tap)
            ip("link", "set", tap, "up")
            words = _serve_words(name)
            lab.running[name] = [_started(stack, lab, Server(name, words, takes=0), (), log)]
        lab.running[KERNEL] = _start_kernels(stack, lab, log)
        for name in ENDS:
            _wait_until_reached(name, folder / "log")
        yield lab


def _make_veth(lab: Laboratory) -> None:
    pid = os.getpid()
    near, far = ENDS[KERNEL]

    def make() -> None:
        ip("link", "add", "far", "type", "veth", "peer", "name", "near", "netns", str(pid))
        ip("address", "add", f"{far}/24", "dev", "far")
        ip("link", "set", "far", "up")

    # The namespace of the thread, which is not that of the process.
    pid = int(Path("/proc/thread-self").resolve().name)
    lab.far(make)
    ip("address", "add", f"{near}/24", "dev", "near")
    ip("link", "set", "near", "up")


def _serve_words(name: str) -> Sequence[str]:
    return (
        *NETSTACK, "serve", "--device", f"tap:{TAPS[name]}", "--claim", "0",
        "--address", f"{ENDS[name][1]}/24", "--port", str(ECHO), "--port", f"{DISCARD}=discard",
        *HOW[name],
    )  # fmt: skip


def _started(
    stack: ExitStack, lab: Laboratory, server: Server, sockets: Sequence[socket.socket], log: object
) -> Running:
    process = spawn((lab.cores.server,), sockets, server, stderr=log)  # type: ignore[arg-type]
    stack.callback(stop, process)
    return Running(process, ECHO)


def _start_kernels(stack: ExitStack, lab: Laboratory, log: object) -> list[Running]:
    """The C echo, and a sink, with the kernel's stack of the far namespace."""
    far = ENDS[KERNEL][1]
    listening = lab.far(lambda: socket.create_server((far, ECHO), backlog=4096))
    assert isinstance(listening, socket.socket)
    with listening:
        program = Server(KERNEL, [build("echo.c", "echo")])
        echoing = _started(stack, lab, program, (listening,), log)
    words = [sys.executable, str(BENCH / "stream.py"), "sink", far, str(DISCARD)]
    sink = lab.far(lambda: _started(stack, lab, Server(KERNEL, words, takes=0), (), log))
    assert isinstance(sink, Running)
    return [echoing, sink]


def _wait_until_reached(name: str, log: Path) -> None:
    for port in (ECHO, DISCARD):
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection((ENDS[name][1], port), timeout=5).close()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BenchError(f"{name}: {error}; said {log.read_text()[-300:]}") from None
                time.sleep(0.05)


# -- what is measured --------------------------------------------------------


def _measure(lab: Laboratory, options: Options) -> Section:
    def each(measure: Callable[[str], float], title: str, *names: str) -> dict[str, Series]:
        cases = {
            name: partial(quiet_sample, lab.cores, partial(measure, name), partial(lab.own, name))
            for name in names or tuple(ENDS)
        }
        return alternate(cases, options.rounds, title)

    seconds = options.seconds
    bulk_in = each(partial(_bulk_in, seconds=seconds), "kernel to stack")
    bulk_out = each(partial(_bulk_out, lab), "stack to kernel")
    both = each(lambda name: _echoed(lab, name, seconds), "bulk echo")
    latency = each(lambda name: _latency(lab, name, seconds), "round trips", OURS, KERNEL)
    pings = each(partial(_ping, lab.cores), "ping -f", OURS, KERNEL)
    connects = each(_connect, "connect", OURS, KERNEL)
    memory = _many(lab, options)
    lossy = _lossy(max(options.rounds, 5))
    rows = [
        Row("kernel to stack", "Gbit/s", bulk_in),
        Row("stack to kernel", "Gbit/s", bulk_out),
        Row("bulk echo", "Gbit/s", both),
        Row("64 octets, round trip", "µs", latency, True),
        Row("ping -f, mean", "µs", pings, True),
        Row("connect", "µs", connects, True),
        Row("1 MiB echo, bad link", "s", lossy, True),
    ]
    return Section("netstack", OURS, "results-netstack.svg", rows, [
        Target("kernel to stack, of the kernel's", bulk_in[OURS].over(bulk_in[KERNEL]), 0.7),
        Target("kernel to stack", bulk_in[OURS].median, 2, "Gbit/s"),
        Target("stack to kernel, of the kernel's", bulk_out[OURS].over(bulk_out[KERNEL]), 0.7),
        Target("stack to kernel", bulk_out[OURS].median, 2, "Gbit/s"),
        Target("kernel to stack, MTU 1500 in Python", bulk_in[SOFTWARE].median, 1, "Gbit/s"),
        Target("stack to kernel, MTU 1500 in Python", bulk_out[SOFTWARE].median, 1, "Gbit/s"),
        Target("bulk echo", both[OURS].median, 1, "Gbit/s"),
        Target("round trip, of the kernel's", latency[OURS].over(latency[KERNEL]), 2.5,
               at_most=True),
        Target("ping -f, of the kernel's", pings[OURS].over(pings[KERNEL]), 5, at_most=True),
        Target("1 MiB, bad link, of the kernel's",
               lossy[SOFTWARE].median / lossy[KERNEL].median, 1.5, at_most=True),
        Target(f"not served of {AT_ONCE:,} at once and {ONE_BY_ONE:,} in a row", memory[0], 0,
               "lost", at_most=True),
        Target("memory kept after them", memory[1], 4, "MiB", at_most=True),
        Target("bulk echo, of Gotcp's", both[OURS].median * 1000 / GOTCP_MBIT, 1000),
        Target("connect, of Gotcp's", GOTCP_CONNECT_MS * 1000 / connects[OURS].median, 1000),
    ])  # fmt: skip


def _bulk_in(name: str, seconds: float) -> float:
    """Gbit/s that the far end takes."""
    sent = 0
    with socket.create_connection((ENDS[name][1], DISCARD), timeout=20) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION)
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            sock.sendall(DATA)
            sent += CHUNK
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
        return sent * 8e-9 / (time.monotonic() - start)


def _bulk_out(lab: Laboratory, name: str) -> float:
    """Gbit/s that the far end sends, from the first octet to the last."""
    near = ENDS[name][0]
    with socket.create_server((near, 0)) as server:
        port = str(server.getsockname()[1])
        server.settimeout(20)
        with _sending(lab, name, lab.data, port):
            client, _ = server.accept()
            with client:
                return _received(client)


@contextmanager
def _sending(lab: Laboratory, name: str, path: Path, port: str) -> Iterator[None]:
    near, far = ENDS[name]
    if name == KERNEL:
        words = [sys.executable, str(BENCH / "stream.py"), "source", near, port, str(path)]
        process = lab.far(lambda: _pinned(lab, words))
    else:
        # The other address: the first one's stack has the tap.  So this one is its own.
        tap = f"out{TAPS[name]}"
        ip("tuntap", "add", tap, "mode", "tap", "vnet_hdr")
        ip("link", "set", tap, "up")
        ip("route", "add", f"{far[:-1]}3/32", "dev", tap)
        words = [*NETSTACK, "connect", "--device", f"tap:{tap}", "--address", f"{far[:-1]}3/24",
                 *HOW[name], "--claim", "0", "--send", str(path), f"{near}:{port}"]  # fmt: skip
        process = _pinned(lab, words)
    assert isinstance(process, subprocess.Popen)
    try:
        yield
        process.wait(20)
    finally:
        stop(process)
        if name != KERNEL:
            ip("link", "delete", tap)


def _pinned(lab: Laboratory, words: Sequence[str]) -> "subprocess.Popen[bytes]":
    return spawn((lab.cores.server,), (), Server("sender", words), stderr=subprocess.PIPE)


def _received(client: socket.socket) -> float:
    buffer, total = bytearray(CHUNK), client.recv_into(bytearray(1))
    start = time.monotonic()
    client.settimeout(20)
    while size := client.recv_into(buffer):
        total += size
    if total != OUT_SIZE:
        raise BenchError(f"{total} of {OUT_SIZE} octets came")
    return total * 8e-9 / (time.monotonic() - start)


def _echoed(lab: Laboratory, name: str, seconds: float) -> float:
    """Gbit/s that come back, compared with what was sent; four connections."""
    return lab.client("bulk", name, seconds)["mb_per_second"] * 8e-3


def _latency(lab: Laboratory, name: str, seconds: float) -> float:
    return lab.client("latency", name, seconds)["median_us"]


def _ping(cores: Cores, name: str) -> float:
    """Mean round trip of a flood ping, in microseconds.

    On the server's core: the kernel answers on the core that asks, so ours must not pay for
    waking another one.
    """
    command = [
        "taskset",
        "-c",
        str(cores.server),
        "ping",
        "-f",
        "-q",
        "-c",
        str(PINGS),
        ENDS[name][1],
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"= [\d.]+/([\d.]+)/", said)
    if not found or " 0% packet loss" not in said:
        raise BenchError(f"ping of {name}: {said}")
    return float(found[1]) * 1000


def _connect(name: str) -> float:
    """Median time of a connect(), in microseconds; each begins when the one before has ended.

    Gotcp's figure is that of a connection alone, so ours has none to end meanwhile.
    """
    times = []
    for _ in range(300):
        with socket.socket() as sock:
            start = time.perf_counter()
            sock.connect((ENDS[name][1], ECHO))
            times.append(time.perf_counter() - start)
            sock.settimeout(20)
            sock.shutdown(socket.SHUT_WR)
            if sock.recv(1):
                raise BenchError(f"{name}: an echo of nothing")
    return statistics.median(times) * 1e6


def _used(address: str) -> bool:
    with socket.create_connection((address, ECHO), timeout=20) as sock:
        sock.sendall(b"?")
        return sock.recv(1) == b"?"


def _many(lab: Laboratory, options: Options) -> tuple[int, float]:
    """How many of very many connections were not served, and the MiB that were not given back.

    The first time, an interpreter takes memory that it keeps to use again.
    """
    address, [stack] = ENDS[OURS][1], lab.running[OURS]
    in_a_row = ONE_BY_ONE if options.rounds > 1 else ONE_BY_ONE // 10
    lost = _crowd(address, in_a_row)
    before = stack.rss_mib()
    lost += _crowd(address, in_a_row)
    return lost, max(0.0, stack.rss_mib() - before)


def _crowd(address: str, in_a_row: int) -> int:
    """Connect as many at once, and then in a row; return how many were not served."""
    with ExitStack() as kept:
        socks = [
            kept.enter_context(socket.create_connection((address, ECHO), timeout=20))
            for _ in range(AT_ONCE)
        ]
        for sock in socks:
            sock.sendall(b"all")
        lost = sum(sock.recv(3) != b"all" for sock in socks)
    return lost + sum(not _used(address) for _ in range(in_a_row))


# -- the bad link ------------------------------------------------------------


def _lossy(rounds: int) -> dict[str, Series]:
    """Seconds for 1 MiB there and back by way of relays with the same seeds."""
    series: dict[str, list[float]] = {SOFTWARE: [], KERNEL: []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(rounds):
            for name in series:
                launcher = Launcher(Path(folder))
                with private_network(launcher) as net:
                    run = _lossy_ours if name == SOFTWARE else _lossy_kernel
                    series[name].append(run(net, seed))
                launcher.close()
    return {name: Series(tuple(values)) for name, values in series.items()}


def _lossy_ours(net: Net, seed: int) -> float:
    ours, theirs = net.frames()
    net.serve(ours, "--claim", "0")
    return _lossy_echo(net, theirs.fileno(), seed)


def _lossy_kernel(net: Net, seed: int) -> float:
    with ThreadPoolExecutor(1, initializer=enter_new_network) as far, ExitStack() as stack:

        def serve() -> tuple[int, socket.socket]:
            descriptor = net.tap(vnet=False, addresses=(f"{LOSSY_PEER}/24",))
            return descriptor, socket.create_server((LOSSY_PEER, ECHO))

        descriptor, listening = far.submit(serve).result()
        program = Server(KERNEL, [build("echo.c", "echo")])
        cores = sorted(os.sched_getaffinity(0))
        process = spawn(cores, (listening,), program, stderr=subprocess.DEVNULL)
        stack.callback(stop, process)
        listening.close()
        return _lossy_echo(net, descriptor, seed)


def _lossy_echo(net: Net, far: int, seed: int) -> float:
    near = net.tap(vnet=False)
    words = [sys.executable, "-m", "tests.process.netstack.relay", str(near), str(far), str(seed)]
    relay = subprocess.Popen(words, pass_fds=(near, far), cwd=ROOT)
    data = os.urandom(LOSSY_SIZE)
    start = time.monotonic()
    try:
        with socket.create_connection((LOSSY_PEER, ECHO), timeout=60) as sock:
            if echo(data, sock) != data:
                raise BenchError("what came back is not what was sent")
        return time.monotonic() - start
    finally:
        relay.kill()
        relay.wait()
