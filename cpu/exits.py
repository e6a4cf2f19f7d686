"""Exits of a vCPU, and the entries that answer them: frozen values, no behaviour.

Vocabulary: the KVM API document (struct kvm_run). Multi-element string I/O arrives as one exit per element.
Only `vmm/machine/dispatch.py` interprets these.
"""

from __future__ import annotations

from cpu.values import dataclass


@dataclass(frozen=True, slots=True)
class PortIn:
    """A read of `size` bytes (1, 2, 4) from an I/O port; answered by CompleteRead."""

    port: int
    size: int


@dataclass(frozen=True, slots=True)
class PortOut:
    """A write of `size` bytes (1, 2, 4) to an I/O port; answered by Resume."""

    port: int
    size: int
    value: int


@dataclass(frozen=True, slots=True)
class MmioRead:
    """A read of `size` bytes (1, 2, 4, 8) at a guest-physical address outside all slots; answered by CompleteRead."""

    address: int
    size: int


@dataclass(frozen=True, slots=True)
class MmioWrite:
    """A write of `size` bytes (1, 2, 4, 8) at a guest-physical address outside all slots; answered by Resume."""

    address: int
    size: int
    value: int


@dataclass(frozen=True, slots=True)
class Halt:
    """The vCPU halted and nothing but the VMM can wake it (interrupts off, or no interrupt controller in the core)."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Triple fault."""


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """KVM_EXIT_SYSTEM_EVENT: 1 shutdown, 2 reset, 3 crash."""

    kind: int
    data: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FailEntry:
    """The hardware refused to enter guest mode."""

    reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class InternalError:
    """The core cannot go on: KVM_EXIT_INTERNAL_ERROR (suberror 1: emulation failure), or a failed ioctl.

    `instruction` holds up to 15 bytes at `rip`, when they could be read.
    """

    suberror: int
    rip: int
    instruction: bytes = b""
    data: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Debug:
    """A breakpoint or single step that the VMM asked for (Vcpu.set_debug)."""

    rip: int
    dr6: int
    """Bit 14: a step ended. Bits 0 to 3: a breakpoint or a watched range was hit."""
    exception: int
    """1 (#DB), or 3: an INT3 stands at `rip`."""
    address: int = 0
    """With one of dr6's bits 0 to 3: the breakpoint, or the linear address that was touched (KVM: of the range)."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """kick() took the vCPU out of guest mode; it is between instructions, so its state may be read and saved."""


@dataclass(frozen=True, slots=True)
class AlarmDue:
    """The VM's alarm (Vm.set_alarm) is due. Not tied to a vCPU; needs no answer."""


@dataclass(frozen=True, slots=True)
class Posted:
    """Posted writes to one address, in order, merged: `data` holds len(data) // size values of `size` bytes.

    `tag` is what the caller gave when it made the address posted. The guest did not wait; there is no answer.
    """

    tag: int
    size: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on."""


@dataclass(frozen=True, slots=True)
class CompleteRead:
    """Go on, and the read yields `value` (little-endian, truncated to the access size)."""

    value: int

    def __init__(self, value: int) -> None:  # one for each synchronous read
        object.__setattr__(self, "value", value)


Exit = (
    PortIn | PortOut | MmioRead | MmioWrite | Halt | Shutdown | SystemEvent | FailEntry | InternalError | Debug
    | Interrupted
)
Entry = Resume | CompleteRead
