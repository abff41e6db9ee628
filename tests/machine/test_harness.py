"""The guest itself: it must leave nothing behind, however its harness ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import guest, remote

pytestmark = pytest.mark.on_machine


@pytest.fixture
def harness() -> Iterator[subprocess.Popen[str]]:
    """guest.py with a command that runs on in the guest, booted and under way."""
    if (obstacle := remote.cannot_run()) is not None:
        (pytest.fail if obstacle[0] == "failed" else pytest.skip)(obstacle[1])
    command = [sys.executable, "-m", "tests.machine.guest", "sh", "-c", "echo up; exec sleep 60"]
    with subprocess.Popen(
        command, cwd=guest.REPOSITORY, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
        process.kill()


def traces(process: subprocess.Popen[str]) -> list[Path]:
    """Returns the cgroup and the scratch folder of a harness, as far as they exist."""
    name = f"{guest.PREFIX}{process.pid}-*"
    return [*guest.cgroup2_mounts()[0].glob(name), *Path(tempfile.gettempdir()).glob(name)]


def processes_in(cgroup: Path) -> list[str]:
    return [pid for file in cgroup.rglob("cgroup.procs") for pid in file.read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_interrupted_harness_leaves_no_process_cgroup_mount_or_setting(
    harness: subprocess.Popen[str], number: signal.Signals
) -> None:
    cgroup, _ = traces(harness)
    assert len(processes_in(cgroup)) > 5, "a whole system runs in it"
    harness.send_signal(number)
    assert harness.wait(20) != 0
    assert traces(harness) == []
    assert guest.PREFIX not in Path("/proc/self/mountinfo").read_text()


def test_killed_harness_takes_the_guest_along_and_the_next_one_sweeps(
    harness: subprocess.Popen[str],
) -> None:
    cgroup, _ = traces(harness)
    os.kill(harness.pid, signal.SIGKILL)
    harness.wait(20)
    deadline = time.monotonic() + 10
    while processes_in(cgroup) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_in(cgroup) == []
    guest.sweep()
    assert traces(harness) == []


def test_boot_puts_back_what_systemd_raises_for_the_whole_machine() -> None:
    if (obstacle := remote.cannot_run()) is not None:
        (pytest.fail if obstacle[0] == "failed" else pytest.skip)(obstacle[1])
    before = [path.read_text() for path in guest.RAISED]
    with guest.Guest():
        assert [path.read_text() for path in guest.RAISED] == before
