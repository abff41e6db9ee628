"""Folders that are made once and kept below ~/.cache/echo-appliance, as KIND-HASH of their recipe.

A folder has its name only when it is finished.  Of each kind the newest stays, and what a process
uses: who was given a folder holds a shared lock on it until he ends, however he ends.  The others
go when a new one of their kind is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "echo-appliance"

_in_use: dict[Path, int] = {}  # descriptors with a shared lock; the kernel closes them


def recipe_hash(parts: Iterable[bytes]) -> str:
    """Return a name for what these parts are a recipe of."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def contained() -> list[str]:
    """Return the start of an argv that ends with us, and all its processes and mounts with it."""
    dies = ["setpriv", "--pdeathsig", "KILL"]
    if os.geteuid() != 0:
        return dies
    spaces = ["--mount", "--propagation", "private", "--mount-proc"]
    return [*dies, "unshare", *spaces, "--pid", "--fork", "--kill-child"]


def made(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of this kind and key, this process's to use until it ends.

    Where there is none, build(folder) fills a new one: one at a time of each kind.  What build
    raises is passed on, and nothing is left of the folder; raises OSError where none can be made.
    """
    folder = CACHE / f"{kind}-{key}"
    if _use(folder):
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"making-{kind}.lock"):
        if _use(folder):  # by another process, meanwhile
            return folder
        for abandoned in _named(f"making-{kind}"):
            _remove(abandoned)  # its maker was killed, else he would hold the lock
        building = Path(tempfile.mkdtemp(prefix=f"making-{kind}-", dir=CACHE))
        try:
            building.chmod(0o755)  # mkdtemp's 0700 would be the mode of a guest's /
            build(building)
            building.rename(folder)
        finally:
            _remove(building)
        _use(folder)
        _remove_unused(kind)
    return folder


def _use(folder: Path) -> bool:
    """Keep a folder from being removed while this process lives; False when there is none."""
    if folder in _in_use:
        return True
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    # One that was removed while we waited has lost its name.
    if not folder.is_dir() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
        os.close(descriptor)
        return False
    _in_use[folder] = descriptor
    return True


def _remove_unused(kind: str) -> None:
    """Remove what nobody uses of a kind; its lock is ours."""
    for folder in _named(kind):
        with _unused(folder) as unused:
            if unused:
                _remove(folder.rename(CACHE / f"making-{folder.name}"))


def _named(prefix: str) -> list[Path]:
    """Return what is called PREFIX-KEY, and not PREFIX-OTHER-KEY, which is another kind."""
    dashes = prefix.count("-") + 1
    return [path for path in CACHE.glob(f"{prefix}-*") if path.name.count("-") == dashes]


@contextlib.contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Tell whether it is a folder that nobody uses; nobody can begin to, meanwhile."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove(folder: Path, seconds: float = 5) -> None:
    """Remove it, also while the last processes of an interrupted build are just ending."""
    deadline = time.monotonic() + seconds
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            time.sleep(0.05)
