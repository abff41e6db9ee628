"""Several users on one state: a sidecar that is not root, root's own commands, other processes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from echo_appliance.dispatch.place import give_to_owner
from tests.process.dispatch.clients import reached
from tests.process.dispatch.space import Space
from tests.process.dispatch.test_dispatch_commands import run_as

OWNER = 65534
GIVEN = "-all,+bpf,+net_admin,+sys_ptrace"
PTRACER = [
    "setpriv", f"--reuid={OWNER}", f"--regid={OWNER}", "--clear-groups", "--no-new-privs",
    f"--inh-caps={GIVEN}", f"--ambient-caps={GIVEN}",
]  # fmt: skip


def as_owner(space: Space, *words: str) -> None:
    done = run_as(space, "capable", *words)
    assert done.returncode == 0, f"{words}: {done.stderr}"


@pytest.mark.parametrize("first", ["owner", "root"])
def test_what_root_changes_stays_open_to_the_owner_of_the_state(empty: Space, first: str) -> None:
    base = empty.bpffs / "echo-appliance"
    base.mkdir()
    os.chown(base, OWNER, OWNER)
    empty.bpffs.chmod(0o755)
    if first == "owner":
        as_owner(empty, "load")
    else:
        empty.ok("load")
    entries = '{"bindings": [{"label": "web", "prefix": "127.1.0.0/16", "port": "80-90"}]}'
    for number, change in enumerate((["upgrade"], ["load-bindings", "-"])):
        empty.ok(*change, stdin=entries)
        as_owner(empty, "bind", "web", "tcp", "127.2.0.1", str(100 + number))
        as_owner(empty, "bind", "web", "tcp", "127.2.0.1", f"{200 + number}-{210 + number}")
    as_owner(empty, "upgrade")
    [path] = empty.pinned()
    assert {pin.stat().st_uid for pin in [path, *path.iterdir()]} == {OWNER}
    as_owner(empty, "unload")


def test_load_without_a_group_sets_no_group_bit(empty: Space) -> None:
    # A service with RestrictSUIDSGID= may not even try.
    empty.ok("load")
    [path] = empty.pinned()
    assert path.stat().st_mode & 0o7777 == 0o750


def test_register_pid_of_another_users_process_needs_cap_sys_ptrace_and_no_other(
    empty: Space,
) -> None:
    os.chown(empty.bpffs, OWNER, OWNER)
    as_owner(empty, "load")
    as_owner(empty, "bind", "web", "tcp", "127.1.0.0/16", "80")
    listener = empty.tcp()
    port = str(listener.getsockname()[1])
    words = ("register-pid", str(os.getpid()), "web", "tcp", "127.0.0.1", port)
    done = run_as(empty, "capable", *words)
    assert done.returncode == 1
    assert done.stderr.endswith("missing: CAP_SYS_PTRACE\n")
    traced = [*PTRACER, *empty.command(*words)]
    done = subprocess.run(traced, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    assert reached([listener], "127.1.0.1", 80) == 0


def test_a_directory_that_any_user_may_have_made_is_not_used(empty: Space) -> None:
    # Its owner would get all that is pinned in it: a bpffs without options is open to all.
    base = empty.bpffs / "echo-appliance"
    base.mkdir()
    os.chown(base, OWNER, OWNER)
    assert f"belongs to user {OWNER}, and anybody may have made it" in empty.fails("load")
    assert list(base.iterdir()) == []
    empty.bpffs.chmod(0o755)
    empty.ok("load")


def test_load_by_a_user_with_a_strict_umask_lets_the_group_read(empty: Space) -> None:
    empty.bpffs.chmod(0o755)
    before = os.umask(0o077)
    try:
        empty.ok("load", "--group", "4242")
    finally:
        os.umask(before)
    assert run_as(empty, "reader", "status").returncode == 0


def test_load_for_a_group_on_a_bpffs_that_is_open_to_all_warns(empty: Space) -> None:
    assert "warning: any user may pin" in empty.ok("load", "--group", str(OWNER)).err
    empty.ok("unload")
    empty.bpffs.chmod(0o755)
    assert "warning" not in empty.ok("load", "--group", str(OWNER)).err


def test_what_root_gives_to_the_owner_is_never_what_a_link_leads_to(
    empty: Space, tmp_path: Path
) -> None:
    base = empty.bpffs / "echo-appliance"
    base.mkdir()
    os.chown(base, OWNER, OWNER)
    (tmp_path / "precious").touch()
    (base / "link").symlink_to(tmp_path / "precious")
    give_to_owner(str(base / "link"))
    assert (tmp_path / "precious").stat().st_uid == 0
    assert (base / "link").lstat().st_uid == OWNER
