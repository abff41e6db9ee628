"""echo: ours beside a C epoll server, uvloop and asyncio protocols, and socat."""

import compileall
import functools
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import cold, core
from bench.core import BENCH, ROOT, Cores, Options, Series, Server
from bench.report import Row, Section, Target

OURS, C, UVLOOP, ASYNCIO, SOCAT = "echo-appliance", "C epoll", "uvloop", "asyncio", "socat"
NOTHING = "python3 -I -c pass"

IDLE_CONNECTIONS = 10_000
SPARE_DESCRIPTORS = 200

# What the installed command does.  `python -m` would add runpy, 1 MB and a millisecond of it.
ENTRY_POINT = "import sys; from echo_appliance.__main__ import main; sys.exit(main())"

# Before 1.8 it can be handed connections, but no listening socket.  It blocks for ever on a full
# pipe when it writes more than the 4 KiB that poll() promises room for.
SOCAT_COMMAND = (
    "socat", "-t10", "-b4096", "TCP4-LISTEN:{port},bind=127.0.0.1,backlog=4096,fork", "PIPE"
)  # fmt: skip

TOOLS = {
    "gcc": "gcc libc6-dev",
    "socat": "socat",
    "systemd-socket-activate": "systemd",
    "podman": "podman",
}


@dataclass(frozen=True, slots=True)
class Workload:
    """What a client does to a server, by load.c's name for it, and the word of its answer."""

    mode: str
    title: str
    unit: str
    word: str
    who: tuple[str, ...]
    less_is_better: bool = False
    split: int = 1  # so many times the rounds, each so much shorter


STREAM_SERVERS = (OURS, C, UVLOOP, ASYNCIO, SOCAT)
BUT_SOCAT = (OURS, C, UVLOOP, ASYNCIO)  # socat forks per datagram too, and per idle connection

LOADS = (
    Workload("latency", "1 connection, 64 octets: median round trip", "µs", "median_us",
             STREAM_SERVERS, less_is_better=True,
             split=4),  # a run has one of few medians, by where the wake-ups happen to fall
    Workload("messages", "64 connections, 1 KiB: messages per second", "/s", "per_second",
             STREAM_SERVERS),
    Workload("bulk", "4 streams in bulk: MB echoed per second", "MB/s", "mb_per_second",
             STREAM_SERVERS),
    Workload("udp", "UDP, 64 octets: datagrams per second", "/s", "per_second", BUT_SOCAT),
)  # fmt: skip


def servers(c_echo: Path) -> dict[str, Server]:
    """The contestants.  All Python ones run on the Python that runs this."""
    app = {"PYTHONPATH": str(ROOT / "app")}
    # As after an installation; a compiler at work in the server would be 4 MB and some ms of it.
    compileall.compile_dir(ROOT / "app", quiet=2)
    peers = BENCH / "peers.py"
    contestants = (
        Server(OURS, (sys.executable, "-c", ENTRY_POINT, "echo"), app),
        Server(C, (c_echo,)),
        Server(UVLOOP, (sys.executable, peers, "uvloop")),
        Server(ASYNCIO, (sys.executable, peers, "asyncio")),
        Server(SOCAT, SOCAT_COMMAND, takes=0),
        Server(NOTHING, (sys.executable, "-I", "-c", "pass")),  # the floor of cold starts
    )
    return {server.name: server for server in contestants}


# -- warm servers ------------------------------------------------------------


def throughput(load: Path, cores: Cores, seconds: float, work: Workload, server: Server) -> float:
    """Run the client against a fresh server and return its figure."""
    with core.running(server, cores) as live:
        command = (load, work.mode, str(live.port), str(seconds))
        return core.quiet_sample(
            cores, lambda: core.run_client(command)[work.word], live.cpu_seconds
        )


def memory(load: Path, cores: Cores, connections: int, server: Server) -> float:
    """Resident MiB of a fresh server that holds so many idle connections."""
    with core.running(server, cores) as live:
        if not connections:
            return live.rss_mib()
        command = [str(load), "idle", str(live.port), str(connections)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            opened = client.stdout.readline()
            rss = live.rss_mib()
            client.stdin.close()
        if opened.strip() != f"open={connections}":
            raise core.BenchError(f"{server.name} did not take {connections} connections")
        return rss


def idle_connections() -> int:
    """10,000, or what the descriptor limit leaves."""
    return min(IDLE_CONNECTIONS, core.open_files_limit() - SPARE_DESCRIPTORS)


# -- the run -----------------------------------------------------------------


def run(options: Options) -> Section:
    """Measure everything; minutes."""
    core.require(TOOLS)
    contest = Contest(options, core.claim_cores())
    rows = contest.warm() | contest.memory() | contest.cold()
    if options.container:
        rows |= contest.containers()
    return Section(
        mode="echo",
        ours=OURS,
        plot="results.svg",
        rows=list(rows.values()),
        targets=_targets({key: row.series for key, row in rows.items()}),
        tools=("uvloop", "gcc", "socat", "systemd", "podman"),
    )


class Contest:
    """The servers, the client and the cores they run on; each method returns rows by key."""

    def __init__(self, options: Options, cores: Cores) -> None:
        self._rounds = options.rounds
        self._seconds = options.seconds
        self._cores = cores
        self._load = core.build("load.c", "load")
        self._servers = servers(core.build("echo.c", "echo"))

    def warm(self) -> dict[str, Row]:
        """What a started server does under each load."""
        rows = {}
        for work in LOADS:
            seconds = self._seconds / work.split
            measure = functools.partial(throughput, self._load, self._cores, seconds, work)
            series = self._alternate(measure, work.who, self._rounds * work.split, work.title)
            rows[work.mode] = Row(work.title, work.unit, series, work.less_is_better)
        return rows

    def memory(self) -> dict[str, Row]:
        """Resident memory without and with idle connections."""
        many = idle_connections()
        kinds = (
            ("rss", 0, "idle: resident memory", STREAM_SERVERS),
            ("rss-many", many, f"{many:,} idle connections: resident memory", BUT_SOCAT),
        )
        rows = {}
        for key, connections, title, who in kinds:
            measure = functools.partial(memory, self._load, self._cores, connections)
            series = self._alternate(measure, who, self._rounds, title)
            rows[key] = Row(title, "MiB", series, less_is_better=True)
        return rows

    def cold(self) -> dict[str, Row]:
        """The first client of a process."""
        title = "process: connect to first octet"
        measure = functools.partial(cold.process_ms, self._load, self._cores)
        series = self._alternate(measure, (*BUT_SOCAT, NOTHING), self._rounds * 2, title)
        return {"cold": Row(title, "ms", series, less_is_better=True)}

    def containers(self) -> dict[str, Row]:
        """The first client of a container, and what it then occupies."""
        first, rss = "container: connect to first octet", "container, idle: resident memory"
        with cold.c_image(core.build("echo.c", "echo-static", "-static")) as c_image:
            images = {OURS: cold.OUR_IMAGE, C: c_image}

            def series(
                measure: Callable[[Path, Cores, str], float], rounds: int, title: str
            ) -> dict[str, Series]:
                cases = {
                    name: functools.partial(measure, self._load, self._cores, image)
                    for name, image in images.items()
                }
                return core.alternate(cases, rounds, title)

            starts = series(cold.container_ms, self._rounds * 2, first)
            sizes = series(cold.container_rss_mib, self._rounds, rss)
        return {
            "container": Row(first, "ms", starts, less_is_better=True),
            "container-rss": Row(rss, "MiB", sizes, less_is_better=True, plotted=False),
        }

    def _alternate(
        self, measure: Callable[[Server], float], who: Sequence[str], rounds: int, title: str
    ) -> dict[str, Series]:
        cases = {name: functools.partial(measure, self._servers[name]) for name in who}
        return core.alternate(cases, rounds, title)


def _targets(got: Mapping[str, Mapping[str, Series]]) -> list[Target]:
    """The table "What it must reach", against what was measured in this run."""
    latency, messages, bulk, udp = (got[work.mode] for work in LOADS)
    start = got["cold"]
    targets = [
        Target("64 x 1 KiB, of the C reference", messages[OURS].over(messages[C]), 0.75),
        Target("64 x 1 KiB, of uvloop protocols", messages[OURS].over(messages[UVLOOP]), 0.95),
        Target("1 x 64 octets, round trip, of the C reference",
               latency[OURS].over(latency[C]), 1.1, at_most=True),
        Target("bulk, of the C reference", bulk[OURS].over(bulk[C]), 1.0),
        Target("bulk, of uvloop with flow control", bulk[OURS].over(bulk[UVLOOP]), 0.8),
        Target("UDP, of a C recvmsg/sendmsg loop", udp[OURS].over(udp[C]), 0.5),
        Target(f"process, first octet, beyond `{NOTHING}`",
               start[OURS].minus(start[NOTHING]), 15, "ms", at_most=True),
        Target("process, first octet, of the same in asyncio",
               start[OURS].over(start[ASYNCIO]), 0.5, at_most=True),
        Target("RSS idle", got["rss"][OURS].median, 12, "MiB", at_most=True),
        Target("RSS with the idle connections", got["rss-many"][OURS].median, 30, "MiB",
               at_most=True),
    ]  # fmt: skip
    if "container" in got:
        beyond = got["container"][OURS].minus(got["container"][C])
        targets += [
            Target("container, first octet, beyond the C image", beyond, 30, "ms", at_most=True),
            Target("RSS idle, in the container", got["container-rss"][OURS].median, 12, "MiB",
                   at_most=True),
        ]  # fmt: skip
    return targets
