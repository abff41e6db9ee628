"""`make vm` when things go wrong: one clear line, a non-zero exit, and nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import vm.machine
from tests.vm.conftest import CID, Booted, Parts, wait_until
from vm import cache, once
from vm.__main__ import find_key, make_key
from vm.errors import VmError
from vm.machine import PREFIX, QCOW2, TOOLS, Folder, Machine, Plan
from vm.vsock import UserVsock

VM = (sys.executable, "-m", "vm")
SPARE_CID = CID + 7


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "CID": str(SPARE_CID), **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"CID": "0"}, "CID=0 is none for a guest: 3 to 4294967294"),
        ({"CID": "1"}, "CID=1 is none"),
        ({"CID": "2"}, "CID=2 is none"),
        ({"CID": "4294967295"}, "is none for a guest"),
        ({"CID": "x"}, "CID=x is none"),
        ({"CID": "4" * 5000}, "is none for a guest"),
        ({"MEM": "64"}, "MEM=64 is too little"),
        ({"MEM": "lots"}, "MEM=lots is too little, or no number"),
        ({"MEM": "9" * 5000}, "is too little, or no number"),
        ({"IMAGE": "README.md"}, "IMAGE=README.md is not a qcow2"),
        ({"IMAGE": "/nowhere"}, "IMAGE=/nowhere cannot be read: No such file"),
        ({"IMAGE": "/tmp"}, "IMAGE=/tmp cannot be read: Is a directory"),
        ({"KEY": "/nowhere"}, "KEY=/nowhere cannot be read: No such file"),
        ({"KEY": "README.md"}, "KEY=README.md is no ssh public key"),
    ],
)
def test_make_vm_bad_parameter_is_told_in_one_line(changes: dict[str, str], words: str) -> None:
    assert words in refusal(environment(**changes))


def test_make_vm_without_butane_and_go_says_what_to_install(tmp_path: Path) -> None:
    assert "no butane, no Go to build it and no podman" in refusal(
        environment(PATH=only(tmp_path, "ssh-keygen"))
    )


def test_make_vm_without_qemu_says_what_installs_it(tmp_path: Path) -> None:
    path = only(tmp_path, "ssh-keygen", "go", "mke2fs")
    assert "no qemu-system-x86_64 and no qemu-img" in refusal(environment(PATH=path))


def test_make_vm_cid_in_use_is_told(vm: Booted) -> None:
    assert vm.seconds > 0
    assert f"CID={CID} is in use by another VM" in refusal(environment(CID=str(CID)))


@pytest.mark.parametrize("name", ["a,b", "a b", 90 * "x"])
def test_make_vm_place_that_is_none_for_sockets_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    words = f"{name}: choose another, without comma or space, of at most"
    assert words in refusal(environment(TMPDIR=str(tmp_path / name)))


def test_make_vm_private_key_is_not_taken_for_the_public_one(tmp_path: Path) -> None:
    private, public = make_key(tmp_path)
    assert "is no ssh public key" in refusal(environment(KEY=str(private)))
    assert find_key(tmp_path, str(private) + ".pub") == (None, public)


@pytest.mark.parametrize("missing", ["mke2fs", "ssh-keygen", "setpriv", "qemu-img"])
def test_make_vm_without_a_tool_says_which(tmp_path: Path, missing: str) -> None:
    tools = {"ssh-keygen", "go", "mke2fs", "setpriv", "unshare", *TOOLS} - {missing}
    variables = environment(PATH=only(tmp_path, *tools), HOME=str(tmp_path), **kept_cache())
    assert f"no {missing}: scripts/setup vm" in refusal(variables)


def test_make_vm_image_that_is_damaged_is_told(tmp_path: Path) -> None:
    image = tmp_path / "damaged.qcow2"
    image.write_bytes(QCOW2 + b"x" * 600)
    assert "qemu-img failed with 1: " in refusal(environment(IMAGE=str(image)))


def test_make_vm_without_room_for_its_disks_is_told(tmp_path: Path) -> None:
    mount = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    script = 'mount -t tmpfs -o size=20m tmpfs /mnt && exec "$@"'
    words = refusal(environment(TMPDIR="/mnt"), [*mount, script, "sh", *VM])
    assert "/mnt has no room" in words


def kept_cache() -> dict[str, str]:
    """Return the environment in which what was made is found, whatever HOME is."""
    return {"XDG_CACHE_HOME": str(once.CACHE.parent)}


def refusal(variables: dict[str, str], command: Sequence[str] = VM) -> str:
    """Return the one line that `make vm` refuses with."""
    done = subprocess.run(
        command, cwd=cache.REPOSITORY, env=variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done
    [line] = done.stderr.splitlines()
    assert line.startswith("vm: ")
    return line


def only(folder: Path, *tools: str) -> str:
    """Return a PATH with no more than these tools."""
    for tool in tools:
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return str(folder)


# -- guests that do not come up -----------------------------------------------------


def test_ignition_failure_is_shown(parts: Parts) -> None:
    newer = '{"ignition": {"version": "3.99.0"}}'
    with Folder() as folder, Machine(Plan(SPARE_CID, newer, parts.data), folder) as machine:
        with pytest.raises(VmError, match=r"Ignition's stage fetch-offline: .*version"):
            machine.wait_for_echo(100)
        assert machine.seconds < 100


def test_guest_that_never_echoes_is_given_up_with_its_console(parts: Parts) -> None:
    plan = Plan(SPARE_CID, '{"ignition": {"version": "3.3.0"}}', parts.data)
    with Folder() as folder, Machine(plan, folder) as machine:
        wait_until(lambda: "initramfs done" in machine.console(), "Ignition's end", 100)
        with pytest.raises(
            VmError, match=r"no echo within 1 s; the console ends with:\n(.*\n)*vm: "
        ):
            machine.wait_for_echo(1)


def test_kernel_panic_is_told_at_once(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm.machine, "KERNEL_ARGUMENTS", "console=ttyS0 rdinit=/nowhere")
    plan = Plan(SPARE_CID, parts.ignition, parts.data)
    panic = pytest.raises(VmError, match="Kernel panic - not syncing: VFS: Unable to mount root")
    with Folder() as folder, Machine(plan, folder) as machine, panic:
        machine.wait_for_echo(60)


def test_image_that_is_empty_is_given_up(parts: Parts, tmp_path: Path) -> None:
    image = tmp_path / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1G"], check=True)
    plan = Plan(SPARE_CID, parts.ignition, parts.data, image=image)
    silence = pytest.raises(VmError, match="no echo within 3 s")
    with Folder() as folder, Machine(plan, folder) as machine, silence:
        machine.wait_for_echo(3)


# -- nothing stays -------------------------------------------------------------------


# Before QEMU has connected, which then ends; while it asks for features; when the guest runs.
@pytest.mark.parametrize("seconds", [0, 0.02, 1])
def test_vsock_device_that_dies_is_told(parts: Parts, seconds: float) -> None:
    with (
        Folder() as folder,
        Machine(Plan(SPARE_CID, parts.ignition, parts.data), folder) as machine,
    ):
        if not isinstance(machine.vsock, UserVsock):
            pytest.skip("this host has vhost_vsock, which does not die alone")
        ours = mentioning(os.getpid())
        [device] = [pid for pid, words in ours if f"--guest-cid={SPARE_CID}" in words]
        time.sleep(seconds)
        os.kill(device, signal.SIGKILL)
        with pytest.raises(VmError, match="the vsock device ended"):
            machine.wait_for_echo(60)


ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)


@pytest.mark.parametrize("number", ENDINGS)
def test_make_vm_ended_by_a_signal_leaves_no_process(number: signal.Signals) -> None:
    with subprocess.Popen(
        VM, cwd=cache.REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "CID" in process.stdout.readline()  # QEMU runs
        time.sleep(0.5)
        assert len(mentioning(process.pid)) == 2, "QEMU and the device"
        process.send_signal(number)
        process.wait(20)
    assert process.returncode == (128 + number if number != signal.SIGKILL else -number)
    wait_until(lambda: not mentioning(process.pid), "the end of all its processes", 10)
    if number == signal.SIGKILL:
        Folder().__exit__()  # the next start removes what the kernel does not
    assert not list(Path("/tmp").glob(f"{PREFIX}{process.pid}-*"))


def mentioning(pid: int) -> list[tuple[int, list[str]]]:
    """Return the processes (and their argv) that name the scratch folder of a VM's owner."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:  # it has just ended
            continue
        if any(f"{PREFIX}{pid}-" in word for word in words):
            found.append((int(path.parent.name), words))
    return found


def test_make_vm_shows_a_way_in_and_fails_when_qemu_is_killed(tmp_path: Path) -> None:
    private, _ = make_key(tmp_path)
    variables = environment(KEY=f"{private}.pub", MEM="1024", SUDO_USER="somebody")
    with subprocess.Popen(
        VM, cwd=cache.REPOSITORY, env=variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        said = read_to(process, "vm: stop")
        assert " ok: 10 x 64 octets" in said
        [command] = re.findall(r"vm: log in    sudo (ssh -F \S+ vm)", said)
        words = [*command.split(), "-i", str(private), "-o", "ControlPath=none", "whoami"]
        assert subprocess.run(words, capture_output=True, text=True, timeout=90).stdout == "core\n"
        [qemu] = [pid for pid, words in mentioning(process.pid) if "qemu-system" in words[0]]
        os.kill(qemu, signal.SIGKILL)
        assert process.wait(20) == 1
        assert process.stderr is not None
        assert process.stderr.read() == "vm: QEMU was ended by signal 9\n"
    assert not mentioning(process.pid)
    assert not list(Path("/tmp").glob(f"{PREFIX}{process.pid}-*"))


def read_to(process: subprocess.Popen[str], words: str) -> str:
    """Return what a process prints up to the line with these words."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return said
    pytest.fail(f"no {words!r} in: {said}")
