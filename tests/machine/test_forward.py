"""The forward units: no network, a backend on a unix socket, routes that are read again."""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import testinfra.host

from tests.machine.clients import receive
from tests.machine.conftest import EXPOSURE_LIMIT, clean, exposure, status_of, wait_until

UNITS = "/srv/echo-appliance/systemd"
ADDRESS = ("127.0.0.1", 11000)  # of the instance "redis"
CONFIG = "~/.config/echo-appliance/forward"

# Stands in for redis: says its name to whoever connects.  argv: path, name
BACKEND = """
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
while True:
    client, _ = server.accept()
    client.sendall(sys.argv[2].encode() + b" heard " + client.recv(100))
    client.close()
"""


def start_backend(user: testinfra.host.Host, name: str) -> None:
    """Run a backend of this name, as a transient unit of the user."""
    folder = "$XDG_RUNTIME_DIR/echo-appliance/backends"
    user.check_output(f"mkdir -p {folder} && rm -f {folder}/{name}")
    program = shlex.quote(BACKEND)
    run = f"systemd-run --user --collect --unit=forward-backend-{name} /usr/bin/python3 -c"
    user.check_output(f"{run} {program} {folder}/{name} {name}")
    wait_until(lambda: user.run(f"test -S {folder}/{name}").rc == 0, f"backend {name}")


def write_route(user: testinfra.host.Host, backend: str) -> None:
    text = f'[route.forward]\nto = "unix:/run/backends/{backend}"\nconnect-retry = 10\n'
    command = f"mkdir -p {CONFIG} && printf %s %s > {CONFIG}/redis.toml"
    user.check_output(command, "%s", text)


def ask() -> bytes:
    """Return what the backend behind the forwarder says."""
    with socket.create_connection(ADDRESS, timeout=20) as client:
        client.sendall(b"hello")
        return receive(client, 100)


@pytest.fixture
def backends(user: testinfra.host.Host) -> Iterator[testinfra.host.Host]:
    """Give the user two backends, and a route to the first."""
    for name in ("one", "two"):
        start_backend(user, name)
    write_route(user, "one")
    yield user
    user.run("systemctl --user stop 'forward*.socket' 'forward*.service'")
    user.run("systemctl --user stop 'forward-backend-*'")
    clean(user)
    user.check_output(f"rm -rf {CONFIG}")


@pytest.fixture
def forward(backends: testinfra.host.Host) -> testinfra.host.Host:
    """Give the user the units, with forward@redis.socket listening."""
    backends.check_output("mkdir -p ~/.config/systemd/user")
    backends.check_output(f"cp -r {UNITS}/forward* ~/.config/systemd/user")
    listen(backends)
    return backends


@pytest.fixture
def quadlet(backends: testinfra.host.Host) -> testinfra.host.Host:
    """Give the user the same as a quadlet."""
    return with_service(backends, "quadlet/forward@.container", "~/.config/containers/systemd")


@pytest.fixture
def native(backends: testinfra.host.Host) -> testinfra.host.Host:
    """Give the user the same without podman."""
    return with_service(backends, "native/forward@.service", "~/.config/systemd/user")


def with_service(user: testinfra.host.Host, service: str, folder: str) -> testinfra.host.Host:
    """Give the user the sockets, and this service in this folder."""
    sockets = f"{UNITS}/forward@.socket {UNITS}/forward@redis.socket.d"
    user.check_output(f"mkdir -p ~/.config/systemd/user {folder}")
    user.check_output(f"cp -r {sockets} ~/.config/systemd/user && cp {UNITS}/{service} {folder}")
    listen(user)
    return user


def listen(user: testinfra.host.Host) -> None:
    user.check_output("systemctl --user daemon-reload")
    user.check_output("systemctl --user start forward@redis.socket")


def assert_without_network(user: testinfra.host.Host) -> None:
    [container] = json.loads(user.check_output("podman inspect forward-redis"))
    assert container["HostConfig"]["NetworkMode"] == "none"


def test_forward_first_connection_starts_a_container_without_network(
    forward: testinfra.host.Host,
) -> None:
    service = forward.service("forward@redis.service")
    assert not service.is_running
    assert ask() == b"one heard hello"
    assert service.is_running
    assert_without_network(forward)


def test_forward_quadlet_does_the_same(quadlet: testinfra.host.Host) -> None:
    assert ask() == b"one heard hello"
    assert quadlet.service("forward@redis.service").is_running
    assert_without_network(quadlet)


def test_forward_native_does_the_same_without_network_or_capability(
    native: testinfra.host.Host,
) -> None:
    assert ask() == b"one heard hello"
    service = native.service("forward@redis.service").systemd_properties
    assert (service["NRestarts"], service["StatusText"][:7]) == ("0", "serving")
    status = status_of(service["MainPID"])
    assert (int(status["CapBnd"], 16), status["NoNewPrivs"], status["Seccomp"]) == (0, "1", "2")
    process = Path(f"/proc/{service['MainPID']}")
    assert (process / "ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    assert exposure(native, "--user", "forward@redis.service") <= EXPOSURE_LIMIT


def test_forward_native_hangup_reads_the_routes_again(native: testinfra.host.Host) -> None:
    assert ask() == b"one heard hello"
    write_route(native, "two")
    native.check_output("systemctl --user kill --signal=HUP forward@redis.service")
    wait_until(lambda: ask() == b"two heard hello", "the new route")


def test_forward_native_backend_that_is_replaced_is_reached(native: testinfra.host.Host) -> None:
    assert ask() == b"one heard hello"
    native.check_output("systemctl --user stop forward-backend-one.service")
    start_backend(native, "one")
    assert ask() == b"one heard hello"


@pytest.fixture
def native_system(root: testinfra.host.Host) -> Iterator[testinfra.host.Host]:
    """Give the system manager the same, with a backend that lets anybody in."""
    own = f"{UNITS}/native/forward@.service {UNITS}/native/system/forward@.service.d"
    sockets = f"{UNITS}/forward@.socket {UNITS}/forward@redis.socket.d"
    folder, routes = "/run/echo-appliance/backends", "/etc/echo-appliance/forward"
    root.check_output(f"cp -r {sockets} {own} /etc/systemd/system && mkdir -p {folder} {routes}")
    text = '[route.forward]\nto = "unix:/run/backends/one"\n'
    root.check_output(f"printf %s %s > {routes}/redis.toml", "%s", text)
    run = "systemd-run --collect --property=UMask=0 --unit=forward-backend-one /usr/bin/python3 -c"
    root.check_output(f"{run} {shlex.quote(BACKEND)} {folder}/one one")
    wait_until(lambda: root.run(f"test -S {folder}/one").rc == 0, "the backend")
    root.check_output("systemctl daemon-reload")
    root.check_output("systemctl start forward@redis.socket")
    yield root
    root.run("systemctl stop forward@redis.socket forward@redis.service forward-backend-one")
    root.check_output(f"rm -r /etc/systemd/system/forward@* {folder} /etc/echo-appliance")
    root.check_output("systemctl daemon-reload")


def test_forward_native_system_unit_serves_as_nobody_known(
    native_system: testinfra.host.Host,
) -> None:
    assert ask() == b"one heard hello"
    service = native_system.service("forward@redis.service").systemd_properties
    uid = int(status_of(service["MainPID"])["Uid"].split()[0])
    assert 61184 <= uid <= 65519, "the range that systemd takes transient users from"
    assert exposure(native_system, "--system", "forward@redis.service") <= EXPOSURE_LIMIT
    native_system.check_output("systemctl reload forward@redis.service")
    journal = "journalctl --unit=forward@redis.service --output=cat"
    wait_until(lambda: "is in force" in native_system.check_output(journal), "the reload")
    assert ask() == b"one heard hello"


def test_forward_reload_reads_the_routes_again(forward: testinfra.host.Host) -> None:
    assert ask() == b"one heard hello"
    write_route(forward, "two")
    assert ask() == b"one heard hello"
    forward.check_output("systemctl --user reload forward@redis.service")
    wait_until(lambda: ask() == b"two heard hello", "the new route")


def test_forward_reload_of_a_bad_file_keeps_the_old_routes(forward: testinfra.host.Host) -> None:
    assert ask() == b"one heard hello"
    forward.check_output(f"echo nonsense > {CONFIG}/redis.toml")
    forward.check_output("systemctl --user reload forward@redis.service")
    journal = "journalctl --user --unit=forward@redis.service --output=cat"
    words = "the old configuration stays"
    wait_until(lambda: words in forward.check_output(journal), words)
    assert ask() == b"one heard hello"


def test_forward_backend_that_is_replaced_is_reached(forward: testinfra.host.Host) -> None:
    assert ask() == b"one heard hello"
    forward.check_output("systemctl --user stop forward-backend-one.service")
    start_backend(forward, "one")
    assert ask() == b"one heard hello"


# The image has Python, so it can be a backend too, and say what it is told.
NETWORK_BACKEND = """
import socket
server = socket.create_server(("", 8080))
while True:
    client, _ = server.accept()
    heard = b""
    while not heard.endswith(b"hello"):
        heard += client.recv(200)
    client.sendall(b"heard " + heard)
    client.close()
"""


@pytest.fixture
def network(user: testinfra.host.Host) -> Iterator[testinfra.host.Host]:
    """Give the user a podman network with the container "web" on it, and a route to that."""
    image = "--entrypoint=/usr/bin/python3 localhost/echo-appliance:latest"
    user.check_output("podman network create forward")
    user.check_output(
        f"podman run --detach --rm --name=web --network=forward {image} -c %s", NETWORK_BACKEND
    )
    text = '[route.forward]\nto = "tcp:web:8080"\nconnect-retry = 10\nproxy-protocol = "v1"\n'
    user.check_output(
        f"mkdir -p {CONFIG} ~/.config/systemd/user && printf %s %s > {CONFIG}/network.toml",
        "%s", text,
    )  # fmt: skip
    user.check_output(f"cp -r {UNITS}/forward* ~/.config/systemd/user")
    user.check_output("systemctl --user daemon-reload")
    user.check_output("systemctl --user start forward@network.socket")
    yield user
    user.run("systemctl --user stop 'forward*.socket' 'forward*.service'")
    clean(user)
    user.run("podman rm --force --time=0 web")
    user.run("podman network rm --force forward")
    user.check_output(f"rm -rf {CONFIG}")


def test_forward_container_on_a_network_is_reached_by_its_name(
    network: testinfra.host.Host,
) -> None:
    with socket.create_connection(("127.0.0.1", 11001), timeout=20) as client:
        port = client.getsockname()[1]
        client.sendall(b"hello")
        # The socket is systemd's, so the client's own address comes through, which it does not
        # through the ports that rootless podman itself publishes.
        assert receive(client, 200).startswith(
            f"heard PROXY TCP4 127.0.0.1 127.0.0.1 {port} ".encode()
        )
    assert network.service("forward@network.service").is_running
