"""What a VM is made from, made once: the guest, the vsock device, butane.

Everything is below ~/.cache/echo-appliance, in folders named by a hash of their recipe; a folder
gets its name only when it is finished.  Nothing is installed: scripts/setup vm does that.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vm.errors import VmError

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "echo-appliance"

DATA_LABEL = "echo-data"

# Debian has it only in its unstable suite, whose index a mirror that is a snapshot serves expired.
DEVICE_RECIPE = (
    "mmdebstrap", "--quiet", "--variant=extract", "--include=vhost-device-vsock",
    "--aptopt=Acquire::Check-Valid-Until \"false\"", "sid",
)  # fmt: skip

BUTANE_VERSION = "v0.29.0"
# A module of our own that requires it, and not `go install ...@version`: that also asks the proxy
# for a list of all versions, which is not to be had of every module.
BUTANE_MODULE = f"module build\ngo 1.24\nrequire github.com/coreos/butane {BUTANE_VERSION}\n"
BUTANE_PACKAGE = "github.com/coreos/butane/internal"
BUTANE_IMAGE = "quay.io/coreos/butane:release"


@dataclass(frozen=True, slots=True)
class Guest:
    """The files of the Debian guest that stands in for CoreOS."""

    disk: Path
    kernel: Path
    initramfs: Path


def guest() -> Guest:
    """Return the guest; builds it (a minute) when there is none or its recipe has changed."""
    recipe = HERE / "guest"
    key = _hash(path.read_bytes() for path in sorted(recipe.iterdir()))

    def build(folder: Path) -> None:
        if os.geteuid() != 0:
            raise VmError("building the guest needs root, once: sudo make vm, or give IMAGE=")
        # In a mount namespace: an interrupted build leaves no mount in what is removed then.
        private = ["unshare", "--mount", "--propagation", "private"]
        _run([*private, str(recipe / "build.sh"), str(folder)])

    folder = _made(f"vm-guest-{key}", build, "the guest, once: about a minute")
    return Guest(folder / "disk.ext4", folder / "vmlinux", folder / "initramfs.cpio")


def vsock_device() -> str:
    """Return the program of the user-space vsock device: this machine's, or one from Debian."""
    if installed := shutil.which("vhost-device-vsock"):
        return installed
    if os.uname().machine != "x86_64" or not shutil.which("mmdebstrap"):
        raise VmError("neither vhost_vsock nor vhost-device-vsock: modprobe vhost_vsock")

    def build(folder: Path) -> None:
        _run([*DEVICE_RECIPE, str(folder / "root")])
        shutil.copy(folder / "root/usr/bin/vhost-device-vsock", folder)
        shutil.rmtree(folder / "root")

    key = _hash([" ".join(DEVICE_RECIPE).encode()])
    return str(_made(f"vm-vsock-{key}", build, "the vsock device") / "vhost-device-vsock")


def butane() -> list[str]:
    """Return the start of butane's argv: installed, else built by Go, else in a container."""
    if installed := shutil.which("butane"):
        return [installed]
    if shutil.which("go"):
        key = _hash([BUTANE_MODULE.encode()])
        return [str(_made(f"butane-{key}", _build_butane, f"butane {BUTANE_VERSION}") / "butane")]
    if shutil.which("podman"):
        mounted = f"--volume={REPOSITORY}:{REPOSITORY}:ro"
        return ["podman", "run", "--rm", "--interactive", "--security-opt=label=disable",
                mounted, f"--workdir={REPOSITORY}", BUTANE_IMAGE]  # fmt: skip
    raise VmError("no butane, no Go to build it and no podman to run it: install one of them")


def _build_butane(folder: Path) -> None:
    (folder / "go.mod").write_text(BUTANE_MODULE)
    version = f"-X {BUTANE_PACKAGE}/version.Raw={BUTANE_VERSION}"
    build = ["go", "build", "-mod=mod", "-trimpath", "-ldflags", f"-s -w {version}"]
    _run([*build, "-o", "butane", BUTANE_PACKAGE], folder, {"GOFLAGS": ""})


def data_disk(folder: Path, archive: Path, extra: Mapping[str, Path]) -> Path:
    """Return a new disk that holds the image's archive and, by name, other folders."""
    tree, disk = folder / "data", folder / "data.ext4"
    tree.mkdir()
    shutil.copy(archive, tree)
    for name, source in extra.items():
        shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    size = sum(path.stat().st_size for path in tree.rglob("*")) + (16 << 20)
    with disk.open("wb") as file:
        file.truncate(size)
    _run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-L", DATA_LABEL,
          "-E", "root_owner=0:0", "-d", str(tree), str(disk)])  # fmt: skip
    shutil.rmtree(tree)
    return disk


def _made(name: str, build: Callable[[Path], None], what: str) -> Path:
    """Return the folder of this name; builds it when it is not there, one builder at a time."""
    made = CACHE / name
    if made.is_dir():
        return made
    with _locked(CACHE / f"{name}.lock"):
        if made.is_dir():
            return made
        print(f"vm: making {what}", flush=True)
        building = Path(tempfile.mkdtemp(prefix="vm-building-", dir=CACHE))
        try:
            building.chmod(0o755)
            build(building)
            building.rename(made)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return made


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(
    command: Sequence[str], folder: Path | None = None, env: Mapping[str, str] | None = None
) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if done.returncode != 0:
        said = done.stdout.strip().splitlines()[-5:] or ["it said nothing"]
        raise VmError(f"{command[0]} failed with {done.returncode}: " + "\n  ".join(said))


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
