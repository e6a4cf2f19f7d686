"""Write a read-only EROFS image: file contents as they come, then the inodes, at last the superblock.

Source: Linux Documentation/filesystems/erofs.rst ("On-disk details") and the EROFS on-disk format document. Plain
layout, nothing compressed: a guest's read is then a read of the host's page cache. Extended inodes, which hold times.
Blocks that are zeroes throughout stay holes of the image's file. The same tree gives the same bytes.
"""

from __future__ import annotations

import ctypes
import functools
import os
import stat
import struct
from collections.abc import Iterable

from images.errors import ImageError
from images.oci.rootfs import Inode, Rootfs

BLOCK = 4096
SLOT = 32
"""nid counts these."""
MAGIC = 0xE0F5E1E2
SUPER_OFFSET = 1024
SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
INODE = struct.Struct("<HHHHQIIIIQII16x")
DIRENT = struct.Struct("<QHBx")
XATTR_HEAD = struct.Struct("<IB7x")
XATTR = struct.Struct("<BBH")
EXTENDED, FLAT_PLAIN, FLAT_INLINE = 1, 0 << 1, 2 << 1
PREFIXES = (
    (b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3), (b"user.", 1), (b"trusted.", 4),
    (b"security.", 6),
)  # fmt: skip
"""Extended attributes that the format has words for; the first two are whole names."""
TYPES = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}  # fmt: skip
MAX_XATTRS = 12 + 4 * 65534
"""Bytes of one inode's: i_xattr_icount has 16 bits."""
ZEROES = bytes(1 << 20)
PUNCH_HOLE = 3
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, of linux/falloc.h."""
WRITE_OUT = 2
"""SYNC_FILE_RANGE_WRITE, of linux/fs.h."""
WRITTEN_OUT = 32 << 20
"""After so many bytes the host begins to write them to its disk, so that publishing need not wait for all of them."""


class Writer:
    """Writes one image into an open file. add_file() and write() in any order, then finish()."""

    def __init__(self, descriptor: int, limit: int) -> None:
        """`limit`: bytes of file contents, over which ImageError is raised."""
        self._descriptor = descriptor
        self._limit = limit
        self._next = 1
        self._size = 0
        self._extents: list[tuple[int, int]] = []
        self._waiting = 0

    def add_file(self, size: int) -> int:
        """Room for a file's content: its first block."""
        blocks = -(-size // BLOCK)
        start = self._next
        self._size += size
        if self._size > self._limit or start + blocks >= 1 << 32:
            raise ImageError(
                f"the image's files have more than {self._limit >> 30} GiB; LOOPVISOR_OCI_LIMIT sets another limit"
            )
        self._next += blocks
        if blocks:
            self._extents.append((start, blocks))
        return start

    def write(self, start: int, offset: int, data: bytes) -> None:
        """Bytes of a file whose content begins at block `start`."""
        if len(data) >= BLOCK and data == ZEROES[: len(data)]:
            return
        at = start * BLOCK + offset
        view = memoryview(data)
        while view:
            count = os.pwrite(self._descriptor, view, at)
            view, at = view[count:], at + count
        self._waiting += len(data)
        if self._waiting >= WRITTEN_OUT:
            self._waiting = 0
            _libc().sync_file_range(self._descriptor, 0, 0, WRITE_OUT)

    def finish(self, tree: Rootfs, identity: bytes) -> None:
        """Write the inodes and the superblock; `identity` is 16 bytes. Frees what no file of the tree has."""
        nodes = list(tree.walk())
        self._punch({node.start for node in nodes if stat.S_ISREG(node.mode)})
        places = _Places(self._next)
        meta = [places.place(node) for node in nodes]
        first = places.blocks
        out = _Out(self._descriptor, first * BLOCK)
        for node, (inline, where) in zip(nodes, meta, strict=True):
            content = _content(node)
            if where and content:
                for at in range(0, len(content) - inline, BLOCK):
                    self.write(where, at, content[at : min(at + BLOCK, len(content) - inline)])
            out.fill(node.nid * SLOT)
            out.put(_inode(node, inline, where, len(content)))
            out.put(_xattrs(node))
            if inline:
                out.put(content[len(content) - inline :])
        total = first + -(-out.flush() // BLOCK)
        os.ftruncate(self._descriptor, total * BLOCK)
        head = SUPER.pack(
            MAGIC, 0, 0, 12, 0, nodes[0].nid, len(nodes), 0, 0, total, first, 0, identity, b"", 0, 0, 0, 0, 0, 0, 0, 0
        )  # fmt: skip
        os.pwrite(self._descriptor, head, SUPER_OFFSET)

    def _punch(self, alive: set[int]) -> None:
        """What upper layers have hidden takes no room on the disk; a file system that cannot do that keeps it."""
        for start, blocks in self._extents:
            if start not in alive:
                _libc().fallocate(self._descriptor, PUNCH_HOLE, start * BLOCK, blocks * BLOCK)


@functools.cache
def _libc() -> ctypes.CDLL:
    """The calls that os has not; what they cannot do on a file system is not missed."""
    found = ctypes.CDLL(None)
    found.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    found.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


class _Out:
    """Sequential writing with a buffer; positions are relative to `base`."""

    def __init__(self, descriptor: int, base: int) -> None:
        self._descriptor, self._base = descriptor, base
        self._buffer = bytearray()
        self._at = 0

    def fill(self, position: int) -> None:
        self._buffer += bytes(position - self._at - len(self._buffer))

    def put(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > 1 << 20:
            self.flush()

    def flush(self) -> int:
        """The position behind the last byte."""
        view = memoryview(bytes(self._buffer))
        self._buffer.clear()
        while view:
            count = os.pwrite(self._descriptor, view, self._base + self._at)
            view, self._at = view[count:], self._at + count
        return self._at


class _Places:
    """Where each inode stands, and the blocks of directories and links that do not fit behind theirs."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._at = 2 * SLOT  # not 0, which directory entries have for no file

    def place(self, node: Inode) -> tuple[int, int]:
        """(bytes of content that stand behind the inode, first block of the rest)"""
        size = INODE.size + _xattr_size(node)
        inline, where = 0, node.start
        if node.is_directory or stat.S_ISLNK(node.mode):
            length = _directory_size(node) if node.is_directory else len(node.target)
            where = 0
            # The tail must not cross a block; links are read from there only if that is all of them.
            if length % BLOCK and size + length % BLOCK <= BLOCK and (node.is_directory or length < BLOCK):
                inline = length % BLOCK
            blocks = -(-(length - inline) // BLOCK)
            if blocks:
                where = self.blocks
                self.blocks += blocks
        whole = size + inline
        if self._at % BLOCK + min(whole, BLOCK) > BLOCK:
            self._at += -self._at % BLOCK
        node.nid = self._at // SLOT
        self._at += whole + -whole % SLOT
        return inline, where


def _names(node: Inode) -> list[tuple[bytes, Inode]]:
    """The entries of a directory, with its own two, in the order of their bytes."""
    assert node.parent is not None
    found = [(name, child) for name, (child, _) in node.children.items()]
    return sorted([(b".", node), (b"..", node.parent), *found], key=lambda item: item[0])


def _blocks(names: list[tuple[bytes, Inode]]) -> Iterable[list[tuple[bytes, Inode]]]:
    """The entries block by block."""
    block: list[tuple[bytes, Inode]] = []
    room = BLOCK
    for item in names:
        need = DIRENT.size + len(item[0])
        if need > room:
            yield block
            block, room = [], BLOCK
        block.append(item)
        room -= need
    yield block


def _directory_size(node: Inode) -> int:
    blocks = list(_blocks(_names(node)))
    return (len(blocks) - 1) * BLOCK + sum(DIRENT.size + len(name) for name, _ in blocks[-1])


def _content(node: Inode) -> bytes:
    """What a directory or link holds."""
    if stat.S_ISLNK(node.mode):
        return node.target
    if not node.is_directory:
        return b""
    parts: list[bytes] = []
    blocks = list(_blocks(_names(node)))
    for block in blocks:
        at = DIRENT.size * len(block)
        heads, texts = [], []
        for name, child in block:
            heads.append(DIRENT.pack(child.nid, at, TYPES[stat.S_IFMT(child.mode)]))
            texts.append(name)
            at += len(name)
        data = b"".join(heads + texts)
        parts.append(data if block is blocks[-1] else data.ljust(BLOCK, b"\0"))
    return b"".join(parts)


def _inode(node: Inode, inline: int, where: int, length: int) -> bytes:
    xattrs = _xattr_size(node)
    union, size = where, length
    if stat.S_ISREG(node.mode):
        size = node.size
    elif node.device != (0, 0):
        # new_encode_dev() of linux/kdev_t.h
        major, minor = node.device
        union, size = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12), 0
    seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
    return INODE.pack(
        EXTENDED | (FLAT_INLINE if inline else FLAT_PLAIN), (xattrs - 12) // 4 + 1 if xattrs else 0, node.mode, 0, size,
        union & 0xFFFFFFFF, node.nid & 0xFFFFFFFF, node.uid, node.gid, seconds, nanoseconds, node.links,
    )  # fmt: skip


def known_xattr(name: bytes) -> tuple[int, bytes] | None:
    """(index of the prefix, the rest of the name); None: the format has no words for it."""
    for prefix, index in PREFIXES:
        if name.startswith(prefix) and (name == prefix) == (index in (2, 3)):
            return index, name[len(prefix) :]
    return None


def _xattr_size(node: Inode) -> int:
    if not node.xattrs:
        return 0
    size = 12
    for name, value in node.xattrs.items():
        known = known_xattr(name)
        assert known is not None
        entry = XATTR.size + len(known[1]) + len(value)
        size += entry + -entry % 4
    return size


def _xattrs(node: Inode) -> bytes:
    if not node.xattrs:
        return b""
    parts = [XATTR_HEAD.pack(0, 0)]
    for name, value in sorted(node.xattrs.items()):
        known = known_xattr(name)
        assert known is not None
        entry = XATTR.pack(len(known[1]), known[0], len(value)) + known[1] + value
        parts.append(entry + bytes(-len(entry) % 4))
    return b"".join(parts)
