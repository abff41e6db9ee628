"""How the host reaches a guest's vsock ports, and what QEMU is told for it.

Two ways: the host kernel's vhost_vsock, where a CID is an address of the whole host; and, where
there is none (or no permission), a vhost-user device in user space, where the guest's ports stand
behind a unix socket.  The guest sees AF_VSOCK with the host as CID 2 in both.

    python -m vm.vsock TARGET     for ssh's ProxyUseFdpass=: connects, and hands over the descriptor
"""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from echo_appliance.probe import ProbeError, connect
from echo_appliance.target import parse_target
from echo_appliance.text import whole_number
from vm.cache import vsock_device
from vm.errors import VmError

VHOST = "/dev/vhost-vsock"
FIRST_CID = 3  # 0 the hypervisor, 1 the loopback, 2 the host: vsock(7)
LAST_CID = 0xFFFFFFFE


class KernelVsock:
    """vhost_vsock: the guest is vsock:CID:PORT for everybody on this host."""

    name = "vhost-vsock"
    survives_reset = True

    def __init__(self, cid: int) -> None:
        self._cid = cid

    def start(self) -> list[str]:
        """Return QEMU's arguments."""
        return ["-device", f"vhost-vsock-pci,guest-cid={self._cid}"]

    def target(self, port: int) -> str:
        """Return a port of the guest as the probe takes it."""
        return f"vsock:{self._cid}:{port}"

    def failure(self) -> str | None:
        """Return why there is no way in any more; the device goes with QEMU."""
        return None

    def close(self) -> None:
        """Nothing to end: the device goes with QEMU."""


class UserVsock:
    """vhost-device-vsock: the guest is vsock-uds:PATH:PORT.  Owns the device's process."""

    name = "user-space vsock"
    # One that was connected to while its guest was down answers nobody any more (0.3.0).
    survives_reset = False

    def __init__(self, cid: int, folder: Path) -> None:
        self._cid = cid
        self._control = folder / "vhost"
        self.path = folder / "vsock"
        self._log = folder / "vsock.log"
        self._device: subprocess.Popen[bytes] | None = None

    def start(self) -> list[str]:
        """Start the device; return QEMU's arguments.  Raises VmError when it does not start."""
        self._control.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        command = [vsock_device(), f"--guest-cid={self._cid}"]
        command += [f"--socket={self._control}", f"--uds-path={self.path}"]
        with self._log.open("wb") as log:
            # If we are killed outright, the kernel takes it along.
            self._device = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_for_socket(self._device)
        return ["-chardev", f"socket,id=vsock,path={self._control}",
                "-device", "vhost-user-vsock-pci,chardev=vsock"]  # fmt: skip

    def _wait_for_socket(self, device: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 10
        while not self._control.exists():
            if device.poll() is not None or time.monotonic() > deadline:
                raise VmError(f"vhost-device-vsock does not start: {self._said()}")
            time.sleep(0.01)

    def _said(self) -> str:
        said = self._log.read_text(errors="replace").strip().splitlines()
        return said[-1] if said else "it says nothing"

    def failure(self) -> str | None:
        """Return why there is no way in any more; None while there is."""
        if self._device is None or self._device.poll() is None:
            return None
        return f"the vsock device ended: {self._said()}"

    def target(self, port: int) -> str:
        """Return a port of the guest as the probe takes it."""
        return f"vsock-uds:{self.path}:{port}"

    def close(self) -> None:
        """End the device."""
        if self._device is not None:
            self._device.kill()
            self._device.wait()


Vsock = KernelVsock | UserVsock


def pick(cid: int, folder: Path) -> Vsock:
    """Return the way that this host has."""
    return KernelVsock(cid) if _opens(VHOST) else UserVsock(cid, folder)


def _opens(path: str) -> bool:
    """Whether it can be used; opening a static device node loads its module."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def check_cid(text: str) -> int:
    """Return the CID that a user wrote.  Raises VmError for one that no guest can have."""
    cid = whole_number(text)
    if cid is None or not FIRST_CID <= cid <= LAST_CID:
        raise VmError(f"CID={text} is none for a guest: {FIRST_CID} to {LAST_CID}")
    return cid


class Claim:
    """A CID that is taken on this host for as long as this lives.

    vhost_vsock refuses a second guest by itself; user-space devices know nothing of each other.
    """

    def __init__(self, cid: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            # An abstract name is gone with its owner, however that ends.
            self._socket.bind(f"\0echo-appliance-vm-{cid}")
        except OSError:
            self._socket.close()
            raise VmError(f"CID={cid} is in use by another VM: choose another") from None

    def release(self) -> None:
        """Let others have it."""
        self._socket.close()


def main(arguments: list[str]) -> int:
    """Connect, and pass the descriptor on through standard output, a unix socket of ssh's."""
    try:
        with connect(parse_target(arguments[0]), 10) as sock, socket.socket(fileno=1) as ssh:
            rights = array.array("i", [sock.fileno()])
            ssh.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            ssh.detach()
    except (OSError, ProbeError) as error:
        print(f"vm: {arguments[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
