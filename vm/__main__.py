"""`make vm`: boot a VM that vm/echo.butane describes, echo over vsock from here, say how to log in.

Parameters are environment variables, as make hands them on: CID, MEM (MiB), IMAGE (a CoreOS qcow2;
without it, a Debian guest that runs the real Ignition), KEY (an ssh public key), ONCE (if not
empty: end after the probe).
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from echo_appliance.probe import probe
from echo_appliance.target import parse_target
from echo_appliance.text import whole_number
from vm import cache, ignition
from vm.errors import VmError
from vm.machine import Folder, Machine, Plan, check_image, write_ssh_config
from vm.vsock import check_cid

ARCHIVE = cache.REPOSITORY / "build" / "echo-appliance.oci.tar"
PUBLIC_KEY = re.compile(r"(ssh|ecdsa|sk-ssh|sk-ecdsa)-\S+ \S+[^\n]*")
KEYS = ("id_ed25519.pub", "id_ecdsa.pub", "id_rsa.pub")
LEAST_MEMORY = 1024  # MiB: below it the first podman is killed for lack of it
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIMIT = {"kvm": 120, "tcg": 300}  # seconds until a guest that does not answer is given up


def main(environment: Mapping[str, str]) -> int:
    """Run one VM until Ctrl-C; return the exit status."""
    for number in ENDINGS:
        signal.signal(number, end)
    try:
        with Folder() as folder:
            return run(folder, environment)
    except VmError as error:
        tell(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        tell(f"{where}{error.strerror}")
    except Ended as ended:
        return 128 + ended.number
    return 1


class Ended(BaseException):
    """A signal asks us to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def end(number: int, _frame: object) -> None:
    """End, once: what is removed on the way out is removed however often Ctrl-C is pressed."""
    for one in ENDINGS:
        signal.signal(one, signal.SIG_IGN)
    raise Ended(number)


def tell(words: str) -> None:
    """Say what went wrong."""
    show_progress(None)
    print(f"vm: {words}", file=sys.stderr)


def run(folder: Path, environment: Mapping[str, str]) -> int:
    """Boot, probe, and wait for the end."""
    cid, image = check_cid(environment.get("CID") or "42"), environment.get("IMAGE")
    memory = check_memory(environment.get("MEM") or "2048")
    if image:
        check_image(Path(image))
    if not ARCHIVE.exists():
        raise VmError(f"{ARCHIVE} is missing: make image")
    private, public = find_key(folder, environment.get("KEY"))
    config = ignition.merge(ignition.transpile(), ignition.Login(public))
    data = cache.data_disk(folder, ARCHIVE, {})
    plan = Plan(cid, config, data, memory, Path(image).resolve() if image else None)
    with Machine(plan, folder) as machine:
        how = f"{machine.accelerator}, {machine.vsock.name}"
        print(f"vm: CID {cid}, {memory} MiB, {how}", flush=True)
        seconds = machine.wait_for_echo(LIMIT[machine.accelerator], show_progress)
        show_progress(None)
        print(f"vm: first echo {seconds:.1f} s after QEMU's start")
        result = probe(parse_target(machine.target()), 64, 10, 60)
        print(result.as_text(64))
        if result.error is not None or environment.get("ONCE"):
            return int(result.error is not None)
        tell_how(folder, write_ssh_config(folder, machine, private))
        machine.wait()
        print("vm: the guest has ended")
    return 0


def tell_how(folder: Path, config: Path) -> None:
    """Print what to do with the VM."""
    # The folder is its owner's: with sudo, root's.
    sudo = "sudo " if os.environ.get("SUDO_USER") else ""
    print(f"vm: log in    {sudo}ssh -F {config} vm")
    console = f"socat -,rawer,escape=0x1d unix-connect:{folder}/console"
    print(f"vm: console   {sudo}{console}   (leave: Ctrl-])")
    print("vm: stop      Ctrl-C here", flush=True)


def show_progress(seconds: float | None) -> None:
    """On a terminal: tell how long it has taken so far, in place; None clears the line."""
    if sys.stdout.isatty():
        words = "" if seconds is None else f"vm: booting, {seconds:.0f} s"
        print(f"\r\033[K{words}", end="", flush=True)


def check_memory(text: str) -> int:
    """Return the MiB that a user wrote."""
    memory = whole_number(text)
    if memory is None or memory < LEAST_MEMORY:
        raise VmError(f"MEM={text} is too little, or no number: MiB, at least {LEAST_MEMORY}")
    return memory


def find_key(folder: Path, given: str | None) -> tuple[Path | None, str]:
    """Return a private key's file (None: ssh finds it) and the public key to let in.

    KEY, else the user's own, else one that is made for this run.
    """
    own = [Path.home() / ".ssh" / name for name in KEYS]
    for path in [Path(given)] if given else own:
        try:
            key = path.read_text(errors="replace").strip()
        except OSError as error:
            if given:
                raise VmError(f"KEY={given} cannot be read: {error.strerror}") from None
            continue
        if PUBLIC_KEY.fullmatch(key):
            return None, key
        # A private key least of all: the guest's configuration is no place for it.
        raise VmError(f"KEY={path} is no ssh public key: give the file that ends in .pub")
    return make_key(folder)


def make_key(folder: Path) -> tuple[Path, str]:
    """Make a key pair in the folder; return the private one's file and the public one."""
    private = folder / "key"
    cache.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(private)])
    return private, private.with_suffix(".pub").read_text().strip()


if __name__ == "__main__":
    raise SystemExit(main(os.environ))
