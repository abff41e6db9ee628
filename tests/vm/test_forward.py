"""Forward over vsock, from the host, and in the guest: its units, with targets on vsock and no
network."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.process.launcher import COMMAND, Launcher
from tests.vm.conftest import APP, Booted
from tests.vm.test_echo import echoed
from vm.vsock import UserVsock

UNITS = "/var/lib/echo-appliance/systemd"
HOST_PORT = 5900


@pytest.fixture
def forwarder(core: Host) -> Iterator[Host]:
    """The guest's user, after README's commands for a forwarder; each test gives it a route."""
    core.check_output(
        "mkdir -p ~/.config/echo-appliance/forward && "
        f"cp -r {UNITS}/forward@.s* {UNITS}/forward@vm.socket.d ~/.config/systemd/user && "
        "systemctl --user daemon-reload"
    )
    yield core
    core.run("systemctl --user stop forward@vm.socket forward@vm.service")
    core.check_output("rm -r ~/.config/systemd/user/forward@* ~/.config/echo-appliance")
    core.check_output("systemctl --user daemon-reload")


def forward_to(forwarder: Host, target: str) -> None:
    """Write the route, and listen."""
    route = f'[route.forward]\nto = "{target}"\nconnect-timeout = 20\n'
    forwarder.check_output("printf %s >~/.config/echo-appliance/forward/vm.toml", route)
    forwarder.check_output("systemctl --user start forward@vm.socket")


def assert_echoes(forwarder: Host, size: int) -> None:
    done = forwarder.run(f"{APP} probe --timeout 60 --count 3 --size {size} tcp:127.0.0.1:11002")
    assert done.rc == 0, done.stdout + forwarder.check_output(
        "journalctl --user -u forward@vm --no-pager -n 30"
    )


def test_forward_unit_reaches_a_vsock_port_of_a_cid(forwarder: Host) -> None:
    forward_to(forwarder, "vsock:1:3000")
    assert_echoes(forwarder, 1 << 20)


def test_forward_unit_reaches_the_host(vm: Booted, forwarder: Host, tmp_path: Path) -> None:
    with contextlib.closing(Launcher(tmp_path)) as launcher, listener_on_host(vm) as listener:
        launcher.start([listener])
        forward_to(forwarder, f"vsock:2:{HOST_PORT}")
        assert_echoes(forwarder, 4096)


def test_forward_on_the_host_reaches_the_guest(vm: Booted, tmp_path: Path) -> None:
    with contextlib.closing(Launcher(tmp_path)) as launcher, socket.socket() as front:
        front.bind(("127.0.0.1", 0))
        front.listen()
        command = (*COMMAND, "forward", "--to", vm.machine.target())
        launcher.start([front], command=command)
        assert echoed(f"tcp:127.0.0.1:{front.getsockname()[1]}", 16384, count=5) is None


@contextlib.contextmanager
def listener_on_host(vm: Booted) -> Iterator[socket.socket]:
    """Give a socket of the host that the guest finds at CID 2, HOST_PORT."""
    if isinstance(vm.machine.vsock, UserVsock):
        # Where the device looks for those who listen.
        path = Path(f"{vm.machine.vsock.path}_{HOST_PORT}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen()
            yield listener
        path.unlink()
    else:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
            listener.bind((socket.VMADDR_CID_ANY, HOST_PORT))
            listener.listen()
            yield listener
