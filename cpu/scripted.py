"""The scripted core: vCPUs that perform a list of steps and record what their reads yielded. For tests.

It runs on the same native thread loop as the real cores: accesses meet the posted, shadow and ioeventfd tables, other
exits park the vCPU, `kick` interrupts between steps. At the end of its script a vCPU idles until it is kicked.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpu import _core
from cpu.contract import Capability, CpuidEntry, VmConfig
from cpu.errors import ConfigError, StateError
from cpu.exits import (
    Debug,
    Exit,
    FailEntry,
    Halt,
    InternalError,
    Interrupted,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Shutdown,
    SystemEvent,
)
from cpu.values import dataclass
from cpu.views import EXIT
from cpu.vm import CoreVcpu, CoreVm

_KINDS: tuple[type, ...] = (
    PortIn, PortOut, MmioRead, MmioWrite, Halt, Shutdown, SystemEvent, FailEntry, InternalError, Debug, Interrupted,
)  # fmt: skip
_STORE = len(_KINDS)


@dataclass(frozen=True, slots=True)
class StoreStep:
    """A step that is no exit: the vCPU writes `value` (1, 2, 4 or 8 bytes) to guest memory."""

    address: int
    size: int
    value: int


@dataclass(frozen=True, slots=True)
class LineChange:
    """set_irq(gsi, level) as the core received it."""

    gsi: int
    level: bool


@dataclass(frozen=True, slots=True)
class MsiMessage:
    """signal_msi(address, data) as the core received it; an NMI arrives as the message that would send it."""

    address: int
    data: int


Step = Exit | StoreStep


def _words(data: Sequence[int]) -> tuple[int, ...]:
    if len(data) > 16:
        raise ConfigError("at most 16 words of data")
    return (*data, *(0,) * (16 - len(data)))


def _pack(step: Step) -> bytes:
    size = address = value = rip = code = extra = 0
    data: tuple[int, ...] = ()
    instruction = b""
    match step:
        case StoreStep(address, size, value):
            return EXIT.pack(_STORE, size, address, value, 0, 0, 0, 0, *_words(()), 0, b"")
        case PortIn(address, size) | MmioRead(address, size):
            pass
        case PortOut(address, size, value) | MmioWrite(address, size, value):
            pass
        case SystemEvent(code, data):
            pass
        case FailEntry(code, extra):
            pass
        case InternalError(code, rip, instruction, data):
            code &= (1 << 64) - 1
        case Debug(rip, code, extra, address):
            pass
    if len(instruction) > 15:
        raise ConfigError("an instruction has at most 15 bytes")
    kind = _KINDS.index(type(step))
    return EXIT.pack(
        kind, size, address, value, rip, code, extra, len(data), *_words(data), len(instruction), instruction
    )


class ScriptedVcpu(CoreVcpu):
    """A vCPU with a script."""

    def script(self, *steps: Step) -> None:
        """Append steps. Parked or fresh only."""
        _core.script_append(self, b"".join(_pack(step) for step in steps))

    @property
    def answers(self) -> list[int]:
        """What the script's reads have yielded so far, in order, shadow reads included. Parked only."""
        return _core.script_answers(self)


class ScriptedVm(CoreVm):
    """A VM of the scripted core."""

    def create_vcpu(self, index: int) -> ScriptedVcpu:
        vcpu = ScriptedVcpu(self, index)
        vcpu._vm = self
        return vcpu

    @property
    def interrupts(self) -> list[LineChange | MsiMessage]:
        """Everything signalled so far, in order."""
        return [
            MsiMessage(first, second) if msi else LineChange(second, bool(first))
            for msi, first, second in _core.script_interrupts(self)
        ]


class ScriptedSystem:
    """The scripted core (cpu.contract.System). `capabilities` may be chosen, to test what a machine does without."""

    DEFAULT = frozenset({Capability.VIRTUAL_CLOCK, Capability.DIRTY_LOG, Capability.IRQFD, Capability.NMI})

    def __init__(self, capabilities: frozenset[Capability] = DEFAULT) -> None:
        self._capabilities = capabilities
        self._closed = False

    @property
    def name(self) -> str:
        """"scripted" """
        return "scripted"

    def capabilities(self) -> frozenset[Capability]:
        """Those that it was made with."""
        return self._capabilities

    def supported_cpuid(self) -> list[CpuidEntry]:
        """Enough for code that edits a table: the highest leaves, and leaf 1."""
        return [
            CpuidEntry(0, 0, 0, 0xD, 0x68747541, 0x444D4163, 0x69746E65),
            CpuidEntry(1, 0, 0, 0x00A20F10, 0, 0x8020_0000, 0x178B_FBFF),
            CpuidEntry(0x8000_0000, 0, 0, 0x8000_0008, 0, 0, 0),
            CpuidEntry(0x8000_0008, 0, 0, 0x3030, 0, 0, 0),
        ]

    def create_vm(self, config: VmConfig) -> ScriptedVm:
        """A VM whose vCPUs replay what their script() says."""
        if self._closed:
            raise StateError("the core is closed")
        # A few architectural MSRs, so that states hold some: TSC, APIC base, STAR, LSTAR.
        return ScriptedVm(
            "scripted",
            config,
            supported_cpuid=self.supported_cpuid,
            msr_indices=(0x10, 0x1B, 0xC000_0081, 0xC000_0082),
        )

    def close(self) -> None:
        """Nothing to give back."""
        self._closed = True
