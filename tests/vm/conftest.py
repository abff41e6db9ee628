"""One VM for all tests of this folder: booted for the first of them, ended after the last."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import testinfra
import testinfra.host

from vm import cache, ignition
from vm.__main__ import ARCHIVE, make_key
from vm.machine import TOOLS, Folder, Machine, Plan, write_ssh_config

CID = 43
BOOT_SECONDS = 200  # far beyond what a boot takes, also on a machine that is busy
APP = "PYTHONPATH=/var/lib/echo-appliance/app python3 -m echo_appliance"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test pays for the boot, and maybe for making what is booted."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.timeout(500))


def why_not() -> str | None:
    """Return what this machine lacks to run a VM, and the mend; None when nothing."""
    if os.geteuid() != 0:
        return "the guest is built by root: run as root"
    tools = (*TOOLS, "mmdebstrap", "mke2fs", "zstd", "ssh", "setpriv")
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found: run scripts/setup vm"
    return None


@pytest.fixture(scope="session", autouse=True)
def _can_run() -> None:
    if not ARCHIVE.exists():
        pytest.fail(f"{ARCHIVE} is missing: run make image first")
    if (reason := why_not()) is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"cannot run: {reason}")
        pytest.skip(reason)
    # A CI runner stops a job with SIGTERM; without this Python would end with fixtures standing.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def config() -> str:
    """The Ignition config that butane makes of the file that users have."""
    return ignition.transpile()


@dataclass(frozen=True, slots=True)
class Parts:
    """What every boot of this run has in common."""

    folder: Path
    key: Path
    ignition: str
    data: Path


@pytest.fixture(scope="session")
def parts(config: str) -> Iterator[Parts]:
    """A key of this run, with which the tests log in as core and as root, and the disk."""
    with Folder() as folder:
        private, public = make_key(folder)
        merged = ignition.merge(config, ignition.Login(public, ("core", "root")))
        extra = {name: cache.REPOSITORY / name for name in ("app", "systemd")}
        data = cache.data_disk(folder, ARCHIVE, extra)
        yield Parts(folder, private, merged, data)


@dataclass(frozen=True, slots=True)
class Booted:
    """A VM that echoes, and how testinfra gets into it, over vsock."""

    machine: Machine
    ssh_config: Path
    seconds: float

    def host(self, user: str) -> testinfra.host.Host:
        """Return the guest as this user sees it."""
        return testinfra.get_host(f"ssh://{user}@vm", ssh_config=str(self.ssh_config))

    def run(self, user: str, command: str) -> str:
        """Return what a command says; nothing when there is no guest, or it goes down meanwhile."""
        ssh = ["ssh", "-F", str(self.ssh_config), "-o", "ControlPath=none", "-l", user, "vm"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run([*ssh, command], capture_output=True, text=True, timeout=20)
            return done.stdout.strip()
        return ""

    def log_out(self) -> None:
        """End the connections that logins share."""
        for user in ("core", "root"):
            leave = ["ssh", "-F", str(self.ssh_config), "-O", "exit", "-l", user, "vm"]
            subprocess.run(leave, capture_output=True, check=False)


@pytest.fixture(scope="session")
def vm(parts: Parts) -> Iterator[Booted]:
    """The VM, after its first boot and the first echo over vsock."""
    with Machine(Plan(CID, parts.ignition, parts.data), parts.folder) as machine:
        seconds = machine.wait_for_echo(BOOT_SECONDS)
        booted = Booted(machine, write_ssh_config(parts.folder, machine, parts.key), seconds)
        yield booted
        booted.log_out()


@pytest.fixture(scope="session")
def root(vm: Booted) -> testinfra.host.Host:
    """The guest, seen as root."""
    return vm.host("root")


@pytest.fixture(scope="session")
def core(vm: Booted) -> testinfra.host.Host:
    """The guest, seen as its lingering user."""
    return vm.host("core")


def wait_until(true: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Return once true() is so; fail, naming what was waited for, when it does not become so."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)
