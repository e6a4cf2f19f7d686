"""The virtio devices of a machine, each on its transport, from one boot to the next. A part of the builder.

PCI functions go to the PCI bus; virtio-mmio devices get a window of layout.virtio_mmio and are described in the ACPI
tables. The devices themselves are the machine's resources (pool.py). Loop thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, ClassVar

from cpu.contract import Space
from cpu.values import dataclass
from virtio.device import Device
from virtio.pci import PciTransport
from virtio.state import TransportState
from virtio.transport import Transport
from vmm.devices.virtio.pool import DevicePool, Maker
from vmm.errors import ConfigError, StateError
from vmm.machine import layout
from vmm.machine.interfaces import Assembly
from vmm.pci.bus import DEVICES


@dataclass(frozen=True, slots=True)
class VirtioState:
    """The virtio-mmio devices by name; functions are saved by their bus."""

    kind: ClassVar = "virtio"
    version: ClassVar = 1
    mmio: dict[str, object]


class VirtioDevices:
    """The transports of one machine's virtio devices."""

    state_type = VirtioState

    def __init__(self, assembly: Assembly, pool: DevicePool) -> None:
        self._assembly = assembly
        self._pool = pool
        self._windows: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []
        self.transports: dict[str, Transport] = {}
        self.slots: dict[str, int] = {}
        """Device numbers of the functions on the PCI bus."""
        self._wanted = {slot.id: slot.device for slot in assembly.config.slots}
        for name in self._wanted:
            if name not in pool.makers:
                raise ConfigError(f"slot: this machine has no device {name!r}; it has {', '.join(pool.makers)}")
            if pool.makers[name].transport == "mmio":
                raise ConfigError(f"slot: {name} is a virtio-mmio device, which has no slot on the PCI bus")
        for name, maker in pool.makers.items():
            if maker.transport == "mmio":
                self._windows[name] = len(self._windows)
                assembly.services.acpi.add_virtio_mmio(self._windows[name])

    async def start(self) -> None:
        """Open the devices that are not open yet, and plug all in. Raises ConfigError, HostError."""
        await self._pool.open()
        for name, device in self._pool.devices.items():
            self._plug(name, device, self._pool.makers[name])

    def plug(self, name: str, avoid: Collection[int] = ()) -> int:
        """Put a device that came to the pool onto the PCI bus, rather in none of the slots `avoid`; its device number.
        Raises ConfigError."""
        self._plug(name, self._pool.devices[name], self._pool.makers[name], avoid)
        return self.slots[name]

    def hide(self, name: str) -> None:
        """The guest does not find the device any more when it looks, while its driver still gets answers."""
        self._assembly.services.pci.hide(self.slots[name])

    def unplug(self, name: str) -> None:
        """Take a device off the PCI bus, at once: it drives no interrupt and takes no more requests. What it has taken
        may still use guest memory until `Device.settle`. The pool keeps it. KeyError if there is none."""
        self._assembly.services.pci.remove(self.slots.pop(name))
        transport = self.transports.pop(name)
        transport.close()
        transport.on_status()

    def _free_slot(self, name: str, avoid: Collection[int] = ()) -> int | None:
        """The device number that the configuration names, or the lowest that it names for no device, none of `avoid` if
        that can be; None if there is none."""
        if name in self._wanted:
            return self._wanted[name]
        taken = {slot.device for slot in self._assembly.services.pci.slots}
        taken |= {self._wanted[other] for other in self._pool.makers if other in self._wanted}
        free = [number for number in range(1, DEVICES) if number not in taken]
        return next((number for number in free if number not in avoid), free[0] if free else None)

    def _plug(self, name: str, device: Device, maker: Maker, avoid: Collection[int] = ()) -> None:
        memory = self._assembly.memory
        board = self._assembly.board
        device.clock = board.clock
        if maker.transport == "pci":
            function = PciTransport(device, memory, packed=maker.packed)
            self.slots[name] = self._assembly.services.pci.add(function, device=self._free_slot(name, avoid))
            self.transports[name] = function
            return
        from virtio import mmio  # seldom asked for

        window, gsi = layout.virtio_mmio(self._windows[name])
        line = board.irq_line(gsi)
        transport = mmio.MmioTransport(device, memory, line.set, stall=board.stall, packed=maker.packed)
        self.transports[name] = transport
        board.map(Space.MMIO, window.start, window.size, transport, f"virtio-mmio {name}")
        for index in range(len(device.queue_sizes)):
            self._undo.append(
                board.ioeventfd(
                    Space.MMIO,
                    window.start + mmio.QUEUE_NOTIFY,
                    4,
                    index,
                    partial(transport.notify, index),
                )
            )

    async def quiesce(self) -> None:
        """Take no more requests and drain those in flight, in all devices. Before `save`."""
        for transport in tuple(self.transports.values()):
            await transport.quiesce()

    def resume(self) -> None:
        """After `quiesce` or `restore`."""
        for transport in self.transports.values():
            transport.resume()

    def reset(self) -> None:
        """A machine reset, of the devices that no bus resets."""
        for name in self._plugged_windows():
            self.transports[name].reset()

    def _plugged_windows(self) -> list[str]:
        """The devices behind virtio-mmio windows; an optional one may be missing."""
        return [name for name in self._windows if name in self.transports]

    def state_parts(self) -> Mapping[str, Any]:
        """The components behind the `object` fields of its state."""
        return {"mmio": {name: self.transports[name] for name in self._plugged_windows()}}

    def save(self) -> VirtioState:
        return VirtioState({name: self.transports[name].save() for name in self._plugged_windows()})

    def restore(self, state: VirtioState) -> None:
        if set(state.mmio) != set(self._plugged_windows()):
            raise StateError("virtio: the saved state is of a machine with other devices")
        for name, saved in state.mmio.items():
            assert isinstance(saved, TransportState)
            self.transports[name].restore(saved)

    async def aclose(self) -> None:
        """Take the devices off: they drive no interrupt and touch no memory afterwards. The pool keeps them."""
        undo, self._undo = self._undo, []
        for call in undo:
            call()
        transports, self.transports = self.transports, {}
        self.slots.clear()
        for transport in transports.values():
            transport.close()
        await self._pool.settle()


def attach(assembly: Assembly) -> None:
    """Component "virtio", if the configuration asks for any device."""
    pool = assembly.pool
    pool.join_console(lambda: assembly.console)
    assembly.services.virtio = VirtioDevices(assembly, pool)
    assembly.add("virtio", assembly.services.virtio)
    pool.begin()
