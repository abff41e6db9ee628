"""What a VM is made from, made once (vm/once.py): the guest, the vsock device, butane.

Nothing is installed: scripts/setup vm does that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vm.archive import uncompress
from vm.errors import VmError
from vm.once import contained, made, recipe_hash

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent

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
    key = recipe_hash(path.read_bytes() for path in sorted(recipe.iterdir()))

    def build(folder: Path) -> None:
        if os.geteuid() != 0:
            raise VmError("building the guest needs root: sudo make vm, or give IMAGE=")
        _tell("the guest, once: about a minute")
        run([str(recipe / "build.sh"), str(folder)], inside=contained())

    folder = made("vm-guest", key, build)
    return Guest(folder / "disk.ext4", folder / "vmlinux", folder / "initramfs.cpio")


def vsock_device() -> str:
    """Return the program of the user-space vsock device: this machine's, or one from Debian."""
    if installed := shutil.which("vhost-device-vsock"):
        return installed
    if os.uname().machine != "x86_64" or not shutil.which("mmdebstrap"):
        raise VmError("neither vhost_vsock nor vhost-device-vsock: modprobe vhost_vsock")

    def build(folder: Path) -> None:
        _tell("the vsock device")
        run([*DEVICE_RECIPE, str(folder / "root")], inside=contained())
        shutil.copy(folder / "root/usr/bin/vhost-device-vsock", folder)
        shutil.rmtree(folder / "root")

    key = recipe_hash([" ".join(DEVICE_RECIPE).encode()])
    return str(made("vm-vsock", key, build) / "vhost-device-vsock")


def butane() -> list[str]:
    """Return the start of butane's argv: installed, else built by Go, else in a container."""
    if installed := shutil.which("butane"):
        return [installed]
    if shutil.which("go"):
        key = recipe_hash([BUTANE_MODULE.encode()])
        return [str(made("butane", key, _build_butane) / "butane")]
    if shutil.which("podman"):
        mounted = f"--volume={REPOSITORY}:{REPOSITORY}:ro"
        return ["podman", "run", "--rm", "--interactive", "--security-opt=label=disable",
                mounted, f"--workdir={REPOSITORY}", BUTANE_IMAGE]  # fmt: skip
    raise VmError("no butane, no Go to build it and no podman to run it: install one of them")


def _build_butane(folder: Path) -> None:
    _tell(f"butane {BUTANE_VERSION}")
    (folder / "go.mod").write_text(BUTANE_MODULE)
    version = f"-X {BUTANE_PACKAGE}/version.Raw={BUTANE_VERSION}"
    build = ["go", "build", "-mod=mod", "-trimpath", "-ldflags", f"-s -w {version}"]
    run([*build, "-o", "butane", BUTANE_PACKAGE], folder, {"GOFLAGS": ""})


def _tell(what: str) -> None:
    print(f"vm: making {what}", flush=True)


def data_disk(folder: Path, archive: Path, extra: Mapping[str, Path]) -> Path:
    """Return a new disk that holds the image's archive and, by name, other folders."""
    tree, disk = folder / "data", folder / "data.ext4"
    tree.mkdir()
    uncompress(archive, tree / archive.name)
    for name, source in extra.items():
        shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    size = sum(path.stat().st_size for path in tree.rglob("*")) + (16 << 20)
    with disk.open("wb") as file:
        file.truncate(size)
    run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-L", DATA_LABEL,
         "-E", "root_owner=0:0", "-d", str(tree), str(disk)])  # fmt: skip
    shutil.rmtree(tree)
    return disk


def run(
    command: Sequence[str],
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    inside: Sequence[str] = (),
) -> None:
    """Run a tool to its end, `inside` another's argv.  Raises VmError with what it said."""
    if missing := [argv[0] for argv in (inside, command) if argv and not shutil.which(argv[0])]:
        raise VmError(f"no {missing[0]}: scripts/setup vm installs what is missing")
    done = subprocess.run(
        [*inside, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=folder,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if done.returncode != 0:
        said = done.stdout.strip().splitlines()[-5:] or ["it said nothing"]
        raise VmError(f"{command[0]} failed with {done.returncode}: " + "; ".join(said))
