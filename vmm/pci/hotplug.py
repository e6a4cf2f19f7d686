"""PCI functions that come and go: the registers that our AML reads and writes, and that AML.

Specification: ACPI 6.4, 5.6.6 (device object notifications), 6.1.1 (_ADR), 6.1.8 (_SUN), 6.3.3 (_EJx), 6.3.5 (_OST),
6.3.7 (_STA). The registers are this machine's own; only its DSDT knows them. Each is 32 bits wide, with one bit for
each device number of bus 0:

    0x00 INSERTED   a function came; the guest clears the bits that it has seen by writing them
    0x04 ASKED      the host asks for the function; likewise
    0x08 EJECT      the guest gives up the functions whose bits it writes
    0x0c PRESENT    functions that are there, and not about to go
    0x10 OST_EVENT  what _OST reports on: device number << 16 | notification
    0x14 OST_STATUS its status code; writing it is the report

Bit 0 of INSERTED, which is the host bridge's, says that a function was pulled without asking: the guest then looks at
the whole bus. This module must not know virtio, files or who asks. Loop thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from cpu.contract import Shadow, Space
from vmm.acpi import aml
from vmm.machine import layout
from vmm.machine.bus import Register, RegisterMap
from vmm.pci.bus import DEVICES, HotplugState, PciBus

if TYPE_CHECKING:
    from vmm.machine.interfaces import Assembly, Board

INSERTED, ASKED, EJECT, PRESENT, OST_EVENT, OST_STATUS = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x14
BUS_CHECK, DEVICE_CHECK, EJECT_REQUEST, OSPM_EJECT = 0, 1, 3, 0x103
"""5.6.6, table 5.187; and 6.3.5, table 6.62: an ejection that began in the guest."""
OST_SUCCESS, OST_IN_PROGRESS = 0x00, 0x84
"""6.3.5, tables 6.63 and 6.65."""
OST_REASONS = {
    0x01: "it gives no reason",
    0x02: "it does not know the notification",
    0x80: "it does not support that",
    0x81: "the device is in use",
    0x82: "the device, or one that depends on it, is busy",
    0x83: "an ejection is under way already",
}


class EventBlock(Protocol):
    """The ACPI block: vmm.devices.pm.Pm."""

    def general_event(self, number: int) -> None:
        """Raise a general purpose event."""


class PciHotplug:
    """The registers. Who takes functions away sets `on_eject` and `on_refused`."""

    def __init__(self, bus: PciBus, pm: EventBlock) -> None:
        self._bus, self._pm = bus, pm
        self._inserted = self._asked = self._ost_event = 0
        self._shadow: Shadow | None = None  # of PRESENT
        self.known = True
        """The guest's tables describe all this; a machine that was saved by a program without it has others."""
        self.leaving: set[int] = set()
        """Device numbers that are not present for the guest any more, although the bus still has them."""
        self.unsettled: set[int] = set()
        """Slots whose last function was pulled while the guest may still be about to eject it. What comes next had
        better go elsewhere, for it would be ejected in its place."""
        self.on_eject: Callable[[int], None] = _nobody
        """The guest gives up the function with this device number."""
        self.on_refused: Callable[[int, str], None] = _nobody_hears
        """The guest does not give up that function, and says why."""
        self._registers = RegisterMap(
            layout.PCI_HOTPLUG_SIZE,
            [
                Register("INSERTED", INSERTED, 4, lambda: self._inserted, self._clear_inserted, lambda: 0),
                Register("ASKED", ASKED, 4, lambda: self._asked, self._clear_asked, lambda: 0),
                Register("EJECT", EJECT, 4, lambda: 0, self._eject),
                Register("PRESENT", PRESENT, 4, self._present),
                Register("OST_EVENT", OST_EVENT, 4, lambda: self._ost_event, self._set_ost_event),
                Register("OST_STATUS", OST_STATUS, 4, lambda: 0, self._ost),
            ],
            gap=0,
        )
        self.read, self.write = self._registers.read, self._registers.write

    def attach(self, board: Board) -> None:
        """Put the registers on the machine's ports."""
        board.map(Space.PORT, layout.PCI_HOTPLUG, layout.PCI_HOTPLUG_SIZE, self, "pci hot plug")
        self._shadow = board.shadow(Space.PORT, layout.PCI_HOTPLUG + PRESENT, 4)
        self.show()

    def show(self) -> None:
        """What is present changed. Linux asks for it 150 times as it boots, five for each slot, so the loop is not
        woken for that."""
        if self._shadow is not None:
            self._shadow.set(self._present())

    # What the machine's owner calls.

    def inserted(self, device: int) -> None:
        """Tell the guest that a function is in this slot."""
        self._asked &= ~(1 << device)
        self._inserted |= 1 << device
        self._pm.general_event(layout.PCI_EVENT)

    def ask(self, device: int) -> None:
        """Ask the guest to give up the function in this slot."""
        self._asked |= 1 << device
        self._pm.general_event(layout.PCI_EVENT)

    def withdraw(self, device: int) -> None:
        """Withdraw the question, if the guest has not heard it yet."""
        self._asked &= ~(1 << device)

    def pulled(self, device: int) -> None:
        """Tell the guest that a function is going whatever it does; it is not present from now on."""
        self._asked &= ~(1 << device)
        self.leaving.add(device)
        self.unsettled.add(device)
        self.show()
        self._inserted |= 1
        self._pm.general_event(layout.PCI_EVENT)

    def gone(self, device: int) -> None:
        """The slot is empty."""
        self.leaving.discard(device)
        self.show()
        self._inserted &= ~(1 << device)
        self._asked &= ~(1 << device)

    # The guest.

    def _clear_inserted(self, value: int) -> None:
        self._inserted &= ~value

    def _clear_asked(self, value: int) -> None:
        self._asked &= ~value

    def _present(self) -> int:
        return sum(1 << slot.device for slot in self._bus.slots if slot.device not in self.leaving)

    def _eject(self, value: int) -> None:
        for slot in self._bus.slots:
            if slot.device and value >> slot.device & 1:
                self.on_eject(slot.device)
        self.unsettled -= {device for device in self.unsettled if value >> device & 1}

    def _set_ost_event(self, value: int) -> None:
        self._ost_event = value

    def _ost(self, status: int) -> None:
        device, event = self._ost_event >> 16, self._ost_event & 0xFFFF
        if event in (EJECT_REQUEST, OSPM_EJECT) and 0 < device < DEVICES:
            # 6.3.5: "Bits 31:16 reserved": of the status only the low half means something.
            status &= 0xFFFF
            if status not in (OST_SUCCESS, OST_IN_PROGRESS):
                self.on_refused(device, OST_REASONS.get(status, f"status {status:#x}"))

    # State, which the bus keeps with its own.

    def reset(self) -> None:
        """A machine reset: what the guest has not heard it finds by itself."""
        self._inserted = self._asked = self._ost_event = 0
        self.unsettled.clear()

    def save(self) -> HotplugState:
        return HotplugState(self._inserted, self._asked, self._ost_event)

    def restore(self, state: HotplugState | None) -> None:
        """None: of a machine that had none of this."""
        self.known = state is not None
        if state is not None:
            self._inserted, self._asked, self._ost_event = state.inserted, state.asked, state.ost_event


def _nobody(device: int) -> None:
    """A machine that is not run yet, or that ends."""


def _nobody_hears(device: int, reason: str) -> None:
    """Likewise."""


# The AML. Names are looked up outwards, so that a slot's methods find those of the bus.


def _slot(device: int) -> bytes:
    """The object of one slot: its address, its number for people, and what the guest asks and says of it."""
    number = aml.integer(device)
    return aml.device(
        f"S{device:02X}",
        aml.name("_ADR", aml.integer(device << 16)),
        aml.name("_SUN", number),
        aml.method("_STA", 0, aml.return_(aml.call("PSTA", number))),
        aml.method("_EJ0", 1, aml.call("PEJT", number)),
        aml.method("_OST", 3, aml.call("POST", number, aml.ARG0, aml.ARG1)),
    )


def _bus_methods() -> tuple[bytes, ...]:
    names = {name: aml.name_string(name) for name in ("PINS", "PASK", "PEJE", "PPRE", "POSE", "POSS")}
    bit = aml.shift_left(aml.ONE, aml.ARG0)
    heard = []
    for device in range(1, DEVICES):
        mask = aml.integer(1 << device)
        heard += [
            aml.if_(aml.bit_and(aml.LOCAL0, mask, aml.NOTHING), aml.notify(f"S{device:02X}", DEVICE_CHECK)),
            aml.if_(aml.bit_and(aml.LOCAL1, mask, aml.NOTHING), aml.notify(f"S{device:02X}", EJECT_REQUEST)),
        ]
    return (
        aml.port_region("PREG", layout.PCI_HOTPLUG, layout.PCI_HOTPLUG_SIZE),
        aml.fields("PREG", 4, *((name, 32) for name in names)),
        aml.mutex("PLCK"),
        # _STA (6.3.7): all of present, enabled, shown and functioning, or nothing.
        aml.method(
            "PSTA", 1,
            aml.if_(aml.bit_and(names["PPRE"], bit, aml.NOTHING), aml.return_(aml.integer(0x0F))),
            aml.return_(aml.ZERO),
        ),
        aml.method("PEJT", 1, aml.acquire("PLCK"), aml.store(bit, names["PEJE"]), aml.release("PLCK"), serialized=True),
        aml.method(
            "POST", 3,
            aml.acquire("PLCK"),
            aml.store(
                aml.bit_or(aml.shift_left(aml.ARG0, aml.integer(16)), aml.ARG1, aml.NOTHING), names["POSE"]
            ),
            aml.store(aml.ARG2, names["POSS"]),
            aml.release("PLCK"),
            serialized=True,
        ),
        # What is cleared is what was read, so that what comes meanwhile stays for the next event.
        aml.method(
            "PHPE", 0,
            aml.acquire("PLCK"),
            aml.store(names["PINS"], aml.LOCAL0),
            aml.store(aml.LOCAL0, names["PINS"]),
            aml.store(names["PASK"], aml.LOCAL1),
            aml.store(aml.LOCAL1, names["PASK"]),
            aml.release("PLCK"),
            *heard,
            aml.if_(aml.bit_and(aml.LOCAL0, aml.ONE, aml.NOTHING), aml.notify("\\_SB.PCI0", BUS_CHECK)),
            serialized=True,
        ),
    )  # fmt: skip


def attach(assembly: Assembly) -> None:
    """Component "pci-hotplug", and its description."""
    bus = assembly.services.pci
    assert assembly.services.pm is not None
    hotplug = PciHotplug(bus, assembly.services.pm)
    hotplug.attach(assembly.board)
    bus.hotplug = hotplug
    acpi = assembly.services.acpi
    acpi.add_terms(aml.scope("\\_SB.PCI0", *_bus_methods(), *(_slot(device) for device in range(1, DEVICES))))
    acpi.add_event(layout.PCI_EVENT, aml.call("\\_SB.PCI0.PHPE"))
    assembly.add("pci-hotplug", hotplug)
    assembly.services.pci_hotplug = hotplug
