"""Flat images: raw bytes at an address, entered in real, 32-bit protected or 64-bit mode.

Entry conditions: interrupts off, all general registers 0 except the stack pointer (below the image in real mode,
BOOT_STACK otherwise) and, in real mode, DL = 0x80 (the first fixed disk, as a boot sector expects).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cpu.contract import Registers
from vmm.boot.state import BootState, LoadMemory, long_mode, protected_mode, real_mode, write_bda
from vmm.errors import ConfigError, GuestError, os_reason
from vmm.machine import layout

if TYPE_CHECKING:
    from vmm.config import EntryMode


def load_flat(
    memory: LoadMemory, path: Path, *, load: int = 0x7C00, entry: int | None = None, mode: EntryMode = "real"
) -> BootState:
    """Put the file at `load` and enter at `entry` (default `load`). Raises ConfigError."""
    try:
        image = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {os_reason(error)}") from error
    return place_flat(memory, image, str(path), load=load, entry=entry, mode=mode)


def place_flat(
    memory: LoadMemory, image: bytes, name: str, *, load: int, entry: int | None = None, mode: EntryMode = "real"
) -> BootState:
    """The same for bytes; `name` is for messages."""
    start = load if entry is None else entry
    if not image:
        raise ConfigError(f"{name}: the file is empty")
    try:
        write_bda(memory)
        memory.write(load, image)
    except GuestError as error:
        raise ConfigError(
            f"{name}: {len(image)} bytes do not fit into memory at {load:#x}; give more memory or another load address"
        ) from error
    if mode == "real":
        if not 0 <= start < 0x11_0000:
            raise ConfigError(f"{name}: entry {start:#x} cannot be reached in real mode; it ends at 0x10ffef")
        cs = 0 if start < 0x1_0000 else min(start >> 4, 0xFFFF)
        registers, system = real_mode(Registers(rip=start - (cs << 4), rsp=0x7C00, rdx=0x80), cs=cs)
        return BootState(registers, system, "flat")
    end = load + len(image)
    reserved = (layout.BOOT_GDT, layout.BOOT_PAGE_TABLES + 6 * 4096)
    if load < reserved[1] and end > reserved[0]:
        raise ConfigError(
            f"{name}: bytes {load:#x} to {end:#x} overlap the loader's tables ({reserved[0]:#x} to {reserved[1]:#x}); "
            f"load it at 1 MiB (load=0x100000), or in real mode"
        )
    registers = Registers(rip=start, rsp=layout.BOOT_STACK)
    if mode == "protected":
        return BootState(registers, protected_mode(memory), "flat")
    return BootState(registers, long_mode(memory), "flat")
