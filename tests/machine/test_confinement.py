"""What the running container can and cannot do: asked of podman, of the kernel, and by trying."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import podman
import pytest
import testinfra.host

from tests.machine import clients

API = "unix:///run/user/1000/podman/podman.sock"


@pytest.fixture
def api(demo: testinfra.host.Host) -> Iterator[podman.PodmanClient]:
    """The user's podman service, with the appliance running."""
    demo.check_output("systemctl --user start podman.socket")
    assert clients.echo(clients.TCP) == b"hello\n"
    with podman.PodmanClient(base_url=API) as client:
        yield client
    demo.check_output("systemctl --user stop podman.socket podman.service")


@pytest.fixture
def process(api: podman.PodmanClient) -> Path:
    """/proc of the appliance."""
    return Path(f"/proc/{api.containers.get('echo-demo').attrs['State']['Pid']}")


def test_podman_says_the_container_is_confined(api: podman.PodmanClient) -> None:
    container = api.containers.get("echo-demo")
    assert container.status == "running"
    host = container.attrs["HostConfig"]
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"] is True
    assert host["Privileged"] is False
    assert "no-new-privileges" in host["SecurityOpt"]
    assert not container.attrs["EffectiveCaps"]
    assert not container.attrs["BoundingCaps"]
    assert container.attrs["Config"]["User"] == "65534:65534"
    assert container.attrs["Config"]["Labels"]["PODMAN_SYSTEMD_UNIT"] == "echo@demo.service"
    assert [mount["RW"] for mount in container.attrs["Mounts"]] == [False]


def test_image_is_small_and_starts_the_command_as_nobody(api: podman.PodmanClient) -> None:
    image = api.images.get("localhost/echo-appliance:latest")
    # Not attrs["Size"], which counts the copy that podman makes for --userns=keep-id as well.
    assert sum(layer["Size"] for layer in image.history()) <= 30e6
    assert image.attrs["Config"]["User"] == "65534:65534"
    assert image.attrs["Config"]["Entrypoint"] == ["/usr/bin/echo-appliance"]
    assert image.attrs["Config"]["Cmd"] == ["echo"]


def test_kernel_grants_the_appliance_no_capability_and_no_new_privilege(process: Path) -> None:
    lines = (process / "status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["Uid"].split()[0] == str(clients.USER_ID)


def test_appliance_is_in_the_control_group_of_its_unit(process: Path) -> None:
    # Only then does systemd end it with the unit, whatever became of conmon and podman.
    assert "/echo@demo.service/" in (process / "cgroup").read_text()


def test_container_has_a_loopback_interface_and_no_route(process: Path) -> None:
    interfaces = (process / "net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    assert (process / "net/route").read_text().splitlines()[1:] == []


def test_connecting_out_of_the_container_fails(
    api: podman.PodmanClient, user: testinfra.host.Host
) -> None:
    # The host's own echo port too: what a container with a network would reach.
    for target in ("tcp:192.0.2.1:80", "udp:192.0.2.1:53", "tcp:127.0.0.1:3000"):
        attempt = user.run(
            "podman exec echo-demo echo-appliance probe --timeout 1 --json %s", target
        )
        assert attempt.rc != 0, target
        assert json.loads(attempt.stdout), target


def test_nothing_in_the_container_can_be_written(process: Path) -> None:
    # Kernel file systems are guarded by their own permissions; "/dev" ones hold no data.
    virtual = {"proc", "sysfs", "devtmpfs", "devpts", "mqueue", "cgroup2"}
    writable = []
    for line in (process / "mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        options = fields.split()[5].split(",")
        if kind.split()[0] not in virtual and "rw" in options:
            writable.append(line)
    assert writable == []
    assert os.statvfs(process / "root").f_flag & os.ST_RDONLY


def test_socket_directory_is_all_that_is_shared_with_the_container(process: Path) -> None:
    shared = process / "root" / clients.DEMO_FOLDER.lstrip("/")
    assert {path.name for path in shared.iterdir()} == {"datagram", "seqpacket", "stream"}
    assert [path.name for path in shared.parents[1].iterdir()] == ["echo-appliance"]
