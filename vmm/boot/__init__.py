"""Loaders: put a kernel into guest memory and say how the first vCPU enters it.

`load()` finds out what a file is: bzImage (its payload unpacked on the host), ELF by PVH, multiboot, the 64-bit Linux
protocol or as a coreboot payload. `load_flat()` takes raw bytes. Both return a BootState. Nothing here knows devices or
cores. Loaders are imported when a file needs them, for a tiny guest should not wait for those of others.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from vmm.boot import elf
from vmm.boot.cmdline import default_cmdline
from vmm.boot.flat import load_flat, place_flat
from vmm.boot.pvh import load_pvh
from vmm.boot.request import Request, is_bzimage, open_file, read_file
from vmm.boot.state import BootState, LoadMemory, write_bda
from vmm.errors import ConfigError
from vmm.machine import layout
from vmm.machine.layout import Layout

__all__ = ["BootState", "LoadMemory", "Protocol", "default_cmdline", "identify", "load", "load_flat", "place_flat"]

Protocol = Literal["auto", "linux64", "pvh", "multiboot", "coreboot", "bzimage"]
"""How to enter: found out, or forced. 'bzimage' runs the image's own decompressor."""


def identify(path: Path) -> str:
    """'bzimage', 'pvh', 'vmlinux', 'multiboot', 'coreboot', or 'unknown'. Raises ConfigError if it cannot be read."""
    return _identify(_gunzipped(read_file(path), str(path)), str(path))


def _gunzipped(data: memoryview, name: str) -> memoryview:
    """A kernel file that is compressed as a whole (Xen, GNU Mach, vmlinux.gz), as boot loaders take it."""
    if elf.is_elf(data) or is_bzimage(data):
        return data
    from vmm.boot.unpack import UnpackError, compression, unpack

    if compression(data) is None:
        return data
    try:
        return memoryview(unpack(data))
    except UnpackError as error:
        raise ConfigError(f"{name}: {error}") from error


def _identify(data: memoryview, name: str) -> str:
    if is_bzimage(data):
        return "bzimage"
    image = elf.parse(data, name) if elf.is_elf(data) else None
    if image is not None and image.pvh_entry is not None:
        return "pvh"
    from vmm.boot import multiboot

    found = multiboot.find(data)
    if image is not None and image.bits == 64 and found is None:
        return "vmlinux"
    if image is not None and image.bits == 32 and (found is None or image.start < layout.KERNEL_BASE):
        return "coreboot"  # GRUB's have a multiboot header too, but no multiboot kernel loads below 1 MiB
    return "multiboot" if found is not None else "unknown"


def load(
    memory: LoadMemory, kernel: Path, *, initrd: Path | None = None, cmdline: str = "", rsdp: int | None = None,
    protocol: Protocol = "auto", cache: Path | None = None,
) -> BootState:
    """Load `kernel` (and `initrd`) into fresh, zeroed memory.

    `rsdp`: guest-physical address of the ACPI root pointer, None without ACPI. `cache`: folder of unpacked kernels,
    None for the user's. Raises ConfigError, one line with the cure.
    """
    name = str(kernel)
    raw, status = open_file(kernel)
    data = _gunzipped(raw, name)
    request = Request(
        cmdline=cmdline, initrd=None if initrd is None else read_file(initrd), initrd_name=str(initrd), rsdp=rsdp,
        e820=Layout(memory.size).e820(), kernel_file=status,
    )
    if request.initrd is not None:
        from vmm.boot.initrd import check_whole

        check_whole(request.initrd, request.initrd_name)
    write_bda(memory)
    kind = _identify(data, name)
    match protocol, kind:
        case ("multiboot", _) | ("auto", "multiboot"):
            from vmm.boot import multiboot

            return multiboot.load_multiboot(memory, data, request, name)
        case ("auto" | "coreboot"), "coreboot":
            from vmm.boot import coreboot

            return coreboot.load_payload(memory, elf.parse(data, name), request)
        case "pvh", "bzimage":
            return load_pvh(memory, _unpacked(data, name, cache, status), request)
        case "pvh", _:
            return load_pvh(memory, elf.parse(data, name), request)
        case ("auto" | "linux64" | "bzimage"), "bzimage":
            from vmm.boot import linux

            image = linux.parse(data, name)
            return linux.load_bzimage(memory, image, request, unpacked=protocol != "bzimage", cache=cache)
        case "auto", "pvh":
            return load_pvh(memory, elf.parse(data, name), request)
        case ("auto", "vmlinux") | ("linux64", "vmlinux" | "pvh"):
            from vmm.boot import linux

            image64 = elf.parse(data, name)
            return linux.load_vmlinux(memory, image64, linux.synthesized_header(), request)
        case _:
            raise ConfigError(
                f"{name}: not a kernel that can be booted{'' if protocol == 'auto' else ' by ' + protocol}: neither "
                f"bzImage nor x86 ELF nor multiboot; for raw code use a flat image"
            )


def _unpacked(data: memoryview, name: str, cache: Path | None, file: os.stat_result) -> elf.Elf:
    from vmm.boot import linux
    from vmm.boot.unpack import UnpackError, compression, unpack_cached

    image = linux.parse(data, name)
    payload = image.payload
    if compression(payload) is None:
        raise ConfigError(f"{name}: its payload cannot be unpacked, so that there is no PVH entry")
    try:
        return elf.parse(unpack_cached(payload, cache=cache, file=file), name)
    except UnpackError as error:
        raise ConfigError(f"{name}: {error}") from error
