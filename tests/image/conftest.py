"""The image tier: what `make image` built, looked at from outside and run by podman.

Nothing here starts a network: containers get --network=none and reach the tests only through
inherited sockets, as in production.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PODMAN = str(REPOSITORY / "scripts" / "image-podman")
NAME = "localhost/echo-appliance:latest"
TOOLS = ("podman", "systemd-socket-activate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without podman there is nothing to test: skip in words, or fail in CI."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if not missing:
        return
    reason = f"{', '.join(missing)} not found: run scripts/setup, or install podman and systemd"
    if os.environ.get("CI") == "true":
        pytest.exit(f"image tier: {reason}", returncode=1)
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def podman(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run podman to its end; its standard error is part of the failure, if it fails."""
    done = subprocess.run([PODMAN, *arguments], capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr}"
    return done


def run_python(*options: str, code: str) -> str:
    """Run the image's interpreter on `code` in a container of its own; return what it printed."""
    fixed = ("--rm", "--pull=never", "--network=none", "--entrypoint=/usr/bin/python3")
    return podman("run", *fixed, *options, NAME, "-I", "-c", code).stdout


@pytest.fixture(scope="session")
def image() -> dict[str, Any]:
    """Build the image if need be; return what `podman image inspect` says of it."""
    built = subprocess.run(
        [REPOSITORY / "scripts" / "image"], capture_output=True, text=True, timeout=600
    )
    assert built.returncode == 0, built.stderr[-2000:]
    [inspected] = json.loads(podman("image", "inspect", NAME).stdout)
    assert isinstance(inspected, dict)
    return inspected


@pytest.fixture(scope="session")
def files(image: dict[str, Any]) -> dict[str, tarfile.TarInfo]:
    """Every file of the image by its path, from the only layer of the saved archive."""
    with tarfile.open(REPOSITORY / "build" / "echo-appliance.oci.tar") as archive:

        def blob(digest: str) -> bytes:
            member = archive.extractfile("blobs/" + digest.replace(":", "/"))
            assert member is not None
            return member.read()

        index = archive.extractfile("index.json")
        assert index is not None
        [entry] = json.load(index)["manifests"]
        manifest = json.loads(blob(entry["digest"]))
        assert manifest["config"]["digest"] == "sha256:" + image["Id"]
        [layer] = manifest["layers"]
        with tarfile.open(fileobj=io.BytesIO(blob(layer["digest"]))) as tree:
            return {"/" + member.name.strip("/"): member for member in tree}
