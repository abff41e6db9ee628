"""What the butane file says is what the guest has: files, owners, modes, links, units."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from testinfra.host import Host

from tests.vm.conftest import wait_until
from vm.errors import VmError
from vm.ignition import BUTANE, LOCAL_FILES, transpile

USER_UNITS = "/home/core/.config/systemd/user"


def entries(config: str, kind: str) -> list[dict[str, Any]]:
    """Return the storage entries of a kind, at least one."""
    found: list[dict[str, Any]] = json.loads(config)["storage"][kind]
    assert found
    return found


def owner(entry: dict[str, Any]) -> str:
    """Return USER:GROUP as the entry asks for it."""
    names = [entry.get(key, {}).get("name", "root") for key in ("user", "group")]
    return ":".join(names)


def content(entry: dict[str, Any]) -> bytes:
    """Return the octets of a file's data: URL."""
    source = entry.get("contents", {}).get("source", "data:,")
    kind, _, data = source.partition(",")
    octets = base64.b64decode(data) if kind.endswith(";base64") else unquote_to_bytes(data)
    compressed = entry.get("contents", {}).get("compression") == "gzip"
    return gzip.decompress(octets) if compressed else octets


def test_files_have_their_content_owner_and_mode(config: str, root: Host) -> None:
    files = entries(config, "files")
    paths = " ".join(entry["path"] for entry in files)
    stats = root.check_output(f"stat --format='%n %U:%G %a %F' {paths}").splitlines()
    expected = [f"{e['path']} {owner(e)} {e['mode']:o} regular" for e in files]
    assert [line.removesuffix(" empty file").removesuffix(" file") for line in stats] == expected
    sums = root.check_output(f"sha256sum {paths}").splitlines()
    assert [line.split()[0] for line in sums] == [
        hashlib.sha256(content(entry)).hexdigest() for entry in files
    ]


def test_directories_and_links_belong_to_the_user(config: str, root: Host) -> None:
    folders, links = entries(config, "directories"), entries(config, "links")
    paths = " ".join(entry["path"] for entry in [*folders, *links])
    stats = root.check_output(f"stat --format='%n %U:%G %N' {paths}").splitlines()
    assert stats == [
        *(f"{e['path']} {owner(e)} '{e['path']}'" for e in folders),
        *(f"{e['path']} {owner(e)} '{e['path']}' -> '{e['target']}'" for e in links),
    ]


def test_nothing_below_the_users_configuration_is_roots(root: Host) -> None:
    assert root.check_output("find /home/core -xdev -user root") == ""


def test_units_are_those_that_users_copy(config: str) -> None:
    copied = {
        "echo@.service": "echo@.service",
        "echo@.socket": "echo@.socket",
        "echo@demo.socket.d/override.conf": "echo@demo.socket.d/override.conf",
    }
    by_path = {entry["path"]: content(entry) for entry in entries(config, "files")}
    for name, source in copied.items():
        assert by_path[f"{USER_UNITS}/{name}"] == (LOCAL_FILES / source).read_bytes()


def test_guest_has_no_failed_unit(root: Host, core: Host) -> None:
    assert root.check_output("systemctl --failed --no-legend") == ""
    assert core.check_output("systemctl --user --failed --no-legend") == ""


def test_user_lingers_and_its_units_are_enabled(root: Host, core: Host) -> None:
    assert root.file("/var/lib/systemd/linger/core").exists
    units = "echo@demo.socket echo-image.service echo-image-update.timer"
    states = core.check_output(f"systemctl --user is-enabled {units}; true").split()
    assert states == ["enabled"] * 3
    assert core.check_output(f"systemctl --user is-active {units}").split() == ["active"] * 3


def test_system_loads_its_image_after_the_users_who_has_clients(root: Host, core: Host) -> None:
    wait_until(lambda: root.service("echo-image").is_running, "the system's image", 100)
    shown = "--value echo-image.service"
    began = root.check_output(f"systemctl show -p ExecMainStartTimestampMonotonic {shown}")
    done = core.check_output(f"systemctl --user show -p ActiveEnterTimestampMonotonic {shown}")
    assert int(began) > int(done) > 0


def test_host_name_and_console_are_set(root: Host) -> None:
    assert root.check_output("uname -n") == "echo"
    assert root.check_output("cat /proc/sys/kernel/printk").split()[0] == "4"


def test_config_holds_no_key_and_no_password(config: str, root: Host) -> None:
    assert "sshAuthorizedKeys" not in config
    assert "passwordHash" not in config
    assert root.check_output("awk -F: '$1 == \"core\" {print $2}' /etc/shadow") in ("!", "!!", "*")


# -- butane's no -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ("mode: 0755", "mode: many", "cannot unmarshal"),
        ("storage:", "storrage:", "unused key storrage"),
        ("{local: echo@.service}", "{local: nowhere}", "no such file"),
        ("variant: fcos", "variant: fcos: fcos", "mapping values are not allowed"),
    ],
)
def test_butane_error_is_told_by_its_line(tmp_path: Path, good: str, bad: str, words: str) -> None:
    text = BUTANE.read_text()
    source = tmp_path / "wrong.butane"
    source.write_text(text.replace(good, bad, 1))
    number = 1 + text[: text.index(good)].count("\n")
    with pytest.raises(VmError) as told:
        transpile(source)
    assert f"line {number}: " in str(told.value)
    assert words in str(told.value)
    assert "\n" not in str(told.value)
