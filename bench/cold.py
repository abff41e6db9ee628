"""Cold starts: from connect() to the first octet, under systemd-socket-activate.

A process ends with its round; a container is removed by its name, for killing
the podman client would leave it behind.
"""

import contextlib
import os
import select
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from bench import core
from bench.core import BUILD, ROOT, BenchError, Cores, Server

OUR_IMAGE = "localhost/echo-appliance:latest"
PODMAN = str(ROOT / "scripts" / "image-podman")

# systemd-socket-activate passes no environment on but what is named.
PASSED_ON = ("PATH", "HOME", "PYTHONPATH", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "CONTAINERS_CONF",
             "DBUS_SESSION_BUS_ADDRESS")  # fmt: skip

# What the units do: no network, no capability, nothing to write to, nothing to pull.
HARDENED = ("--network=none", "--pull=never", "--read-only", "--cap-drop=all",
            "--security-opt=no-new-privileges")  # fmt: skip


def process_ms(load: Path, cores: Cores, server: Server) -> float:
    """Milliseconds until a client of the not yet started server has its octet (or EOF)."""

    def once() -> float:
        with _first_octet_ms(load, (cores.server,), server) as milliseconds:
            return milliseconds

    return core.quiet_sample(cores, once)


def container_ms(load: Path, cores: Cores, image: str) -> float:
    """The same for an image.  podman uses what cores it likes, as it does for its users."""
    with _container(load, cores, image) as (milliseconds, _):
        return milliseconds


def container_rss_mib(load: Path, cores: Cores, image: str) -> float:
    """Resident MiB of the image's process after its first client has left."""
    with _container(load, cores, image) as (_, name):
        command = (PODMAN, "inspect", "--format={{.State.Pid}}", name)
        pid = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@contextlib.contextmanager
def _container(load: Path, cores: Cores, image: str) -> Iterator[tuple[float, str]]:
    """Start a container by its first client; yield the milliseconds it took, and its name."""
    name = f"echo-bench-{uuid.uuid4().hex[:12]}"
    server = Server(image, (PODMAN, "run", "--rm", f"--name={name}", *HARDENED, image))
    try:
        with _first_octet_ms(load, (cores.server, cores.client), server) as milliseconds:
            yield milliseconds, name
    finally:
        _podman("rm", "--force", "--ignore", "--time=0", name)


@contextlib.contextmanager
def _first_octet_ms(load: Path, where: tuple[int, ...], server: Server) -> Iterator[float]:
    port = _free_port()
    passed = {**os.environ, **server.environment}
    words = [f"-E{name}={passed[name]}" for name in PASSED_ON if name in passed]
    command = ("systemd-socket-activate", f"-l127.0.0.1:{port}", *words, *server.words)
    process = core.spawn(where, (), Server(server.name, command), stderr=subprocess.PIPE)
    try:
        _wait_for_listening(process)
        yield core.run_client((load, "cold", str(port)))["us"] / 1000
    finally:
        core.stop(process)


def _free_port() -> int:
    stream, datagram = core.bound_pair()
    with stream, datagram:
        return int(stream.getsockname()[1])


def _wait_for_listening(process: "subprocess.Popen[bytes]") -> None:
    """Wait for "Listening on"; then let the caches and the scheduler settle."""
    assert process.stderr is not None
    said = b""
    while b"Listening on" not in said:
        ready, _, _ = select.select([process.stderr], [], [], 10)
        more = os.read(process.stderr.fileno(), 4096) if ready else b""
        if not more:
            raise BenchError(f"systemd-socket-activate does not listen: {said.decode()}")
        said += more
    time.sleep(0.05)


@contextlib.contextmanager
def c_image(static_echo: Path) -> Iterator[str]:
    """Build an image that holds the C echo and nothing else; remove it in the end."""
    if _podman("image", "exists", OUR_IMAGE) != 0:
        raise BenchError(f"there is no {OUR_IMAGE}: run make image, or use --without-container")
    tag = "localhost/echo-bench-c:latest"
    recipe = f'FROM scratch\nCOPY {static_echo.name} /echo\nUSER 65534\nENTRYPOINT ["/echo"]\n'
    build = (PODMAN, "build", "--quiet", "--network=none", f"--tag={tag}", "--file=-", str(BUILD))
    subprocess.run(build, input=recipe.encode(), stdout=subprocess.DEVNULL, check=True)
    try:
        yield tag
    finally:
        _podman("rmi", "--force", tag)


def _podman(*words: str) -> int:
    return subprocess.run((PODMAN, *words), capture_output=True).returncode
