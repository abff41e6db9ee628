"""The other ways to run it: quadlet, podman under restriction, and no podman at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import testinfra.host

from tests.machine import clients
from tests.machine.clients import DEMO, Target
from tests.machine.conftest import EXPOSURE_LIMIT, clean, exposure, status_of, wait_until

UNITS = "/srv/echo-appliance/systemd"
SOCKETS = f"{UNITS}/echo@.socket {UNITS}/echo@demo.socket.d"


def install(user: testinfra.host.Host, *commands: str) -> None:
    user.check_output("mkdir -p ~/.config/systemd/user ~/.config/containers/systemd")
    for command in [*commands, "systemctl --user daemon-reload"]:
        user.check_output(command)


def assert_all_echo(targets: list[Target]) -> None:
    """Every family echoes, the first of them from cold."""
    assert {target.name: clients.echo(target) for target in targets} == {
        target.name: b"hello\n" for target in targets
    }


@pytest.fixture
def quadlet(user: testinfra.host.Host) -> Iterator[testinfra.host.Host]:
    install(
        user,
        f"cp -r {SOCKETS} ~/.config/systemd/user",
        f"cp {UNITS}/quadlet/echo@.container ~/.config/containers/systemd",
    )
    user.check_output("systemctl --user start echo@demo.socket")
    yield user
    clean(user)


def test_quadlet_serves_every_family_confined_as_the_unit_does(
    quadlet: testinfra.host.Host,
) -> None:
    assert_all_echo(DEMO)
    properties = quadlet.service("echo@demo.service").systemd_properties
    assert properties["SourcePath"].endswith("echo@.container")
    assert properties["StatusText"].startswith("serving")
    assert properties["NRestarts"] == "0"
    container = quadlet.podman("echo-demo").inspect()
    assert container["HostConfig"]["NetworkMode"] == "none"
    assert container["HostConfig"]["ReadonlyRootfs"] is True
    status = status_of(str(container["State"]["Pid"]))
    assert (int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, "1")


def test_quadlet_drains_on_stop(quadlet: testinfra.host.Host) -> None:
    with clients.connect(clients.TCP) as client:
        client.sendall(b"before")
        assert clients.receive(client, 6) == b"before"
        quadlet.check_output("systemctl --user stop --no-block echo@demo.service")
        state = "systemctl --user show --value -p ActiveState echo@demo.service"
        wait_until(lambda: quadlet.check_output(state) == "deactivating", "the stop")
        client.sendall(b"after")
        assert clients.receive(client, 5) == b"after"
    wait_until(lambda: quadlet.check_output(state) == "inactive", "the end of the drain")


@pytest.fixture
def restricted(user: testinfra.host.Host) -> Iterator[testinfra.host.Host]:
    install(
        user,
        f"cp {UNITS}/echo-restrict@* {UNITS}/podman-usernamespace.service ~/.config/systemd/user",
        "mkdir ~/.config/systemd/user/echo-restrict@demo.socket.d",
        f"cp {UNITS}/echo@demo.socket.d/* ~/.config/systemd/user/echo-restrict@demo.socket.d",
    )
    user.check_output("systemctl --user start echo-restrict@demo.socket")
    yield user
    user.run("systemctl --user stop podman-usernamespace.service")
    clean(user)


def test_restricted_podman_serves_every_family(restricted: testinfra.host.Host) -> None:
    folder = f"/run/user/{clients.USER_ID}/echo-restrict/demo"
    assert_all_echo([*clients.inet_targets(), *clients.unix_targets(folder)])
    podman = restricted.service("echo-restrict@demo.service").systemd_properties
    assert status_of(podman["MainPID"])["NoNewPrivs"] == "1"
    assert restricted.service("podman-usernamespace.service").is_running


def test_restricted_unit_cannot_make_sockets_of_other_families(
    restricted: testinfra.host.Host,
) -> None:
    attempt = "import socket; socket.socket(socket.AF_INET6)"
    folder = "~/.config/systemd/user/echo-restrict@demo.service.d"
    lines = f'[Service]\\nExecStartPre=/usr/bin/python3 -c "{attempt}"\\n'
    restricted.check_output(f"mkdir -p {folder}; printf %s > {folder}/test.conf", lines)
    restricted.check_output("systemctl --user daemon-reload")
    assert restricted.run("systemctl --user start echo-restrict@demo.service").failed
    journal = restricted.check_output("journalctl --user -u echo-restrict@demo.service -n 50")
    assert "Address family not supported by protocol" in journal


@pytest.mark.parametrize("kind", ["socket", "service"])
def test_restricted_unit_differs_from_the_plain_one_only_where_it_restricts(kind: str) -> None:
    def settings(name: str) -> set[str]:
        text = Path(f"{UNITS}/{name}@.{kind}").read_text().replace("\\\n", " ")
        lines = [" ".join(line.split()) for line in text.splitlines()]
        return {line for line in lines if line and not line.startswith(("#", "Description="))}

    plain = "\n".join(settings("echo"))
    for word, theirs in (
        ("echo@", "echo-restrict@"),
        ("echo-%i", "echo-restrict-%i"),
        ("/echo-appliance/%i", "/echo-restrict/%i"),
    ):
        plain = plain.replace(word, theirs)
    changed = settings("echo-restrict") ^ set(plain.splitlines())
    restricts = {"NoNewPrivileges", "RestrictAddressFamilies"} if kind == "service" else set()
    assert {line.partition("=")[0] for line in changed} - {"Requires", "After"} == restricts


@pytest.fixture
def native(user: testinfra.host.Host) -> Iterator[testinfra.host.Host]:
    install(user, f"cp -r {SOCKETS} {UNITS}/native/echo@.service ~/.config/systemd/user")
    user.check_output("systemctl --user start echo@demo.socket")
    yield user
    clean(user)


def test_native_user_unit_serves_every_family_without_network_or_capability(
    native: testinfra.host.Host,
) -> None:
    assert_all_echo(DEMO)
    service = native.service("echo@demo.service").systemd_properties
    assert (service["NRestarts"], service["StatusText"][:7]) == ("0", "serving")
    status = status_of(service["MainPID"])
    assert (int(status["CapBnd"], 16), status["NoNewPrivs"], status["Seccomp"]) == (0, "1", "2")
    process = Path(f"/proc/{service['MainPID']}")
    assert (process / "ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    assert (process / "net/route").read_text().splitlines()[1:] == []


def test_native_user_unit_is_hardened(native: testinfra.host.Host) -> None:
    assert exposure(native, "--user", "echo@demo.service") <= EXPOSURE_LIMIT


def test_native_user_sockets_are_bound_anew_by_a_restart_under_a_running_service(
    native: testinfra.host.Host,
) -> None:
    folder = "~/.config/systemd/user/echo@demo.socket.d"
    native.check_output(f"printf '[Unit]\\nStartLimitIntervalSec=0\\n' >{folder}/test.conf")
    native.check_output("systemctl --user daemon-reload")
    for _ in range(30):  # one in three failed with PrivateTmp=yes
        assert clients.echo(clients.TCP) == b"hello\n"
        native.check_output("systemctl --user restart echo@demo.socket")
    assert_all_echo(DEMO)


@pytest.fixture
def native_system(root: testinfra.host.Host) -> Iterator[testinfra.host.Host]:
    own = f"{UNITS}/native/echo@.service {UNITS}/native/system/echo@.service.d"
    root.check_output(f"cp -r {SOCKETS} {own} /etc/systemd/system")
    root.check_output("systemctl daemon-reload")
    root.check_output("systemctl start echo@demo.socket")
    yield root
    root.check_output("systemctl stop echo@demo.socket echo@demo.service")
    root.check_output("rm -r /etc/systemd/system/echo@*")
    root.check_output("systemctl daemon-reload")


def test_native_system_unit_serves_every_family_as_nobody_known(
    native_system: testinfra.host.Host,
) -> None:
    targets = [*clients.inet_targets(), *clients.unix_targets("/run/echo-appliance/demo")]
    # A client's own socket file is closed to the service's transient user.
    assert_all_echo([target for target in targets if target.name != "unix-dgram-path"])
    service = native_system.service("echo@demo.service").systemd_properties
    uid = int(status_of(service["MainPID"])["Uid"].split()[0])
    assert 61184 <= uid <= 65519, "the range that systemd takes transient users from"
    assert exposure(native_system, "--system", "echo@demo.service") <= EXPOSURE_LIMIT
