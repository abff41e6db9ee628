"""dispatch@.service, native and in a container: the first packet to any port of a prefix."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

from tests.machine import clients
from tests.machine.conftest import status_of, wait_until
from tests.machine.dispatching import (
    ADDRESSES,
    BINDINGS,
    CONTAINER,
    INSTALLED,
    NATIVE,
    UNITS,
    anywhere,
    installed,
    is_active,
    journal,
    listen,
    show,
    status,
)

NAMES = [name for name, _ in ADDRESSES]
SIDECAR = "dispatch@demo.service"
SERVICE = "echo@demo.service"
CAPABILITIES = {"net_bind_service": 10, "net_admin": 12, "bpf": 39}
EXPOSURE_LIMIT = 2.0  # they are at 1.4 to 1.8: their network and capabilities are what they are for


@pytest.fixture(params=[NATIVE, CONTAINER], ids=["native", "container"])
def variant(root: Host, request: pytest.FixtureRequest) -> Iterator[Host]:
    """Both ways to run all of it, from cold."""
    with installed(root, request.param) as host:
        listen(host)
        yield host


@pytest.fixture
def native(root: Host) -> Iterator[Host]:
    """Without podman, from cold."""
    with installed(root, NATIVE) as host:
        listen(host)
        yield host


def assert_echo(name: str) -> None:
    """A client at a random address and port gets its octets back, from there and no other."""
    target = anywhere(name)
    # The client is connected: the kernel gives it no datagram of another address or port.
    assert clients.echo(target, b"hello") == b"hello", target


@pytest.mark.parametrize("name", NAMES)
def test_first_packet_to_a_random_port_of_the_prefix_starts_the_service_and_is_echoed(
    variant: Host, name: str
) -> None:
    assert_echo(name)
    assert is_active(variant, SERVICE)
    for _ in range(5):
        assert_echo(name)
    assert show(variant, SERVICE, "NRestarts") == "0"
    assert show(variant, SIDECAR, "NRestarts") == "0"


def test_ports_below_1024_and_those_of_local_clients_answer_as_well(variant: Host) -> None:
    for port in (1, 1023, 1024, 32768, 60999, 65535):
        for family, address in ((socket.AF_INET, "127.0.0.129"), (socket.AF_INET6, "2001:db8::1")):
            target = clients.Target("udp", family, socket.SOCK_DGRAM, (address, port))
            assert clients.echo(target) == b"hello\n", target


def test_service_that_ended_idle_is_woken_by_the_next_packet_to_any_port(native: Host) -> None:
    folder = f"{INSTALLED}/echo@demo.service.d"
    text = '[Service]\nEnvironment="ECHO_OPTIONS=--exit-idle 0.2"\n'
    native.check_output(f"mkdir -p {folder} && printf %s %s > {folder}/test.conf", "%s", text)
    native.check_output("systemctl daemon-reload")
    for name in NAMES:
        assert_echo(name)
        wait_until(lambda: show(native, SERVICE, "ActiveState") == "inactive", "the idle exit")
    assert show(native, SERVICE, "Result") == "success"


def test_addresses_outside_of_the_prefix_are_not_taken(native: Host) -> None:
    assert all(refused(address, 4711) for address in ("127.0.0.127", "127.0.0.2", "::1"))
    assert not is_active(native, SERVICE)


def test_sidecar_has_two_capabilities_and_the_one_of_low_ports(variant: Host) -> None:
    pid = show(variant, SIDECAR, "MainPID")
    if (container := variant.run("podman inspect --format {{.State.Pid}} dispatch-demo")).rc == 0:
        pid = container.stdout.strip()
    allowed = sum(1 << bit for bit in CAPABILITIES.values())
    lines = status_of(pid)
    assert int(lines["CapEff"], 16) == allowed
    assert int(lines["CapBnd"], 16) == allowed
    assert (lines["NoNewPrivs"], lines["Seccomp"]) == ("1", "2")


def test_native_sidecar_is_a_user_of_its_own_and_hardened(native: Host) -> None:
    uid = int(status_of(show(native, SIDECAR, "MainPID"))["Uid"].split()[0])
    assert uid == int(native.check_output("id -u echo-dispatch"))
    others = ("dispatch-sockets@demo", "dispatch-user@1000", "dispatch-user-replies@1000")
    for unit in (SIDECAR, *(f"{name}.service" for name in others)):
        report = native.check_output("systemd-analyze security --no-pager %s", unit)
        verdict = report.strip().splitlines()[-1]
        assert float(verdict.split(":")[1].split()[0]) <= EXPOSURE_LIMIT, verdict


def test_members_of_the_group_echo_dispatch_read_the_state_also_after_root_changed_it(
    native: Host,
) -> None:
    member = "setpriv --reuid=echo --regid=echo-dispatch --clear-groups echo-appliance dispatch"
    for change in ("upgrade", f"load-bindings {BINDINGS}", "bind x tcp 127.0.0.64/32 1-1000"):
        native.check_output(f"echo-appliance dispatch {change}")
        for command in ("status", "bindings", "metrics"):
            assert "echo" in native.check_output(f"{member} {command}")


@pytest.mark.parametrize("kind", ["native", "container"])
def test_units_are_what_systemd_takes_without_a_word(root: Host, kind: str) -> None:
    with installed(root, NATIVE if kind == "native" else CONTAINER) as host:
        units = "dispatch@demo.service dispatch-sockets@demo.service dispatch-replies@demo.socket"
        units += " dispatch-metrics@demo.socket echo@demo.service echo@demo.socket"
        if kind == "native":
            units += " dispatch-user@1000.path dispatch-user@1000.service"
            units += " dispatch-user-replies@1000.socket dispatch-user-replies@1000.service"
        done = host.run(f"systemd-analyze verify {units}")
        assert (done.rc, done.stdout + done.stderr) == (0, "")


def test_traffic_goes_on_while_the_sidecar_is_down_and_wakes_the_service(variant: Host) -> None:
    variant.run("systemctl stop dispatch-replies@demo.socket dispatch@demo.service")
    assert not is_active(variant, SIDECAR)
    assert not is_active(variant, SERVICE)
    assert_echo("tcp4")
    assert is_active(variant, SERVICE)
    assert_echo("tcp6")


def test_sidecar_that_is_killed_comes_back_and_no_connection_notices(native: Host) -> None:
    with clients.connect(anywhere("tcp4")) as client:
        client.sendall(b"before")
        assert clients.receive(client, 6) == b"before"
        os.kill(int(show(native, SIDECAR, "MainPID")), signal.SIGKILL)
        assert_echo("tcp6")
        wait_until(lambda: show(native, SIDECAR, "NRestarts") == "1", "the restart")
        wait_until(lambda: is_active(native, SIDECAR), "READY=1")
        client.sendall(b"after")
        assert clients.receive(client, 5) == b"after"
    for name in NAMES:
        assert_echo(name)


def test_sidecar_that_hangs_is_replaced_by_the_watchdog(native: Host) -> None:
    Path(INSTALLED, "dispatch@demo.service.d/test.conf").write_text("[Service]\nWatchdogSec=1s\n")
    native.check_output("systemctl daemon-reload")
    native.check_output("systemctl restart dispatch@demo.service")
    os.kill(int(show(native, SIDECAR, "MainPID")), signal.SIGSTOP)
    assert_echo("tcp4")
    wait_until(lambda: show(native, SIDECAR, "NRestarts") == "1", "the watchdog")
    wait_until(lambda: is_active(native, SIDECAR), "READY=1")


def test_restart_of_the_sidecar_leaves_a_running_server_as_it_was(variant: Host) -> None:
    # systemd sets in the sockets whether they block when it passes them, to whomever.
    assert_echo("tcp4")
    variant.check_output("systemctl restart dispatch@demo.service")
    for name in NAMES:
        assert_echo(name)
    assert show(variant, SERVICE, "NRestarts") == "0"


def test_new_sockets_of_a_restarted_socket_unit_are_registered(variant: Host) -> None:
    assert_echo("tcp4")
    before = status(variant)["destinations"]
    variant.check_output("systemctl stop echo@demo.socket")
    with socket.create_server(("0.0.0.0", 4711)) as other:
        wait_until(lambda: refused("127.0.0.200", 4711), "the end of the sockets")
        assert not refused("127.0.0.2", 4711)
        # Who listens on all addresses got that one, and none of what is bound to the others.
        assert other.accept()[0].getsockname() == ("127.0.0.2", 4711)
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    variant.check_output("systemctl start echo@demo.socket")
    wait_until(lambda: all(row["sockets"] for row in status(variant)["destinations"]), "sockets")
    after = status(variant)["destinations"]
    assert [row["label"] for row in after] == [row["label"] for row in before]
    assert all(old["sockets"] != new["sockets"] for old, new in zip(before, after, strict=True))
    for name in NAMES:
        assert_echo(name)


def test_restart_of_the_socket_unit_under_a_running_server_registers_the_new_sockets(
    variant: Host,
) -> None:
    for _ in range(3):
        assert_echo("tcp4")
        before = status(variant)["destinations"]
        variant.check_output("systemctl restart echo@demo.socket")
        wait_until(lambda: are_new(before, status(variant)["destinations"]), "the new sockets")  # noqa: B023
    for name in NAMES:
        assert_echo(name)


def are_new(before: Any, after: Any) -> bool:
    return all(
        new["sockets"] and new["sockets"] != old["sockets"]
        for old, new in zip(before, after, strict=True)
    )


def refused(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_dispatcher_that_someone_unloaded_is_back_with_bindings_and_sockets(native: Host) -> None:
    native.check_output("echo-appliance dispatch unload")
    wait_until(lambda: show(native, SIDECAR, "NRestarts") == "1", "the sidecar to notice")
    wait_until(lambda: is_active(native, SIDECAR), "the sidecar")
    for name in NAMES:
        assert_echo(name)


def test_what_root_does_by_hand_does_not_lock_the_sidecar_out(native: Host) -> None:
    native.check_output("echo-appliance dispatch bind other tcp 127.0.0.64/32 1000-2000")
    native.check_output("echo-appliance dispatch upgrade")
    native.check_output("systemctl reload dispatch@demo.service")
    wait_until(lambda: "other" not in bound(native), "the file to be in force again")
    native.check_output("systemctl restart dispatch@demo.service")
    assert_echo("tcp4")


def bound(root: Host) -> set[str]:
    """Returns the labels that are bound."""
    return {row["label"] for row in status(root)["bindings"]}


def test_reload_puts_a_changed_file_in_force_and_refuses_a_broken_one_in_a_line(
    variant: Host,
) -> None:
    with clients.connect(anywhere("tcp4")) as client:
        text = '[[bindings]]\nlabel = "echo"\nprefix = "127.0.0.64/32"\nport = "1000-2000"\n'
        variant.check_output(f"printf %s %s > {BINDINGS}", "%s", text)
        variant.check_output("systemctl reload dispatch@demo.service")
        moved = clients.Target("tcp4", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.64", 1500))
        wait_until(lambda: answers(moved), "the new bindings")
        assert not answers(anywhere("tcp4"))
        before = len(refusals(variant))
        variant.check_output(f"echo '[[bindings]' > {BINDINGS}")
        variant.check_output("systemctl reload dispatch@demo.service")
        wait_until(lambda: refusals(variant)[before:], "the refusal")
        [line] = refusals(variant)[before:]
        assert "line 1, column" in line
        assert answers(moved)
        client.sendall(b"open all the while")
        assert clients.receive(client, 18) == b"open all the while"


def answers(target: clients.Target) -> bool:
    try:
        return clients.echo(target, timeout=5) == b"hello\n"
    except ConnectionRefusedError:
        return False


def refusals(root: Host) -> list[str]:
    return [line for line in journal(root, SIDECAR) if "not reloaded" in line]


def test_upgrades_and_reloads_under_load_lose_no_connection(native: Host) -> None:
    over = threading.Event()

    def talk(name: str) -> int:
        turns = 0
        while not over.is_set():
            assert_echo(name)
            turns += 1
        return turns

    with ThreadPoolExecutor(4) as pool:
        try:
            talkers = [pool.submit(talk, name) for name in ("tcp4", "tcp6") * 2]
            for _ in range(10):
                native.check_output("echo-appliance dispatch upgrade")
                native.check_output("systemctl reload dispatch@demo.service")
            native.check_output("systemctl restart dispatch@demo.service")
        finally:
            over.set()
        turns = [talker.result() for talker in talkers]
    assert min(turns) > 10
    assert sum(row["misses"] + row["errors"] for row in status(native)["destinations"]) == 0


def test_metrics_of_the_kernel_are_scraped_from_the_inherited_socket(variant: Host) -> None:
    variant.check_output("systemctl stop dispatch@demo.service")
    variant.check_output("systemctl start dispatch-metrics@demo.socket")
    variant.check_output("systemctl start dispatch@demo.service")
    assert_echo("tcp4")
    lookups = 'echo_appliance_dispatch_lookups_total{label="echo",domain="ipv4",protocol="tcp"} 1'
    assert lookups in scrape("/run/echo-dispatch/demo/metrics")


def scrape(path: str) -> list[str]:
    """Returns the lines of a metrics page that is served on a unix socket."""
    connection = http.client.HTTPConnection("dispatch")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(10)
    connection.sock.connect(path)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    return page.splitlines()


# Both begin in one transaction, as at a boot.
CLIENT = """
[Unit]
After=network.target
Wants=network.target
[Service]
Type=oneshot
ExecStart=echo-appliance probe tcp:127.0.0.200:4711
"""
BOOT = "[Unit]\nWants=echo@demo.socket early-client.service network.target\n"


def test_bindings_are_in_force_before_whoever_waits_for_the_network(root: Host) -> None:
    with installed(root, NATIVE) as host:
        for name, text in (("early-client.service", CLIENT), ("early.target", BOOT)):
            Path(INSTALLED, name).write_text(text)
        host.check_output("systemctl daemon-reload")
        try:
            host.check_output("systemctl stop network.target")
            host.check_output("systemctl start early.target")
            wait_until(
                lambda: show(host, "early-client.service", "ActiveState") in ("inactive", "failed"),
                "the client",
            )
            assert show(host, "early-client.service", "Result") == "success"
            assert show(host, "early-client.service", "ExecMainExitTimestamp"), "it did run"
        finally:
            for name in ("early-client.service", "early.target"):
                Path(INSTALLED, name).unlink()


def test_shipped_sandbox_is_one_file_for_all_native_units() -> None:
    link = Path(f"{UNITS}/system/dispatch@.service.d/sandbox.conf")
    assert link.resolve() == Path(f"{UNITS}/system/dispatch-.service.d/sandbox.conf")
