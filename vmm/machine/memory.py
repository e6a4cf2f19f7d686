"""Guest memory: host buffers at guest-physical addresses, checked on every access.

Layout of a PC: RAM from 0 up to the PCI hole at 3 GiB, the rest from 4 GiB on. Implements virtio's GuestMemory
structurally. Anonymous mappings use transparent huge pages; with `hugepages` they come from the reserved pool.
It must not know devices or cores; the builder makes memory slots from `regions`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

from virtio.errors import GuestError as VirtioGuestError
from vmm.convert import format_size
from vmm.errors import GuestError, HostError, os_reason
from vmm.machine.layout import HIGH_MEMORY, PCI_HOLE

_MAP_NORESERVE = 0x4000  # asm-generic/mman.h; the mmap module has it from Python 3.11 on some platforms only


class OutsideMemory(GuestError, VirtioGuestError):
    """A guest-physical range that is not RAM; virtio's devices take it as their driver's error."""


class GuestMemory:
    """All RAM of one machine. Loop thread, except that views may be filled by whoever holds them.

    `on_written` and `on_written_ranges`, set by the builder, tell the core about writes by the VMM (Vm.memory_written).
    """

    def __init__(self, size: int, *, hugepages: bool = False) -> None:
        """`size` in bytes, a multiple of 4 KiB. Raises HostError if the host refuses."""
        self.size = size
        self._maps: list[mmap.mmap] = []
        self._regions: list[tuple[int, memoryview]] = []
        self.on_written: Callable[[int, int], None] | None = None
        self.on_written_ranges: Callable[[bytes], None] | None = None
        low = min(size, PCI_HOLE)
        try:
            self._add(0, low, hugepages)
            if size > low:
                self._add(HIGH_MEMORY, size - low, hugepages)
        except OSError as error:
            self.close()
            cure = (
                "; reserve pages with sysctl vm.nr_hugepages, or leave hugepages out"
                if hugepages
                else "; ask for less memory"
            )
            raise HostError(f"memory: cannot map {format_size(size)}: {os_reason(error)}{cure}") from error

    def _add(self, start: int, size: int, hugepages: bool) -> None:
        if hugepages:
            descriptor = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_HUGETLB)
            try:
                os.ftruncate(descriptor, size)
                mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            finally:
                os.close(descriptor)
        else:
            mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
            for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTDUMP):
                try:
                    mapping.madvise(advice)
                except OSError:
                    pass  # a kernel without transparent huge pages: slower, nothing more
        self._maps.append(mapping)
        self._regions.append((start, memoryview(mapping)))

    def regions(self) -> list[tuple[int, memoryview]]:
        """(guest-physical address, writable buffer) by address; they stay until close()."""
        return list(self._regions)

    def view(self, gpa: int, length: int) -> memoryview:
        """The writable bytes [gpa, gpa + length), which must lie in one region. Raises OutsideMemory otherwise."""
        for start, memory in self._regions:
            offset = gpa - start
            if 0 <= offset <= offset + length <= len(memory):
                return memory[offset : offset + length]
        raise OutsideMemory(f"guest-physical range {gpa:#x}+{length:#x} is not within memory")

    def read(self, gpa: int, length: int) -> bytes:
        """A copy. Raises GuestError."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` in and tell the core. Raises GuestError."""
        self.view(gpa, len(data))[:] = data
        self.written(gpa, len(data))

    def written(self, gpa: int, length: int) -> None:
        """[gpa, gpa + length) was written through a view: tell the core. *any thread*"""
        if self.on_written is not None:
            self.on_written(gpa, length)

    def written_ranges(self, ranges: bytes) -> None:
        """`written` for many: pairs of 64-bit numbers of this host, (gpa, length). *any thread*"""
        if self.on_written_ranges is not None:
            self.on_written_ranges(ranges)

    def close(self) -> None:
        """Unmap. A view that someone still holds keeps its mapping until it goes. Idempotent."""
        regions, self._regions = self._regions, []
        for _start, memory in regions:
            try:
                memory.release()
            except BufferError:
                pass
        maps, self._maps = self._maps, []
        for mapping in maps:
            try:
                mapping.close()
            except BufferError:
                pass
        self.on_written = self.on_written_ranges = None
