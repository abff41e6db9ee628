"""echo@.service: rootless podman under a user's systemd, from the first packet to the last."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import testinfra.host

from tests.machine import clients
from tests.machine.clients import DEMO, TCP, UDP, UNIX, Target
from tests.machine.conftest import wait_until

SERVICE = "echo@demo.service"
SOCKET = "echo@demo.socket"
NAME = "echo-demo"


def show(user: testinfra.host.Host, name: str, unit: str = SERVICE) -> str:
    """Returns one property of a unit of the user."""
    return str(user.check_output("systemctl --user show --value -p %s %s", name, unit))


def app_pid(user: testinfra.host.Host) -> int:
    """Returns the appliance's process id, as the guest counts."""
    return int(user.check_output("podman inspect --format {{.State.Pid}} %s", NAME))


def containers(user: testinfra.host.Host) -> list[str]:
    return str(user.check_output("podman ps --all --format {{.Names}}")).split()


def starts(user: testinfra.host.Host, since: float) -> int:
    """Returns how often the service became active since then, which the journal knows."""
    lines = user.check_output(
        "journalctl --user --output=cat --since=%s --unit=%s", f"@{since:.3f}", SERVICE
    ).splitlines()
    return sum(line.startswith("Started ") for line in lines)


@pytest.mark.parametrize("target", DEMO, ids=lambda target: target.name)
def test_first_packet_of_each_family_starts_the_service_and_is_echoed(
    demo: testinfra.host.Host, target: Target
) -> None:
    assert demo.service(SOCKET).is_running
    assert not demo.service(SERVICE).is_running, "must start on demand"
    assert clients.echo(target, b"first") == b"first"
    assert demo.service(SERVICE).is_running
    assert clients.echo(target, b"second") == b"second"
    assert show(demo, "NRestarts") == "0"


def test_burst_on_every_family_makes_one_activation_and_loses_nothing(
    demo: testinfra.host.Host,
) -> None:
    begun = time.time()
    # A path can be bound by one client at a time.
    targets = [target for target in DEMO if not (target.bound_to or "").startswith(("/", "\0"))]
    words = [(target, b"%d" % number) for number in range(40) for target in targets]
    with ThreadPoolExecutor(len(words)) as pool:
        assert list(pool.map(lambda job: clients.echo(*job), words)) == [word for _, word in words]
    assert starts(demo, begun) == 1
    assert demo.service(SOCKET).is_running
    assert show(demo, "NRestarts") == "0"


def test_largest_datagram_comes_back_whole(demo: testinfra.host.Host) -> None:
    payload = os.urandom(65507)
    assert clients.echo(UDP, payload) == payload


@pytest.mark.parametrize("target", [TCP, UNIX], ids=lambda target: target.name)
def test_restart_under_load_refuses_no_connection_and_loses_no_reply(
    demo: testinfra.host.Host, target: Target
) -> None:
    over = threading.Event()

    def talk() -> int:
        turns = 0
        while not over.is_set():
            assert clients.echo(target, b"x" * 1000) == b"x" * 1000
            turns += 1
        return turns

    clients.echo(target)
    with ThreadPoolExecutor(4) as pool:
        try:
            talkers = [pool.submit(talk) for _ in range(4)]
            before = app_pid(demo)
            for _ in range(3):
                demo.check_output("systemctl --user restart %s", SERVICE)
            after = app_pid(demo)
        finally:
            over.set()
        turns = [talker.result() for talker in talkers]
    assert before != after
    assert min(turns) > 10


def test_stop_finishes_open_connections_and_takes_no_new_one(demo: testinfra.host.Host) -> None:
    with clients.connect(TCP) as client:
        client.sendall(b"before")
        assert clients.receive(client, 6) == b"before"
        demo.check_output("systemctl --user stop --no-block %s", SERVICE)
        wait_until(lambda: show(demo, "ActiveState") == "deactivating", "the stop")
        client.sendall(b"after")
        client.shutdown(socket.SHUT_WR)
        assert clients.receive(client, 100) == b"after"
    wait_until(lambda: show(demo, "ActiveState") == "inactive", "the end of the drain")
    assert show(demo, "Result") == "success"
    assert containers(demo) == []
    assert demo.service(SOCKET).is_running
    assert clients.echo(TCP) == b"hello\n", "the socket wakes the service again"


def test_stopping_the_socket_stops_the_service_and_removes_the_files(
    demo: testinfra.host.Host,
) -> None:
    clients.echo(UNIX)
    demo.check_output("systemctl --user stop %s", SOCKET)
    assert not demo.service(SERVICE).is_running
    assert containers(demo) == []
    assert not demo.file(f"{clients.DEMO_FOLDER}/stream").exists
    with pytest.raises(ConnectionRefusedError):
        clients.echo(TCP)


def test_idle_service_ends_well_and_the_next_packet_wakes_it(
    demo: testinfra.host.Host, drop_in: Callable[..., None]
) -> None:
    drop_in('Environment="ECHO_OPTIONS=--exit-idle 0.2"')
    for _ in range(6):  # systemd's default is to give up at the sixth start in 10 s
        assert clients.echo(UDP) == b"hello\n"
        wait_until(lambda: show(demo, "ActiveState") == "inactive", "the idle exit")
        assert show(demo, "Result") == "success"
        assert containers(demo) == []
    assert show(demo, "NRestarts") == "0"
    assert demo.service(SOCKET).is_running


def test_killed_appliance_is_restarted_and_answers(demo: testinfra.host.Host) -> None:
    clients.echo(TCP)
    first = app_pid(demo)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: show(demo, "NRestarts") == "1", "the restart")
    assert clients.echo(TCP) == b"hello\n"
    assert app_pid(demo) != first
    assert containers(demo) == [NAME]


def test_killed_conmon_leaves_no_container_that_answers(demo: testinfra.host.Host) -> None:
    clients.echo(TCP)
    first = app_pid(demo)
    os.kill(int(show(demo, "MainPID")), signal.SIGKILL)
    wait_until(lambda: show(demo, "NRestarts") == "1", "the restart")
    assert clients.echo(TCP) == b"hello\n"
    assert app_pid(demo) != first
    wait_until(lambda: not Path(f"/proc/{first}").exists(), "the end of the first appliance")
    assert containers(demo) == [NAME]
    assert show(demo, "NRestarts") == "1", "the next start must find nothing in its way"


def test_killed_podman_client_leaves_no_container_that_answers(demo: testinfra.host.Host) -> None:
    kill = ["pkill", "--signal", "KILL", "--full", "^/usr/bin/podman run"]
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(clients.echo, TCP)
        wait_until(lambda: subprocess.run(kill).returncode == 0, "a podman client to kill")
        assert client.result() == b"hello\n"
    assert containers(demo) == [NAME]
    assert show(demo, "NRestarts") == "1"


def test_first_start_after_a_login_survives_a_podman_that_ends_before_systemd_listens(
    demo: testinfra.host.Host, root: testinfra.host.Host
) -> None:
    # Without a pause process podman works in a child, whose message about the main process systemd
    # drops once the child is gone.  Here that is certain: systemd sleeps meanwhile.
    demo.check_output("podman system migrate")
    manager = int(root.check_output("systemctl show --value -p MainPID user@1000.service"))
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(clients.echo, TCP)
        wait_until(lambda: processes("^/usr/bin/podman run"), "podman")
        os.kill(manager, signal.SIGSTOP)
        try:
            wait_until(
                lambda: processes("^/usr/bin/conmon") and processes("^/usr/bin/podman run") == 1,
                "the end of podman's child",
            )
        finally:
            os.kill(manager, signal.SIGCONT)
        assert client.result() == b"hello\n"
    wait_until(lambda: show(demo, "ActiveState") == "active", "READY=1")
    assert show(demo, "NRestarts") == "0"


def processes(pattern: str) -> int:
    """Returns how many processes have a command line like the pattern."""
    done = subprocess.run(["pgrep", "--count", "--full", pattern], capture_output=True, text=True)
    return int(done.stdout)


def test_container_left_by_a_crash_is_replaced(demo: testinfra.host.Host) -> None:
    demo.check_output("podman create --name=%s localhost/echo-appliance:latest", NAME)
    assert clients.echo(TCP) == b"hello\n"
    assert containers(demo) == [NAME]
    assert show(demo, "NRestarts") == "0"


def test_ready_is_what_the_appliance_says_not_what_podman_does(
    demo: testinfra.host.Host, drop_in: Callable[..., None]
) -> None:
    drop_in('Environment="ECHO_OPTIONS=--start-sleep 1.5"')
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(clients.echo, TCP)
        wait_until(lambda: containers(demo), "the container")
        time.sleep(0.5)  # podman and conmon have long said what they have to say
        assert show(demo, "ActiveState") == "activating"
        assert client.result() == b"hello\n"
    wait_until(lambda: show(demo, "ActiveState") == "active", "READY=1")


def test_status_line_names_every_socket_that_is_served(demo: testinfra.host.Host) -> None:
    clients.echo(TCP)
    status = show(demo, "StatusText")
    for served in ("127.0.0.1:3000", "[::1]:3000", "stream", "seqpacket", "datagram", "vsock"):
        assert served in status


def test_health_check_asks_the_appliance_itself(demo: testinfra.host.Host) -> None:
    clients.echo(TCP, b"start")
    assert demo.run("podman healthcheck run %s", NAME).rc == 0
    os.kill(app_pid(demo), signal.SIGSTOP)
    try:
        done = demo.run("timeout 5 podman healthcheck run %s", NAME)
    finally:
        os.kill(app_pid(demo), signal.SIGCONT)
    assert done.rc != 0, "a check that cannot fail says nothing"


def test_watchdog_restarts_an_appliance_that_hangs_and_no_other(
    demo: testinfra.host.Host, drop_in: Callable[..., None]
) -> None:
    drop_in("WatchdogSec=2s")
    clients.echo(TCP)
    time.sleep(4.5)  # more than two watchdog periods: it is fed
    assert show(demo, "NRestarts") == "0"
    hung = app_pid(demo)
    os.kill(hung, signal.SIGSTOP)
    wait_until(lambda: show(demo, "NRestarts") == "1", "the watchdog")
    assert clients.echo(TCP) == b"hello\n"
    assert app_pid(demo) != hung


def test_service_that_cannot_start_keeps_its_sockets_and_answers_once_mended(
    demo: testinfra.host.Host, drop_in: Callable[..., None]
) -> None:
    quickly = ("RestartSec=100ms", "RestartSteps=0", "RestartMaxDelaySec=infinity")
    drop_in("ExecStartPre=/bin/false", *quickly)
    burst = [TCP, UNIX, UDP] * 6
    with ThreadPoolExecutor(len(burst)) as pool:
        waiting = [pool.submit(clients.echo, target) for target in burst]
        wait_until(lambda: int(show(demo, "NRestarts")) >= 8, "some attempts")
        assert demo.service(SOCKET).is_running
        drop_in(*quickly)
        assert [client.result() for client in waiting] == [b"hello\n"] * len(burst)
    assert demo.service(SOCKET).is_running


def test_service_that_leaves_its_datagrams_unread_does_not_end_the_socket(
    demo: testinfra.host.Host, drop_in: Callable[..., None]
) -> None:
    # Ends at once and well, so nothing but the socket's own rules slows the next start.
    drop_in("Type=oneshot", "Restart=no", "ExecStart=", "ExecStart=/bin/true")
    with clients.connect(UDP) as client:
        client.sendall(b"patience")
        time.sleep(3)  # the default limit is 20 starts in 2 s
        assert show(demo, "Result", SOCKET) == "success"
        assert demo.service(SOCKET).is_running
        drop_in()
        assert client.recv(100) == b"patience"
