"""What a relay owes both of its ends: no octet lost, and no end that waits for ever."""

from __future__ import annotations

import resource
import select
import socket
import time
from pathlib import Path

import pytest

from tests.process.launcher import eventually
from tests.process.netstack.net import OURS, PORT, Net, connect, echo, metrics
from tests.process.peers import pattern


def listening_unix(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    server.settimeout(20)
    return server


def test_relay_keeps_what_a_slow_target_has_not_taken_when_both_sides_have_closed(
    net: Net, tmp_path: Path
) -> None:
    """The target says early that it will send nothing; then it reads, slowly, all there is."""
    data = pattern(900_000)
    with listening_unix(tmp_path / "target") as target:
        net.serve(net.tap(), ports=[f"80=unix:{tmp_path / 'target'}"])
        with connect(80) as client:
            served, _ = target.accept()
            with served:
                served.settimeout(20)
                served.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""  # so ours is in FIN-WAIT-2, and then in TIME-WAIT
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                assert not select.select([client], [], [], 0.5)[0] or client.recv(1) == b""
                assert served.makefile("rb").read() == data


def test_relay_without_descriptors_resets_that_client_and_serves_on(
    net: Net, tmp_path: Path
) -> None:
    page = net.page()
    with listening_unix(tmp_path / "target") as target:
        server = net.serve(
            net.tap(), ports=[f"80=unix:{tmp_path / 'target'}", f"{PORT}"],
            passed=[("metrics", page)],
        )  # fmt: skip
        before = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (server.descriptors, before[1]))
        with pytest.raises(ConnectionResetError), connect(80) as client:
            client.recv(1)
        with connect() as other:
            assert echo(b"still here", other) == b"still here"
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, before)
        with connect(80) as client, target.accept()[0] as served:
            served.sendall(b"again")
            assert client.recv(10) == b"again"
        assert metrics(page.getsockname())["connections_ended_total:target-emfile"] == 1


def test_relay_whose_target_is_gone_does_not_wait_for_its_client_for_ever(
    net: Net, tmp_path: Path
) -> None:
    """The target has closed, not only half: nobody will ever read what the client might send."""
    page = net.page()
    with listening_unix(tmp_path / "target") as target:
        server = net.serve(
            net.tap(), ports=[f"80=unix:{tmp_path / 'target'}"], passed=[("metrics", page)]
        )
        with connect(80) as client:
            served, _ = target.accept()
            served.sendall(b"all there is")
            served.close()
            assert client.makefile("rb").read() == b"all there is"
            server.assert_sleeps(0.5)  # a hang-up is told over and over to who does not listen
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                eventually(lambda: client.sendall(b"too late"), "the reset")
    eventually(lambda: metrics(page.getsockname())["connections"] == 0, "its end")
    # TCP did that, which knew that nobody reads: it would not have waited for a FIN either.
    assert metrics(page.getsockname())["connections_ended_total:aborted"] == 1


def test_relay_waits_without_spinning_for_a_client_that_does_not_read(
    net: Net, tmp_path: Path
) -> None:
    """The target has sent all, and closed: its hang-up is told for as long as one listens to it."""
    data = pattern(950_000)  # what our window and the socket's buffer take in
    with listening_unix(tmp_path / "target") as target:
        server = net.serve(net.tap(), ports=[f"80=unix:{tmp_path / 'target'}"])
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(20)
            client.connect((OURS, 80))
            served, _ = target.accept()
            served.settimeout(20)
            served.sendall(data)
            served.close()
            server.assert_sleeps(0.5)
            assert client.makefile("rb").read() == data


@pytest.mark.parametrize("software", [False, True], ids=["offload", "software"])
def test_client_with_less_room_than_a_segment_gets_all_in_time(
    net: Net, tmp_path: Path, software: bool
) -> None:
    """A segment that fills such a window at once has Linux open it by one octet, for ever."""
    data = pattern(100_000)
    options = ("--mtu", "9000", *(("--software",) if software else ()))
    with listening_unix(tmp_path / "target") as target:
        net.serve(net.tap(mtu=9000), *options, ports=[f"80=unix:{tmp_path / 'target'}"])
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
            client.settimeout(20)
            client.connect((OURS, 80))
            served, _ = target.accept()
            served.sendall(data)
            served.close()
            time.sleep(0.5)  # the window closes, and is probed
            give_up, got = time.monotonic() + 10, b""
            while octets := client.recv(65536):
                got += octets
                assert time.monotonic() < give_up, f"{len(got)} octets in 10 s"
            assert got == data
