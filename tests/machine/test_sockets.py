"""The socket units by themselves: what they need, what they say, and the optional metrics."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator

import pytest
import testinfra.host

from tests.machine import clients
from tests.machine.conftest import wait_until

UNITS = "/srv/echo-appliance/systemd"
NO_VSOCK = "/etc/systemd/system/user@.service.d/no-vsock.conf"


class UnixHTTPConnection(http.client.HTTPConnection):
    """HTTP to a unix stream socket."""

    def __init__(self, path: str) -> None:
        super().__init__("echo", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(self._path)


def scrape(connection: http.client.HTTPConnection) -> str:
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert response.status == 200
    return text


def test_units_have_no_fault_that_systemd_knows(demo: testinfra.host.Host) -> None:
    demo.check_output(f"cp {UNITS}/podman-usernamespace.service ~/.config/systemd/user")
    units = "echo@demo.service echo@demo.socket echo-metrics@demo.socket echo-restrict@a.service"
    verify = demo.run(f"systemd-analyze --user verify {units} podman-usernamespace.service")
    assert (verify.rc, verify.stdout, verify.stderr) == (0, "", "")


def test_demo_listens_before_anything_runs(demo: testinfra.host.Host) -> None:
    for address in ("tcp://127.0.0.1:3000", "tcp://::1:3000", "udp://127.0.0.1:3000"):
        assert demo.socket(address).is_listening, address
    assert demo.socket(f"unix://{clients.DEMO_FOLDER}/stream").is_listening
    listen = demo.check_output("systemctl --user show -p Listen echo@demo.socket")
    assert "vsock::3000 (Stream)" in listen
    assert demo.check_output("podman ps --all --quiet") == ""


def test_enabled_socket_is_there_after_the_user_manager_starts(
    demo: testinfra.host.Host, root: testinfra.host.Host
) -> None:
    demo.check_output("systemctl --user enable echo@demo.socket")
    restart_user_manager(root, demo)
    assert demo.service("echo@demo.socket").is_running
    assert clients.echo(clients.TCP) == b"hello\n"


def test_metrics_socket_tells_prometheus_what_was_echoed(demo: testinfra.host.Host) -> None:
    demo.check_output("systemctl --user start echo-metrics@demo.socket")
    assert clients.echo(clients.TCP, b"x" * 1234) == b"x" * 1234
    text = scrape(UnixHTTPConnection(f"{clients.DEMO_FOLDER}/metrics"))
    assert "1234" in text
    assert "# TYPE" in text
    assert "# TYPE" in scrape(http.client.HTTPConnection("127.0.0.1", 3001, timeout=20))
    demo.check_output("systemctl --user stop echo@demo.socket")
    assert not demo.service("echo-metrics@demo.socket").is_running
    assert not demo.service("echo@demo.service").is_running


def test_vsock_is_handed_over_and_echoes_where_the_kernel_can_loop_it_back(
    demo: testinfra.host.Host,
) -> None:
    # Without the loopback nothing on this machine can connect; that is for the tier with a VM.
    echoed = clients.echo(clients.VSOCK if clients.vsock_loopback() else clients.TCP)
    assert echoed == b"hello\n"
    status = demo.service("echo@demo.service").systemd_properties["StatusText"]
    assert "vsock stream 4294967295:3000" in status


@pytest.fixture
def no_vsock(root: testinfra.host.Host, demo: testinfra.host.Host) -> Iterator[testinfra.host.Host]:
    """A user manager as on a kernel that has no vsock: socket() says EAFNOSUPPORT."""
    root.check_output("systemctl stop user@1000.service")
    root.check_output("mkdir -p /etc/systemd/system/user@.service.d")
    root.check_output(f"printf '[Service]\\nRestrictAddressFamilies=~AF_VSOCK\\n' > {NO_VSOCK}")
    root.check_output("systemctl daemon-reload")
    restart_user_manager(root, demo)
    yield demo
    root.check_output(f"rm {NO_VSOCK}")
    root.check_output("systemctl daemon-reload")
    restart_user_manager(root, demo)


def restart_user_manager(root: testinfra.host.Host, user: testinfra.host.Host) -> None:
    root.check_output("systemctl restart user@1000.service")
    running = "systemctl --user is-system-running"
    wait_until(lambda: user.run(running).stdout.strip() == "running", "the user manager")


def test_kernel_without_vsock_is_named_and_one_command_mends_it(
    no_vsock: testinfra.host.Host,
) -> None:
    assert no_vsock.run("systemctl --user start echo@demo.socket").failed
    journal = no_vsock.check_output("journalctl --user -u echo@demo.socket -n 20")
    assert "(vsock::3000): Address family not supported by protocol" in journal
    no_vsock.check_output("sed -i /vsock/d ~/.config/systemd/user/echo@demo.socket.d/override.conf")
    no_vsock.check_output("systemctl --user daemon-reload")
    no_vsock.check_output("systemctl --user start echo@demo.socket")
    assert clients.echo(clients.TCP) == b"hello\n"
