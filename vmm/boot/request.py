"""What every loader is asked for, and what all of them place: command line and initrd.

Apart from the loaders so that one of them can be used without importing the others.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path

from cpu.values import dataclass
from vmm.boot.state import LoadMemory
from vmm.errors import ConfigError, os_reason
from vmm.machine import layout
from vmm.machine.layout import E820Entry, Layout

HEADER_MAGIC = b"HdrS"
"""At 0x202 of a bzImage (boot protocol 2.00 and later)."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller wants loaded with a kernel."""

    cmdline: str = ""
    initrd: memoryview | None = None
    initrd_name: str = "initrd"
    rsdp: int | None = None
    e820: Sequence[E820Entry] = field(default=())
    kernel_file: os.stat_result | None = None
    """What the kernel's file was as it was opened: unpack_cached()."""


def is_bzimage(data: bytes | memoryview) -> bool:
    return len(data) > 0x268 and bytes(data[0x202:0x206]) == HEADER_MAGIC and bytes(data[0x1FE:0x200]) == b"\x55\xaa"


def read_file(path: Path) -> memoryview:
    """A file's bytes, mapped. Raises ConfigError."""
    return open_file(path)[0]


def open_file(path: Path) -> tuple[memoryview, os.stat_result]:
    """A file's bytes, mapped, and what it was as it was opened. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise ConfigError(f"{path}: the file is empty")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), status
    except (OSError, ValueError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}: {reason}") from error


def place_cmdline(memory: LoadMemory, cmdline: str, limit: int, name: str) -> int:
    """Write the zero-terminated command line; returns its address. Raises ConfigError if it is too long."""
    raw = cmdline.encode()
    limit = min(limit, layout.CMDLINE.size - 1)
    if len(raw) > limit:
        raise ConfigError(f"cmdline: {len(raw)} bytes; {name} takes {limit} at most")
    if 0 in raw:
        raise ConfigError("cmdline: a zero byte is not allowed")
    memory.write(layout.CMDLINE.start, raw + b"\0")
    return layout.CMDLINE.start


def place_initrd(memory: LoadMemory, request: Request, kernel_end: int, address_max: int, kernel: str) -> int:
    """Copy the initrd as high as it goes below 4 GiB, on a page boundary, above the kernel. Returns its address."""
    assert request.initrd is not None
    low_end = Layout(memory.size).low_end
    size = len(request.initrd)
    address = (min(address_max + 1, low_end) - size) & ~0xFFF
    if address < kernel_end:
        needed = -(-(kernel_end + size) >> 20) + 1
        raise ConfigError(
            f"{request.initrd_name}: {size >> 20}M do not fit into {low_end >> 20}M of memory beside {kernel} "
            f"(which needs {kernel_end >> 20}M); give the machine {needed}M or more"
        )
    memory.write(address, request.initrd)
    return address
