"""A file tree in memory, written as an initramfs (newc cpio) or as an ext4 image: the same tree gives the same bytes.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst for newc.
"""

from __future__ import annotations

import os
import stat
import tarfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from images.errors import ImageError
from images.programs import run, tool


@dataclass(frozen=True, slots=True)
class Node:
    """One entry: `mode` with type bits; `data`, a file's content or a symbolic link's target; `owner`, (uid, gid)."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)
    owner: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Tree:
    """Paths (without a leading slash) and their entries; parents are made as needed, owned by root."""

    nodes: dict[str, Node] = field(default_factory=dict)

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._parents(path)
        self.nodes[path] = Node(stat.S_IFDIR | mode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._parents(path)
        self.nodes[path] = Node(stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        self._parents(path)
        self.nodes[path] = Node(stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._parents(path)
        self.nodes[path] = Node(stat.S_IFCHR | mode, b"", (major, minor))

    def add_tar(self, archive: tarfile.TarFile) -> None:
        """Everything in a tar file but device nodes; a hard link becomes a copy."""
        for member in archive:
            path = member.name.removeprefix("./").rstrip("/")
            if not path or path == ".":
                continue
            mode, owner = stat.S_IMODE(member.mode), (member.uid, member.gid)
            if member.isdir():
                self.nodes[path] = Node(stat.S_IFDIR | mode, owner=owner)
            elif member.issym():
                self.nodes[path] = Node(stat.S_IFLNK | 0o777, member.linkname.encode(), owner=owner)
            elif member.islnk():
                self.nodes[path] = self.nodes[member.linkname.removeprefix("./")]
            elif member.isreg():
                body = archive.extractfile(member)
                self.nodes[path] = Node(stat.S_IFREG | mode, body.read() if body else b"", owner=owner)

    def _parents(self, path: str) -> None:
        parent = os.path.dirname(path)
        if parent and parent not in self.nodes:
            self._parents(parent)
            self.nodes[parent] = Node(stat.S_IFDIR | 0o755)

    def cpio(self) -> bytes:
        """The tree as a newc archive: sorted, owned by root, time 0."""
        parts: list[bytes] = []
        for number, path in enumerate(sorted(self.nodes), 1):
            node = self.nodes[path]
            links = 2 if stat.S_ISDIR(node.mode) else 1
            parts.append(_newc(number, node.mode, links, node.data, path, node.device))
        parts.append(_newc(0, 0, 1, b"", "TRAILER!!!", (0, 0)))
        archive = b"".join(parts)
        return archive + bytes(-len(archive) % 512)

    def ext4(self, image: Path, size_mib: int, label: str, work: Path) -> None:
        """Write the tree as an ext4 image of `size_mib` (sparse). Needs e2fsprogs, no root; `work` is scratch space.

        Owners and times are set afterwards by debugfs, for mke2fs copies those of the scratch files.
        """
        source = work / "tree"
        source.mkdir()
        fixes: list[str] = []
        for path in sorted(self.nodes):
            node, target = self.nodes[path], source / path
            if stat.S_ISDIR(node.mode):
                target.mkdir(exist_ok=True)
            elif stat.S_ISLNK(node.mode):
                target.symlink_to(node.data.decode())
            elif stat.S_ISREG(node.mode):
                target.write_bytes(node.data)
            else:
                raise ImageError(f"no {path} in an ext4 image: only files, directories and links", "config")
            if not stat.S_ISLNK(node.mode):
                target.chmod(stat.S_IMODE(node.mode))
            owners = zip(("uid", "gid"), node.owner, strict=True)
            fixes += [f'set_inode_field "/{path}" {name} {value}' for name, value in owners]
            fixes += [f'set_inode_field "/{path}" {name} 0' for name in ("mtime", "atime", "ctime")]
        fixes += [f"set_inode_field / {name} 0" for name in ("uid", "gid", "mtime", "atime", "ctime")]
        identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"loopvisor:{label}"))
        environment = {"E2FSPROGS_FAKE_TIME": "1", "SOURCE_DATE_EPOCH": "1"}
        with image.open("wb") as file:
            file.truncate(size_mib << 20)
        options = f"hash_seed={identity},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"
        _tool(
            [tool("mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext4", "-L", label, "-U", identity, "-E", options]
            + ["-m", "0", "-d", str(source), str(image)],
            environment,
        )
        script = work / "fixes"
        script.write_text("\n".join(fixes) + "\n")
        _tool([tool("debugfs", "e2fsprogs"), "-w", "-f", str(script), str(image)], environment)


def _tool(command: list[str], environment: dict[str, str]) -> None:
    status, out, errors = run(command, environment=environment)
    if status:
        lines = [*out.splitlines(), *errors] or ["no message"]
        full = next((line for line in lines if "allocate" in line or "No space" in line), None)
        what = f"{full}; make root.size_mib larger" if full else lines[-1]
        raise ImageError(f"{os.path.basename(command[0])} failed: {what}")


def _newc(number: int, mode: int, links: int, data: bytes, path: str, device: tuple[int, int]) -> bytes:
    name = path.encode() + b"\0"
    fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + name
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
