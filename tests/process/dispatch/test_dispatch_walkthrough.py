"""README's walk-through: a server that is running, and register-pid for each of its sockets.

As ExecStartPost= of a unit runs it, after the server has said READY=1.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.process.dispatch.sidecars import Manager
from tests.process.dispatch.space import DEADLINE, Space

BINDINGS = (
    ("tcp", "127.0.0.128/25", "0"),
    ("udp", "127.0.0.128/25", "1234"),
    ("tcp", "2001:db8::/64", "0"),
    ("udp", "2001:db8::/64", "1000-2000"),
)


@contextmanager
def server(space: Space, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """An echo server on port 1234 of 127.0.0.1 and ::1 that is ready."""
    manager = Manager(folder / "notify")
    sockets = [space.tcp("127.0.0.1", 1234), space.udp("127.0.0.1", 1234),
               space.tcp("::1", 1234), space.udp("::1", 1234)]  # fmt: skip
    environment = {"NOTIFY_SOCKET": str(manager.path)}
    passed = [("echo", one) for one in sockets]
    with space.start([], passed, environment, mode="echo") as process:
        for one in sockets:
            one.close()  # the server's alone: when it ends, they do
        try:
            manager.wait_for("READY=1")
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=DEADLINE)
            manager.socket.close()


def probe(*targets: str) -> bool:
    command = [sys.executable, "-m", "echo_appliance", "probe", "--timeout", "2", *targets]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_walkthrough_leads_from_bindings_to_a_running_server(space: Space, tmp_path: Path) -> None:
    for protocol, prefix, port in BINDINGS:
        space.ok("bind", "example", protocol, prefix, port)
    space.run_tool("ip", "-6", "route", "add", "local", "2001:db8::/64", "dev", "lo")
    any_port = random.randint(1, 65535)  # noqa: S311
    targets = [
        *(f"tcp:{address}:{any_port}" for address in ("127.0.0.128", "127.0.0.242")),
        *("udp:127.0.0.129:1234", "udp:[2001:db8::2342]:1234", "udp:[2001:db8::1]:1999"),
        "tcp:[2001:db8::1]:777",
    ]
    with server(space, tmp_path) as process:
        for address in ("127.0.0.1", "::1"):
            for protocol in ("tcp", "udp"):
                words = ("example", protocol, address, "1234")
                space.ok("register-pid", str(process.pid), *words)
        assert probe(*targets)
        rows = [line.split() for line in space.ok("list").out.splitlines()]
        destinations = rows[rows.index(["Destinations:"]) + 2 :]
        assert [row[:3] for row in destinations] == [
            ["example", domain, protocol] for domain in ("ipv4", "ipv6")
            for protocol in ("tcp", "udp")
        ]  # fmt: skip
        assert all(row[3].startswith("sk:") and row[5:] == ["0", "0"] for row in destinations)
    # Its sockets went with it, and nobody else gets what was theirs.
    assert not probe(targets[0])
    [first, *_] = space.ok("status", "--json").json["destinations"]
    assert (first["sockets"], first["misses"] > 0) == ([], True)
    space.ok("unload")
