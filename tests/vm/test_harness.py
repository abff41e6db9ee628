"""`make vm` when things go wrong: one clear line, a non-zero exit, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.vm.conftest import CID, Booted, Parts, wait_until
from vm import cache
from vm.errors import VmError
from vm.machine import PREFIX, Folder, Machine, Plan

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
        ({"MEM": "64"}, "MEM=64 is too little"),
        ({"MEM": "lots"}, "MEM=lots is too little, or no number"),
        ({"IMAGE": "README.md"}, "IMAGE=README.md is not a qcow2"),
        ({"IMAGE": "/nowhere"}, "IMAGE=/nowhere cannot be read: No such file"),
        ({"KEY": "/nowhere"}, "KEY=/nowhere cannot be read: No such file"),
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


def refusal(variables: dict[str, str]) -> str:
    """Return the one line that `make vm` refuses with."""
    done = subprocess.run(
        VM, cwd=cache.REPOSITORY, env=variables, capture_output=True, text=True, timeout=60
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


def test_image_that_is_empty_is_given_up(parts: Parts, tmp_path: Path) -> None:
    image = tmp_path / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1G"], check=True)
    plan = Plan(SPARE_CID, parts.ignition, parts.data, image=image)
    silence = pytest.raises(VmError, match="no echo within 3 s")
    with Folder() as folder, Machine(plan, folder) as machine, silence:
        machine.wait_for_echo(3)


# -- nothing stays -------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
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
    assert process.returncode == (130 if number != signal.SIGKILL else -number)
    wait_until(lambda: not mentioning(process.pid), "the end of all its processes", 10)
    if number == signal.SIGKILL:
        Folder().__exit__()  # the next start removes what the kernel does not
    assert not list(Path("/tmp").glob(f"{PREFIX}{process.pid}-*"))


def mentioning(pid: int) -> list[str]:
    """Return the processes whose command line names the scratch folder of a VM's owner."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().replace("\0", " ")
        except OSError:  # it has just ended
            continue
        if f"{PREFIX}{pid}-" in words:
            found.append(words)
    return found
