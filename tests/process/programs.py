"""Real peers for the forward tests: programs that run beside the test, and end with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.process.conftest import lacking
from tests.process.launcher import eventually, in_session


def find(program: str, package: str) -> str:
    """Return the program's path."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        lacking(f"{program} is not installed: apt-get install {package}")
    return path


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that nothing listens on, for programs that bind for themselves."""
    with socket.create_server((host, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, **how: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the duration of the block, in a session of its own."""
    with open(log, "ab") as output:
        process: subprocess.Popen[bytes] = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, **how,
        )  # type: ignore[call-overload]  # fmt: skip
    try:
        yield process
    finally:
        for pid in in_session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_for(address: object, log: Path) -> None:
    """Wait until something accepts connections there."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET

    def accepts() -> bool:
        with socket.socket(family) as sock:
            return sock.connect_ex(address) == 0  # type: ignore[arg-type]

    eventually(accepts, lambda: f"{address} to be served: {log.read_text()}")


@contextlib.contextmanager
def iperf3_server(directory: Path, port: int) -> Iterator[None]:
    """Run iperf3 for one client.

    Whoever connects is that client, so nobody may only to see whether it listens.  One for several
    closes its socket after each, and listens anew: who comes in between is refused, or reset.
    """
    log = directory / "iperf3.log"
    log.unlink(missing_ok=True)
    options = ["--server", "--one-off", "--forceflush", "--bind", "127.0.0.1", "--port", str(port)]
    with running([find("iperf3", "iperf3"), *options], log):
        eventually(lambda: "Server listening" in log.read_text(), "iperf3 to listen")
        yield


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[int]:
    """Run redis-server; give its port."""
    port, log = free_port(), directory / "redis.log"
    server = find("redis-server", "redis-server")
    options = ["--port", str(port), "--save", "", "--dir", str(directory)]
    with running([server, *options], log):
        wait_for(("127.0.0.1", port), log)
        yield port


@contextlib.contextmanager
def haproxy(directory: Path, text: str) -> Iterator[None]:
    """Run haproxy with a configuration."""
    program = find("haproxy", "haproxy")
    file, log = directory / "haproxy.cfg", directory / "haproxy.log"
    timeouts = "timeout connect 5s\n timeout client 30s\n timeout server 30s"
    file.write_text(f"global\ndefaults\n mode tcp\n {timeouts}\n{text}")
    with running([program, "-f", str(file), "-db", "-q"], log):
        yield


@contextlib.contextmanager
def nginx(directory: Path, server: str) -> Iterator[None]:
    """Run nginx with one server's configuration."""
    file = directory / "nginx.conf"
    file.write_text(
        f"daemon off; pid {directory}/pid; error_log stderr; user root;\nevents {{}}\n"
        f"http {{ access_log off; server {{ {server} }} }}\n"
    )
    command = [find("nginx", "nginx"), "-p", str(directory), "-c", str(file)]
    with running(command, directory / "nginx.log"):
        yield


def certificate(directory: Path, name: str) -> Path:
    """Return a PEM file with a new key and a certificate for this name."""
    openssl, file = find("openssl", "openssl"), directory / f"{name}.pem"
    subprocess.run(
        [
            openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(file),
            "-out", f"{file}.crt",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


@contextlib.contextmanager
def tls_server(directory: Path, name: str, *options: str) -> Iterator[int]:
    """Run openssl s_server, which shows a page; give its port."""
    port, log = free_port(), directory / f"{name}.log"
    command = [
        find("openssl", "openssl"), "s_server", "-accept", f"127.0.0.1:{port}", "-www", "-quiet",
        "-cert", str(certificate(directory, name)), *options,
    ]  # fmt: skip
    with running(command, log):
        wait_for(("127.0.0.1", port), log)
        yield port
