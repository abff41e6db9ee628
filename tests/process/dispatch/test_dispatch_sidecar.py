"""The sidecar: binds and registers before READY=1, reloads, watches, serves metrics."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

from tests.process.dispatch.clients import reached, received
from tests.process.dispatch.sidecars import Manager, eventually, sidecar, write
from tests.process.dispatch.space import DEADLINE, Space


def test_sidecar_loads_binds_and_registers_before_it_is_ready(empty: Space, tmp_path: Path) -> None:
    stream, datagram = empty.tcp(), empty.udp()
    write(tmp_path / "b.json", ("echo", "127.1.0.0/16", 0))
    unix = empty.keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))  # of the same unit
    passed = (("echo", stream), ("echo", datagram), ("echo", unix))
    with sidecar(empty, tmp_path, tmp_path / "b.json", *passed):
        assert reached([stream], "127.1.0.1", 4321) == 0
        assert received([datagram], "127.1.0.1", 4321) == 0
        assert stream.getblocking(), "the server's socket is as it was"
    # It only sets things up: without it all goes on.
    assert reached([stream], "127.1.0.1", 4321) == 0
    # And its next start finds everything in place.
    with sidecar(empty, tmp_path, tmp_path / "b.json", ("echo", stream), ("echo", datagram)):
        rows = empty.ok("status", "--json").json["destinations"]
        assert [len(row["sockets"]) for row in rows] == [1, 1]


def test_sidecar_applies_the_file_again_on_sighup_and_keeps_the_old_if_it_is_broken(
    empty: Space, tmp_path: Path
) -> None:
    stream, config = empty.tcp(), tmp_path / "b.json"
    write(config, ("echo", "127.1.0.0/16", 80))
    with sidecar(empty, tmp_path, config, ("echo", stream)) as process:
        assert process.stderr is not None

        def hear(words: str) -> None:
            assert process.stderr is not None
            while words not in process.stderr.readline():
                pass

        write(config, ("echo", "127.2.0.0/16", 80))
        process.send_signal(signal.SIGHUP)
        eventually(lambda: reached([stream], "127.2.0.1", 80) == 0)
        assert reached([stream], "127.1.0.1", 80) is None
        config.write_text("{")
        process.send_signal(signal.SIGHUP)
        hear("not reloaded")
        assert reached([stream], "127.2.0.1", 80) == 0


def test_sidecar_registers_again_what_was_taken_out(empty: Space, tmp_path: Path) -> None:
    stream, config = empty.tcp(), tmp_path / "b.json"
    write(config, ("echo", "127.1.0.0/16", 80))
    with sidecar(empty, tmp_path, config, ("echo", stream)):
        empty.ok("unregister", "echo", "ipv4", "tcp")
        assert reached([stream], "127.1.0.1", 80) is None
        eventually(lambda: reached([stream], "127.1.0.1", 80) == 0)
        empty.ok("unload")
        eventually(lambda: reached([stream], "127.1.0.1", 80) == 0)


def test_sidecar_serves_metrics_on_the_socket_of_that_name(empty: Space, tmp_path: Path) -> None:
    stream, metrics, config = empty.tcp(), empty.tcp(), tmp_path / "b.json"
    write(config, ("echo", "127.1.0.0/16", 80))
    with sidecar(empty, tmp_path, config, ("echo", stream), ("metrics", metrics)):
        assert reached([stream], "127.1.0.1", 80) == 0
        with socket.create_connection(metrics.getsockname()) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            page = b""
            while octets := client.recv(65536):
                page += octets
        labels = b'{label="echo",domain="ipv4",protocol="tcp"}'
        assert b"echo_appliance_dispatch_lookups_total%s 1\n" % labels in page


def test_sidecar_that_cannot_start_says_why_and_is_not_ready(empty: Space, tmp_path: Path) -> None:
    config = tmp_path / "b.json"
    config.write_text('{"bindings": [{"label": ""}]}')
    process = empty.start(["run", "--config", str(config)], (("echo", empty.tcp()),), {})
    _, words = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "a label must not be empty" in words
    assert config.name in words


def test_once_registers_and_binds_and_ends_and_traffic_goes_on(
    empty: Space, tmp_path: Path
) -> None:
    stream, config = empty.tcp(), tmp_path / "b.json"
    write(config, ("echo", "127.1.0.0/16", 80))
    words = ["run", "--once", "--config", str(config)]
    with empty.start(words, (("echo", stream),), {}) as process:
        _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, said
    assert reached([stream], "127.1.0.1", 80) == 0


def test_sidecar_without_sockets_ends_when_someone_unloads_so_that_they_are_registered_again(
    empty: Space, tmp_path: Path
) -> None:
    # Loaded and bound by it alone, everything would be refused.
    config, manager = tmp_path / "b.json", Manager(tmp_path / "notify")
    write(config, ("echo", "127.1.0.0/16", 80))
    words = ["run", "--config", str(config)]
    environment = {"NOTIFY_SOCKET": str(manager.path)}
    with empty.start(words, (("metrics", empty.tcp()),), environment) as process:
        manager.wait_for("READY=1")
        empty.ok("unload")
        _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert said.splitlines()[-1].endswith("the sockets are not ours to register")
    assert empty.pinned() == []
    manager.socket.close()
