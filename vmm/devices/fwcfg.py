"""fw_cfg: how firmware and kernels read named items of the machine (ACPI device QEMU0002).

Specification: QEMU's docs/specs/fw_cfg: a 16-bit selector at 0x510, a byte of the selected item at 0x511, and DMA
through a control structure whose address is written, big endian, to 0x514. Every item is read-only here. Items are made
or read from their files when the guest reads them, so that a machine whose guest never looks pays nothing.

A DMA's length is the guest's: what exceeds a slice goes on in the loop's later turns while the vCPU that asked waits.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Protocol

from cpu.contract import Space
from cpu.values import dataclass
from vmm.errors import ConfigError, GuestError, StateError, os_reason
from vmm.machine import layout
from vmm.machine.interfaces import Assembly, Board

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.config import Config
    from vmm.machine.memory import GuestMemory

SELECTOR, DATA, DMA_HIGH, DMA_LOW = 0, 1, 4, 8
SIGNATURE, DMA_SIGNATURE = b"QEMU", b"QEMU CFG"
TRADITIONAL, DMA = 1 << 0, 1 << 1
"""Bits of the item KEY_ID: what the interface can do."""
WRITE_MODE = 1 << 14
"""A bit of the selector that chose writing on old machines; here it is ignored."""

# Items by number, for those who do not look into the directory.
KEY_SIGNATURE, KEY_ID, KEY_UUID, KEY_RAM_SIZE, KEY_NOGRAPHIC, KEY_CPUS = 0x00, 0x01, 0x02, 0x03, 0x04, 0x05
KEY_KERNEL_ADDRESS, KEY_KERNEL_SIZE, KEY_INITRD_ADDRESS, KEY_INITRD_SIZE = 0x07, 0x08, 0x0A, 0x0B
KEY_BOOT_MENU, KEY_MAX_CPUS = 0x0E, 0x0F
KEY_KERNEL_DATA, KEY_INITRD_DATA = 0x11, 0x12
KEY_CMDLINE_ADDRESS, KEY_CMDLINE_SIZE, KEY_CMDLINE_DATA = 0x13, 0x14, 0x15
KEY_SETUP_ADDRESS, KEY_SETUP_SIZE, KEY_SETUP_DATA = 0x16, 0x17, 0x18
KEY_DIRECTORY, KEY_FIRST_FILE = 0x19, 0x20

# The DMA control structure: big-endian control, length, address.
CONTROL = struct.Struct(">IIQ")
ERROR, READ, SKIP, SELECT, WRITE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
ENTRY = struct.Struct(">IHH56s")
"""A directory's entry: size, selector, reserved, name."""
SLICE = 1 << 20
"""Bytes that one turn of the loop moves: about 0.2 ms."""

HEAD = 1024
"""Bytes of a kernel that say whether it is a bzImage, and how long its real-mode part is."""
SETUP_ADDRESS, KERNEL_ADDRESS, CMDLINE_ADDRESS = 0x1_0000, 0x10_0000, 0x2_0000
"""Where the Linux boot protocol (its section on the memory layout) has a bzImage's parts."""


class Item(Protocol):
    """Bytes that a guest can select."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """[offset, offset + length) without what lies beyond the end. Raises OSError."""


class Bytes:
    """An item whose bytes `make` gives, when they are first asked for."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._data: bytes | None = None

    @property
    def data(self) -> bytes:
        if self._data is None:
            self._data = self._make()
        return self._data

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


class FileItem:
    """A part of a file of the host, open as long as the machine lives. Raises ConfigError naming `where`."""

    def __init__(self, where: str, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ConfigError(f"{where}: {path}: {os_reason(error)}") from error
        self._skip = 0
        self.size = os.fstat(self._descriptor).st_size
        if self.size >> 32:
            self.close()
            raise ConfigError(f"{where}: {path}: 4 GiB or more; an item's size has 32 bits")

    def skip(self, count: int) -> None:
        """The item begins `count` bytes further on, at the end at most."""
        count = min(count, self.size)
        self._skip += count
        self.size -= count

    def read(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        return os.pread(self._descriptor, length, self._skip + offset) if length > 0 else b""

    def close(self) -> None:
        os.close(self._descriptor)


def number(value: int, size: int) -> Bytes:
    """A little-endian number of `size` bytes."""
    return Bytes(lambda: value.to_bytes(size, "little"))


@dataclass(frozen=True, slots=True)
class Transfer:
    """What is left of a DMA, and where its control structure stands."""

    control: int
    kind: int
    address: int
    length: int


@dataclass(frozen=True, slots=True)
class FwCfgState:
    """The selected item, the offset into it, and the upper half of the next control structure's address."""

    kind: ClassVar = "fw-cfg"
    version: ClassVar = 1
    key: Annotated[int, range(1 << 16)]
    offset: Annotated[int, range(1 << 32)]
    high: Annotated[int, range(1 << 32)]


class FwCfg:
    """The device. `memory` is the guest's; `items` by selector, `files` by name: each gets the next selector from
    KEY_FIRST_FILE on, in the order of the names."""

    state_type = FwCfgState

    def __init__(
        self, board: Board, memory: GuestMemory, items: Mapping[int, Item], files: Mapping[str, Item]
    ) -> None:
        self._board, self._memory = board, memory
        self._names = sorted(files)
        self._items = dict(items)
        self._items[KEY_SIGNATURE] = Bytes(lambda: SIGNATURE)
        self._items[KEY_ID] = number(TRADITIONAL | DMA, 4)
        self._items[KEY_DIRECTORY] = Bytes(self._directory)
        for index, name in enumerate(self._names):
            self._items[KEY_FIRST_FILE + index] = files[name]
        self._key, self._offset, self._high = KEY_SIGNATURE, 0, 0
        self._transfers: list[tuple[Transfer, Callable[[], None]]] = []
        """DMAs that go on in later turns, the oldest first, each with what lets its vCPU run on: one a vCPU at most."""
        self._fetching: dict[asyncio.Task[None], Callable[[], None]] = {}
        """DMAs whose memory is on its way from another host, with what lets their vCPUs run on."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._turn: asyncio.Handle | None = None

    def attach(self) -> None:
        self._board.map(Space.PORT, layout.FW_CFG, layout.FW_CFG_SIZE, self, "fw_cfg")

    def _directory(self) -> bytes:
        entries = [
            ENTRY.pack(self._items[KEY_FIRST_FILE + index].size, KEY_FIRST_FILE + index, 0, name.encode())
            for index, name in enumerate(self._names)
        ]
        return len(entries).to_bytes(4, "big") + b"".join(entries)

    # The bus.

    def read(self, offset: int, size: int) -> int:
        if offset == DATA and size == 1:
            value = self._take(1)
            return value[0] if value else 0
        if offset >= DMA_HIGH and offset + size <= layout.FW_CFG_SIZE:
            start = offset - DMA_HIGH
            return int.from_bytes(DMA_SIGNATURE[start : start + size], "little")
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == SELECTOR and size == 2:
            self._select(value)
        elif offset == DMA_HIGH and size == 4:
            self._high = swapped(value)
        elif offset == DMA_LOW and size == 4:
            address, self._high = self._high << 32 | swapped(value), 0
            self._start(address)

    def _select(self, key: int) -> None:
        self._key, self._offset = key & ~WRITE_MODE, 0

    def _take(self, length: int) -> bytes:
        """The next bytes of the selected item, fewer at its end; then the offset stands still."""
        item = self._items.get(self._key)
        if item is None:
            return b""
        try:
            data = item.read(self._offset, length)
        except OSError:
            return b""
        self._offset += len(data)
        return data

    # DMA.

    def _start(self, control: int) -> None:
        """The guest wrote the address of a control structure."""
        self._begin(control, None)

    def _begin(self, control: int, resume: Callable[[], None] | None) -> None:
        """`resume` lets the vCPU run on, if it was stalled."""
        if not self._memory.here(control, CONTROL.size):
            self._wait(control, control, CONTROL.size, resume)
            return
        waits = self._prepare(control, resume)
        if not waits and resume is not None:
            resume()
            self._look_idle()

    def _wait(self, control: int, address: int, length: int, resume: Callable[[], None] | None) -> None:
        """Pages of the guest's are on their way from another host: begin again when they are here."""
        resume = resume or self._board.stall()
        self._idle.clear()
        fetching = self._fetch(control, address, length, resume)
        task = asyncio.get_running_loop().create_task(fetching, name="fw_cfg pages")
        self._fetching[task] = resume
        task.add_done_callback(lambda task: self._fetching.pop(task, None))

    async def _fetch(self, control: int, address: int, length: int, resume: Callable[[], None]) -> None:
        if self._memory.absent is not None:
            await self._memory.absent.fetch([(address, length)])
        task = asyncio.current_task()
        assert task is not None
        self._fetching.pop(task, None)
        self._begin(control, resume)

    def _look_idle(self) -> None:
        if not self._transfers and not self._fetching:
            self._idle.set()

    def _prepare(self, control: int, resume: Callable[[], None] | None) -> bool:
        """Whether it goes on later, and the vCPU waits."""
        try:
            flags, length, address = CONTROL.unpack(self._memory.read(control, CONTROL.size))
        except GuestError:
            return False  # there is no place to report it
        if flags & SELECT:
            self._select(flags >> 16)
        kind = READ if flags & READ else WRITE if flags & WRITE else SKIP if flags & SKIP else 0
        if kind == SKIP:
            item = self._items.get(self._key)
            self._offset = min(self._offset + length, item.size if item is not None else 0)
        elif kind == WRITE:
            self._report(control, 0 if not length else ERROR)
            return False
        if kind != READ or not length:
            self._report(control, 0)
            return False
        try:
            self._memory.view(address, length)
        except GuestError:
            self._report(control, ERROR)
            return False
        if not self._memory.here(address, length):
            self._wait(control, address, length, resume)
            return True
        transfer = Transfer(control, kind, address, length)
        if not self._transfers:
            rest = self._move(transfer)
            if rest is None:
                return False
            transfer = rest
        self._transfers.append((transfer, resume or self._board.stall()))
        self._idle.clear()
        self._continue()
        return True

    def _move(self, transfer: Transfer) -> Transfer | None:
        """Move one slice; what is left, or None when the guest has been told that it is done. Beyond the end of an item
        zeros are read."""
        length = min(transfer.length, SLICE)
        data = self._take(length)
        self._memory.write(transfer.address, data + bytes(length - len(data)))
        if length == transfer.length:
            self._report(transfer.control, 0)
            return None
        return Transfer(transfer.control, transfer.kind, transfer.address + length, transfer.length - length)

    def _continue(self) -> None:
        if self._turn is None and self._transfers:
            self._turn = asyncio.get_running_loop().call_soon(self._next_slice)

    def _next_slice(self) -> None:
        self._turn = None
        transfer, resume = self._transfers[0]
        rest = self._move(transfer)
        if rest is not None:
            self._transfers[0] = (rest, resume)
        else:
            del self._transfers[0]
            resume()
        self._look_idle()
        self._continue()

    def _report(self, control: int, flags: int) -> None:
        try:
            self._memory.write(control, flags.to_bytes(4, "big"))
        except GuestError:
            pass

    # The machine's life.

    async def quiesce(self) -> None:
        """Wait until no DMA is in flight."""
        await self._idle.wait()

    def reset(self) -> None:
        self._drop()
        self._key, self._offset, self._high = KEY_SIGNATURE, 0, 0

    def _drop(self) -> None:
        """End what is in flight."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        dropped, self._transfers = self._transfers, []
        fetching, self._fetching = self._fetching, {}
        for task in fetching:
            task.cancel()
        for resume in (*(resume for _, resume in dropped), *fetching.values()):
            resume()
        self._idle.set()

    def close(self) -> None:
        self._drop()
        close(self._items.values())
        self._items.clear()

    def save(self) -> FwCfgState:
        """Raises StateError while a DMA is in flight: `quiesce` first."""
        if self._transfers or self._fetching:
            raise StateError("fw_cfg: a transfer is in flight")
        return FwCfgState(self._key, self._offset, self._high)

    def restore(self, state: FwCfgState) -> None:
        self._drop()
        self._key, self._offset, self._high = state.key, state.offset, state.high


def swapped(value: int) -> int:
    """A 32-bit number whose bytes came in the other order."""
    return int.from_bytes(value.to_bytes(4, "little"), "big")


def e820_item(memory: int) -> bytes:
    """`etc/e820`: (start, size, type) of every range, little endian."""
    ranges = layout.Layout(memory).e820()
    return b"".join(struct.pack("<QQI", item.start, item.size, item.type) for item in ranges)


def _setup_header(setup: bytes, cmdline: int, initrd: tuple[int, int]) -> bytes:
    """A bzImage's real-mode part with what the boot protocol wants a loader to fill in."""
    filled = bytearray(setup)
    version = int.from_bytes(filled[0x206:0x208], "little")
    filled[0x210] = 0xFF  # type_of_loader: none that has a number
    if version >= 0x0201:
        filled[0x211] |= 0x80  # loadflags: heap_end_ptr is valid
        struct.pack_into("<H", filled, 0x224, 0xFE00 - 0x200)
    if version >= 0x0202:
        struct.pack_into("<I", filled, 0x228, cmdline)
    struct.pack_into("<II", filled, 0x218, *initrd)
    return bytes(filled)


def add_kernel(items: dict[int, Item], config: Config, cmdline: Callable[[], str]) -> None:
    """What firmware that boots a kernel by itself asks for. A bzImage comes in its two parts; another kernel is
    KERNEL_DATA alone. Raises ConfigError."""
    line = Bytes(lambda: cmdline().encode() + b"\0")
    items[KEY_CMDLINE_ADDRESS] = number(CMDLINE_ADDRESS, 4)
    items[KEY_CMDLINE_SIZE] = Bytes(lambda: line.size.to_bytes(4, "little"))
    items[KEY_CMDLINE_DATA] = line
    initrd = (0, 0)
    if config.initrd is not None:
        file = FileItem("initrd", config.initrd)
        initrd = ((layout.Layout(config.memory).low_end - file.size) & ~0xFFF, file.size)
        items[KEY_INITRD_DATA] = file
    items[KEY_INITRD_ADDRESS], items[KEY_INITRD_SIZE] = number(initrd[0], 4), number(initrd[1], 4)
    if config.kernel is None:
        return
    items[KEY_KERNEL_DATA] = kernel = FileItem("kernel", config.kernel)
    from vmm.boot.request import is_bzimage

    head = kernel.read(0, HEAD)
    if is_bzimage(head):
        size = ((head[0x1F1] or 4) + 1) * 512  # setup_sects, and the boot sector
        setup = kernel.read(0, size).ljust(size, b"\0")
        kernel.skip(size)
        items[KEY_SETUP_ADDRESS], items[KEY_SETUP_SIZE] = number(SETUP_ADDRESS, 4), number(size, 4)
        items[KEY_SETUP_DATA] = Bytes(lambda: _setup_header(setup, CMDLINE_ADDRESS, initrd))
    items[KEY_KERNEL_ADDRESS], items[KEY_KERNEL_SIZE] = number(KERNEL_ADDRESS, 4), number(kernel.size, 4)


def attach(assembly: Assembly) -> None:
    """Component "fw_cfg". Raises ConfigError for a user's file that cannot be read or takes a name that is in use."""
    items: dict[int, Item] = {}
    files: dict[str, Item] = {}
    try:
        fill(items, files, assembly)
    except BaseException:
        close(items.values())
        close(files.values())
        raise
    device = FwCfg(assembly.board, assembly.memory, items, files)
    device.attach()
    assembly.add("fw_cfg", device)


def close(items: Iterable[Item]) -> None:
    for item in items:
        if isinstance(item, FileItem):
            item.close()


def fill(items: dict[int, Item], files: dict[str, Item], assembly: Assembly) -> None:
    """What this machine has. Raises ConfigError; what was opened until then is in `items` and `files`."""
    config, memory = assembly.config, assembly.memory
    items.update({
        KEY_UUID: Bytes(lambda: bytes(16)),
        KEY_RAM_SIZE: number(memory.size, 8),
        KEY_NOGRAPHIC: number(1, 2),
        KEY_CPUS: number(config.cpus, 2),
        KEY_BOOT_MENU: number(0, 2),
        KEY_MAX_CPUS: number(config.most_cpus, 2),
    })  # fmt: skip

    def cmdline() -> str:
        from vmm.machine.builder import effective_cmdline

        return effective_cmdline(config, assembly.capabilities)

    add_kernel(items, config, cmdline)
    acpi = assembly.services.acpi
    blobs: list[tuple[bytes, bytes, bytes]] = []

    def blob(index: int) -> Bytes:
        def make() -> bytes:
            if not blobs:
                from vmm.acpi.loader import relocatable

                blobs.append(relocatable(acpi.tables()))
            return blobs[0][index]

        return Bytes(make)

    files.update({
        "etc/e820": Bytes(lambda: e820_item(memory.size)),
        "etc/acpi/tables": blob(0),
        "etc/acpi/rsdp": blob(1),
        "etc/table-loader": blob(2),
    })  # fmt: skip
    for own in config.fw_cfg:
        if own.name in files:
            raise ConfigError(f"fw_cfg: {own.name!r} is there already; give the item another name, as opt/…")
        files[own.name] = FileItem("fw_cfg", own.file) if own.file is not None else _text(own.string or "")


def _text(text: str) -> Bytes:
    return Bytes(text.encode)
