"""The netstack units: a tap made by root, and all else by a user, without network or capability."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Iterator

import pytest
import testinfra.host

from tests.machine.clients import receive
from tests.machine.conftest import clean, wait_until

UNITS = "/srv/echo-appliance/systemd"
OURS, OURS6 = "192.0.2.2", "2001:db8::2"
WALK_THROUGH = 20_480
CONFIG = "~/.config/echo-appliance"

# Does to the tap in descriptor 3 what the profile allows, and then what it does not.
IOCTLS = """
import errno, fcntl, struct
def ask(request, argument):
    try:
        fcntl.ioctl(3, request, argument)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
print(ask(0x400454CA, struct.pack("16sH22x", b"tap0", 0x5002)))  # TUNSETIFF
print(ask(0x400454CC, 0))  # TUNSETOWNER
print(ask(0x400454CB, 0))  # TUNSETPERSIST
print(ask(0x8924, bytes(40)))  # SIOCSIFHWADDR
print(ask(0x400454E2, bytes(4)))  # TUNSETCARRIER
"""


@pytest.fixture
def tap(root: testinfra.host.Host) -> Iterator[None]:
    """tap0, made by the privileged unit for the user."""
    if not root.file("/dev/net/tun").exists:
        pytest.skip("this kernel has no taps: modprobe tun")
    root.check_output(f"cp {UNITS}/system/netstack-tap@.service /etc/systemd/system/")
    root.check_output("systemctl daemon-reload && systemctl start netstack-tap@tap0")
    yield
    root.check_output("systemctl stop netstack-tap@tap0")
    assert "tap0" not in root.check_output("ip -brief link")


@pytest.fixture
def netstack(tap: None, user: testinfra.host.Host) -> Iterator[testinfra.host.Host]:
    """The user, whose quadlet runs."""
    user.check_output(f"mkdir -p {CONFIG}")
    user.check_output(f"cp {UNITS}/quadlet/netstack-seccomp.json {CONFIG}")
    user.check_output(f"cp {UNITS}/quadlet/netstack@.container ~/.config/containers/systemd/")
    user.check_output("systemctl --user daemon-reload")
    user.check_output("systemctl --user start netstack@tap0")
    yield user
    user.run("systemctl --user stop netstack@tap0")
    clean(user)
    user.check_output(f"rm -rf {CONFIG}")


def echoed(address: str, data: bytes) -> bytes:
    with socket.create_connection((address, 7), timeout=20) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return receive(client, len(data) + 1)


def test_netstack_of_a_user_echoes_from_a_container_without_network(
    netstack: testinfra.host.Host, root: testinfra.host.Host
) -> None:
    data = bytes(range(256)) * (WALK_THROUGH // 256)
    for address in (OURS, OURS6):
        assert echoed(address, data) == data
    pid = netstack.check_output("podman inspect --format '{{.State.Pid}}' netstack-tap0")
    status = root.file(f"/proc/{pid}/status").content_string
    assert "CapEff:\t0000000000000000" in status
    assert "CapBnd:\t0000000000000000" in status
    assert "Seccomp:\t2" in status
    assert "NoNewPrivs:\t1" in status
    interfaces = root.check_output(f"nsenter --net --target {pid} ip -brief link")
    assert [line.split()[0] for line in interfaces.splitlines()] == ["lo"]


def test_netstack_unit_is_told_ready_and_stops_cleanly(netstack: testinfra.host.Host) -> None:
    def property_of(name: str) -> str:
        unit = "netstack@tap0.service"
        return str(netstack.check_output(f"systemctl --user show --value -p {name} {unit}"))

    assert property_of("ActiveState") == "active"
    assert OURS in property_of("StatusText")
    netstack.check_output("systemctl --user stop netstack@tap0")
    assert property_of("Result") == "success"


def test_netstack_that_dies_is_started_again(netstack: testinfra.host.Host) -> None:
    netstack.check_output("podman kill --signal=KILL netstack-tap0")

    def again() -> bool:
        try:
            return echoed(OURS, b"again") == b"again"
        except OSError:
            return False

    wait_until(again, "the stack to come back", 30)


def test_seccomp_profile_allows_no_ioctl_that_changes_the_tap(
    tap: None, user: testinfra.host.Host
) -> None:
    profile = f"{UNITS}/quadlet/netstack-seccomp.json"
    run = (
        "podman run --rm --network=none --pull=never --cap-drop=all --preserve-fds=1 "
        f"--security-opt=no-new-privileges --security-opt=seccomp={profile} "
        "--userns=keep-id:uid=65534,gid=65534 --entrypoint=/usr/bin/python3 "
        f"localhost/echo-appliance:latest -c {shlex.quote(IOCTLS)} 3<>/dev/net/tun"
    )
    assert user.check_output(run).split() == ["done", "ENOSYS", "ENOSYS", "ENOSYS", "ENOSYS"]


# -- a macvtap that wakes the service ------------------------------------------

INDEX = 77


@pytest.fixture
def macvtap(root: testinfra.host.Host) -> Iterator[testinfra.host.Host]:
    """netstack@77.socket listens for frames; the kernel is at the other end of the wire."""
    root.check_output("ip link add near type veth peer name far")
    root.check_output("ip address add 192.0.2.1/24 dev near && ip link set near up")
    root.check_output("ip link set far up")
    root.check_output(f"cp {UNITS}/system/netstack* /etc/systemd/system/")
    folder = f"/etc/systemd/system/netstack-macvtap@{INDEX}.service.d"
    root.check_output(
        f"mkdir -p {folder} && printf '[Service]\nEnvironment=PARENT=far\n' >{folder}/test.conf"
    )
    root.check_output(f"systemctl daemon-reload && systemctl start netstack-macvtap@{INDEX}")
    _make_node(root)
    # As quiet as no real link is: else the kernel's own broadcasts would be the first frame.
    wait_until(lambda: _start_unwoken(root), "a quiet link", 20)
    yield root
    root.run(f"systemctl stop netstack@{INDEX}.socket netstack@{INDEX}.service")
    root.check_output(f"systemctl stop netstack-macvtap@{INDEX}")
    root.check_output("ip link delete near")
    root.check_output(f"rm -rf /etc/systemd/system/netstack* /dev/tap{INDEX}")
    root.check_output("systemctl daemon-reload")


def _make_node(root: testinfra.host.Host) -> None:
    """What udev does on other machines."""
    majors = root.check_output("cat /proc/devices").splitlines()
    [major] = {line.split()[0] for line in majors if line.endswith(" macvtap")}
    root.check_output(f"test -e /dev/tap{INDEX} || mknod /dev/tap{INDEX} c {major} 1")


def _start_unwoken(root: testinfra.host.Host) -> bool:
    root.check_output(f"systemctl start netstack@{INDEX}.socket")
    if root.run(f"systemctl is-active netstack@{INDEX}.service").stdout.strip() == "inactive":
        return True
    root.run(f"systemctl stop netstack@{INDEX}.socket netstack@{INDEX}.service")
    return False


def test_macvtap_first_frame_starts_the_stack(macvtap: testinfra.host.Host) -> None:
    assert echoed(OURS, b"who is there?") == b"who is there?"
    unit = macvtap.check_output(
        f"systemctl show -p ActiveState -p MainPID --value netstack@{INDEX}.service"
    )
    state, pid = sorted(unit.split(), reverse=True)
    assert state == "active"
    status = macvtap.file(f"/proc/{pid}/status").content_string
    assert "CapEff:\t0000000000000000" in status
    assert "Uid:\t0\t" not in status
