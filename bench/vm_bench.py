"""The VM: how long until it echoes, how long a first client waits, what the appliance takes of it.

Each round boots a guest anew.  The time from an empty cache is taken once, with a cache folder of
its own: downloads of packages are most of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.core import ROOT, BenchError, Options, Series
from bench.report import Row, Section, Target
from echo_appliance.probe import probe
from echo_appliance.target import parse_target
from vm import cache, ignition
from vm.__main__ import ARCHIVE, make_key
from vm.errors import VmError
from vm.machine import Folder, Machine, Plan, write_ssh_config

OURS = "the VM"
CID = 61
LIMIT = 300  # seconds for a boot
COLD_STARTS = 3  # per boot, of which the median counts
SERVICE = "echo@demo.service"
MEMORY = f"systemctl --user show --property=MemoryCurrent --value {SERVICE}"


def run(options: Options) -> Section:
    """Measure; one boot per round."""
    try:
        empty = _from_empty_cache() if options.rounds >= 5 else None
        rounds = [_boot() for _ in range(options.rounds)]
    except VmError as error:
        raise BenchError(str(error)) from error
    boot, cold, memory = (Series(tuple(values)) for values in zip(*rounds, strict=True))
    rows = [
        Row("QEMU's start to the first echo over vsock", "s", {OURS: boot}, True),
        Row("container cold: connect to the first octet", "s", {OURS: cold}, True),
        Row("memory of the echo unit, idle, podman's own included", "MB", {OURS: memory}, True),
    ]
    targets = [
        Target("first echo, cached guest", boot.median, 30, "s", at_most=True),
        Target("first octet, container cold", cold.median, 3, "s", at_most=True),
        Target("memory of the unit, idle", memory.median, 60, "MB", at_most=True),
    ]
    if empty is not None:
        rows.append(
            Row("empty cache to the first echo", "s", {OURS: Series((empty,))}, True, False)
        )
        targets.append(Target("first echo, empty cache", empty, 240, "s", at_most=True))
    return Section("vm", OURS, "results-vm.svg", rows, targets, ("podman",))


def _boot() -> tuple[float, float, float]:
    """Return seconds to the first echo, seconds of a cold start, and MB of an idle appliance."""
    with _machine() as (machine, config):
        boot = machine.wait_for_echo(LIMIT)
        ssh = ["ssh", "-F", str(config), "vm"]
        memory = int(_output([*ssh, MEMORY])) / 1e6
        cold = sorted(_cold_start(machine, ssh) for _ in range(COLD_STARTS))[COLD_STARTS // 2]
    return boot, cold, memory


@contextmanager
def _machine() -> Iterator[tuple[Machine, Path]]:
    if not ARCHIVE.exists():
        raise BenchError(f"{ARCHIVE} is missing: make image")
    with Folder() as folder:
        private, public = make_key(folder)
        config = ignition.merge(ignition.transpile(), ignition.Login(public))
        plan = Plan(CID, config, cache.data_disk(folder, ARCHIVE, {}))
        with Machine(plan, folder) as machine:
            yield machine, write_ssh_config(folder, machine, private)


def _cold_start(machine: Machine, ssh: list[str]) -> float:
    _output([*ssh, f"systemctl --user stop {SERVICE}"])
    started = time.monotonic()
    result = probe(parse_target(machine.target()), 1, 1, 60)
    if result.error is not None:
        raise BenchError(f"the VM does not echo: {result.error}")
    return time.monotonic() - started


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise BenchError(f"{command[-1]} in the VM: {done.stderr.strip()}")
    return done.stdout.strip()


def _from_empty_cache() -> float:
    """Return the seconds of `make vm`'s program, up to its echo, with nothing made before."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder, "CID": str(CID), "ONCE": "yes"}
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "vm"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
    if done.returncode != 0:
        raise BenchError(f"make vm: {done.stderr.strip()}")
    return time.monotonic() - started
