"""The sidecar: binds and registers before READY=1, reloads, watches, serves metrics."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from echo_appliance.dispatch import libbpf
from echo_appliance.dispatch.place import Place
from echo_appliance.dispatch.sidecar import CHECK_SECONDS, Sidecar
from echo_appliance.dispatch.state import Dispatcher
from echo_appliance.errors import SetupError
from tests.process.dispatch.clients import reached, received
from tests.process.dispatch.sidecars import Manager, eventually, sidecar, write
from tests.process.dispatch.space import DEADLINE, Space


def hear(process: subprocess.Popen[str], words: str) -> list[str]:
    """Read what the sidecar says up to a line with these words; return the lines before."""
    assert process.stderr is not None
    lines: list[str] = []
    while words not in (line := process.stderr.readline()):
        assert line, lines
        lines.append(line)
    return lines


def get(metrics: socket.socket) -> bytes:
    with socket.create_connection(metrics.getsockname(), timeout=DEADLINE) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        page = b""
        while octets := client.recv(65536):
            page += octets
    return page


@contextmanager
def replaced_program(space: Space) -> Iterator[None]:
    """Another program in our link's place, as if by another tool."""
    [path] = space.pinned()
    link, ours, twin = (
        libbpf.open_pin(str(path / name)) for name in ("link", "program", "explain")
    )
    libbpf.update_link(link, twin)
    yield
    libbpf.update_link(link, ours)
    for descriptor in (link, ours, twin):
        os.close(descriptor)


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
        write(config, ("echo", "127.2.0.0/16", 80))
        process.send_signal(signal.SIGHUP)
        eventually(lambda: reached([stream], "127.2.0.1", 80) == 0)
        assert reached([stream], "127.1.0.1", 80) is None
        config.write_text("{")
        process.send_signal(signal.SIGHUP)
        hear(process, "not reloaded")
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
        page = get(metrics)
        labels = b'{label="echo",domain="ipv4",protocol="tcp"}'
        assert b"echo_appliance_dispatch_lookups_total%s 1\n" % labels in page


def test_metrics_that_took_long_to_count_stand_for_a_while(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(str(space.bpffs), None)
    page = Sidecar(place, None, [], []).page
    for label in ("a", "b"):
        space.ok("bind", label, "tcp", "127.1.0.0/16", str(ord(label)))
        assert f'label="{label}"' in page()  # a few are counted anew each time
    monkeypatch.setattr("echo_appliance.dispatch.sidecar.SLOW", 0.0)
    monkeypatch.setattr("echo_appliance.dispatch.sidecar.STANDS", 1e6)
    before = page()
    space.ok("bind", "c", "tcp", "127.1.0.0/16", "3")
    assert page() == before
    os.close(place.netns)


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


def test_sidecar_asked_to_reload_while_somebody_holds_the_lock_serves_and_reloads_after(
    empty: Space, tmp_path: Path
) -> None:
    stream, metrics, config = empty.tcp(), empty.tcp(), tmp_path / "b.json"
    write(config, ("echo", "127.1.0.0/16", 80))
    with sidecar(empty, tmp_path, config, ("echo", stream), ("metrics", metrics)) as process:
        lock = os.open(empty.bpffs / "echo-appliance" / "lock", os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            write(config, ("echo", "127.2.0.0/16", 80))
            process.send_signal(signal.SIGHUP)
            hear(process, "read again after that")
            assert b" 200 " in get(metrics)
            assert reached([stream], "127.2.0.1", 80) is None
        finally:
            os.close(lock)
        eventually(lambda: reached([stream], "127.2.0.1", 80) == 0)
        assert reached([stream], "127.1.0.1", 80) is None


def test_sidecar_on_a_file_with_an_endless_number_keeps_the_old_and_goes_on(
    empty: Space, tmp_path: Path
) -> None:
    stream, config = empty.tcp(), tmp_path / "b.json"
    write(config, ("echo", "127.1.0.0/16", 80))
    with sidecar(empty, tmp_path, config, ("echo", stream)) as process:
        config.write_text('{"bindings": [{"label": "a", "prefix": "::1", "port": ' + "1" * 5000)
        process.send_signal(signal.SIGHUP)
        hear(process, "not reloaded")
        assert reached([stream], "127.1.0.1", 80) == 0


def test_sidecar_says_what_keeps_it_from_registering_once(empty: Space, tmp_path: Path) -> None:
    stream, config = empty.tcp(), tmp_path / "b.json"
    write(config, ("echo", "127.1.0.0/16", 80))
    with sidecar(empty, tmp_path, config, ("echo", stream)) as process:
        with replaced_program(empty):
            hear(process, "someone else replaced it")
            time.sleep(2.5 * CHECK_SECONDS)
        empty.ok("unregister", "echo", "ipv4", "tcp")
        assert hear(process, "registered echo") == []


def test_sidecar_of_a_dispatcher_of_another_version_says_so(empty: Space, tmp_path: Path) -> None:
    empty.ok("load")
    with empty.dispatcher() as dispatcher:
        settings = dispatcher.settings()
        settings.layout = 99
        dispatcher.write_settings(settings)
    assert "of another version (layout 99" in empty.fails("run", "--once")


def test_a_dispatcher_that_is_refused_leaves_no_descriptor_open(space: Space) -> None:
    place = Place(str(space.bpffs), None)
    before = len(space.descriptors(os.getpid()))
    with replaced_program(space):
        open_ones = len(space.descriptors(os.getpid()))
        for _ in range(5):
            with pytest.raises(SetupError, match="someone else replaced it"):
                Dispatcher(place, write=True)
        assert len(space.descriptors(os.getpid())) == open_ones
    assert len(space.descriptors(os.getpid())) == before
    os.close(place.netns)


def test_sidecar_goes_on_when_metrics_are_asked_of_a_dispatcher_that_was_unloaded(
    empty: Space, tmp_path: Path
) -> None:
    stream, metrics, config = empty.tcp(), empty.tcp(), tmp_path / "b.json"
    write(config, ("echo", "127.1.0.0/16", 80))
    with sidecar(empty, tmp_path, config, ("echo", stream), ("metrics", metrics)):
        empty.ok("unload")
        get(metrics)
        eventually(lambda: reached([stream], "127.1.0.1", 80) == 0)
        assert b" 200 " in get(metrics)
