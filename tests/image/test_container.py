"""The image at work: activated by a real connection, hardened, and with no network of its own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import NAME, PODMAN, podman

HARDENED = (
    "--read-only",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--network=none",
)
STREAM = "/run/echo-appliance/stream"
HEALTH = ("--health-cmd", f'["echo-appliance", "probe", "unix:{STREAM}"]')
PASSED_ON = ("PATH", "HOME", "XDG_RUNTIME_DIR", "CONTAINERS_CONF")


@dataclass(frozen=True, slots=True)
class Container:
    """A container that systemd-socket-activate starts on the first connection to `port`."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def python(self, code: str) -> str:
        return podman("exec", self.name, "/usr/bin/python3", "-I", "-c", code).stdout

    def pid_1(self, entry: str) -> bytes:
        """Read /proc/1/`entry` as it is seen from inside."""
        code = f"import sys; sys.stdout.write(open('/proc/1/{entry}').read())"
        return self.python(code).encode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_listener(path: Path, process: subprocess.Popen[bytes]) -> None:
    """systemd-socket-activate makes the sockets in order: with the last one, all are there."""
    deadline = time.monotonic() + 10
    while not path.exists():
        assert process.poll() is None, "systemd-socket-activate ended before it listened"
        assert time.monotonic() < deadline, "systemd-socket-activate does not listen"
        time.sleep(0.01)


@contextlib.contextmanager
def activated(folder: Path, *options: str) -> Iterator[Container]:
    """Listen on TCP and on a unix socket in `folder`, which the container sees; end all after."""
    name, port, path = f"image-test-{secrets.token_hex(4)}", free_port(), folder / "stream"
    folder.chmod(0o755)
    command = ["systemd-socket-activate", f"--listen=127.0.0.1:{port}", f"--listen={path}"]
    command += [f"--setenv={key}" for key in PASSED_ON if key in os.environ]
    command += [PODMAN, "run", "--rm", f"--name={name}", "--pull=never", *HARDENED]
    command += [f"--volume={folder}:{Path(STREAM).parent}:z", *options, NAME]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for_listener(path, process)
        path.chmod(0o666)
        yield Container(name, port, process)
    finally:
        # The container first: without its podman client it would go on holding the port.
        podman("rm", "--force", "--time=0", name, check=False)
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def container(
    image: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    """One running container for the tests that only look at it."""
    health = (*HEALTH, "--health-interval=disable")
    with activated(tmp_path_factory.mktemp("container"), *health) as running:
        with running.connect() as client:
            assert echo(client, b"awake") == b"awake"
        yield running


def echo(client: socket.socket, payload: bytes) -> bytes:
    client.sendall(payload)
    received = bytearray()
    while len(received) < len(payload) and (chunk := client.recv(65536)):
        received += chunk
    return bytes(received)


def test_first_connection_starts_a_container_that_echoes(container: Container) -> None:
    payload = secrets.token_bytes(100_000)
    with container.connect() as client:
        assert echo(client, payload) == payload


def test_python_is_pid_1(container: Container) -> None:
    command = container.pid_1("cmdline").split(b"\0")
    assert command[0] == b"/usr/bin/python3"
    assert command[-3:] == [b"/usr/bin/echo-appliance", b"echo", b""]


def test_process_is_nobody_without_any_right(container: Container) -> None:
    lines = container.pid_1("status").decode().splitlines()
    status = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
    assert set(status["Uid"] + status["Gid"]) == {"65534"}
    assert {status[f"Cap{kind}"][0] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == ["1"]


def test_container_has_no_network_but_what_it_inherited(container: Container) -> None:
    code = (
        "import errno, os, socket\n"
        "s = socket.socket()\n"
        "s.settimeout(5)\n"
        f"for target in (('192.0.2.1', 9), ('127.0.0.1', {container.port})):\n"
        "    print(errno.errorcode[s.connect_ex(target)])\n"
        "print(*(name for _, name in socket.if_nameindex()))\n"
    )
    assert container.python(code).splitlines() == ["ENETUNREACH", "ECONNREFUSED", "lo"]


def test_root_file_system_cannot_be_written(container: Container) -> None:
    code = (
        "import errno, os\n"
        "flags = os.statvfs('/').f_flag\n"
        "print(bool(flags & os.ST_RDONLY), os.access('/usr/bin/python3.13', os.W_OK))\n"
    )
    assert container.python(code).split() == ["True", "False"]


def test_probe_inside_reaches_a_mounted_unix_socket(container: Container) -> None:
    done = podman("exec", container.name, "echo-appliance", "probe", f"unix:{STREAM}")
    assert f"unix:{STREAM}" in done.stdout


def test_health_check_of_the_documented_form_passes(container: Container) -> None:
    podman("healthcheck", "run", container.name)
    [inspected] = json.loads(podman("inspect", container.name).stdout)
    state = inspected["State"]
    assert (state.get("Health") or state["Healthcheck"])["Status"] == "healthy"


def test_stop_ends_it_at_once_with_status_0(image: dict[str, Any], tmp_path: Path) -> None:
    with activated(tmp_path) as running:
        with running.connect() as client:
            assert echo(client, b"before the end") == b"before the end"
        podman("stop", "--time=10", running.name)
        assert running.process.wait(timeout=5) == 0
