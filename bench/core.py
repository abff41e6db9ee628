"""What every benchmark here needs: pinned servers, handed-over sockets, quiet samples, rounds.

The server runs on one core, the client on another.  All servers of a workload
are measured in turn in every round, in alternating order; a figure is the
median over the rounds, and a ratio the median of the ratios within each round,
so that a machine that slows down meanwhile slows both sides of it.
"""

import contextlib
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
BUILD = ROOT / "build" / "bench"

PATIENCE = 60  # seconds that a client may take longer than it was asked to run
FOREIGN_LIMIT = 0.06  # of one core: with more of it used by others, a sample says little
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds; what the kernel counts CPU time in
TRIES = 6  # samples taken before the quietest of them must do


class BenchError(Exception):
    """The benchmark cannot go on; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Options:
    """How often and how long to measure."""

    rounds: int
    seconds: float  # per sample
    container: bool  # whether podman and the image are there


# -- the machine -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cores:
    """Where the server and its client run: two cores that share no execution units."""

    server: int
    client: int


def claim_cores() -> Cores:
    """Pick two of the allowed cores, and pin this process, with its clients, to the client's.

    They are not hyperthreads of one core, if that can be.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise BenchError("one core is not enough: server and client need one each")
    server = allowed[0]
    siblings = Path(f"/sys/devices/system/cpu/cpu{server}/topology/thread_siblings_list")
    shared = _cpu_list(siblings.read_text()) if siblings.exists() else set()
    apart = [core for core in allowed[1:] if core not in shared]
    client = (apart or allowed[1:])[0]
    os.sched_setaffinity(0, {client})
    return Cores(server, client)


def _cpu_list(text: str) -> set[int]:
    """Read the kernel's list format: 0,4-6."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def require(tools: Mapping[str, str]) -> None:
    """Raise BenchError unless all the tools are there; maps each to the package that has it."""
    missing = {tool: package for tool, package in tools.items() if not shutil.which(tool)}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise BenchError(f"{', '.join(missing)} not found: apt-get install {packages}")


def build(source: str, output: str, *flags: str) -> Path:
    """Compile bench/<source> to build/bench/<output> if it is older, and return its path."""
    path, target = BENCH / source, BUILD / output
    if not target.exists() or target.stat().st_mtime < path.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", *flags]
        done = subprocess.run(["gcc", *options, "-o", str(target), str(path)])
        if done.returncode != 0:  # gcc has said why
            raise BenchError(f"cannot build {source}: it needs gcc and libc6-dev (glibc-static)")
    return target


def open_files_limit() -> int:
    """Return how many descriptors a process here may have at most."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


# -- servers -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    """A way to start an echo server (or whatever a mode compares)."""

    name: str
    command: Sequence[str | Path]
    environment: Mapping[str, str] = field(default_factory=dict)
    takes: int = 2  # of a TCP and a UDP socket; one that takes none binds "{port}" itself

    @property
    def words(self) -> list[str]:
        """The command as strings."""
        return [str(word) for word in self.command]

    def on(self, port: int) -> "Server":
        """Return the same with the port filled in."""
        return replace(self, command=[word.replace("{port}", str(port)) for word in self.words])


@dataclass(frozen=True, slots=True)
class Running:
    """A started server: the process group that is its own, and the port it serves."""

    process: "subprocess.Popen[bytes]"
    port: int

    def cpu_seconds(self) -> float:
        """CPU time of its processes so far, children that have ended included."""
        return sum(sum(map(int, stat[11:15])) for stat in self._stats()) * TICK

    def rss_mib(self) -> float:
        """Resident memory of its processes, in MiB: what systemctl and ps call M."""
        pages = sum(int(stat[21]) for stat in self._stats())
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _stats(self) -> Iterator[list[str]]:
        """The fields of /proc/PID/stat after the name, of each process in the group."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid:
                    yield fields


def spawn(
    cores: Sequence[int], sockets: Sequence[socket.socket], server: Server, stderr: IO[bytes] | int
) -> "subprocess.Popen[bytes]":
    """Start the server on these cores, in a process group of its own, handed the sockets."""
    numbers = [sock.fileno() for sock in sockets]
    handover = [sys.executable, "-I", str(BENCH / "handover.py"), ",".join(map(str, cores))]
    return subprocess.Popen(
        [*handover, *map(str, numbers), "--", *server.words],
        env={**os.environ, **server.environment},
        pass_fds=numbers,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stderr=stderr,
    )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End the process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr is not None:
        process.stderr.close()


@contextlib.contextmanager
def running(server: Server, cores: Cores) -> Iterator[Running]:
    """Serve TCP and UDP on one free loopback port; ready when this returns."""
    stream, datagram = bound_pair()
    port = stream.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        with stream, datagram:
            sockets = (stream, datagram)[: server.takes]
            process = spawn((cores.server,), sockets, server.on(port), stderr=log)
        try:
            _wait_until_served(server, port, log)
            yield Running(process, port)
        finally:
            stop(process)


def bound_pair() -> tuple[socket.socket, socket.socket]:
    """Return a listening TCP and a UDP socket with the same loopback port."""
    while True:
        stream = socket.create_server(("127.0.0.1", 0), backlog=4096)
        datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            datagram.bind(stream.getsockname())
        except OSError:  # taken for UDP: try the next
            stream.close()
            datagram.close()
            continue
        return stream, datagram


def _wait_until_served(server: Server, port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            _echo_once(port)
        except OSError as error:
            # Refused: one that binds for itself has not got there yet.
            if isinstance(error, ConnectionRefusedError) and time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines() or [str(error)]
            raise BenchError(f"{server.name} does not echo: {said[-1]}") from error
        return


def _echo_once(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"?")
        if client.recv(1) != b"?":
            raise ConnectionResetError("it closed the connection")


# -- samples -----------------------------------------------------------------


def run_client(command: Sequence[str | Path]) -> dict[str, float]:
    """Run a client that prints name=value words; it inherits the runner's core."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=PATIENCE
    )
    if done.returncode != 0:
        raise BenchError(f"the client failed: {done.stderr.strip()}")
    pairs = (word.partition("=") for word in done.stdout.split())
    return {name: float(value) for name, _, value in pairs}


def quiet_sample(
    cores: Cores, measure: Callable[[], float], own: Callable[[], float] = lambda: 0.0
) -> float:
    """Return measure(), taken again while other programs use the two cores.

    own() is the CPU time of a server that outlives measure(); what this process
    starts and reaps is known.  After TRIES the least disturbed sample must do.
    """
    samples = []
    for _ in range(TRIES):
        before, start = _foreign_seconds(cores) - own(), time.monotonic()
        value = measure()
        foreign, seconds = _foreign_seconds(cores) - own() - before, time.monotonic() - start
        samples.append((foreign / seconds, value))
        if foreign <= max(FOREIGN_LIMIT * seconds, 2 * TICK):
            break
    return min(samples)[1]


def _foreign_seconds(cores: Cores) -> float:
    """CPU time spent on the two cores by others than this process and those it has reaped.

    Time in interrupts is left out: over loopback that is our own traffic.
    """
    busy = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in (f"cpu{cores.server}", f"cpu{cores.client}"):
            user, nice, system = map(int, fields[:3])
            busy += user + nice + system
    times = os.times()
    ours = times.user + times.system + times.children_user + times.children_system
    return busy * TICK - ours


# -- rounds ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Series:
    """One figure of one server, once per round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure that is reported."""
        return statistics.median(self.values)

    def over(self, other: "Series") -> float:
        """The median of the ratios within each round."""
        return statistics.median(a / b for a, b in zip(self.values, other.values, strict=True))

    def minus(self, other: "Series") -> float:
        """The median of the differences within each round."""
        return statistics.median(a - b for a, b in zip(self.values, other.values, strict=True))


def alternate(
    cases: Mapping[str, Callable[[], float]], rounds: int, title: str
) -> dict[str, Series]:
    """Measure every case once per round, in alternating order, and tell a terminal how far."""
    names = list(cases)
    values: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            _progress(f"{title}: round {turn + 1} of {rounds}, {name}")
            values[name].append(cases[name]())
    _progress("")
    return {name: Series(tuple(measured)) for name, measured in values.items()}


def _progress(words: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{words}")
        sys.stderr.flush()
