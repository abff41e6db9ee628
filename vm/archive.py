"""The image's archive, with layers that are not compressed: to unpack them is half of its loading.

Source: the OCI image format, manifest.md and image-layout.md.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

GZIP = "+gzip"


def uncompress(archive: Path, to: Path) -> None:
    """Write an OCI archive of the same image (the same config, so the same id) without gzip."""
    with tarfile.open(archive) as source, tarfile.open(to, "w") as result:

        def read(name: str) -> bytes:
            file = source.extractfile(name)
            if file is None:
                raise tarfile.TarError(f"{name} is no file")
            return file.read()

        def blob(digest: str) -> bytes:
            return read(f"blobs/{digest.replace(':', '/')}")

        def add(name: str, octets: bytes) -> None:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(octets), 0o644
            result.addfile(entry, io.BytesIO(octets))

        def add_blob(descriptor: dict[str, Any], octets: bytes) -> dict[str, Any]:
            digest = hashlib.sha256(octets).hexdigest()
            add(f"blobs/sha256/{digest}", octets)
            return {**descriptor, "digest": f"sha256:{digest}", "size": len(octets)}

        def add_layer(layer: dict[str, Any]) -> dict[str, Any]:
            octets, kind = blob(layer["digest"]), layer["mediaType"]
            if kind.endswith(GZIP):
                octets, kind = gzip.decompress(octets), kind.removesuffix(GZIP)
            return add_blob({**layer, "mediaType": kind}, octets)

        index = json.loads(read("index.json"))
        [described] = index["manifests"]
        manifest = json.loads(blob(described["digest"]))
        add_blob(manifest["config"], blob(manifest["config"]["digest"]))
        manifest["layers"] = [add_layer(layer) for layer in manifest["layers"]]
        index["manifests"] = [add_blob(described, json.dumps(manifest).encode())]
        add("index.json", json.dumps(index).encode())
        add("oci-layout", read("oci-layout"))
