"""A private network namespace and bpffs for one test, and the dispatch commands in it.

The test's own thread moves there, so what it opens and starts is there, too.  With the thread's
return nothing is left: the mount goes with its namespace, the namespace with its last socket.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echo_appliance.dispatch import libbpf
from echo_appliance.dispatch.place import Lock, Place
from echo_appliance.dispatch.state import Dispatcher

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000  # include/uapi/linux/sched.h
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # include/uapi/linux/mount.h
COMMAND = (sys.executable, "-m", "echo_appliance", "dispatch")
DEADLINE = 20.0

# Moves what was passed to 3 and up, where Popen has a pipe of its own until this runs; LISTEN_PID
# must be the process that takes the sockets.
TAKING = """
import fcntl, os, sys
passed = [int(number) for number in os.environ.pop("PASSED").split()]
free = 3 + len(passed)
copies = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, free) for number in passed]
for number in passed:
    os.set_inheritable(number, False)
for number, copy in enumerate(copies, 3):
    os.dup2(copy, number)
os.environ["LISTEN_PID"] = str(os.getpid())
"""
STUB = f"""{TAKING}
os.execv(sys.executable, [sys.executable, "-m", "echo_appliance", *sys.argv[1:]])
"""
_WITHOUT_NETWORK = ("unshare", "--net")  # a namespace with not even a loopback that is up


# A command that kills itself: every call of libbpf and every change of the file system counts.
_KILLED = """
import os, signal, sys
left = int(sys.argv[1])

def count():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):
    if event in ("os.rename", "os.mkdir", "os.chmod", "os.chown", "os.remove", "os.rmdir"):
        count()

from echo_appliance.dispatch import libbpf
check = libbpf._check
libbpf._check = lambda *arguments: (check(*arguments), count())[0]
sys.addaudithook(watch)
from echo_appliance.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


class Done:
    """A command that has ended."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.status = process.returncode
        self.out = process.stdout
        self.err = process.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Space:
    """Where one test lives."""

    def __init__(self, bpffs: Path) -> None:
        self.bpffs = bpffs
        self._sockets: list[socket.socket] = []

    # -- commands ------------------------------------------------------------------

    def command(self, *words: str) -> list[str]:
        """Return the argv of a dispatch command here."""
        return [*COMMAND, "--bpffs", str(self.bpffs), *words]

    def run(self, *words: str, stdin: str | None = None) -> Done:
        """Run a dispatch command, whatever comes of it."""
        return Done(
            subprocess.run(
                self.command(*words), input=stdin, capture_output=True, text=True,
                timeout=DEADLINE, check=False,
            )
        )  # fmt: skip

    def ok(self, *words: str, stdin: str | None = None) -> Done:
        """Run a dispatch command that must work."""
        done = self.run(*words, stdin=stdin)
        assert done.status == 0, f"{words}: {done.err}"
        return done

    def fails(self, *words: str, stdin: str | None = None) -> str:
        """Run a dispatch command that must fail, in one line; return the line."""
        done = self.run(*words, stdin=stdin)
        assert done.status in (1, 2), f"{words}: {done.status} {done.out}{done.err}"
        assert done.err.count("\n") == 1, done.err
        assert not done.out
        return done.err

    def start(
        self,
        words: list[str],
        passed: Sequence[tuple[str, socket.socket]],
        environment: dict[str, str],
        mode: str = "dispatch",
        *,
        without_network: bool = False,
        stub: str = STUB,
    ) -> subprocess.Popen[str]:
        """Start a dispatch command (or another mode) with inherited sockets, by their names."""
        words = self.command(*words)[3:] if mode == "dispatch" else [mode, *words]
        names = ":".join(name for name, _ in passed)
        numbers = [sock.fileno() for _, sock in passed]
        handed = {
            "LISTEN_FDS": str(len(passed)),
            "LISTEN_FDNAMES": names,
            "PASSED": " ".join(map(str, numbers)),
        }
        return subprocess.Popen(
            [*(_WITHOUT_NETWORK if without_network else ()), sys.executable, "-c", stub, *words],
            env={**os.environ, **handed, **environment},
            pass_fds=numbers, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def register(self, *passed: tuple[str, socket.socket], label: str = "") -> Done:
        """Run `register` to its end."""
        with self.start(["register", *([label] if label else [])], passed, {}) as process:
            out, err = process.communicate(timeout=DEADLINE)
        return Done(subprocess.CompletedProcess([], process.returncode, out, err))

    def run_tool(self, *words: str) -> None:
        """Run a program of the system."""
        subprocess.run(words, check=True, capture_output=True, timeout=DEADLINE)

    def descriptors(self, pid: int) -> list[str]:
        """Return the descriptors that a process has open."""
        return os.listdir(f"/proc/{pid}/fd")

    # -- sockets ---------------------------------------------------------------------

    def keep(self, sock: socket.socket) -> socket.socket:
        """Close a socket after the test."""
        self._sockets.append(sock)
        return sock

    def tcp(self, address: str = "127.0.0.1", port: int = 0, **options: Any) -> socket.socket:
        """Return a listening TCP socket."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return self.keep(socket.create_server((address, port), family=family, **options))

    def udp(self, address: str = "127.0.0.1", port: int = 0) -> socket.socket:
        """Return a bound UDP socket."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = self.keep(socket.socket(family, socket.SOCK_DGRAM))
        sock.bind((address, port))
        return sock

    # -- what is there ---------------------------------------------------------------

    @contextmanager
    def dispatcher(self) -> Iterator[Dispatcher]:
        """Open the state in this process, to write."""
        place = Place(str(self.bpffs), None)
        with Lock(place, 5), Dispatcher(place, write=True) as opened:
            yield opened
        os.close(place.netns)

    def pinned(self) -> list[Path]:
        """Return the directories of dispatchers, and what is left of such."""
        base = self.bpffs / "echo-appliance"
        found = sorted(base.iterdir()) if base.exists() else []
        return [path for path in found if path.name != "lock"]

    def wait_until_dead(self) -> None:
        """Wait until the kernel has taken down the namespace of the one dispatcher here."""
        [path] = self.pinned()
        deadline = time.monotonic() + DEADLINE
        link = libbpf.open_pin(str(path / "link"))
        while libbpf.link_info(link)[1]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.close(link)

    @contextmanager
    def killed_after(self, calls: int, *words: str) -> Iterator[bool]:
        """Run a dispatch command that is killed by SIGKILL after so many calls that change state.

        Yields whether it was; else it came to its end before.
        """
        done = subprocess.run(
            [sys.executable, "-c", _KILLED, str(calls), *self.command(*words)[3:]],
            capture_output=True, text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        yield done.returncode != 0

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


@contextmanager
def private_space() -> Iterator[Space]:
    """Move this thread to a fresh space, and back."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = [os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY) for kind in ("net", "mnt")]
    with tempfile.TemporaryDirectory(prefix="dispatch-") as folder:
        check(libc.unshare(CLONE_NEWNS | CLONE_NEWNET))
        space = Space(Path(folder))
        try:
            check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
            check(libc.mount(b"bpf", folder.encode(), b"bpf", 0, None))
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield space
        finally:
            space.close()
            for number in home:
                check(libc.setns(number, 0))
                os.close(number)


def check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
