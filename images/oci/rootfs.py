"""The merged file tree of an image's layers: who hides whom, and nothing outside of it.

Paths are resolved within the tree as a process would that has it as its root: symbolic links of what is there are
followed for a member's parent, and ".." stays below the root. Source: OCI image specification 1.1, "Image Layer
Filesystem Changeset". Knows neither archives nor file systems. Everything that an archive can make grow is bounded.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator

from images.errors import ImageError

MAX_ENTRIES = 2_000_000
MAX_TEXT = 512 << 20
"""Bytes of names, targets and extended attributes of a whole image."""
MAX_STEPS = 50_000_000
"""Components of paths that are looked up for a whole image."""
MAX_LINKS = 40
"""Symbolic links in one path, as in Linux."""
MAX_COMPONENT = 255
WHITEOUT, OPAQUE, AUFS = b".wh.", b".wh..wh..opq", b".wh..wh."


class Inode:
    """An inode. `children` of a directory: name -> (node, number of the layer that brought this entry). `start` is the
    first block of a file's content; `target` a symbolic link's; `device` (major, minor)."""

    __slots__ = (
        "children", "device", "gid", "links", "mode", "mtime_ns", "nid", "parent", "size", "start", "target", "uid",
        "xattrs",
    )  # fmt: skip

    def __init__(self, mode: int, uid: int = 0, gid: int = 0, mtime_ns: int = 0) -> None:
        self.mode, self.uid, self.gid, self.mtime_ns = mode, uid, gid, mtime_ns
        self.size = self.start = self.nid = self.links = 0
        self.target = b""
        self.device = (0, 0)
        self.xattrs: dict[bytes, bytes] = {}
        self.children: dict[bytes, tuple[Inode, int]] = {}
        self.parent: Inode | None = None

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Rootfs:
    """The tree. `layer` counts up with begin_layer()."""

    def __init__(self) -> None:
        self.root = Inode(stat.S_IFDIR | 0o755)
        self.root.parent = self.root
        self.layer = 0
        self._entries = self._text = self._steps = 0
        self._last: tuple[bytes, Inode] | None = None

    def begin_layer(self) -> None:
        """What is added from now on is above what is there."""
        self.layer += 1
        self._last = None

    def count(self, text: int) -> None:
        """One more member, with so many bytes of names and attributes. Raises ImageError beyond the limits."""
        self._entries += 1
        self._text += text
        if self._entries > MAX_ENTRIES:
            raise ImageError(f"the image has more than {MAX_ENTRIES} files")
        if self._text > MAX_TEXT:
            raise ImageError(f"the image's names and attributes take more than {MAX_TEXT >> 20} MiB")

    def add(self, path: bytes, node: Inode) -> None:
        """Put a node at a path. A directory over a directory keeps its entries; else it replaces what was there."""
        parent, name = self._place(path)
        if not name:
            if not node.is_directory:
                raise ImageError("the image's root is no directory")
            self._adopt(self.root, node)
            return
        before = parent.children.get(name)
        if before is not None and before[0].is_directory and node.is_directory:
            self._adopt(before[0], node)
            parent.children[name] = before[0], self.layer
            return
        if before is not None and before[0].is_directory:
            self._last = None
        node.parent = parent
        parent.children[name] = node, self.layer

    def link(self, path: bytes, target: bytes) -> None:
        """A hard link. Raises ImageError if the target is not there or is a directory."""
        where, name = self._place(target)
        found = where.children.get(name)
        if found is None:
            raise ImageError(f"{_show(path)}: a hard link to {_show(target)}, which is not there")
        if found[0].is_directory:
            raise ImageError(f"{_show(path)}: a hard link to the directory {_show(target)}")
        parent, name = self._place(path)
        if not name:
            raise ImageError("the image's root is no directory")
        if name in parent.children and parent.children[name][0].is_directory:
            self._last = None
        parent.children[name] = found[0], self.layer

    def is_whiteout(self, path: bytes) -> bool:
        """Take a member whose name says that something of the layers below is gone; False: it is none."""
        name = path.rstrip(b"/").rpartition(b"/")[2]
        if not name.startswith(WHITEOUT):
            return False
        if name == OPAQUE:
            parent, _ = self._place(path)
            self._hide_below(parent)
        elif not name.startswith(AUFS):
            parent, _ = self._place(path)
            hidden = name[len(WHITEOUT) :]
            if hidden in (b"", b".", b".."):
                raise ImageError(f"{_show(path)}: a whiteout of nothing")
            found = parent.children.get(hidden)
            if found is not None:
                if found[0].is_directory:
                    self._hide_below(found[0])
                if found[1] < self.layer and not found[0].children:
                    del parent.children[hidden]
        self._last = None
        return True

    def directory(self, path: bytes) -> None:
        """Make a directory with its parents unless something is there."""
        parent, name = self._place(path)
        if name and name not in parent.children:
            self.add(path, Inode(stat.S_IFDIR | 0o755))

    def walk(self) -> Iterator[Inode]:
        """Every node once, the root first, parents before what is in them; their `links` are counted."""
        seen: set[int] = {id(self.root)}
        order, waiting = [self.root], [self.root]
        self.root.links = 2
        while waiting:
            for _, (node, _) in sorted(waiting.pop().children.items()):
                if node.is_directory:
                    node.links = 2
                    assert node.parent is not None
                    node.parent.links += 1
                    waiting.append(node)
                elif id(node) in seen:
                    node.links += 1
                    continue
                else:
                    node.links = 1
                seen.add(id(node))
                order.append(node)
        return iter(order)

    def _adopt(self, node: Inode, other: Inode) -> None:
        node.mode, node.uid, node.gid, node.mtime_ns = other.mode, other.uid, other.gid, other.mtime_ns
        node.xattrs = other.xattrs

    def _hide_below(self, top: Inode) -> None:
        """Remove what the layers below brought into a directory, at any depth."""
        order, waiting = [], [top]
        while waiting:
            directory = waiting.pop()
            order.append(directory)
            waiting += [node for node, _ in directory.children.values() if node.is_directory]
        self._count_steps(sum(len(directory.children) + 1 for directory in order))
        for directory in reversed(order):
            for name, (node, brought) in list(directory.children.items()):
                if brought < self.layer and not (node.is_directory and node.children):
                    del directory.children[name]

    def _place(self, path: bytes) -> tuple[Inode, bytes]:
        """(the directory, the last component) of a path; (root, b"") for the root itself. Makes missing parents."""
        head, _, name = path.rstrip(b"/").rpartition(b"/")
        if name in (b"", b"."):
            head, name = path, b""
        self._check(name, path)
        if self._last is not None and self._last[0] == head:
            return self._last[1], name
        node = self._descend(head, path)
        if not name and node is not self.root:
            raise ImageError(f"{_show(path)}: no name for a file")
        self._last = head, node
        return node, name

    def _count_steps(self, count: int) -> None:
        self._steps += count
        if self._steps > MAX_STEPS:
            raise ImageError("the image's layers want too many paths looked up; they are not made to be used")

    def _check(self, name: bytes, path: bytes) -> None:
        if name == b"..":
            raise ImageError(f"{_show(path)}: a name that leads out of the image")
        if len(name) > MAX_COMPONENT:
            raise ImageError(f"{_show(path)}: a name of more than {MAX_COMPONENT} bytes")

    def _descend(self, head: bytes, path: bytes) -> Inode:
        node, links = self.root, 0
        waiting = head.split(b"/")
        for name in waiting:
            self._check(name, path)
        waiting.reverse()
        while waiting:
            name = waiting.pop()
            self._count_steps(1)
            if name in (b"", b"."):
                continue
            if name == b"..":
                assert node.parent is not None
                node = node.parent
                continue
            found = node.children.get(name)
            if found is None:
                self._check(name, path)
                self.count(len(name))
                made = Inode(stat.S_IFDIR | 0o755)
                made.parent = node
                node.children[name] = made, self.layer
                node = made
            elif found[0].is_directory:
                node = found[0]
            elif stat.S_ISLNK(found[0].mode):
                links += 1
                if links > MAX_LINKS:
                    raise ImageError(f"{_show(path)}: too many symbolic links on the way there")
                target = found[0].target
                if target.startswith(b"/"):
                    node = self.root
                waiting += reversed(target.split(b"/"))
            else:
                raise ImageError(f"{_show(path)}: what should be a directory on the way there is a file")
        return node


def _show(path: bytes) -> str:
    return ascii(path.decode("utf-8", "replace")[:200])[1:-1]
