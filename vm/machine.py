"""A QEMU process and what it says: started, waited for, asked over vsock, ended.

Never writes to the disks it is given (the guest has an overlay), and leaves no process and no file:
what runs dies with us, by the kernel, and the next start removes the folder of one that was killed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from echo_appliance.probe import ProbeError, connect
from echo_appliance.target import parse_target
from vm import cache, vsock
from vm.errors import VmError

PREFIX = "echo-appliance-vm-"
QCOW2 = b"QFI\xfb"  # docs/interop/qcow2.txt
TOOLS = ("qemu-system-x86_64", "qemu-img", "setpriv")
PLACE_LIMIT = 45  # of 107: the folder's own name, the longest in it, and 17 octets that ssh adds
ROOM = 512 << 20  # a first boot writes 150 MiB
PORT = 3000
SSH_PORT = 22

# What the console says when nothing will come of it: initramfs (guest/init), CoreOS, the kernel.
FAILURES = re.compile(r"^vm: (?!initramfs done).*|.*Ignition has failed.*|.*Kernel panic.*", re.M)

KERNEL_ARGUMENTS = (
    "console=ttyS0 rw quiet systemd.show_status=no audit=0 "
    # A throw-away guest has nothing to protect, and emulation pays for each of these.
    "mitigations=off init_on_alloc=0 lsm=capability "
    # A clock that is found stable has the kernel patch its idle loop while other processors run it.
    # That is what we take a rare panic under emulation for: "Fatal exception in interrupt", right
    # behind the place in sched_clock_idle_wakeup_event() that is patched then.
    "tsc=unstable"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to boot."""

    cid: int
    ignition: str
    data: Path  # the disk with the image
    memory: int = 2048  # MiB
    image: Path | None = None  # a CoreOS qcow2; without it, the Debian stand-in


class Machine:
    """A running guest.  Owns its QEMU, its vsock device and its folder; use `with`."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self.folder = folder
        self._console = folder / "console.log"
        self._claim: vsock.Claim | None = None
        self.vsock = vsock.pick(plan.cid, folder)
        self.accelerator = "kvm" if has_kvm() else "tcg"
        self._qemu: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def __enter__(self) -> Machine:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
            raise VmError(
                f"no {' and no '.join(missing)}: scripts/setup vm installs what is missing"
            )
        if self._plan.image is not None:
            check_image(self._plan.image)
        self._claim = vsock.Claim(self._plan.cid)
        self._run()

    def _run(self) -> None:
        command = ["qemu-system-x86_64", *self._arguments(), *self.vsock.start()]
        with (self.folder / "qemu.log").open("wb") as log:
            self._started = time.monotonic()
            self._qemu = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C on the terminal is ours to handle
            )

    def _arguments(self) -> list[str]:
        plan = self._plan
        config, overlay = self.folder / "config.ign", self.folder / "overlay.qcow2"
        config.write_text(plan.ignition)
        # vhost-user devices see the guest's memory: it must be a descriptor, and shared.
        memory = f"memory-backend-memfd,id=memory,size={plan.memory}M,share=on"
        console = f"socket,id=console,path={self.folder}/console,server=on,wait=off"
        return [
            "-object", memory, "-machine", "q35,memory-backend=memory", "-m", str(plan.memory),
            "-smp", str(min(4, os.cpu_count() or 1)), *ACCELERATORS[self.accelerator],
            "-nodefaults", "-display", "none", "-device", "virtio-rng-pci",
            "-fw_cfg", f"name=opt/com.coreos/config,file={config}",
            "-chardev", f"{console},logfile={self._console}", "-serial", "chardev:console",
            *(coreos(plan.image, overlay) if plan.image else stand_in(overlay)),
            *([] if self.vsock.survives_reset else ["-no-reboot"]),
            "-drive", f"if=none,id=data,file={plan.data},format=raw,readonly=on",
            "-device", "nvme,serial=data,drive=data",
        ]  # fmt: skip

    def follow_reboot(self, limit: float) -> None:
        """Go on with a guest that was told to reboot, where its vsock device cannot.

        Waits for QEMU to end on it, and starts device and QEMU anew with the same disk.
        """
        if self.vsock.survives_reset or self._qemu is None:
            return
        try:
            self._qemu.wait(limit)
        except subprocess.TimeoutExpired:
            raise VmError(f"no reboot within {limit:.0f} s: {self.tail()}") from None
        self.vsock.close()
        self._run()

    def wait(self) -> None:
        """Return when the guest has ended.  Raises VmError when QEMU did not end by itself."""
        if self._qemu is not None and (status := self._qemu.wait()) != 0:
            raise VmError(
                f"QEMU was ended by signal {-status}" if status < 0 else self._last_words()
            )

    @property
    def seconds(self) -> float:
        """How long ago QEMU was started."""
        return time.monotonic() - self._started

    def target(self, port: int = PORT) -> str:
        """Return a vsock port of the guest as the probe takes it."""
        return self.vsock.target(port)

    def wait_for_echo(
        self, limit: float, progress: Callable[[float], None] = lambda _: None
    ) -> float:
        """Return the seconds from QEMU's start to the first octets that came back over vsock.

        Raises VmError when the guest ends, says that it failed, or after `limit` seconds.
        """
        while not self._echoes():
            progress(self.seconds)
            self._check()
            if self.seconds > limit:
                raise VmError(
                    f"no echo within {limit:.0f} s; the console ends with:\n{self.tail()}"
                )
            time.sleep(0.1)
        return self.seconds

    def _echoes(self) -> bool:
        """Whether the guest answers; waits long only for one that has taken the connection."""
        try:
            with connect(parse_target(self.target()), 3) as sock:
                sock.settimeout(60)
                sock.sendall(b"?")
                return sock.recv(1) == b"?"
        except (OSError, ProbeError):
            return False

    def _check(self) -> None:
        if told := self.failure():
            raise VmError(told)
        if self._qemu is not None and self._qemu.poll() is not None:
            raise VmError(self._last_words())
        if told := self.vsock.failure():
            raise VmError(told)

    def _last_words(self) -> str:
        # QEMU ends when its device dies before it has connected; no device ends with QEMU.
        if told := self.vsock.failure():
            return told
        said = (self.folder / "qemu.log").read_text(errors="replace").strip()
        reason = said.splitlines()[-1] if said else f"the console ends with:\n{self.tail()}"
        return f"QEMU ended: {reason}"

    def failure(self) -> str | None:
        """Return what the console says of a boot that failed; None while it says nothing so."""
        console = self.console()
        told: list[str] = FAILURES.findall(console)
        if told:  # of a panic, the place where it began
            told = re.findall("RIP: .*", console)[:1] + told
        return "; ".join(line.strip() for line in told) or None

    def console(self) -> str:
        """Return all that the guest wrote to its serial console."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def tail(self, lines: int = 15) -> str:
        """Return the console's last lines, for people."""
        return "\n".join(self.console().splitlines()[-lines:]) or "(nothing)"

    def close(self) -> None:
        """End QEMU and the device, and wait for them."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
        self.vsock.close()
        if self._claim is not None:
            self._claim.release()


# Emulating the features of later processors costs more than programs gain by them.
ACCELERATORS = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    "tcg": ("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "Nehalem"),
}


def has_kvm() -> bool:
    """Whether KVM runs a stock kernel here.

    /dev/kvm is not enough: in a virtual machine that lends no hardware virtualisation it may be
    paravirtual, and a stock kernel hangs in it.
    """
    flags = Path("/proc/cpuinfo").read_text().split()
    return ("vmx" in flags or "svm" in flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def check_image(image: Path) -> None:
    """Raise VmError unless it is a qcow2 image."""
    try:
        with image.open("rb") as file:
            magic = file.read(len(QCOW2))
    except OSError as error:
        raise VmError(f"IMAGE={image} cannot be read: {error.strerror}") from None
    if magic != QCOW2:
        raise VmError(f"IMAGE={image} is not a qcow2: coreos-installer download -f qcow2.xz -d")


def coreos(image: Path, overlay: Path) -> list[str]:
    """Return QEMU's arguments for a whole disk that boots itself."""
    make_overlay(overlay, image, "qcow2")
    return ["-drive", f"if=virtio,file={overlay},cache=unsafe",
            "-nic", "user,model=virtio"]  # fmt: skip


def stand_in(overlay: Path) -> list[str]:
    """Return QEMU's arguments for the Debian guest."""
    guest = cache.guest()
    make_overlay(overlay, guest.disk, "raw")
    return [
        "-kernel", str(guest.kernel), "-initrd", str(guest.initramfs), "-append", KERNEL_ARGUMENTS,
        "-drive", f"if=none,id=root,file={overlay},cache=unsafe",
        "-device", "nvme,serial=root,drive=root",
    ]  # fmt: skip


def make_overlay(overlay: Path, base: Path, form: str) -> None:
    """Make the disk that takes the guest's writes, once: a second start goes on with it."""
    if not overlay.exists():
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", form]
        cache.run([*create, str(overlay)])


class Folder:
    """A scratch folder with a short name (a unix socket's path has 107 octets); use `with`.

    Raises VmError where TMPDIR is no place for it.
    """

    def __init__(self) -> None:
        check_place(tempfile.gettempdir())
        # Named after the owner's process id, by which a later one knows whether it still lives.
        for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            owner = path.name.removeprefix(PREFIX).partition("-")[0]
            if not Path("/proc", owner).exists():
                shutil.rmtree(path, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def check_place(folder: str) -> None:
    """Raise VmError unless QEMU and ssh can have their sockets and disks in this folder."""
    if "," in folder or " " in folder or len(os.fsencode(folder)) > PLACE_LIMIT:
        wanted = f"without comma or space, of at most {PLACE_LIMIT} octets"
        raise VmError(f"TMPDIR={folder}: choose another, {wanted}")
    if shutil.disk_usage(folder).free < ROOM:
        raise VmError(f"{folder} has no room: {ROOM >> 20} MiB for what a VM writes, or set TMPDIR")


def write_ssh_config(folder: Path, machine: Machine, key: Path | None) -> Path:
    """Write the configuration by which `ssh -F` reaches the guest, as host "vm", over vsock."""
    path = f"PYTHONPATH={cache.REPOSITORY}"
    proxy = ["env", path, sys.executable, "-m", "vm.vsock", machine.target(SSH_PORT)]
    lines = [
        "Host vm",
        # A shell reads it, after ssh has looked for its own %-words.
        f"ProxyCommand {shlex.join(proxy).replace('%', '%%')}",
        "ProxyUseFdpass yes",
        "User core",
        # Its host key is new with every boot, and the way to it is not a network.
        "StrictHostKeyChecking no",
        "UserKnownHostsFile /dev/null",
        "LogLevel ERROR",
        # Later logins by the same user share the first one's connection, which ends with the VM.
        "ControlMaster auto",
        f"ControlPath {folder}/ssh-%r",
        "ControlPersist 60",
        # A user-space device says nothing of a guest that has rebooted.
        "ServerAliveInterval 10",
        *([f"IdentityFile {key}", "IdentitiesOnly yes"] if key else []),
    ]
    config = folder / "ssh_config"
    config.write_text("\n".join(lines) + "\n")
    return config
