"""What is in the image, and above all what is not."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from .conftest import NAME, REPOSITORY, podman, run_python

Files = dict[str, tarfile.TarInfo]
MEGABYTE = 1_000_000


def test_unpacked_size_stays_within_30_mb(files: Files) -> None:
    assert sum(member.size for member in files.values()) <= 30 * MEGABYTE


def test_the_only_programs_are_python_and_the_command(files: Files) -> None:
    loader = {path for path in files if "/ld-linux" in path or "/ld64.so" in path or "/ld-" in path}
    runnable = {
        path
        for path, member in files.items()
        if member.isfile() and member.mode & 0o111 and ".so" not in path
    }
    assert runnable - loader == {"/usr/bin/echo-appliance", "/usr/bin/python3.13"}


def test_a_shell_cannot_be_started(image: dict[str, Any]) -> None:
    for program in ("/bin/sh", "/usr/bin/sh", "sh", "apt-get", "dpkg", "pip"):
        done = podman("run", "--rm", "--network=none", f"--entrypoint={program}", NAME, check=False)
        assert done.returncode in (126, 127), f"{program}: {done.returncode} {done.stderr}"


def test_no_file_grants_rights_or_can_be_changed(files: Files) -> None:
    for path, member in files.items():
        assert not member.mode & 0o6000, f"{path} is setuid or setgid"
        assert not member.pax_headers.get("SCHILY.xattr.security.capability"), path
        assert (member.uid, member.gid) == (0, 0), path
        assert member.isfile() or member.isdir() or member.issym() or member.islnk(), path
        if not member.issym() and path != "/tmp":
            assert not member.mode & 0o022, f"{path} can be written by others"


def test_every_byte_code_file_is_trusted_unchecked(files: Files, image: dict[str, Any]) -> None:
    """PEP 552: flags 0b01, or Python would look at the source, or write, at every start."""
    code = (
        "import pathlib; files = list(pathlib.Path('/usr/lib').rglob('*.pyc'));"
        "print(len(files), {file.read_bytes()[4] for file in files})"
    )
    count, flags = run_python(code=code).split(maxsplit=1)
    assert int(count) == sum(path.endswith(".pyc") for path in files) > 50
    assert flags.strip() == "{1}"


def test_every_module_of_the_application_can_be_imported(image: dict[str, Any]) -> None:
    app = REPOSITORY / "app"
    parts = (path.relative_to(app).with_suffix("").parts for path in app.rglob("*.py"))
    names = sorted(".".join(part) for part in parts if part[-1] != "__init__")
    assert "echo_appliance.__main__" in names
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)\nprint('all')"
    assert run_python(code=code) == "all\n"


def test_what_nothing_imports_by_name_yet_is_there(image: dict[str, Any]) -> None:
    """ctypes with its library for later modes, and codecs that are looked up at run time."""
    code = (
        "import ctypes, tomllib, traceback\n"
        "print(ctypes.CDLL(None).getpid(), 'b\\xfccher.example'.encode('idna').decode())"
    )
    assert run_python(code=code) == "1 xn--bcher-kva.example\n"


def test_packages_and_licences_are_recorded(files: Files) -> None:
    """SBOM tools read status.d where there is no dpkg; licences ask for their text."""
    recorded = {PurePosixPath(path).name for path in files if "/dpkg/status.d/" in path}
    assert {"libc6", "libsystemd0", "python3-systemd", "python3.13-minimal"} <= recorded
    for package in recorded:
        assert f"/usr/share/doc/{package}/copyright" in files, package


def test_labels_say_what_it_is(image: dict[str, Any]) -> None:
    prefix = "org.opencontainers.image."
    assert image["Labels"][prefix + "title"] == "echo-appliance"
    for label in ("description", "licenses", "version"):
        assert image["Labels"][prefix + label], label


def test_configuration_is_exec_form_and_unprivileged(image: dict[str, Any]) -> None:
    config = image["Config"]
    assert config["User"] == "65534:65534"
    assert config["Entrypoint"] == ["/usr/bin/echo-appliance"]
    assert config["Cmd"] == ["echo"]


def test_two_builds_from_nothing_have_one_digest(image: dict[str, Any], tmp_path: Path) -> None:
    done = subprocess.run(
        [REPOSITORY / "scripts" / "image", "--check-reproducible"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (line.partition("sha256:")[2] for line in done.stdout.splitlines())
    assert len(first) == 64
    assert first == second


def test_dispatch_has_its_compiled_program_and_libbpf(image: dict[str, Any]) -> None:
    code = (
        "import os; from echo_appliance.dispatch import libbpf, program\n"
        "print(os.path.getsize(program.OBJECT) > 1000, libbpf.possible_cpus() > 0)"
    )
    assert run_python(code=code) == "True True\n"
