"""An image's archive without compression: the same image, every octet named by its hash."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from vm.archive import uncompress

LAYER = b"a layer, which is a tar in life" * 100
CONFIG = b'{"rootfs": {}}'
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
ANNOTATIONS = {"org.opencontainers.image.ref.name": "localhost/echo-appliance:latest"}


def described(blobs: dict[str, bytes], octets: bytes, kind: str) -> dict[str, Any]:
    """Keep a blob; return its descriptor."""
    digest = hashlib.sha256(octets).hexdigest()
    blobs[f"blobs/sha256/{digest}"] = octets
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(octets)}


def make(path: Path, layers: list[tuple[bytes, str]]) -> None:
    """Write an OCI archive with these layers."""
    files: dict[str, bytes] = {}
    manifest = {
        "config": described(files, CONFIG, "application/vnd.oci.image.config.v1+json"),
        "layers": [described(files, octets, kind) for octets, kind in layers],
    }
    entry = described(files, json.dumps(manifest).encode(), "manifest")
    index = {"manifests": [{**entry, "annotations": ANNOTATIONS}]}
    files |= {"index.json": json.dumps(index).encode(), "oci-layout": b"{}"}
    with tarfile.open(path, "w") as archive:
        for name, octets in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(octets)
            archive.addfile(info, io.BytesIO(octets))


def read(path: Path) -> dict[str, bytes]:
    """Return an archive's files, whose blobs have the names of their hashes."""
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            files[member.name] = file.read()
    for name, octets in files.items():
        if name.startswith("blobs/"):
            assert name == f"blobs/sha256/{hashlib.sha256(octets).hexdigest()}"
    return files


@pytest.mark.parametrize("kind", [LAYER_TYPE + "+gzip", LAYER_TYPE])
def test_archive_uncompressed_is_the_same_image_without_gzip(tmp_path: Path, kind: str) -> None:
    layer = gzip.compress(LAYER) if kind.endswith("gzip") else LAYER
    make(tmp_path / "old", [(layer, kind), (LAYER[:100], LAYER_TYPE)])
    uncompress(tmp_path / "old", tmp_path / "new")
    files = read(tmp_path / "new")
    [entry] = json.loads(files["index.json"])["manifests"]
    assert entry["annotations"] == ANNOTATIONS
    whole = files["blobs/" + entry["digest"].replace(":", "/")]
    assert entry["size"] == len(whole)
    manifest = json.loads(whole)
    assert manifest["config"]["digest"] == "sha256:" + hashlib.sha256(CONFIG).hexdigest()
    assert files["oci-layout"] == b"{}"
    for found, expected in zip(manifest["layers"], (LAYER, LAYER[:100]), strict=True):
        octets = files["blobs/" + found["digest"].replace(":", "/")]
        assert octets == expected
        assert (found["mediaType"], found["size"]) == (LAYER_TYPE, len(expected))
