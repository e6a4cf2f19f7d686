"""What the machine's parts promise each other (Protocols), and where they find one another (Services). The builder puts
the implementations together.

Everything here is confined to the loop thread.
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
    """A device with posted ranges, which gets several of the guest's writes in one call."""

    def posted(self, offset: int, size: int, data: bytes) -> None:
        """The guest wrote at `offset` len(data) // size times, `size` bytes each. `data` has them, oldest first."""


class TimerHandle(Protocol):
    """A call that Clock.call_at() has planned."""

    def cancel(self) -> None:
        """Cancel the call. Idempotent."""


class Clock(Protocol):
    """The VM's clock: real or virtual. Devices read no other."""

    def now_ns(self) -> int:
        """ns since the VM's start."""

    def wall_ns(self) -> int:
        """CLOCK_REALTIME as the guest sees it, ns since the epoch."""

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> TimerHandle:
        """Call `callback` once, when the clock has come to `deadline_ns`; soon, if that moment has passed."""


class IrqLine(Protocol):
    """One level-triggered input of the interrupt controllers. It is high while any of its owners raises it."""

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
        """A new owner's part of the interrupt line `gsi`."""

    def signal_msi(self, address: int, data: int) -> None:
        """Send a message-signalled interrupt: `data` to `address` (Intel SDM volume 3, 11.11)."""

    def map(self, space: Space, address: int, size: int, device: BusDevice, name: str) -> None:
        """Put a device on a bus; overlapping an existing range raises ConfigError naming both."""

    def unmap(self, space: Space, address: int) -> None:
        """Take the device at `address` off its bus."""

    def post(self, space: Space, address: int, size: int, device: PostedDevice, offset: int) -> None:
        """Post writes of `size` bytes at `address`: the vCPU does not wait for them. They arrive at
        device.posted(offset, ...)."""

    def unpost(self, space: Space, address: int, size: int) -> None:
        """Undo `post`."""

    def shadow(self, space: Space, address: int, size: int, notice: Callable[[], None] | None = None) -> Shadow:
        """Answer reads of `size` bytes at `address` from the returned shadow, while that is valid. `notice` is called
        when a read switched the register to its `after` value, in order with the posted writes."""

    def unshadow(self, space: Space, address: int, size: int) -> None:
        """Undo `shadow`."""

    def ioeventfd(
        self,
        space: Space,
        address: int,
        size: int,
        match: int | None,
        callback: Callable[[], None],
        answerer: object = None,
    ) -> Callable[[], None]:
        """Call `callback` on the loop when the guest writes there (only when it writes `match`, if given; size 0: a
        write of any size). `answerer` (cpu.contract.Vm.add_ioeventfd) may make the call unnecessary. Returns the
        function that undoes this."""

    def stall(self) -> Callable[[], None]:
        """Make the vCPU whose access is being handled wait until the returned function is called. A device calls this
        in its `read` or `write`, for work that takes long but must be done before the guest's next instruction. Other
        vCPUs and machines run on, and the machine can be paused and ended meanwhile."""

    def request(self, action: Literal["shutdown", "reset", "crash"], detail: str, status: int | None = None) -> None:
        """The guest wants something of the whole machine (reset port, power-off, pvpanic, exit port). With `status` the
        machine ends with that exit status, whatever the action."""


class Services:
    """What the parts of a machine offer one another, by typed attribute. A part sets its attribute in its `attach()`.

    Parts attach in the builder's order, so that a part can use the services of earlier ones. If it uses a service that
    no part has set yet, an AttributeError shows that the order is wrong. Services that the bare platform lacks, and
    that parts may ask for all the same, are None there.
    """


    reset: ResetControl
    """It ends the machine, or starts it again, as the guest's reset ports do."""
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
    """It tells the guest that it is a copy."""


class Assembly(Protocol):
    """What a part of the machine (serial ports, legacy devices, PCI, virtio) gets while the builder calls its
    `attach(assembly)`. Parts are called in the builder's order, before the boot loader."""

    @property
    def config(self) -> Config:
        """The machine's configuration."""

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
        """The machine's virtio devices, which stay when it reboots."""

    @property
    def present_cpus(self) -> set[int]:
        """The numbers of the processors that the guest has now. The set stays when the machine reboots."""

    def allow_cpu(self, index: int, on: bool) -> None:
        """Let a vCPU run, or keep it parked. Does nothing with the virtual clock, which stands while a vCPU is
        parked."""

    services: Services
    """What the parts offer one another."""
    rsdp: int | None
    """Guest-physical address of the ACPI root pointer; the part that writes the tables sets it."""

    def debug_output(self, text: bytes) -> None:
        """Take what the guest wrote to a debug port. Never blocks; what is kept is bounded."""

    def warn(self, text: str) -> None:
        """Warn whoever runs the machine, by an event, which `vmm run` prints. A machine tells at most a hundred."""

    def mark(self, name: str) -> None:
        """Note that the moment of this name in the machine's timeline has come (vmm/timeline.py)."""

    def add(self, name: str, component: object) -> None:
        """Own a component under a unique name. Components that are Stateful (vmm.state.payload) are saved and restored
        in the order in which they were added. Before the first instruction the machine calls a component's `populate()`
        to fill memory, unless memory comes from a saved state, and its `start()`. At the end it calls `aclose()` or
        else `close()`, in reverse order. Each may be left out; `start` and the last two may be coroutines."""


class CharacterPort(Protocol):
    """The host side of a character device (UART, virtio-console port)."""

    def write(self, data: bytes) -> None:
        """Take output of the guest, all of it. Never blocks."""

    async def relieved(self) -> None:
        """Wait until readers that must not miss any output have nearly caught up. A device calls this if it can go on
        writing while the machine is held."""

    def read(self, limit: int) -> bytes:
        """Input for the guest, up to `limit` bytes; empty if there is none now."""

    def set_receiver(self, ready: Callable[[], None]) -> None:
        """Have `ready` called whenever input arrives and none was waiting."""

    def event(self, kind: str) -> None:
        """Report what is not data. The only kind is "break", a break condition on the line."""
