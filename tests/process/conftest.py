"""The process tier: the real appliance as a process, real sockets, no mocks."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import pytest

from tests.process.launcher import Launcher, eventually
from tests.process.peers import Sockets, pattern

CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h

_T = TypeVar("_T")


class InNamespace(Protocol):
    """Calls make() inside a private network namespace, and returns what it made."""

    def __call__(self, make: Callable[[], _T]) -> _T: ...


def lacking(reason: str) -> NoReturn:
    """What cannot run here skips, in words; under CI everything can, so there it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"cannot run: {reason}")
    pytest.skip(reason)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name leaves room in a unix socket's 107 octets."""
    with tempfile.TemporaryDirectory(prefix="echo-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def sockets(short_path: Path) -> Iterator[Sockets]:
    """Makes sockets, and closes them after the test."""
    made = Sockets(short_path)
    yield made
    made.close()


@pytest.fixture
def launch(short_path: Path) -> Iterator[Launcher]:
    """Starts appliances, and ends them after the test."""
    launcher = Launcher(short_path)
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def payload() -> bytes:
    """64 MiB that repeat nowhere."""
    return pattern(64 << 20)


@pytest.fixture(scope="session", autouse=True)
def _many_files() -> None:
    """The tests hold thousands of sockets themselves."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@pytest.fixture
def in_namespace() -> InNamespace:
    """A private network with its own addresses; sockets made in it work from everywhere.

    A namespace belongs to a thread, and what the thread makes there stays there; so nothing is
    left behind but the sockets, and with the last of them the namespace is gone.
    """
    if os.geteuid() != 0:
        lacking("a network namespace needs root: run as root")

    def run(make: Callable[[], _T]) -> _T:
        def enter() -> _T:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET) != 0:
                raise PermissionError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
            subprocess.run(["ip", "-batch", "-"], input=_ADDRESSES, text=True, check=True)
            eventually(_addresses_work, "the link to be up, and its addresses in use")
            return make()

        with ThreadPoolExecutor(1) as thread:
            try:
                return thread.submit(enter).result()
            except PermissionError as error:
                lacking(f"{error}: run with CAP_SYS_ADMIN")

    return run


def _addresses_work() -> bool:
    # Until the kernel has noticed the carrier, what is sent to an IPv6 address of ours leaves for
    # a neighbour that does not exist.
    show = ["ip", "-6", "route", "show", "table", "local"]
    routes = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    wanted = [line.split()[2].partition("/")[0] for line in _ADDRESSES.splitlines() if "::" in line]
    return all(f"local {address} " in routes for address in wanted)


# A veth pair for what the loopback cannot do: broadcasts.  TEST-NET-1 and documentation addresses.
_ADDRESSES = """\
link set lo up
link set lo multicast on
link add v0 type veth peer name v1
link set v0 up
link set v1 up
address add 192.0.2.1/24 brd 192.0.2.255 dev v0
address add 192.0.2.2/24 dev v0
address add 192.0.2.3/24 dev v0
address add 192.0.2.9/24 dev v0
address add 2001:db8::1/64 dev v0 nodad
address add 2001:db8::2/64 dev v0 nodad
address add 2001:db8::9/64 dev v0 nodad
address add fe80::9/64 dev v0 nodad
address add fe80::5/64 dev v0 nodad
route add default dev v0
"""
