"""Processors that come and go: the registers that our AML reads and writes, that AML, and which vCPUs may run.

Specification: ACPI 6.4, 5.2.12.2 (local APIC structures), 5.6.6 (device object notifications), 6.2.10 (_MAT), 6.3.3
(_EJx), 6.3.5 (_OST), 6.3.7 (_STA), 8.4 (processor devices). The registers are this machine's own; only its DSDT knows
them. Each is 32 bits wide; of the pairs the second one has the bits of processors 32 to 63:

    0x00, 0x04 INSERTED   processors that came; the guest clears the bits that it has seen by writing them
    0x08, 0x0c ASKED      processors that the host asks for; likewise
    0x10, 0x14 PRESENT    processors that are there
    0x18       EJECT      the guest gives up the processor whose number it writes
    0x1c       OST        what the guest reports: number << 24 | notification << 8 | status

Every vCPU is made at the start. One that is not present is held parked, whatever the guest does (with the virtual
clock, which stands while a vCPU is held, it waits for its first INIT instead). Loop thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from cpu.contract import Space
from cpu.values import U32, U64, dataclass
from vmm.acpi import aml
from vmm.machine import layout
from vmm.machine.bus import Register, RegisterMap

if TYPE_CHECKING:
    from vmm.machine.interfaces import Assembly, Board

INSERTED, ASKED, PRESENT, EJECT, OST = 0x00, 0x08, 0x10, 0x18, 0x1C
DEVICE_CHECK, EJECT_REQUEST, OSPM_EJECT = 1, 3, 0x103 & 0xFF
"""5.6.6, table 5.187; and the low byte of 6.3.5's ejection that began in the guest."""
OST_SUCCESS, OST_IN_PROGRESS = 0x00, 0x84
WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class CpuHotplugState:
    """Bit n is processor n; `ost`: the last report."""

    kind: ClassVar = "cpu-hotplug"
    version: ClassVar = 1
    present: U64
    inserted: U64
    asked: U64
    ost: U32


class CpuHotplug:
    """The registers, and the processors that are present."""

    state_type = CpuHotplugState

    def __init__(
        self,
        count: int,
        present: set[int],
        event: Callable[[], None],
        allow: Callable[[int, bool], None],
    ) -> None:
        """`count`: how many processors there can be. `present`: those that are, which outlives this incarnation of the
        machine. `event` raises the general purpose event; `allow(index, on)` lets a vCPU run, or parks it."""
        self.count = count
        self.present = present
        self._event = event
        self._allow = allow
        self._inserted = self._asked = self._ost = 0
        self.on_change: Callable[[int, str | None], None] = _nobody
        """The guest gave a processor up (None), or says why it does not."""
        halves = []
        for name, at, read, clear in (
            ("INSERTED", INSERTED, lambda: self._inserted, self._clear_inserted),
            ("ASKED", ASKED, lambda: self._asked, self._clear_asked),
            ("PRESENT", PRESENT, self._mask, None),
        ):
            for half in (0, 32):
                halves.append(_half(f"{name}{half}", at + half // 8, half, read, clear))
        self._registers = RegisterMap(
            layout.CPU_HOTPLUG_SIZE,
            [
                *halves,
                Register("EJECT", EJECT, 4, lambda: 0, self._eject),
                Register("OST", OST, 4, lambda: self._ost, self._report),
            ],
            gap=0,
        )
        self.read, self.write = self._registers.read, self._registers.write

    def attach(self, board: Board) -> None:
        """Put the registers on the machine's ports."""
        board.map(Space.PORT, layout.CPU_HOTPLUG, layout.CPU_HOTPLUG_SIZE, self, "cpu hot plug")

    def start(self) -> None:
        """Park what is not present."""
        for index in range(self.count):
            if index not in self.present:
                self._allow(index, False)

    # What the machine's owner calls.

    def insert(self, index: int) -> None:
        """A processor is there from now on, and the guest is told."""
        self.present.add(index)
        self._asked &= ~(1 << index)
        self._inserted |= 1 << index
        self._allow(index, True)
        self._event()

    def ask(self, index: int) -> None:
        """Ask the guest to give up a processor."""
        self._inserted &= ~(1 << index)
        self._asked |= 1 << index
        self._event()

    # The guest.

    def _mask(self) -> int:
        return sum(1 << index for index in self.present)

    def _clear_inserted(self, bits: int) -> None:
        self._inserted &= ~bits

    def _clear_asked(self, bits: int) -> None:
        self._asked &= ~bits

    def _eject(self, index: int) -> None:
        if index and index in self.present:
            self.present.discard(index)
            self._allow(index, False)
            self.on_change(index, None)

    def _report(self, value: int) -> None:
        self._ost = value
        index, event, status = value >> 24, value >> 8 & 0xFFFF, value & 0xFF
        asked = index in self.present and event & 0xFF in (EJECT_REQUEST, OSPM_EJECT)
        if asked and status not in (OST_SUCCESS, OST_IN_PROGRESS):
            self.on_change(index, f"the guest does not give it up (status {status:#x})")

    # State

    def save(self) -> CpuHotplugState:
        return CpuHotplugState(self._mask(), self._inserted, self._asked, self._ost)

    def restore(self, state: CpuHotplugState) -> None:
        self._inserted, self._asked, self._ost = state.inserted, state.asked, state.ost
        self.present.clear()
        self.present.update(index for index in range(self.count) if state.present >> index & 1 or not index)
        for index in range(self.count):
            self._allow(index, index in self.present)


def _nobody(index: int, reason: str | None) -> None:
    """Nobody waits."""


def _half(name: str, at: int, shift: int, read: Callable[[], int], clear: Callable[[int], None] | None) -> Register:
    """A register of 32 bits of a mask; what is written clears them."""
    if clear is None:
        return Register(name, at, 4, lambda: read() >> shift & WORD)
    return Register(name, at, 4, lambda: read() >> shift & WORD, lambda value: clear(value << shift), lambda: 0)


# The AML, in the scope of \_SB.


def _processor(index: int) -> bytes:
    """8.4: a processor as a device, whose _UID is that of its local APIC structure."""
    number = aml.integer(index)
    present = "CPRL" if index < 32 else "CPRH"
    bit = aml.integer(1 << index % 32)
    # 5.2.12.2: type 0, 8 bytes, UID, APIC ID, flags: enabled
    entry = bytes((0, 8, index, index, 1, 0, 0, 0))
    methods = []
    if index:
        methods = [
            aml.method("_EJ0", 1, aml.call("CEJT", number)),
            aml.method("_OST", 3, aml.call("CRPT", number, aml.ARG0, aml.ARG1)),
        ]
    return aml.device(
        f"C{index:03X}",
        aml.name("_HID", aml.string("ACPI0007")),
        aml.name("_UID", number),
        aml.name("_MAT", aml.buffer(entry)),
        aml.method(
            "_STA",
            0,
            aml.if_(aml.bit_and(aml.name_string(present), bit, aml.NOTHING), aml.return_(aml.integer(0x0F))),
            aml.return_(aml.ZERO),
        ),
        *methods,
    )


def terms(count: int) -> bytes:
    """The description of `count` processors."""
    names = {name: aml.name_string(name) for name in ("CINL", "CINH", "CASL", "CASH", "CPRL", "CPRH", "CEJE", "COST")}
    low, high = (aml.LOCAL0, aml.LOCAL1), (aml.LOCAL2, aml.LOCAL3)
    heard = []
    for index in range(1, count):
        came, asked = low if index < 32 else high
        bit = aml.integer(1 << index % 32)
        heard += [
            aml.if_(aml.bit_and(came, bit, aml.NOTHING), aml.notify(f"C{index:03X}", DEVICE_CHECK)),
            aml.if_(aml.bit_and(asked, bit, aml.NOTHING), aml.notify(f"C{index:03X}", EJECT_REQUEST)),
        ]
    take = []
    for register, local in zip(("CINL", "CASL", "CINH", "CASH"), (*low, *high), strict=True):
        # What is cleared is what was read, so that what comes meanwhile stays for the next event.
        take += [aml.store(names[register], local), aml.store(local, names[register])]
    report = aml.bit_or(
        aml.shift_left(aml.ARG0, aml.integer(24)),
        aml.bit_or(
            aml.shift_left(aml.bit_and(aml.ARG1, aml.integer(0xFFFF), aml.NOTHING), aml.integer(8)),
            aml.bit_and(aml.ARG2, aml.integer(0xFF), aml.NOTHING),
            aml.NOTHING,
        ),
        aml.NOTHING,
    )
    return aml.scope(
        "\\_SB",
        aml.port_region("CREG", layout.CPU_HOTPLUG, layout.CPU_HOTPLUG_SIZE),
        aml.fields("CREG", 4, *((name, 32) for name in names)),
        aml.mutex("CLCK"),
        aml.method(
            "CEJT", 1, aml.acquire("CLCK"), aml.store(aml.ARG0, names["CEJE"]), aml.release("CLCK"), serialized=True
        ),
        aml.method(
            "CRPT", 3, aml.acquire("CLCK"), aml.store(report, names["COST"]), aml.release("CLCK"), serialized=True
        ),
        aml.method("CHPE", 0, aml.acquire("CLCK"), *take, aml.release("CLCK"), *heard, serialized=True),
        *(_processor(index) for index in range(count)),
    )


def attach(assembly: Assembly) -> None:
    """Component "cpu-hotplug" and its description, of a machine whose processors may change."""
    config = assembly.config
    if config.most_cpus == config.cpus:
        return
    services = assembly.services
    pm, acpi = services.pm, services.acpi
    assert pm is not None
    hotplug = CpuHotplug(
        config.most_cpus, assembly.present_cpus, lambda: pm.general_event(layout.CPU_EVENT), assembly.allow_cpu
    )
    hotplug.attach(assembly.board)
    acpi.describe_processors(config.most_cpus, assembly.present_cpus)
    acpi.add_terms(terms(config.most_cpus))
    acpi.add_event(layout.CPU_EVENT, aml.call("\\_SB.CHPE"))
    assembly.add("cpu-hotplug", hotplug)
    services.cpu_hotplug = hotplug
