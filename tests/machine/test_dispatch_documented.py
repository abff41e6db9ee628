"""README's section of dispatch, typed in: walk-through, units, a rootless user's sockets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.machine import clients
from tests.machine.conftest import clean, status_of, wait_until
from tests.machine.dispatching import (
    COMMON,
    INSTALLED,
    UNITS,
    anywhere,
    is_active,
    pinned,
    remove,
    show,
    status,
)
from tests.machine.test_documented import bash, blocks, lines, probe_all

TITLE = "dispatch: whole prefixes and port ranges"
LOAD, SERVER, LISTED, TRY, END, FILE, NATIVE, CONTAINER, PROBE, USER, DATAGRAMS = range(11)


@pytest.fixture
def reader(root: Host) -> Iterator[Host]:
    """Who reads the README, as root; whatever becomes of it, nothing stays."""
    yield root
    root.run("systemctl stop example.socket example.service")
    remove(root)
    assert pinned() == []


def section() -> list[str]:
    return [block.replace("sudo ", "") for block in blocks(TITLE)]


def test_readme_dispatch_section_has_the_blocks_that_are_typed_in_here() -> None:
    assert len(section()) == DATAGRAMS + 1
    assert section()[FILE].startswith("[[bindings]]")


def test_readme_walk_through_steers_to_a_server_registered_by_its_process_id(reader: Host) -> None:
    text = section()
    bash(reader, text[LOAD])
    listed = bash(reader, text[SERVER])
    # The numbers of sockets are the kernel's; all else is as printed.
    assert masked(listed) == masked(text[LISTED])
    assert probe_all(reader, text[TRY])
    [explain] = [line for line in lines(text[TRY]) if " explain " in line]
    assert "127.0.0.128/25" in bash(reader, explain)
    assert sum(row["lookups"] for row in status(reader)["destinations"]) == 5
    bash(reader, text[END])
    assert pinned() == []
    assert reader.run("systemctl is-active example.service").stdout.strip() == "inactive"


def masked(text: str) -> list[list[str]]:
    return [re.sub(r"sk:[0-9a-f]+", "sk:N", line).split() for line in text.splitlines() if line]


@pytest.mark.parametrize("variant", [NATIVE, CONTAINER], ids=["native", "container"])
def test_readme_units_start_the_server_by_the_first_packet_to_any_port(
    reader: Host, variant: int
) -> None:
    bash(reader, section()[variant])
    assert not is_active(reader, "echo@demo.service")
    targets = probe_all(reader, section()[PROBE])
    assert {target[:3] for target in targets} == {"tcp", "udp"}
    assert is_active(reader, "echo@demo.service")


@pytest.fixture
def user_sockets(demo: Host, root: Host) -> Iterator[Host]:
    """The units for a rootless user's sockets, which exist; yields the user."""
    root.check_output(COMMON)
    root.check_output(f"cp -r {UNITS}/system/dispatch* {INSTALLED}")
    root.check_output(f"install -Dt /etc/sysusers.d {UNITS}/system/sysusers.d/echo-appliance.conf")
    root.check_output("systemd-sysusers")
    root.check_output("systemctl daemon-reload")
    root.check_output("ip -6 route add local 2001:db8::/64 dev lo")
    yield demo
    root.run("systemctl disable --now dispatch-user@1000.path dispatch-user-replies@1000.socket")
    remove(root)
    clean(demo)
    assert pinned() == []


def is_registered(root: Host) -> bool:
    rows = status(root)["destinations"] if pinned() else []
    return len(rows) == 4 and all(row["sockets"] for row in rows)


def test_readme_rootless_users_container_is_started_by_a_packet_to_any_port(
    user_sockets: Host, root: Host
) -> None:
    bash(root, section()[USER])
    root.check_output("systemctl start dispatch-user@1000.service")  # its sockets are there already
    assert is_registered(root)
    assert not user_sockets.service("echo@demo.service").is_running
    [tcp, _] = lines(section()[PROBE])
    bash(root, tcp)
    assert user_sockets.service("echo@demo.service").is_running
    assert user_sockets.check_output("podman ps --format {{.Names}}") == "echo-demo"


@pytest.mark.parametrize("name", ["udp4", "udp6"])
def test_readme_rootless_users_container_without_network_answers_from_any_port(
    user_sockets: Host, root: Host, name: str
) -> None:
    bash(root, section()[USER])
    bash(user_sockets, section()[DATAGRAMS])
    root.check_output("systemctl start dispatch-user@1000.service")
    for _ in range(5):
        target = anywhere(name, lowest=1024)
        assert clients.echo(target, b"hello") == b"hello", target
    assert user_sockets.podman("echo-demo").inspect()["HostConfig"]["NetworkMode"] == "none"
    lender = "dispatch-user-replies@1000.service"
    assert int(status_of(show(root, lender, "MainPID"))["CapEff"], 16) == 1 << 12 | 1 << 39


def test_new_sockets_of_a_rootless_user_are_registered_when_they_appear(
    user_sockets: Host, root: Host
) -> None:
    bash(root, section()[USER])
    for _ in range(2):
        user_sockets.check_output("systemctl --user stop echo@demo.socket echo@demo.service")
        wait_until(lambda: not is_registered(root), "the end of the sockets")
        wait_until(lambda: settled(root), "the path unit's turn")
        user_sockets.check_output("systemctl --user start echo@demo.socket")
        wait_until(lambda: is_registered(root) and settled(root), "the new sockets")
        bash(root, lines(section()[PROBE])[0])


def settled(root: Host) -> bool:
    return show(root, "dispatch-user@1000.service", "ActiveState") in ("inactive", "failed")


def test_service_for_users_needs_ptrace_and_nothing_more(user_sockets: Host, root: Host) -> None:
    wanted = {"cap_bpf", "cap_net_admin", "cap_sys_ptrace"}
    unit = "dispatch-user@1000.service"
    assert set(show(root, unit, "CapabilityBoundingSet").split()) == wanted
    root.check_output("systemctl start %s", unit)
    assert is_registered(root)


# What somebody without rights is told: one line each, and nothing has changed.
CLOSED = "is closed to this user: run as its owner or in its group"
MISSING = "missing: CAP_BPF, CAP_NET_ADMIN"
REFUSED = {
    "status": CLOSED,
    "metrics": CLOSED,
    "load": MISSING,
    "unload": MISSING,
    "upgrade": MISSING,
    "bind a tcp 127.0.0.128/25 0": MISSING,
    f"load-bindings {UNITS}/system/bindings.toml": MISSING,
    "register-pid 1 a tcp 127.0.0.1 1": f"{MISSING}, CAP_SYS_PTRACE",
    f"run --config {UNITS}/system/bindings.toml": MISSING,
}


@pytest.mark.parametrize("command", REFUSED)
def test_unprivileged_user_is_told_in_one_line_what_is_missing(
    reader: Host, user: Host, command: str
) -> None:
    reader.check_output("chmod o+x /sys/fs/bpf")
    reader.check_output("echo-appliance dispatch load")
    before = pinned()
    done = user.run(f"echo-appliance dispatch {command}")
    assert done.rc == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert REFUSED[command] in done.stderr
    assert pinned() == before
    reader.check_output("chmod o-x /sys/fs/bpf")


def test_bpffs_that_systemd_closed_says_so_to_an_unprivileged_user(
    reader: Host, user: Host
) -> None:
    reader.check_output("chmod 700 /sys/fs/bpf")
    reader.check_output("echo-appliance dispatch load")
    done = user.run("echo-appliance dispatch status")
    assert (done.rc, done.stderr.count("\n")) == (1, 1)
    assert "is closed to this user" in done.stderr


def test_group_reads_the_counters_without_any_capability(reader: Host, user: Host) -> None:
    reader.check_output("chmod o+x /sys/fs/bpf")
    reader.check_output("echo-appliance dispatch load --group echo")
    reader.check_output("echo-appliance dispatch bind web tcp 127.0.0.128/25 80")
    assert "127.0.0.128/25" in user.check_output("echo-appliance dispatch status")
    assert "# TYPE" in user.check_output("echo-appliance dispatch metrics")
    reader.check_output("chmod o-x /sys/fs/bpf")


def test_installed_units_are_those_that_the_readme_names() -> None:
    names = {path.name.partition("@")[0] for path in Path(f"{UNITS}/system").glob("dispatch*@*")}
    readme = (Path(UNITS).parent / "README.md").read_text()
    assert all(f"`{name}@" in readme for name in names)
