"""The sidecar as systemd starts it: with a file, sockets, and someone to tell that it is ready."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.process.dispatch.space import DEADLINE, STUB, Space


class Manager:
    """Stands where systemd listens for notifications."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(DEADLINE)

    def wait_for(self, word: str) -> None:
        while word not in self.socket.recv(4096).decode().splitlines():
            pass


@contextmanager
def sidecar(
    space: Space,
    tmp_path: Path,
    config: Path,
    *passed: tuple[str, socket.socket],
    stub: str = STUB,
) -> Iterator[subprocess.Popen[str]]:
    """A sidecar that is ready."""
    manager = Manager(tmp_path / "notify")
    process = space.start(
        ["run", "--config", str(config)], passed, {"NOTIFY_SOCKET": str(manager.path)}, stub=stub
    )
    try:
        try:
            manager.wait_for("READY=1")
        except TimeoutError:
            process.kill()
            raise AssertionError(process.communicate()) from None
        yield process
        if process.poll() != -signal.SIGKILL:  # which is a test's own doing
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        manager.socket.close()
        manager.path.unlink()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def write(path: Path, *rows: tuple[str, str, object]) -> None:
    entries = [{"label": label, "prefix": prefix, "port": port} for label, prefix, port in rows]
    path.write_text(json.dumps({"bindings": entries}))


def eventually(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
