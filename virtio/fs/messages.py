"""The FUSE messages that a virtio-fs device and its driver exchange (protocol 7.31 and later), little-endian.

The same messages as virtio/native/fs_wire.h, which works with them; tests/unit/virtio/test_fs_messages.py holds the two
equal. Drivers in tests build and parse with these.
"""

from __future__ import annotations

import enum

from construct import Int16ul, Int32sl, Int32ul, Int64ul, Struct  # type: ignore[import-untyped,unused-ignore]

ROOT_ID = 1
"""The node that the shared directory itself is."""
MAJOR, MINOR = 7, 38


class Opcode(enum.IntEnum):
    """What is asked."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50


def _numbers(*fields: str, size: int = 32) -> list[object]:
    kind = {16: Int16ul, 32: Int32ul, 64: Int64ul}[size]
    return [name / kind for name in fields]


InHeader = Struct(
    *_numbers("len", "opcode"),
    *_numbers("unique", "nodeid", size=64),
    *_numbers("uid", "gid", "pid"),
    *_numbers("total_extlen", "padding", size=16),
)
OutHeader = Struct("len" / Int32ul, "error" / Int32sl, "unique" / Int64ul)
Attr = Struct(
    *_numbers("ino", "size", "blocks", "atime", "mtime", "ctime", size=64),
    *_numbers("atimensec", "mtimensec", "ctimensec", "mode", "nlink", "uid", "gid", "rdev", "blksize", "flags"),
)
EntryOut = Struct(
    *_numbers("nodeid", "generation", "entry_valid", "attr_valid", size=64),
    *_numbers("entry_valid_nsec", "attr_valid_nsec"),
    "attr" / Attr,
)
ForgetIn = Struct("nlookup" / Int64ul)
ForgetOne = Struct(*_numbers("nodeid", "nlookup", size=64))
BatchForgetIn = Struct(*_numbers("count", "dummy"))
GetattrIn = Struct(*_numbers("flags", "dummy"), "fh" / Int64ul)
AttrOut = Struct("attr_valid" / Int64ul, *_numbers("attr_valid_nsec", "dummy"), "attr" / Attr)
MknodIn = Struct(*_numbers("mode", "rdev", "umask", "padding"))
MkdirIn = Struct(*_numbers("mode", "umask"))
RenameIn = Struct("newdir" / Int64ul)
Rename2In = Struct("newdir" / Int64ul, *_numbers("flags", "padding"))
LinkIn = Struct("oldnodeid" / Int64ul)
SetattrIn = Struct(
    *_numbers("valid", "padding"),
    *_numbers("fh", "size", "lock_owner", "atime", "mtime", "ctime", size=64),
    *_numbers("atimensec", "mtimensec", "ctimensec", "mode", "unused4", "uid", "gid", "unused5"),
)
OpenIn = Struct(*_numbers("flags", "open_flags"))
CreateIn = Struct(*_numbers("flags", "mode", "umask", "open_flags"))
OpenOut = Struct("fh" / Int64ul, *_numbers("open_flags", "padding"))
ReleaseIn = Struct("fh" / Int64ul, *_numbers("flags", "release_flags"), "lock_owner" / Int64ul)
ReadIn = Struct(
    *_numbers("fh", "offset", size=64),
    *_numbers("size", "read_flags"),
    "lock_owner" / Int64ul,
    *_numbers("flags", "padding"),
)
WriteIn = Struct(
    *_numbers("fh", "offset", size=64),
    *_numbers("size", "write_flags"),
    "lock_owner" / Int64ul,
    *_numbers("flags", "padding"),
)
WriteOut = Struct(*_numbers("size", "padding"))
StatfsOut = Struct(
    *_numbers("blocks", "bfree", "bavail", "files", "ffree", size=64),
    *_numbers("bsize", "namelen", "frsize", "padding"),
    *_numbers("spare0", "spare1", "spare2", size=64),
)
FsyncIn = Struct("fh" / Int64ul, *_numbers("flags", "padding"))
SetxattrIn = Struct(*_numbers("size", "flags"))
GetxattrIn = Struct(*_numbers("size", "padding"))
GetxattrOut = Struct(*_numbers("size", "padding"))
InitIn = Struct(*_numbers("major", "minor", "max_readahead", "flags"))
InitOut = Struct(
    *_numbers("major", "minor", "max_readahead", "flags"),
    *_numbers("max_background", "congestion_threshold", size=16),
    *_numbers("max_write", "time_gran"),
    *_numbers("max_pages", "map_alignment", size=16),
    *_numbers("flags2", "unused0"),
    *_numbers("unused1", "unused2", "unused3", size=64),
)
FallocateIn = Struct(*_numbers("fh", "offset", "length", size=64), *_numbers("mode", "padding"))
LseekIn = Struct(*_numbers("fh", "offset", size=64), *_numbers("whence", "padding"))
LseekOut = Struct("offset" / Int64ul)
CopyIn = Struct(*_numbers("fh_in", "off_in", "nodeid_out", "fh_out", "off_out", "len", "flags", size=64))
Dirent = Struct(*_numbers("ino", "off", size=64), *_numbers("namelen", "type"))
