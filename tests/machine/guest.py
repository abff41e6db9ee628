"""Boot a Debian guest with systemd as PID 1 and rootless podman, and run commands in it.

No virtual machine and no container engine: fresh namespaces of every kind but user, a cgroup2
directory of its own, and a throw-away overlay over a cached root (rootfs.sh, boot.sh).  The guest
shares the kernel and nothing else: its files are in a tmpfs of its own mount namespace, and end
with it.

Never touches the machine's mounts, network or services.  Sources: pivot_root(2), cgroups(7),
systemd.io/CONTAINER_INTERFACE.

    python3 -m tests.machine.guest [-u] [COMMAND...]    a shell in a fresh guest (-u: as its user)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vm.once import contained, made, recipe_hash

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PREFIX = "echo-appliance-machine-"
TOOLS = ("mmdebstrap", "unshare", "nsenter", "setpriv")
# systemd as PID 1 raises these for the whole machine; they are in no namespace.
RAISED = (Path("/proc/sys/fs/file-max"), Path("/proc/sys/fs/nr_open"))
APPARMOR = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")

# Joins the cgroup $1, then becomes the rest.  0 stands for the writer, in any pid namespace.
JOIN = 'echo 0 >"$1/cgroup.procs"; shift; exec "$@"'
USER = "echo"
USER_ENV = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": f"/home/{USER}",
    "USER": USER,
    "LANG": "C.UTF-8",
    "XDG_RUNTIME_DIR": "/run/user/1000",
    "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/user/1000/bus",
}
ROOT_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME": "/root"}


class GuestError(Exception):
    """The guest cannot be run, or has ended; the text says why."""


def why_not() -> str | None:
    """Returns what this machine lacks to run the guest, and the mend; None when nothing."""
    if os.geteuid() != 0:
        return "the machine tier makes namespaces and mounts: run it as root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found: run scripts/setup"
    if APPARMOR.exists() and APPARMOR.read_text().strip() != "0":
        return f"AppArmor forbids users their own namespaces: echo 0 >{APPARMOR}"
    if not cgroup2_mounts():
        return "no cgroup2 is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    return None


def cgroup2_mounts() -> list[Path]:
    """Returns where cgroup2 is mounted: /sys/fs/cgroup, or elsewhere on a hybrid machine."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    parts = [line.partition(" - ") for line in lines]
    return [Path(mount.split()[4]) for mount, _, kind in parts if kind.startswith("cgroup2 ")]


def rootfs() -> Path:
    """Returns the cached root; builds it (25 s) when there is none or its recipe has changed."""
    recipe = HERE / "rootfs.sh"

    def build(folder: Path) -> None:
        done = subprocess.run([*contained(), recipe, folder], stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise GuestError(f"{recipe} ended with {done.returncode}: see its output")

    return made("machine", recipe_hash([recipe.read_bytes()]), build)


def assign(variables: dict[str, str]) -> list[str]:
    """Returns the variables as env(1) takes them."""
    return [f"{name}={value}" for name, value in variables.items()]


def become_user() -> list[str]:
    """Returns the start of an argv that, in the guest, drops from root to its lingering user."""
    identity = ["setpriv", "--reuid", USER, "--regid", USER, "--init-groups"]
    return [*identity, "env", "-i", "-C", USER_ENV["HOME"], *assign(USER_ENV)]


class Guest:
    """A booted guest.  Owns its processes, its cgroup and its scratch folder; use `with`."""

    def __init__(self) -> None:
        # Named after the owner's process id, by which sweep() knows whether it still lives.
        self._scratch = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._cgroup = cgroup2_mounts()[0] / self._scratch.name
        self._outer: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self.boot_seconds = 0.0

    def __enter__(self) -> Guest:
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _boot(self) -> None:
        sweep()
        root = rootfs()
        before = {path: path.read_text() for path in RAISED}
        started = time.monotonic()
        try:
            self._start(root)
            self._wait_until_running()
        finally:
            for path, value in before.items():
                path.write_text(value)
        self.boot_seconds = time.monotonic() - started

    def _start(self, root: Path) -> None:
        # A cgroup holds processes or other cgroups, so what command() runs gets one of its own.
        (self._cgroup / "harness").mkdir(parents=True)
        mountpoint = self._scratch / "mnt"
        mountpoint.mkdir()
        # If we are killed outright, the kernel kills unshare, and unshare the guest's PID 1.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child"]
        command += ["--mount", "--propagation", "private", "--net", "--uts", "--ipc"]
        # Only PID 1 is in the guest's cgroup, before that becomes the root of its view.
        command += ["sh", "-c", JOIN, "_", str(self._cgroup), "unshare", "--cgroup"]
        command += map(str, [HERE / "boot.sh", root, REPOSITORY, mountpoint])
        with (self._scratch / "boot.log").open("wb") as log:
            self._outer = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C on the terminal is ours to handle
            )

    def _wait_until_running(self) -> None:
        ask = ["is-system-running"]
        self._wait_for(self._find_pid, "the guest's PID 1")
        self._wait_for(lambda: self._says("running", ["systemctl", *ask]), "systemd")
        user = ["systemctl", "--user", *ask]
        self._wait_for(lambda: self._says("running", user, user=True), "the user manager")

    def _says(self, word: str, argv: list[str], user: bool = False) -> bool:
        """Runs argv in the guest and tells whether its output is the word."""
        command = self.command(argv, user)
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() == word

    def _find_pid(self) -> bool:
        assert self._outer is not None
        outer = self._outer.pid
        children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        # Until boot.sh has become systemd there is nothing to enter.
        if not children or Path(f"/proc/{children[0]}/comm").read_text() != "systemd\n":
            return False
        self._pid = int(children[0])
        return True

    def _wait_for(self, ready: Callable[[], bool], what: str, seconds: float = 30) -> None:
        assert self._outer is not None
        deadline = time.monotonic() + seconds
        while not ready():
            if self._outer.poll() is not None or time.monotonic() > deadline:
                log = (self._scratch / "boot.log").read_text(errors="replace")[-2000:]
                raise GuestError(f"{what} did not come up in the guest: {log or 'no output'}")
            time.sleep(0.02)

    def command(
        self,
        argv: list[str],
        user: bool = False,
        env: dict[str, str] | None = None,
        folder: str = "/root",
    ) -> list[str]:
        """Returns the argv that runs argv in the guest, as root or as its lingering user."""
        # The caller leaves its own cgroup first: podman and systemd refuse to work for processes
        # outside the tree that the guest can see.
        enter = ["sh", "-c", JOIN, "_", str(self._cgroup / "harness")]
        spaces = ["nsenter", "-t", str(self._pid), "-m", "-u", "-i", "-n", "-p", "-C", "--"]
        root = ["env", "-i", "-C", folder, *assign(ROOT_ENV)]
        return [*enter, *spaces, *(become_user() if user else root), *assign(env or {}), *argv]

    def close(self) -> None:
        """Ends every process of the guest, waits for them, removes cgroup and scratch folder."""
        if self._outer is not None and self._outer.poll() is None:
            self._outer.kill()  # unshare --kill-child takes PID 1 along, and PID 1 all the others
            self._outer.wait()
        remove_cgroup(self._cgroup)
        shutil.rmtree(self._scratch, ignore_errors=True)


def remove_cgroup(top: Path) -> None:
    """Kills what is left in the cgroup and removes it with all below; gives up after 10 s."""
    deadline = time.monotonic() + 10
    while top.is_dir() and time.monotonic() < deadline:
        (top / "cgroup.kill").write_text("1")
        below = sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True)
        try:
            for folder in [*below, top]:
                folder.rmdir()
        except OSError:
            time.sleep(0.02)  # busy: a process of it has not been reaped yet


def sweep() -> None:
    """Removes what a harness that was killed outright could not: its cgroup, its empty folder."""
    for top in filter(is_abandoned, cgroup2_mounts()[0].glob(f"{PREFIX}*")):
        remove_cgroup(top)
    for folder in filter(is_abandoned, Path(tempfile.gettempdir()).glob(f"{PREFIX}*")):
        shutil.rmtree(folder)


def is_abandoned(path: Path) -> bool:
    owner = path.name.removeprefix(PREFIX).partition("-")[0]
    return not Path("/proc", owner).exists()


def main(argv: list[str]) -> int:
    """Boots, runs the arguments or a shell in the guest, and tears down: for finding faults."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if (reason := why_not()) is not None:
        print(reason, file=sys.stderr)
        return 1
    user = argv[:1] == ["-u"]
    with Guest() as guest:
        print(f"booted in {guest.boot_seconds:.2f} s", file=sys.stderr)
        return subprocess.run(guest.command(argv[user:] or ["bash", "-i"], user)).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
