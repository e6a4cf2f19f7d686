"""Container images made here: layers as tar archives, OCI layouts and saved archives of them, without other tools."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from images import builder
from images.errors import ImageError

TYPES = {"file": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE,
         "char": tarfile.CHRTYPE, "block": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE}  # fmt: skip

Entry = dict[str, Any]


def entry(name: str, kind: str = "file", data: bytes = b"", **more: Any) -> Entry:
    """A member of a layer; `more`: target, mode, uid, gid, mtime, device, xattrs."""
    return {"name": name, "kind": kind, "data": data, **more}


def layer(*entries: Entry) -> bytes:
    """A tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for item in entries:
            member = tarfile.TarInfo(item["name"])
            member.type = TYPES[item["kind"]]
            member.size = len(item["data"])
            member.mode = item.get("mode", 0o755 if item["kind"] == "dir" else 0o644)
            member.uid, member.gid = item.get("uid", 0), item.get("gid", 0)
            member.mtime = item.get("mtime", 1_000_000_000)
            member.linkname = item.get("target", "")
            member.devmajor, member.devminor = item.get("device", (0, 0))
            member.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in item.get("xattrs", {}).items()}
            archive.addfile(member, io.BytesIO(item["data"]))
    return out.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def configuration(layers: list[bytes], **settings: Any) -> bytes:
    """The JSON of an image's configuration; `settings` are its Entrypoint, Cmd, Env, …"""
    return json.dumps({
        "architecture": "amd64", "os": "linux", "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [digest(item) for item in layers]},
    }).encode()  # fmt: skip


def blobs(layers: list[bytes], packed: list[bytes] | None = None, **settings: Any) -> tuple[dict[str, bytes], str]:
    """(blobs by their digest, the manifest's digest). `packed`: the layers as they are stored; by default gzip."""
    config = configuration(layers, **settings)
    stored = packed or [gzip.compress(item, 1, mtime=0) for item in layers]
    kind = "application/vnd.oci.image"
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": f"{kind}.manifest.v1+json",
        "config": {"mediaType": f"{kind}.config.v1+json", "digest": digest(config), "size": len(config)},
        "layers": [{"mediaType": f"{kind}.layer.v1.tar+gzip", "digest": digest(item), "size": len(item)}
                   for item in stored],
    }).encode()  # fmt: skip
    return {digest(item): item for item in [config, manifest, *stored]}, digest(manifest)


def layout(
    path: Path, layers: list[bytes], packed: list[bytes] | None = None, tag: str = "latest", **settings: Any
) -> Path:
    """An OCI layout with one image."""
    found, manifest = blobs(layers, packed, **settings)
    (path / "blobs" / "sha256").mkdir(parents=True)
    for name, data in found.items():
        (path / "blobs" / "sha256" / name.partition(":")[2]).write_bytes(data)
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": len(found[manifest]),
        "annotations": {"org.opencontainers.image.ref.name": tag},
    }]}))  # fmt: skip
    return path


def saved(path: Path, layers: list[bytes], tag: str = "made/here:1", **settings: Any) -> Path:
    """What `docker save` writes."""
    config = configuration(layers, **settings)
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [tag], "Layers": names}]).encode()
    files = {"config.json": config, "manifest.json": manifest, **dict(zip(names, layers, strict=True))}
    path.write_bytes(layer(*[entry(name, data=data) for name, data in files.items()]))
    return path


BUSYBOX = Path("/bin/busybox")
APPLETS = (
    *("sh", "id", "pwd", "env", "cat", "hostname", "stat", "touch"),
    *("echo", "ls", "sleep", "nc", "mount", "rm", "true"),
)
ETC = {
    "etc/passwd": b"root:x:0:0::/root:/bin/sh\nalice:x:1000:1001::/home/alice:/bin/sh\n",
    "etc/group": b"users:x:1001:\n",
}


def base() -> bytes:
    """A layer with busybox."""
    if not BUSYBOX.exists():
        pytest.skip("busybox is not installed")
    return layer(
        entry("bin/busybox", data=BUSYBOX.read_bytes(), mode=0o755),
        *[entry(f"bin/{name}", "hard", target="bin/busybox") for name in APPLETS],
        *[entry(name, data=data) for name, data in ETC.items()],
        entry("home/alice", "dir", uid=1000, gid=1001),
        entry("tmp", "dir", mode=0o1777),
    )


def need_container_kernel() -> None:
    """Skips the test, with the reason, where the kernel for container images cannot be had."""
    try:
        builder.build("container")
    except ImageError as error:
        pytest.skip(f"no kernel for container images: {error}")
