"""`make vm`: boot a VM that vm/echo.butane describes, echo over vsock from here, say how to log in.

Parameters are environment variables, as make hands them on: CID, MEM (MiB), IMAGE (a CoreOS qcow2;
without it, a Debian guest that runs the real Ignition), KEY (an ssh public key), ONCE (if not
empty: end after the probe).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from echo_appliance.probe import probe
from echo_appliance.target import parse_target
from vm import cache, ignition
from vm.errors import VmError
from vm.machine import Folder, Machine, Plan, check_image, write_ssh_config
from vm.vsock import check_cid

ARCHIVE = cache.REPOSITORY / "build" / "echo-appliance.oci.tar"
KEYS = ("id_ed25519.pub", "id_ecdsa.pub", "id_rsa.pub")
LEAST_MEMORY = 1024  # MiB: below it the first podman is killed for lack of it
LIMIT = {"kvm": 120, "tcg": 300}  # seconds until a guest that does not answer is given up


def main(environment: Mapping[str, str]) -> int:
    """Run one VM until Ctrl-C; return the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Folder() as folder:
            return run(folder, environment)
    except VmError as error:
        show_progress(None)
        print(f"vm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130


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
    print(f"vm: log in    ssh -F {config} vm")
    print(
        f"vm: console   socat -,rawer,escape=0x1d unix-connect:{folder}/console   (leave: Ctrl-])"
    )
    print("vm: stop      Ctrl-C here", flush=True)


def show_progress(seconds: float | None) -> None:
    """On a terminal: tell how long it has taken so far, in place; None clears the line."""
    if sys.stdout.isatty():
        words = "" if seconds is None else f"vm: booting, {seconds:.0f} s"
        print(f"\r\033[K{words}", end="", flush=True)


def check_memory(text: str) -> int:
    """Return the MiB that a user wrote."""
    if not text.isascii() or not text.isdigit() or int(text) < LEAST_MEMORY:
        raise VmError(f"MEM={text} is too little, or no number: MiB, at least {LEAST_MEMORY}")
    return int(text)


def find_key(folder: Path, given: str | None) -> tuple[Path | None, str]:
    """Return a private key's file (None: ssh finds it) and the public key to let in.

    KEY, else the user's own, else one that is made for this run.
    """
    own = [Path.home() / ".ssh" / name for name in KEYS]
    for path in [Path(given)] if given else own:
        try:
            return None, path.read_text().strip()
        except OSError as error:
            if given:
                raise VmError(f"KEY={given} cannot be read: {error.strerror}") from None
    return make_key(folder)


def make_key(folder: Path) -> tuple[Path, str]:
    """Make a key pair in the folder; return the private one's file and the public one."""
    private = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", private], check=True)
    return private, private.with_suffix(".pub").read_text().strip()


if __name__ == "__main__":
    raise SystemExit(main(os.environ))
