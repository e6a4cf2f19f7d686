"""Apply an image's layers, lowest first, to a tree and a file system image. *any thread*"""

from __future__ import annotations

import stat
from collections.abc import Iterator

from images.errors import ImageError
from images.oci import tar
from images.oci.erofs import MAX_XATTRS, XATTR, Writer, known_xattr
from images.oci.layers import LayerStream
from images.oci.rootfs import Inode, Rootfs

TYPES = {
    "0": stat.S_IFREG, "2": stat.S_IFLNK, "3": stat.S_IFCHR, "4": stat.S_IFBLK, "5": stat.S_IFDIR, "6": stat.S_IFIFO,
}  # fmt: skip
OVERLAY = (b"trusted.overlay.", b"user.overlay.")
"""What overlayfs reads: an image must not steer the guest's own overlay."""
LAST_TIME = ((1 << 63) - 1) // 1_000_000_000 * 1_000_000_000
"""Nanoseconds since 1970 that a file's time is cut to."""


def apply(stream: LayerStream, tree: Rootfs, writer: Writer) -> None:
    """One layer. Raises ImageError that names the member."""
    tree.begin_layer()
    for member, content in tar.members(stream.read):
        try:
            _take(member, content, tree, writer)
        except ImageError as error:
            name = ascii(member.name.decode("utf-8", "replace")[:200])[1:-1]
            raise ImageError(str(error) if name in str(error) else f"{name}: {error}") from error


def _take(member: tar.Member, content: Iterator[tuple[int, bytes]], tree: Rootfs, writer: Writer) -> None:
    xattrs = _xattrs(member)
    tree.count(len(member.name) + len(member.target) + sum(len(name) + len(value) for name, value in xattrs.items()))
    if tree.is_whiteout(member.name):
        return
    if member.kind == "1":
        tree.link(member.name, member.target)
        return
    if member.kind == "0" and member.name.endswith(b"/"):
        member.kind = "5"  # as before POSIX.1-1988
    if max(member.uid, member.gid) >= 1 << 32:
        raise ImageError("its owner is no number of 32 bits")
    node = Inode(TYPES[member.kind] | member.mode, member.uid, member.gid, min(member.mtime_ns, LAST_TIME))
    node.xattrs = xattrs
    if member.kind == "2":
        if not member.target:
            raise ImageError("a symbolic link to nothing")
        node.target = member.target
    elif member.kind in "34":
        major, minor = node.device = member.device
        if major >= 1 << 12 or minor >= 1 << 20:
            raise ImageError(f"there is no device {major}:{minor}")
    tree.add(member.name, node)
    if member.kind == "0":
        node.size = member.size
        node.start = writer.add_file(member.size)
        for offset, data in content:
            writer.write(node.start, offset, data)


def _xattrs(member: tar.Member) -> dict[bytes, bytes]:
    """Those that the file system has words for and that are not overlayfs' own."""
    found = {}
    size = 12
    for name, value in member.xattrs.items():
        known = known_xattr(name)
        if known is None or name.startswith(OVERLAY):
            continue
        if len(known[1]) > 255 or len(value) > 65535 or b"\0" in name:
            raise ImageError("an extended attribute with a name or a value that Linux does not take")
        found[name] = value
        size += XATTR.size + len(known[1]) + len(value) + 3
    if size > MAX_XATTRS:
        raise ImageError(f"extended attributes of more than {MAX_XATTRS} bytes")
    return found
