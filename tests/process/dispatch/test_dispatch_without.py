"""What a user sees where something is missing: libbpf, clang, BPF in the kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.dispatch.space import Space

ROOT = Path(__file__).parents[3]

# Runs a command after the kernel has lost a call: number, argument, its value, errno.
_WITHOUT = """
import ctypes, struct, sys
number, argument, value, errno = map(int, sys.argv[1:5])
def step(code, true, false, k): return struct.pack("HBBI", code, true, false, k)
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
rules = [step(LOAD, 0, 0, 0), step(EQUAL, 0, 3, number), step(LOAD, 0, 0, 16 + 8 * argument),
         step(EQUAL, 0, 1, value), step(RETURN, 0, 0, 0x50000 | errno),
         step(RETURN, 0, 0, 0x7fff0000)]
octets = b"".join(rules)
buffer = ctypes.create_string_buffer(octets)
program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "no new privileges"
assert libc.prctl(22, 2, ctypes.create_string_buffer(program)) == 0, "seccomp"
from echo_appliance.__main__ import main
sys.exit(main(sys.argv[5:]))
"""
# bpf(2) and getsockopt(2), by machine
_CALLS = {"x86_64": (321, 55), "aarch64": (280, 209)}
_BPF_PROG_LOAD, _SO_NETNS_COOKIE = 5, 71
_EINVAL, _ENOSYS, _ENOPROTOOPT = 22, 38, 92


def run_without(space: Space, lost: tuple[int, ...], *words: str) -> str:
    """Run a command that must fail in one line; return the line."""
    if os.uname().machine not in _CALLS:
        pytest.skip("the numbers of system calls of this machine are not known here")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, *map(str, lost), *space.command(*words)[3:]],
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_kernel_without_namespace_cookies_is_named(empty: Space) -> None:
    _, getsockopt = _CALLS.get(os.uname().machine, (0, 0))
    line = run_without(empty, (getsockopt, 2, _SO_NETNS_COOKIE, _ENOPROTOOPT), "load")
    assert "needs a kernel with BPF sk_lookup and SO_NETNS_COOKIE, as Linux has since 5.14" in line
    assert os.uname().release in line


@pytest.mark.parametrize("errno", [_EINVAL, _ENOSYS])
def test_kernel_without_sk_lookup_is_named(empty: Space, errno: int) -> None:
    bpf, _ = _CALLS.get(os.uname().machine, (0, 0))
    line = run_without(empty, (bpf, 0, _BPF_PROG_LOAD, errno), "load")
    assert "needs a kernel with BPF sk_lookup" in line
    assert empty.pinned() == []


def test_missing_libbpf_is_named_with_its_package(empty: Space) -> None:
    listed = subprocess.run(["ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    paths = {line.split()[-1] for line in listed.splitlines() if "libbpf.so.1 " in line}
    for path in paths:  # in this test's own mount namespace
        empty.run_tool("mount", "--bind", "/dev/null", os.path.realpath(path))
    line = empty.fails("load")
    assert "needs libbpf, which is not here: apt-get install libbpf1" in line


def path_without_clang(folder: Path) -> str:
    """Return a PATH with what a shell script needs, and no compiler."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "uname", "cat", "mv"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    return str(tools)


def test_compiling_without_clang_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "bpf"], env={"PATH": path_without_clang(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "clang is missing" in done.stderr
    assert "apt-get install clang libbpf-dev" in done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The package as pip installs it where no clang is, with what it needs for that."""
    source, target = tmp_path / "source", tmp_path / "target"
    ignored = shutil.ignore_patterns("*.o", "*.egg-info", "__pycache__")
    for name in ("app", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--target", target, source], check=True, timeout=100,
        env={**os.environ, "PATH": path_without_clang(tmp_path)},
    )  # fmt: skip
    return target


def test_installation_without_clang_works_and_dispatch_says_what_is_missing(
    installed: Path, empty: Space
) -> None:
    done = subprocess.run(
        empty.command("load"), env={**os.environ, "PYTHONPATH": str(installed)}, cwd=installed,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "the BPF program is not compiled: install clang" in done.stderr
    assert empty.pinned() == []
