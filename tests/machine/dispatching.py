"""The dispatch units of the system manager: what is installed, and how they are asked."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testinfra.host import Host

from tests.machine.clients import Target
from tests.machine.conftest import wait_until
from tests.machine.remote import ARCHIVE_PATH, MOUNTED

UNITS = f"{MOUNTED}/systemd"
INSTALLED = "/etc/systemd/system"
BINDINGS = "/etc/echo-appliance/dispatch/bindings.toml"
PINS = Path("/sys/fs/bpf/echo-appliance")
ECHO = f"{UNITS}/echo@.socket {UNITS}/echo@demo.socket.d {UNITS}/system/echo@demo.service.d"
COMMON = f"install -D -m 644 {UNITS}/system/bindings.toml {BINDINGS}"
NATIVE = (
    COMMON,
    f"cp -r {ECHO} {UNITS}/native/echo@.service {UNITS}/native/system/* {INSTALLED}",
    f"cp -r {UNITS}/system/dispatch* {INSTALLED}",
    f"install -D -m 644 -t /etc/sysusers.d {UNITS}/system/sysusers.d/echo-appliance.conf",
    "systemd-sysusers",
)
CONTAINER = (
    COMMON,
    f"podman load --quiet --input {MOUNTED}/{ARCHIVE_PATH}",
    f"cp -r {ECHO} {UNITS}/system/dispatch-*.socket {UNITS}/system/container/* {INSTALLED}",
)
ADDRESSES = (("tcp4", "127.0.0.{}"), ("tcp6", "2001:db8::{:x}"), ("udp4", "127.0.0.{}"),
             ("udp6", "2001:db8::{:x}"))  # fmt: skip


@contextlib.contextmanager
def installed(root: Host, commands: tuple[str, ...]) -> Iterator[Host]:
    """Gives the system these units, dispatch@demo enabled; afterwards nothing is left of it."""
    try:
        for command in (*commands, "systemctl daemon-reload", "systemctl enable dispatch@demo"):
            root.check_output(command)
        yield root
    finally:
        remove(root)
    assert pinned() == []
    assert root.check_output("podman ps --all --quiet") == ""


def remove(root: Host) -> None:
    """Stops and removes every unit of ours, and what the kernel keeps of them."""
    root.run("systemctl disable dispatch@demo dispatch-metrics@demo.socket")
    root.run("systemctl stop 'echo@*' 'dispatch*'")
    root.run("echo-appliance dispatch unload")
    root.run("ip -6 route del local 2001:db8::/64 dev lo")
    root.check_output(f"rm -rf {INSTALLED}/echo@* {INSTALLED}/dispatch* {Path(BINDINGS).parent}")
    root.check_output("systemctl daemon-reload")
    root.run("systemctl reset-failed")


def listen(root: Host) -> None:
    """Starts the sockets; returns once dispatch is in force and nothing else runs."""
    root.check_output("systemctl start echo@demo.socket")
    wait_until(lambda: is_active(root, "dispatch@demo.service"), "the sidecar")
    assert not is_active(root, "echo@demo.service"), "must start on demand"


def is_active(root: Host, unit: str) -> bool:
    return str(root.run("systemctl is-active %s", unit).stdout).strip() == "active"


def show(root: Host, unit: str, name: str) -> str:
    """Returns one property of a unit."""
    return str(root.check_output("systemctl show --value -p %s %s", name, unit))


def journal(root: Host, unit: str) -> list[str]:
    """Returns what our own programs said in a unit."""
    lines = root.check_output("journalctl --output=cat --unit=%s", unit).splitlines()
    return [line for line in lines if line.startswith("echo-appliance: ")]


def status(root: Host) -> Any:
    return json.loads(root.check_output("echo-appliance dispatch status --json"))


def pinned() -> list[str]:
    """Returns the dispatchers that are pinned, and what is left of such."""
    found = PINS.iterdir() if PINS.exists() else ()
    return [path.name for path in found if path.name != "lock"]


def anywhere(name: str, lowest: int = 1) -> Target:
    """Returns a target of this name at an address and a port of the demo's that chance picks."""
    pattern = dict(ADDRESSES)[name]
    address = pattern.format(random.randrange(129, 255))  # noqa: S311 - chance, not a secret
    family = socket.AF_INET6 if name.endswith("6") else socket.AF_INET
    kind = socket.SOCK_STREAM if name.startswith("tcp") else socket.SOCK_DGRAM
    return Target(name, family, kind, (address, random.randrange(lowest, 65536)))  # noqa: S311
