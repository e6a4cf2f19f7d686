"""Devices of the embedder's own at I/O ports or in memory (MMIO): the class to inherit from, its place in a machine.

The embedder's code is neither the guest's nor ours: what it raises, or returns against its declaration, ends the
machine as a host error that names the device, its class and the line. Loop thread.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cpu.contract import Shadow, Space
from cpu.values import dataclass
from vmm.errors import ConfigError, GuestError, HostError, StateError, VmmError
from vmm.machine.bus import ONES, Register, RegisterMap

if TYPE_CHECKING:
    from virtio.device import Device
    from vmm.machine.interfaces import Board, IrqLine

SPACES = {"port": Space.PORT, "mmio": Space.MMIO}
SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Stateless:
    """`state_type` of a device that has nothing to save."""

    kind: ClassVar = "stateless"
    version: ClassVar = 1


class Peripheral:
    """A device at `size` addresses from `address` on, in the space of I/O ports or of memory.

    Either `registers` declares what is there, or `read` and `write` take every access. An access makes the vCPU wait
    for the loop, but for two kinds: writes that `posted` names, which arrive later and in order, and reads that
    `shadowed` names, which get what `show` gave last. One instance serves a machine over all its reboots.
    """

    space: ClassVar[Literal["port", "mmio"]] = "port"
    address: int
    size: int
    """Bytes."""
    gsi: int | None = None
    """The interrupt line that `interrupt` drives, 0 to 23; below 16 it is the PIC's IRQ too."""
    posted: ClassVar[tuple[tuple[int, int], ...]] = ()
    """(offset, bytes) of registers whose writes do not wait."""
    shadowed: ClassVar[tuple[tuple[int, int], ...]] = ()
    """(offset, bytes) of registers whose reads do not wait."""
    state_type: ClassVar[type | None] = None
    """A dataclass as vmm/state/payload.py describes it, for machines that are saved; Stateless if there is nothing to
    save. None: a machine with this device cannot be saved."""

    board: Board
    """What it is plugged into, from `attached` on: the machine's clock and chance, `request` to end it, `stall` to
    take time."""
    _line: IrqLine | None = None
    _shadows: Mapping[tuple[int, int], Shadow]

    def registers(self) -> Iterable[Register]:
        """What is there, by declaration; nothing, if `read` and `write` are overridden."""
        return ()

    def read(self, offset: int, size: int) -> int:
        """A guest's read of 1, 2, 4 or 8 bytes: a number of so many bytes. Gaps between registers read as ones."""
        raise NotImplementedError

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write of 1, 2, 4 or 8 bytes."""
        raise NotImplementedError

    def attached(self) -> None:
        """The machine is there and has not run; also after each reboot, then after `reset`. Shadows get their first
        values here."""

    def reset(self) -> None:
        """The machine was reset: be as new."""

    async def aclose(self) -> None:
        """The machine is closed."""

    def save(self) -> Any:
        """The state: an instance of `state_type`. Only between two accesses."""
        return Stateless()

    def restore(self, state: Any) -> None:
        """Take over what `save` gave; its values are as the declaration allows. Raises StateError."""

    def interrupt(self, level: bool) -> None:
        """Raise or lower the interrupt line. It stays raised until it is lowered."""
        if self._line is None:
            raise HostError("this device has no interrupt line: give it a gsi")
        self._line.set(level)

    def pulse(self) -> None:
        """An edge, for a guest that waits for edges: whatever the line was, it rises once, and is low afterwards."""
        for level in (False, True, False):
            self.interrupt(level)

    def show(self, offset: int, size: int, value: int, after: int | None = None) -> None:
        """What reads of a shadowed register get from now on. With `after`, the first read changes it to that value, and
        `seen` is called (a register that reading clears)."""
        self._shadows[offset, size].set(value, after)

    def seen(self, offset: int, size: int) -> None:
        """The guest read a shadowed register that has an `after`."""


def told(error: Exception) -> str:
    """An exception of the embedder's code, with its place."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({PurePath(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}".removesuffix(": ") + where


class Seat:
    """A peripheral's place in a machine until the next reboot: on its bus, with its line, its shadows and its state."""

    def __init__(self, board: Board, name: str, device: Peripheral) -> None:
        """Raises ConfigError."""
        self.name, self.device = name, device
        self._title = f"device {name!r} ({type(device).__name__})"
        self.state_type = device.state_type or Stateless
        self._space = self._checked(board)
        registers = tuple(self._call(device.registers))
        if registers:
            declared = RegisterMap(device.size, registers)
            self._read, self._write = declared.read, declared.write
        else:
            self._read, self._write = device.read, device.write
        board.map(self._space, device.address, device.size, self, f"{name} ({type(device).__name__})")
        for offset, size in device.posted:
            board.post(self._space, device.address + offset, size, self, offset)
        device._shadows = {
            (offset, size): board.shadow(self._space, device.address + offset, size, self._notice(offset, size))
            for offset, size in device.shadowed
        }
        device._line = None if device.gsi is None else board.irq_line(device.gsi)
        device.board = board
        self._call(device.attached)

    def _checked(self, board: Board) -> Space:
        device = self.device
        space = SPACES.get(device.space)
        if space is None:
            raise ConfigError(f"{self._title}: space {device.space!r} is neither 'port' nor 'mmio'")
        for name in ("address", "size"):
            if not isinstance(getattr(device, name, None), int):
                raise ConfigError(f"{self._title}: has no {name}; give it a number")
        for offset, size in (*device.posted, *device.shadowed):
            if size not in SIZES or not 0 <= offset <= device.size - size:
                raise ConfigError(f"{self._title}: {size} bytes at offset {offset:#x} are not one register of its own")
        return space

    def read(self, offset: int, size: int) -> int:
        """BusDevice"""
        value = self._call(self._read, offset, size)
        if not isinstance(value, int) or not 0 <= value <= ONES[size]:
            raise HostError(
                f"{self._title}: a read of {size} bytes at offset {offset:#x} returned {value!r:.40}, "
                f"not a number from 0 to {ONES[size]:#x}"
            )
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """BusDevice"""
        self._call(self._write, offset, size, value)

    def posted(self, offset: int, size: int, data: bytes) -> None:
        """PostedDevice"""
        for at in range(0, len(data), size):
            self.write(offset, size, int.from_bytes(data[at : at + size], "little"))

    def _notice(self, offset: int, size: int) -> Callable[[], None]:
        return lambda: self._call(self.device.seen, offset, size)

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """What the embedder's code returns. Raises GuestError and ConfigError as they are, HostError for others."""
        try:
            return method(*arguments)
        except (GuestError, ConfigError):
            raise
        except Exception as error:
            raise HostError(f"{self._title}: {told(error)}") from error

    def save(self) -> Any:
        """Stateful"""
        if self.device.state_type is None:
            raise StateError(f"{self._title}: declares no state_type, so a machine with it cannot be saved")
        state = self._call(self.device.save)
        if not isinstance(state, self.state_type):
            raise HostError(f"{self._title}: save() returned {state!r:.40}, not a {self.state_type.__name__}")
        return state

    def restore(self, state: Any) -> None:
        """Stateful"""
        try:
            self.device.restore(state)
        except StateError:
            raise
        except Exception as error:
            raise StateError(f"{self._title}: {told(error)}") from error


class OwnDevices:
    """The embedder's devices of one machine, made: peripherals, and virtio devices, which the pool takes over."""

    def __init__(self, own: Mapping[str, Callable[[], Any]]) -> None:
        """Raises ConfigError."""
        from virtio.device import Device
        from virtio.errors import VirtioError  # a machine without such devices starts sooner

        self.peripherals: dict[str, Peripheral] = {}
        self.virtio: dict[str, Device] = {}
        self.seated = False
        """They were part of a machine already: this is a reboot."""
        for name, make in own.items():
            if not callable(make):
                raise ConfigError(f"devices: {name!r}: {make!r:.60} is no function that makes a device")
            try:
                made = make()
            except (VmmError, VirtioError):
                raise
            except Exception as error:
                raise HostError(f"device {name!r}: {told(error)}") from error
            if isinstance(made, Peripheral):
                self.peripherals[name] = made
            elif isinstance(made, Device):
                self.virtio[name] = made
            else:
                raise ConfigError(
                    f"devices: {name!r}: made {made!r:.60}, which is neither a virtio Device nor a vmm.Peripheral"
                )

    async def aclose(self, pooled: Collection[object]) -> None:
        """Close those that the pool did not take over (`pooled`). Raises the first failure, after all were tried."""
        failure: BaseException | None = None
        left = [device.aclose for device in self.virtio.values() if device not in pooled]
        for close in (*(device.aclose for device in self.peripherals.values()), *left):
            try:
                await close()
            except Exception as error:
                failure = failure or error
        self.peripherals, self.virtio = {}, {}
        if failure is not None:
            raise failure


def attach(assembly: Any, own: OwnDevices) -> None:
    """Put the embedder's peripherals onto a machine (vmm.machine.interfaces.Assembly)."""
    for name, device in own.peripherals.items():
        if own.seated:
            device.reset()
        assembly.add(name, Seat(assembly.board, name, device))
    own.seated = True
