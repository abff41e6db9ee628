"""Reboots, a second VM, the console: what happens to a VM after its first boot."""

from __future__ import annotations

import socket

from testinfra.host import Host

from tests.vm.conftest import BOOT_SECONDS, CID, Booted, Parts, wait_until
from tests.vm.test_echo import echoed
from vm.machine import Folder, Machine, Plan

BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


def test_console_has_core_logged_in(vm: Booted) -> None:
    with socket.socket(socket.AF_UNIX) as console:
        console.settimeout(30)
        console.connect(str(vm.machine.folder / "console"))
        console.sendall(b"\r")
        seen = b""
        while b"core@echo:~$" not in seen:
            seen += console.recv(4096)
        console.sendall(b"echo $((6 * 7)) $USER\r")
        while b"42 core" not in seen:
            seen += console.recv(4096)


def test_reboot_keeps_what_the_first_boot_made(vm: Booted, root: Host) -> None:
    finished = "stat --format=%Y /etc/.ignition-result.json"
    first = root.check_output(f"{BOOT_ID}; {finished}").split()
    vm.run("root", "systemctl reboot")
    # The old logins, which later ones would share, know nothing of it.
    vm.log_out()
    vm.machine.follow_reboot(60)
    wait_until(lambda: vm.run("root", BOOT_ID) not in ("", first[0]), "another boot", BOOT_SECONDS)
    vm.machine.wait_for_echo(vm.machine.seconds + BOOT_SECONDS)
    assert root.check_output(finished) == first[1], "Ignition ran again"
    units = "echo@demo.socket echo-image.service echo-image-update.timer"
    active = vm.host("core").check_output(f"systemctl --user is-active {units}").split()
    assert active == ["active"] * 3


def test_second_vm_with_another_cid_echoes_at_the_same_time(vm: Booted, parts: Parts) -> None:
    plan = Plan(CID + 1, parts.ignition, parts.data, memory=1024)
    with Folder() as folder, Machine(plan, folder) as second:
        second.wait_for_echo(BOOT_SECONDS)
        assert second.target() != vm.machine.target()
        for machine in (vm.machine, second, vm.machine):
            assert echoed(machine.target()) is None
    assert echoed(vm.machine.target()) is None, "the first one outlives the second"
