"""What the forward tests have in common: a forwarder, backends, and how both are asked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.process.launcher import COMMAND, Launcher, Server
from tests.process.peers import Sockets

FAMILIES = {
    "inet": (socket.AF_INET, None),
    "inet6": (socket.AF_INET6, None),
    "unix": (socket.AF_UNIX, None),
    "abstract": (socket.AF_UNIX, ""),  # autobound
}


def target(backend: socket.socket) -> str:
    """Return the target that leads to a listening (or a datagram) socket of ours."""
    address = backend.getsockname()
    if backend.family == socket.AF_UNIX:
        scheme = "unix" if backend.type == socket.SOCK_STREAM else "unix-dgram"
        name = address if isinstance(address, str) else "@" + address[1:].decode()
        return f"{scheme}:{name}"
    if backend.family == socket.AF_VSOCK:
        return f"vsock:{LOOPBACK_CID}:{address[1]}"
    scheme = "tcp" if backend.type == socket.SOCK_STREAM else "udp"
    host = f"[{address[0]}]" if backend.family == socket.AF_INET6 else address[0]
    return f"{scheme}:{host}:{address[1]}"


LOOPBACK_CID = 1  # VMADDR_CID_LOCAL, where the kernel has vsock_loopback


def vsock_loops_back(backend: socket.socket) -> bool:
    """Whether a listening vsock socket can be reached from here; takes the connection."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect((LOOPBACK_CID, backend.getsockname()[1]))
        except OSError:
            return False
        backend.accept()[0].close()
        return True


class Forwarding:
    """Starts forwarders, and connects clients through them."""

    def __init__(self, launch: Launcher, sockets: Sockets, directory: Path) -> None:
        self._launch = launch
        self._sockets = sockets
        self._directory = directory
        self.stdout: int | None = None  # of those that config() starts; None: where stderr is

    def to(
        self, front: socket.socket, *targets: socket.socket | str, options: Sequence[str] = ()
    ) -> Server:
        """Forward one socket to targets."""
        words: list[str] = []
        for one in targets:
            words += ["--to", one if isinstance(one, str) else target(one)]
        return self._launch.start([front], *words, *options, command=(*COMMAND, "forward"))

    def config(
        self,
        text: str,
        *options: str,
        metrics: socket.socket | None = None,
        **fronts: socket.socket,
    ) -> Server:
        """Forward sockets by a configuration; their names are the routes'."""
        self.write(text)
        passed = {**fronts, **({"metrics": metrics} if metrics else {})}
        return self._launch.start(
            list(passed.values()), "--config", str(self.file), *options,
            names=list(passed), stdout=self.stdout, command=(*COMMAND, "forward"),
        )  # fmt: skip

    def refuse(self, text: str, *options: str, **fronts: socket.socket) -> str:
        """Return the one line that a configuration is refused with."""
        self.write(text)
        return self._launch.fail(
            list(fronts.values()), "--config", str(self.file), *options,
            names=list(fronts), command=(*COMMAND, "forward"),
        )  # fmt: skip

    @property
    def file(self) -> Path:
        """Where the configuration is."""
        return self._directory / "forward.toml"

    def write(self, text: str) -> None:
        """Write the configuration."""
        self.file.write_text(text)

    def joined(
        self, front: socket.socket, backend: socket.socket
    ) -> tuple[socket.socket, socket.socket]:
        """Return a client and what its backend accepted, joined by the forwarder."""
        client = self._sockets.connect(front)
        accepted, _ = backend.accept()
        return client, self._sockets.keep(accepted)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    """Do it beside the test; join() it there."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
