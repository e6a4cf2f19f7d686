"""What the machine's parts promise each other: Protocols, and where they find one another (Services). The builder puts
implementations together.

All of it is confined to the loop thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

from cpu.contract import Capability, Shadow, Space
from vmm.config import Config
from vmm.machine.memory import GuestMemory

if TYPE_CHECKING:
    from virtio.protocols import RandomSource
    from vmm.acpi import Acpi
    from vmm.devices.cpus import CpuHotplug
    from vmm.devices.pm import Pm
    from vmm.devices.reset import ResetControl
    from vmm.devices.virtio import VirtioDevices
    from vmm.devices.virtio.pool import DevicePool
    from vmm.devices.vmgenid import GenerationId
    from vmm.machine.bus import BusDevice
    from vmm.pci.bus import PciBus
    from vmm.pci.hotplug import PciHotplug


class PostedDevice(Protocol):
    """A device with posted ranges gets its writes merged: `data` is len(data) // size values in order."""

    def posted(self, offset: int, size: int, data: bytes) -> None:
        """Writes of `size` bytes each at `offset`, oldest first."""


class TimerHandle(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """It does not come. Idempotent."""


class Clock(Protocol):
    """The VM's clock: real or virtual. Devices read no other."""

    def now_ns(self) -> int:
        """ns since the VM's start."""

    def wall_ns(self) -> int:
        """CLOCK_REALTIME as the guest sees it, ns since the epoch."""

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> TimerHandle:
        """Call once when the clock has come to `deadline_ns`, at once if it has passed it."""


class IrqLine(Protocol):
    """One level-triggered input of the interrupt controller. Several owners of one GSI are ORed."""

    def set(self, level: bool) -> None:
        """Raise or lower this owner's part of the line."""


class Board(Protocol):
    """What a device is plugged into: the machine's address spaces, interrupt lines, clock and chance."""

    @property
    def clock(self) -> Clock:
        """The machine's time."""

    @property
    def random(self) -> RandomSource:
        """The machine's source of chance."""

    def irq_line(self, gsi: int) -> IrqLine:
        """A new owner's part of the line `gsi` of the interrupt controllers."""

    def signal_msi(self, address: int, data: int) -> None:
        """Send a message-signalled interrupt: `data` to `address` (Intel SDM volume 3, 11.11)."""

    def map(self, space: Space, address: int, size: int, device: BusDevice, name: str) -> None:
        """Put a device on a bus; overlapping an existing range raises ConfigError naming both."""

    def unmap(self, space: Space, address: int) -> None:
        """Take the device at `address` off its bus."""

    def post(self, space: Space, address: int, size: int, device: PostedDevice, offset: int) -> None:
        """Make writes of `size` at `address` posted; they arrive at device.posted(offset, ...)."""

    def unpost(self, space: Space, address: int, size: int) -> None:
        """Undo `post`."""

    def shadow(self, space: Space, address: int, size: int, notice: Callable[[], None] | None = None) -> Shadow:
        """Reads of `size` at `address` come from the shadow while it is valid. `notice` is called when a read
        switched the register to its `after` value (in order with the posted writes)."""

    def unshadow(self, space: Space, address: int, size: int) -> None:
        """Undo `shadow`."""

    def ioeventfd(
        self, space: Space, address: int, size: int, match: int | None, callback: Callable[[], None]
    ) -> Callable[[], None]:
        """Call `callback` on the loop when the guest writes there; returns the function that undoes it."""

    def stall(self) -> Callable[[], None]:
        """From within a device's `read` or `write`, for what takes its time but must be over before the guest's next
        instruction: the vCPU whose access this is waits until the returned function is called. Other vCPUs and machines
        run on, and the machine can be paused and ended meanwhile."""

    def request(self, action: Literal["shutdown", "reset", "crash"], detail: str, status: int | None = None) -> None:
        """A guest's wish that concerns the whole machine (reset port, power-off, pvpanic, exit port)."""


class Services:
    """What the parts of a machine offer one another, by typed attribute. A part sets its attribute in its `attach()`.

    Parts attach in the builder's order, so an earlier part's service is there; to use one that no part has set is a
    mistake in that order, and an AttributeError. What the bare platform lacks, and others ask for, is None there.
    """


    reset: ResetControl
    """Ends the machine, or starts it again, as the guest's reset ports do."""
    acpi: Acpi
    """The tables, to which parts add what they are."""
    pci: PciBus
    """Bus 0, to which parts add their functions."""
    pci_hotplug: PciHotplug | None = None
    """The registers by which functions come and go."""
    cpu_hotplug: CpuHotplug | None = None
    """The registers by which processors come and go, of a machine that can have more than it starts with."""
    pm: Pm | None = None
    """The power button, and general purpose events."""
    virtio: VirtioDevices | None = None
    """The transports of the virtio devices."""
    generation_id: GenerationId | None = None
    """Tells the guest that it is a copy."""


class Assembly(Protocol):
    """What a part of the machine (serial ports, legacy devices, PCI, virtio) gets while the builder calls its
    `attach(assembly)`. Parts are called in the builder's order, before the boot loader."""

    @property
    def config(self) -> Config:
        """What was asked for."""

    @property
    def board(self) -> Board:
        """What devices are plugged into."""

    @property
    def memory(self) -> GuestMemory:
        """The guest's memory."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the execution core can do."""

    @property
    def console(self) -> CharacterPort:
        """A new port of the machine's console, for one device."""

    @property
    def pool(self) -> DevicePool:
        """The machine's virtio devices, which stay over its reboots."""

    @property
    def present_cpus(self) -> set[int]:
        """The processors that the guest has, which stays over its reboots."""

    def allow_cpu(self, index: int, on: bool) -> None:
        """Let a vCPU run, or keep it parked; nothing with the virtual clock."""

    services: Services
    """What the parts offer one another."""
    rsdp: int | None
    """Guest-physical address of the ACPI root pointer; the part that writes the tables sets it."""

    def debug_output(self, text: bytes) -> None:
        """What a guest writes to a debug port. Never blocks, bounded."""

    def warn(self, text: str) -> None:
        """Tell whoever runs the machine: an event, which `vmm run` prints. At most a hundred a machine."""

    def mark(self, name: str) -> None:
        """The machine's timeline has come to the moment of this name (vmm/timeline.py)."""

    def add(self, name: str, component: object) -> None:
        """Own a component under a unique name. Those that are Stateful (vmm.state.payload) are saved and restored in
        the order in which they were added. Before the first instruction `populate()` fills memory, unless memory comes
        from a saved state, and `start()` is awaited; at the end `aclose()` or else `close()`, in reverse order."""


class CharacterPort(Protocol):
    """The host side of a character device (UART, virtio-console port)."""

    def write(self, data: bytes) -> None:
        """Output of the guest. Never blocks, takes everything."""

    async def relieved(self) -> None:
        """Wait until whoever must not miss any output has nearly caught up. For a device that can go on writing while
        the machine is held."""

    def read(self, limit: int) -> bytes:
        """Input for the guest, up to `limit` bytes; empty if there is none now."""

    def set_receiver(self, ready: Callable[[], None]) -> None:
        """`ready` is called whenever input arrives while there was none."""

    def event(self, kind: str) -> None:
        """Something other than data: "break"."""
