"""What the control socket offers who looks for the cause of a guest's hang: an NMI, and the memory as a core file.

    {"command": "nmi"}                     -> {"ok": true}: every processor gets a non-maskable interrupt
    {"command": "dump", "path": "/…"}      -> {"ok": true, "bytes": N} when the file is whole

The file is an ELF core (System V ABI, AMD64 supplement) as crash and GDB read it: a PT_LOAD for each range of
guest-physical memory, holes where it is zero, and an NT_PRSTATUS note with the registers of each processor. The
processors stand still meanwhile. Loop thread; the file is written by another.
"""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu.contract import Vcpu
from vmm.errors import ConfigError, HostError, core_errors, os_reason
from vmm.management.debugging import looking

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

ET_CORE, EM_X86_64, PT_LOAD, PT_NOTE, NT_PRSTATUS = 4, 62, 1, 4, 1
READ_WRITE_EXECUTE = 7
BLOCK = 64 << 10
"""Bytes that are a hole in the file if they are all zero."""
_HEADER = struct.Struct("<4sBBBBB7xHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III8s")
_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
)  # fmt: skip


async def nmi(vm: VirtualMachine, _request: dict[str, Any]) -> dict[str, Any]:
    """Raises StateError, HostError."""
    with core_errors():
        for vcpu in vm.machine.vcpus:
            vcpu.nmi()
    return {}


def status_note(vcpu: Vcpu) -> bytes:
    """A parked vCPU's registers as Linux's struct elf_prstatus in its note."""
    general, system = vcpu.registers(), vcpu.system_registers()
    values = [getattr(general, name) for name in _REGISTERS]
    values += [general.rax, general.rip, system.cs.selector, general.rflags, general.rsp, system.ss.selector]
    values += [system.fs.base, system.gs.base]
    values += [getattr(system, name).selector for name in ("ds", "es", "fs", "gs")]
    status = struct.pack("<32xI76x27QI4x", vcpu.index + 1, *values, 0)
    return _NOTE.pack(5, len(status), NT_PRSTATUS, b"CORE") + status


def write_core(path: Path, notes: bytes, regions: list[tuple[int, memoryview]]) -> int:
    """Write the file beside its place, then put it there; its length. *any thread* Raises OSError."""
    count = len(regions) + 1
    start = _HEADER.size + count * _SEGMENT.size
    at = (start + len(notes) + 4095) & ~4095
    segments = [_SEGMENT.pack(PT_NOTE, 0, start, 0, 0, len(notes), len(notes), 4)]
    offsets = []
    for address, view in regions:
        size = len(view)
        segments.append(_SEGMENT.pack(PT_LOAD, READ_WRITE_EXECUTE, at, address, address, size, size, 4096))
        offsets.append(at)
        at += size
    header = _HEADER.pack(
        b"\x7fELF", 2, 1, 1, 0, 0, ET_CORE, EM_X86_64, 1, 0, _HEADER.size, 0, 0, _HEADER.size, _SEGMENT.size, count,
        0, 0, 0,
    )  # fmt: skip
    part = path.with_name(f".{path.name}.part")
    zeros = bytes(BLOCK)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            os.pwrite(descriptor, header + b"".join(segments) + notes, 0)
            os.ftruncate(descriptor, at)
            for offset, (_, view) in zip(offsets, regions, strict=True):
                for begin in range(0, len(view), BLOCK):
                    block = view[begin : begin + BLOCK]
                    if block != zeros[: len(block)] and os.pwrite(descriptor, block, offset + begin) != len(block):
                        raise OSError("the disk took only a part")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return at


async def dump(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """Raises ConfigError, StateError, HostError; nothing is left behind then."""
    path = request.get("path")
    if not isinstance(path, str) or not Path(path).is_absolute():
        raise ConfigError("dump: path is that of a file, from /")
    async with looking(vm) as machine:
        notes = b"".join(status_note(vcpu) for vcpu in machine.vcpus)
        writing = asyncio.ensure_future(asyncio.to_thread(write_core, Path(path), notes, machine.memory.regions()))
        try:
            # Whoever asked may leave: memory must stay until the thread has ended all the same.
            return {"bytes": await asyncio.shield(writing)}
        except asyncio.CancelledError:
            await asyncio.wait([writing])
            raise
        except OSError as error:
            raise HostError(f"dump: {path}: {os_reason(error)}") from error
