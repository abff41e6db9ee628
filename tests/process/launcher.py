"""Starts the appliance as systemd would: descriptors from 3 on, LISTEN_* and a NOTIFY_SOCKET.

Also what tests ask of the running process by /proc.  Nothing here sleeps to wait for the
appliance: `eventually` looks at a condition until it holds, or fails at a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

# A socket or a descriptor to hand over; None leaves its number closed.
Passed = socket.socket | int | None

DEADLINE = 15.0  # seconds: far beyond what anything takes, also on a machine that is busy
COMMAND = (sys.executable, "-m", "echo_appliance")

# LISTEN_PID must be the process that serves, so it is set between fork and exec, as systemd
# does: this stub becomes the appliance.  argv: descriptors, environment, most open files.
_STUB = """
import fcntl, json, os, resource, sys
passed, environment, most, *command = map(json.loads, sys.argv[1:])
high = [fd if fd is None else fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in passed]
os.closerange(3, 100)
for number, fd in enumerate(high, 3):
    if fd is not None:
        os.dup2(fd, number)
os.closerange(100, 100 + len(high) + 1000)
if most:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
environment = {k: str(os.getpid()) if v == "$PID" else v for k, v in environment.items()}
os.execve(command[0], command, environment)
"""

_T = TypeVar("_T")


def eventually(
    condition: Callable[[], _T | None], what: str | Callable[[], str], seconds: float = DEADLINE
) -> _T:
    """Return the condition's first true value; fail, naming `what`, when none came in time."""
    give_up = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > give_up:
            words = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {seconds:g} s: {words}")
        time.sleep(0.002)
    return value


class Notifications:
    """Stands where the service manager listens: a unix datagram socket."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("")  # autobound: an abstract name of its own
        self.address = "@" + self._socket.getsockname()[1:].decode()
        self.received: list[tuple[float, str]] = []  # when (monotonic), one assignment

    def wait(self, line: str, seconds: float = DEADLINE) -> str:
        """Return the first assignment that begins with `line`; takes in all up to it."""
        give_up = time.monotonic() + seconds
        while (found := self.first(line)) is None:
            self._socket.settimeout(max(0.001, give_up - time.monotonic()))
            try:
                self._take(self._socket.recv(4096))
            except TimeoutError:
                got = [text for _, text in self.received]
                raise AssertionError(f"no {line} within {seconds:g} s, only {got}") from None
        return found

    def first(self, line: str) -> str | None:
        """Return the first assignment taken in so far that begins with `line`."""
        return next((text for _, text in self.received if text.startswith(line)), None)

    def take(self) -> list[str]:
        """Take in what has arrived, without waiting; return all assignments so far."""
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._take(self._socket.recv(4096))
        return [text for _, text in self.received]

    def times(self, line: str) -> list[float]:
        """Return when each `line` came, as taken in."""
        return [when for when, text in self.received if text == line]

    def close(self) -> None:
        """Stand there no longer."""
        self._socket.close()

    def _take(self, message: bytes) -> None:
        self.received += [(time.monotonic(), line) for line in message.decode().splitlines()]


class Server:
    """One appliance that runs, or ran.  Made by Launcher.start()."""

    def __init__(
        self, process: subprocess.Popen[bytes], stderr_path: Path, notified: Notifications
    ) -> None:
        self._process = process
        self._stderr_path = stderr_path
        self.notified = notified
        self.pid = process.pid

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._stderr_path.read_text()

    @property
    def exited(self) -> bool:
        """Whether it is over."""
        return self._process.poll() is not None

    def wait(self, seconds: float = DEADLINE) -> int:
        """Return its exit status; negative when a signal ended it."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds:g} s; said: {self.stderr}") from None

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM; return its exit status."""
        self.signal()
        return self.wait()

    def freeze(self) -> None:
        """SIGSTOP, and wait until it stands."""
        freeze(self.pid)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    # -- what /proc says -----------------------------------------------------

    @property
    def rss(self) -> int:
        """Resident octets."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) * 1024

    @property
    def descriptors(self) -> int:
        """How many descriptors are open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def workers(self) -> list[int]:
        """The pids of its children."""
        return children(self.pid)

    def assert_sleeps(self, seconds: float = 0.3) -> None:
        """See assert_sleeps(): of this process, not of its workers."""
        assert_sleeps(self.pid, seconds)


class Launcher:
    """Starts appliances, and ends whatever is left of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._servers: list[Server] = []

    def start(
        self,
        passed: Sequence[Passed],
        *options: str,
        names: Sequence[str] | None = None,
        environment: dict[str, str | None] | None = None,
        most_files: int = 0,
        ready: bool = True,
        stdout: int | None = None,
        command: Sequence[str] = (*COMMAND, "echo"),
    ) -> Server:
        """Start it with these descriptors, in this order, and wait until it is ready.

        `environment` changes what is set for it; a value of None unsets.  Its stdout is where its
        stderr is, unless given.
        """
        notified = Notifications()
        handle, stderr_path = tempfile.mkstemp(prefix="stderr.", dir=self._directory)
        fds = [one.fileno() if isinstance(one, socket.socket) else one for one in passed]
        variables = _environment(fds, names, notified.address, environment or {})
        stub = [json.dumps(value) for value in (fds, variables, most_files, *command, *options)]
        with os.fdopen(handle, "wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _STUB, *stub],
                stdin=subprocess.DEVNULL,
                stdout=stderr if stdout is None else stdout,
                stderr=stderr,
                pass_fds=[fd for fd in fds if fd is not None],
                start_new_session=True,
            )
        server = Server(process, Path(stderr_path), notified)
        self._servers.append(server)
        if ready:
            _wait_ready(server)
        return server

    def fail(self, passed: Sequence[Passed], *options: str, **how: object) -> str:
        """Start it in a way that cannot work; return the one line that it says.

        Asserts what is so of every such start: no READY=1, no success, one line, no traceback.
        """
        server = self.start(passed, *options, ready=False, **how)  # type: ignore[arg-type]
        assert server.wait() in (1, 2), server.stderr
        assert not [line for line in server.notified.take() if line.startswith("READY")]
        lines = server.stderr.splitlines()
        assert len(lines) == 1, server.stderr
        assert lines[0].startswith("echo-appliance"), lines[0]
        return lines[0]

    def forget(self, server: Server) -> None:
        """Look no more after one that is over."""
        server.notified.close()
        self._servers.remove(server)

    def close(self) -> None:
        """End all of them; fail if one left a process, or a traceback."""
        left: list[int] = []
        for server in self._servers:
            if not server.exited:
                for pid in in_session(server.pid):
                    os.kill(pid, signal.SIGKILL)
            server.wait()
            server.notified.close()
            # Its workers end by themselves when it does.
            with contextlib.suppress(AssertionError):
                eventually(lambda: not in_session(server.pid), "its end", 5.0)  # noqa: B023
            for pid in in_session(server.pid):
                left.append(pid)
                os.kill(pid, signal.SIGKILL)
        said = "".join(server.stderr for server in self._servers)
        assert "Traceback" not in said, said
        assert not left, f"processes outlived their supervisor: {left}"


def _wait_ready(server: Server) -> None:
    give_up = time.monotonic() + DEADLINE
    while server.notified.first("READY=1") is None:
        assert not server.exited, f"exited with {server.wait()}: {server.stderr}"
        assert time.monotonic() < give_up, f"not ready in time: {server.stderr}"
        with contextlib.suppress(AssertionError):
            server.notified.wait("READY=1", 0.2)
    # libsystemd's own socket is still open when its READY=1 is here: who counts descriptors
    # from now on must not count it.
    eventually(lambda: server.exited or stat_fields(server.pid)[0] in "ST", "it to wait for work")


def _environment(
    fds: Sequence[int | None],
    names: Sequence[str] | None,
    notify: str,
    changes: dict[str, str | None],
) -> dict[str, str]:
    ours = ("LISTEN_", "NOTIFY_", "WATCHDOG_")
    variables: dict[str, str | None] = {
        key: value for key, value in os.environ.items() if not key.startswith(ours)
    }
    variables |= {"LISTEN_FDS": str(len(fds)), "LISTEN_PID": "$PID", "NOTIFY_SOCKET": notify}
    if names is not None:
        variables["LISTEN_FDNAMES"] = ":".join(names)
    variables |= changes
    return {key: value for key, value in variables.items() if value is not None}


# -- processes ---------------------------------------------------------------


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on (proc(5): field 3 is first)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def assert_sleeps(pid: int, seconds: float) -> None:
    """Look at its use of the processor for a while: waiting costs none, a spin costs all."""
    before, until = _cpu_seconds(pid), time.monotonic() + seconds
    while (rest := until - time.monotonic()) > 0:
        time.sleep(rest)
    used = _cpu_seconds(pid) - before
    assert used <= seconds / 5, f"used {used:.2f} s of processor time in {seconds} s"


def _cpu_seconds(pid: int) -> float:
    fields = stat_fields(pid)  # utime, stime
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def in_session(leader: int) -> list[int]:
    """Return the pids of a session's processes that are not dead yet."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = stat_fields(int(entry))
                if int(fields[3]) == leader and fields[0] not in "ZX":
                    found.append(int(entry))
    return found


def freeze(pid: int) -> None:
    """SIGSTOP a process, and wait until it stands."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: stat_fields(pid)[0] == "T", f"process {pid} to stop")


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Keep a process from running for the duration of the block."""
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
