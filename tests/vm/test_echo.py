"""Echo over AF_VSOCK, from the host and in the guest, from a container that its client starts."""

from __future__ import annotations

import contextlib
import json
import tarfile
import time
from collections.abc import Iterator
from typing import Any

from testinfra.host import Host

from echo_appliance.probe import connect, probe
from echo_appliance.target import parse_target
from tests.vm.conftest import APP, Booted, wait_until
from vm.__main__ import ARCHIVE
from vm.vsock import UserVsock

IMAGE = "localhost/echo-appliance:latest"
SERVICE = "echo@demo.service"

# Hands a vsock listener to the image; no .socket unit makes one that is SEQPACKET.
LISTENER = f"""\
import os, socket, sys
name, kind, port, *options = sys.argv[1:]
with socket.socket(socket.AF_VSOCK, getattr(socket, kind)) as listener:
    listener.bind((socket.VMADDR_CID_ANY, int(port)))
    listener.listen()
    os.dup2(listener.fileno(), 9)
    os.dup2(9, 3)
    os.environ |= {{"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}}
    podman = ["podman", "run", "--rm", "--network=none", "--name", name, "{IMAGE}", "echo"]
    os.execvp("podman", podman + options)
"""


@contextlib.contextmanager
def container(core: Host, name: str, kind: str, port: int, options: str = "") -> Iterator[None]:
    """Run one in the guest, with a vsock listener."""
    words = f"{name} {kind} {port} {options}"
    core.check_output(f"nohup python3 -c %s {words} >/tmp/{name}.log 2>&1 &", LISTENER)
    try:
        yield
    finally:
        core.run(f"podman stop {name}")


def echoed(target: str, size: int = 64, count: int = 1) -> str | None:
    """Return what is wrong with the echo of a target; None when every octet came back."""
    return probe(parse_target(target), size, count, 60).error


def test_echo_from_the_host_returns_every_octet(vm: Booted) -> None:
    # The user-space device loses octets of larger writes.
    large = [] if isinstance(vm.machine.vsock, UserVsock) else [4 << 20]
    for size in (1, 16384, *large):
        assert echoed(vm.machine.target(), size, count=20) is None


def test_first_connection_starts_the_service_once(vm: Booted, core: Host) -> None:
    core.check_output(f"systemctl --user stop {SERVICE}")
    assert core.check_output(f"systemctl --user is-active echo@demo.socket {SERVICE}; true") == (
        "active\ninactive"
    )
    started = time.monotonic()
    assert echoed(vm.machine.target()) is None
    print(f"cold container, first octet after {time.monotonic() - started:.2f} s")
    assert echoed(vm.machine.target()) is None
    state = core.check_output(f"systemctl --user show -p ActiveState,NRestarts --value {SERVICE}")
    assert sorted(state.split()) == ["0", "active"]
    assert core.check_output("podman ps --format '{{.Names}} {{.Image}}'") == f"echo-demo {IMAGE}"


def test_loopback_cid_echoes_streams_in_the_guest(core: Host) -> None:
    for size in ("1", "65536", "4194304"):
        done = core.run(f"{APP} probe --count 5 --size {size} vsock:1:3000")
        assert done.rc == 0, done.stdout + done.stderr


def test_loopback_cid_echoes_seqpackets_in_the_guest(core: Host) -> None:
    probe_it = f"{APP} probe --timeout 20 vsock-seqpacket:1:3011"
    with container(core, "seqpacket", "SOCK_SEQPACKET", 3011):
        wait_until(lambda: core.run(probe_it).rc == 0, "an echo")
        done = core.run(f"{probe_it} --count 20 --size 5000")
        assert done.rc == 0, done.stdout + core.check_output("cat /tmp/seqpacket.log")


def test_limit_per_source_counts_by_cid(vm: Booted, core: Host) -> None:
    target = vm.machine.target(3012)
    limit = "--max-connections-per-source 1"
    with container(core, "limited", "SOCK_STREAM", 3012, limit), contextlib.ExitStack() as stack:
        wait_until(lambda: echoed(target) is None, "an echo")
        first, second = (stack.enter_context(connect(parse_target(target), 20)) for _ in range(2))
        for sock in (first, second):
            sock.settimeout(20)
        first.sendall(b"?")
        assert first.recv(1) == b"?"
        with contextlib.suppress(ConnectionResetError):
            assert second.recv(1) == b"", "the host has its one connection"
        done = core.run(f"{APP} probe --timeout 20 vsock:1:3012")
        assert done.rc == 0, "another CID has one of its own: " + done.stdout


def test_image_in_the_guest_is_the_one_that_was_built(core: Host) -> None:
    with tarfile.open(ARCHIVE) as archive:

        def read(name: str) -> dict[str, Any]:
            file = archive.extractfile(name)
            assert file is not None
            found: dict[str, Any] = json.load(file)
            return found

        digest = read("index.json")["manifests"][0]["digest"]
        config = read(f"blobs/{digest.replace(':', '/')}")["config"]["digest"]
    named = core.check_output(f"podman image inspect --format '{{{{.Id}}}}' {IMAGE}")
    assert f"sha256:{named}" == config


def test_idle_appliance_is_updated(vm: Booted, root: Host, core: Host) -> None:
    core.check_output(f"systemctl --user stop {SERVICE}")
    assert core.check_output("podman ps --quiet") == ""
    core.check_output(
        "printf 'FROM %s\\nLABEL newer=yes\\n' | podman build --quiet --tag newer -f - /tmp && "
        "podman save --quiet --format oci-archive --output /tmp/newer.tar newer && "
        "podman rmi newer",
        IMAGE,
    )
    place = "/etc/echo-appliance/image"
    root.check_output(f"cp {place} /tmp && echo ECHO_IMAGE=oci-archive:/tmp/newer.tar >{place}")
    core.check_output("systemctl --user start echo-image-update.service")
    root.check_output(f"cp /tmp/image {place}")
    label = f"podman image inspect --format '{{{{.Labels.newer}}}}' {IMAGE}"
    assert core.check_output(label) == "yes"
    assert len(core.check_output("podman images --quiet").split()) == 1, "the old one is gone"
    assert echoed(vm.machine.target()) is None
    assert "newer" in core.check_output("podman inspect --format '{{.Config.Labels}}' echo-demo")


def test_update_timer_waits_for_its_day(core: Host) -> None:
    timer = core.check_output("systemctl --user list-timers --no-legend echo-image-update.timer")
    assert "echo-image-update.service" in timer
