"""The contract of an execution core: system, vm, vcpu. It is KVM's own.

Life of a vCPU: created *parked*. `resume()` lets its native thread run it; it parks again with every exit that
`Vm.take()` hands out, and stays parked until `resume()` answers that exit. Registers and state may be read and set
only while parked. So a paused VM is one whose vCPUs are all parked: `kick()` each, take the `Interrupted` exits.

Threads: everything here is called from one thread (the loop's) unless the docstring says *any thread*.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from cpu.exits import AlarmDue, Entry, Exit, Posted
from cpu.values import U8, U16, U32, U64, dataclass

if TYPE_CHECKING:
    from cpu.debug import Debugging, PastExit, TraceEntry
    from cpu.state import VcpuState, VmState


class Capability(enum.StrEnum):
    """What a core may offer beyond the contract's core; `vmm/` asks for these and never for a core's name."""

    REAL_MODE = "real-mode"
    PAE_PAGING = "pae-paging"
    STOCK_KERNELS = "stock-kernels"
    VIRTUAL_CLOCK = "virtual-clock"
    DIRTY_LOG = "dirty-log"
    IRQFD = "irqfd"
    NMI = "nmi"
    INSTRUCTION_COUNT = "instruction-count"
    DETECTS_HALT = "detects-halt"
    DEBUG = "debug"
    """Vcpu.set_debug() and translate()."""
    BREAKPOINTS = "breakpoints"
    """Any number of points (cpu.debug.MAX_POINTS) of any length. Without it: four, of 1, 2, 4 or 8 bytes, aligned."""
    TRACE = "trace"


class Space(enum.IntEnum):
    """The two address spaces of the bus."""

    PORT = 0
    MMIO = 1


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One CPUID leaf (struct kvm_cpuid_entry2); flags bit 0: `index` (ECX) is significant."""

    function: U32
    index: U32
    flags: U32
    eax: U32
    ebx: U32
    ecx: U32
    edx: U32


@dataclass(frozen=True, slots=True)
class VmConfig:
    """What a VM needs to know before its vCPUs are made."""

    vcpus: int = 1
    virtual_clock: bool = False
    """Time is instructions retired. It stands still, for all vCPUs, while any vCPU is parked (software core)."""
    virtual_ips: int = 1_000_000_000
    """Instructions per second of virtual time."""
    epoch_ns: int | None = None
    """CLOCK_REALTIME in ns at time 0, 0 or more; None: now."""
    seed: int | None = None
    """Seeds RDRAND and RDSEED (software core); None: the host's entropy."""
    pit: bool = True
    """An 8254 at ports 0x40 to 0x43, and port 0x61. Without it KVM closes the VM 14 ms sooner (tests.bench start)."""
    parallel: bool = False
    """Software core with the real clock: each vCPU has a native thread of its own. KVM's always have."""
    finish: bool = True
    """The software core executes the instructions that the host's KVM gives up (`stats()['finished']`)."""
    tsc_khz: int = 0
    """Rate of the guests' TSC; 0: the core's own (KVM: the host's, software core: 1 GHz). A guest that is to move to a
    core which cannot scale has to have that core's. HostError from create_vcpu() if the core cannot have it."""


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """GSI -> MSI message."""

    gsi: int
    address: int
    data: int


@dataclass(frozen=True, slots=True)
class Segment:
    base: U64 = 0
    limit: U32 = 0xFFFF
    selector: U16 = 0
    type: U8 = 3
    present: U8 = 1
    dpl: U8 = 0
    db: U8 = 0
    s: U8 = 1
    l: U8 = 0  # noqa: E741 - the SDM's name
    g: U8 = 0
    avl: U8 = 0
    unusable: U8 = 0


@dataclass(frozen=True, slots=True)
class Registers:
    """General registers (64 bits each)."""

    rax: U64 = 0
    rbx: U64 = 0
    rcx: U64 = 0
    rdx: U64 = 0
    rsi: U64 = 0
    rdi: U64 = 0
    rsp: U64 = 0
    rbp: U64 = 0
    r8: U64 = 0
    r9: U64 = 0
    r10: U64 = 0
    r11: U64 = 0
    r12: U64 = 0
    r13: U64 = 0
    r14: U64 = 0
    r15: U64 = 0
    rip: U64 = 0
    rflags: U64 = 2


@dataclass(frozen=True, slots=True)
class SystemRegisters:
    """Segment, table and control registers (struct kvm_sregs)."""

    cs: Segment = field(default_factory=Segment)
    ds: Segment = field(default_factory=Segment)
    es: Segment = field(default_factory=Segment)
    fs: Segment = field(default_factory=Segment)
    gs: Segment = field(default_factory=Segment)
    ss: Segment = field(default_factory=Segment)
    tr: Segment = field(default_factory=Segment)
    ldt: Segment = field(default_factory=Segment)
    gdt: tuple[U64, U16] = (0, 0xFFFF)
    """(base, limit)"""
    idt: tuple[U64, U16] = (0, 0xFFFF)
    cr0: U64 = 0x60000010
    cr2: U64 = 0
    cr3: U64 = 0
    cr4: U64 = 0
    cr8: U64 = 0
    efer: U64 = 0
    apic_base: U64 = 0xFEE00900


@runtime_checkable
class Vcpu(Protocol):
    """One virtual processor."""

    @property
    def index(self) -> int:
        """Its number in the VM, from 0."""

    def resume(self, entry: Entry) -> None:
        """Answer the exit that parked it (Resume also for a fresh vCPU) and run on. StateError if it is not parked."""

    def complete(self, entry: Entry) -> None:
        """resume(), but only to the end of the instruction of that exit, which may have further accesses: then it
        parks with `Interrupted`. (The software core may take a few instructions more after a read of MMIO.) So to
        save the state of a vCPU that is parked in an access: complete() it."""

    def kick(self) -> None:
        """Make it park with `Interrupted` soon (1 ms); nothing if it is parked. *any thread*

        A kick is sticky: if another exit was on its way, `Interrupted` follows right after that one's answer, with the
        access completed."""

    def registers(self) -> Registers:
        """The general registers, of a parked vCPU."""

    def set_registers(self, registers: Registers) -> None:
        """Set the general registers of a parked vCPU."""

    def system_registers(self) -> SystemRegisters:
        """The system registers, of a parked vCPU."""

    def set_system_registers(self, registers: SystemRegisters) -> None:
        """Set the system registers of a parked vCPU."""

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """What CPUID tells; before the vCPU first runs."""

    def msr(self, index: int) -> int:
        """A model-specific register. HostError if the core has none of that index."""

    def set_msr(self, index: int, value: int) -> None:
        """Set a model-specific register."""

    def state(self) -> VcpuState:
        """Everything the vCPU is, CPUID as set included. Complete only between instructions: fresh, or parked by
        `Interrupted` (or by an exit that is no access)."""

    def set_state(self, state: VcpuState) -> None:
        """Take over what state() gave, on this core or another: of a vCPU that has not run yet, or of itself. After
        Vm.set_state(), when guest memory has its content. HostError if the core lacks what the state needs, by name;
        ConfigError if no processor can be in that state. The vCPU is no good then."""

    def get_blob(self, kind: int) -> bytes:
        """A part of state() in its layout of the KVM API (cpu.views.StateKind but MSRS), of a parked vCPU."""

    def set_blob(self, kind: int, data: bytes | bytearray) -> int:
        """Set what get_blob() gave. ConfigError if no processor can hold it."""

    def stood_still(self) -> None:
        """Have the guest told that this parked vCPU stood still while time went on (PVCLOCK_GUEST_STOPPED of kvmclock;
        KVM API 4.68), so that its watchdogs do not take the gap for a lockup. Nothing if the guest does not use
        kvmclock, and with the virtual clock, which stood still as well."""

    def nmi(self) -> None:
        """Deliver a non-maskable interrupt. *any thread*"""

    # For debuggers. Neither guest memory nor what the guest sees of its registers is touched. (KVM: the guest's own
    # debug registers do nothing while there are points.)
    def set_debug(self, debugging: Debugging) -> None:
        """Replace what a parked vCPU is debugged with; Debugging(): nothing. It parks with `Debug` exits then, and with
        the same one again when it is resumed at a point of execution. Not part of its state. ConfigError if a point is
        of a kind, length or number that this core does not have; HostError without Capability.DEBUG."""

    def translate(self, linear: int) -> int | None:
        """The guest-physical address to which the page tables of a parked vCPU lead; None: nowhere. Rights are not
        looked at."""

    def trace(self) -> list[TraceEntry]:
        """What a parked vCPU executed since Vm.set_trace(), the oldest first; nothing without Capability.TRACE."""

    def past_exits(self) -> list[PastExit]:
        """The last exits of a parked vCPU, the oldest first. Always kept."""


class Shadow(Protocol):
    """One shadow-read register: the guest reads `value` without an exit while it is valid."""

    def set(self, value: int, after: int | None = None) -> None:
        """Make reads yield `value`. With `after`, the first read switches the register to `after` by itself and
        posts a zero-length `Posted(tag, size, b"")` notice (a read-to-clear register)."""

    def invalidate(self) -> None:
        """Reads exit synchronously again until the next set()."""


@runtime_checkable
class Vm(Protocol):
    """One virtual machine in guest mode: memory slots, interrupt controller, vCPUs, the channel of exits. A forked
    child may close() it; anything else raises StateError there, the threads are its parent's."""

    def create_vcpu(self, index: int) -> Vcpu:
        """A vCPU, fresh and parked; each index once."""

    def set_memory_slot(
        self, slot: int, address: int, memory: memoryview | None, *, readonly: bool = False, log_dirty: bool = False
    ) -> None:
        """Map a writable, page-aligned buffer at a guest-physical address; None removes the slot. The core keeps
        the buffer exported until removal or close."""

    def start_dirty_log(self) -> None:
        """Log writes to every writable slot from now on, also to those that are set with `log_dirty` already. Slots
        that are set later are logged as they say. vCPUs may run. HostError leaves no slot logged."""

    def stop_dirty_log(self) -> None:
        """Log no slot any more, and forget what was logged. vCPUs may run. Nothing if none is logged."""

    def dirty_log(self, slot: int) -> bytes:
        """The pages of a logged slot that were written since the last call: bit n is page n of 4 KiB, in 64-bit words
        of this host (little-endian), whose unused last bits are 0. The call clears the log.

        vCPUs may run meanwhile: a write that the result lacks will be in the next, and whoever copies a page after the
        call has what its bit promises. Page-table bits, kvmclock pages and whatever else the core writes by itself are
        in the log, and what memory_written() names. ConfigError if the slot is not logged."""

    def memory_written(self, address: int, length: int) -> None:
        """The caller wrote guest memory (DMA): it is entered in the dirty log of the slots it concerns. Hardware is
        coherent beyond that, the software core drops translated code. Call it after the write. *any thread*"""

    def memory_written_ranges(self, ranges: bytes) -> None:
        """memory_written() for many: pairs of 64-bit numbers of this host, (address, length). *any thread*"""

    def fileno(self) -> int:
        """Readable when take() has something. One descriptor per VM."""

    def take(self) -> list[tuple[int, Exit] | Posted | AlarmDue]:
        """What happened since the last call, in order: every posted write made before an exit stands before it.
        (vcpu index, exit) pairs leave that vCPU parked. Never blocks. Virtual clock: call it once each time that the
        descriptor is readable; the next call says that what this one returned has been handled."""

    def linger(self) -> None:
        """Say that what take() returned is answered. Waits up to 20 µs for the next exit, if that has paid lately:
        the loop then finds the descriptor readable instead of going to sleep. May be left out."""

    # The three kinds of access. Everything not named here is a synchronous exit.
    def add_posted(self, space: Space, address: int, size: int, tag: int) -> None:
        """Writes of `size` bytes at exactly `address` are posted. (virtual clock: they are still in order, and the
        vCPU waits until they were taken, so that a run stays a function of its inputs.)"""

    def remove_posted(self, space: Space, address: int, size: int) -> None:
        """Undo add_posted()."""

    def add_shadow(self, space: Space, address: int, size: int, tag: int = 0) -> Shadow:
        """Reads of `size` bytes at `address` are answered from the shadow; invalid until its first set()."""

    def remove_shadow(self, space: Space, address: int, size: int) -> None:
        """Undo add_shadow()."""

    def add_ioeventfd(
        self, fd: int, space: Space, address: int, size: int, match: int | None = None, answerer: object = None
    ) -> None:
        """A write (of value `match`, if given; size 0: any size) signals the eventfd and is done.

        `answerer`: a capsule (cpu/native/answerer.h) that is asked first, on the vCPU's own thread; the eventfd is
        signalled if it leaves the matter to others. KVM, and any core with the virtual clock, does not ask it."""

    def remove_ioeventfd(
        self, fd: int, space: Space, address: int, size: int, match: int | None = None
    ) -> None:
        """Undo add_ioeventfd(), with the same arguments."""

    # Interrupts.
    def set_irq(self, gsi: int, level: bool) -> None:
        """Drive one of the 24 GSIs (0-15 reach PIC and IOAPIC, 0 is IOAPIC pin 2). *any thread*"""

    def signal_msi(self, address: int, data: int) -> None:
        """*any thread*"""

    def set_msi_routes(self, routes: Sequence[MsiRoute]) -> None:
        """Replace all MSI routes; GSIs 24 and up. The fixed PIC/IOAPIC routes stay."""

    def add_irqfd(self, fd: int, gsi: int, resample_fd: int | None = None) -> None:
        """A write to the eventfd raises the GSI; with a resample eventfd it is level-triggered."""

    def remove_irqfd(self, fd: int, gsi: int) -> None:
        """Undo add_irqfd()."""

    # Time.
    def now_ns(self) -> int:
        """Time since the VM's start: host monotonic, or virtual. *any thread*"""

    def set_alarm(self, deadline_ns: int | None) -> None:
        """Have take() report AlarmDue once now_ns() >= deadline_ns. One alarm per VM."""

    def tsc_khz(self) -> int:
        """The rate of the guests' TSC, of vCPUs that are there and parked; 0: unknown."""

    def set_tsc_khz(self, khz: int) -> None:
        """Have it tick so fast, before they run. HostError if the core cannot."""

    def state(self) -> VmState:
        """Everything that is not a vCPU's, while all of them are there and parked. Take it before the vCPUs' states:
        time goes on, and TSCs must not be behind the clock."""

    def set_state(self, state: VmState) -> None:
        """Take over what state() gave, on this core or another, while all vCPUs are there and parked. Time goes on from
        where it was; the wall clock that kvmclock tells is the host's (KVM), or VmConfig.epoch_ns + now_ns(). HostError
        if the core lacks what the state needs, by name."""

    def stats(self) -> dict[str, int]:
        """Counters: exits by class ('exit.port-in'...), 'posted', 'shadow', 'ioeventfd', and the core's own."""

    def last_finished(self) -> bytes:
        """The bytes of one of the last instructions that the host's KVM gave up and the software core executed (every
        64th is kept), as far as they could be read; b"" without any."""

    def set_trace(self, entries: int) -> None:
        """Keep the last `entries` (at most 2^20; 0: none) blocks and events of each vCPU, while all of them are parked.
        The guest runs slower. HostError without Capability.TRACE."""

    def close(self) -> None:
        """Stop and join every thread, release slots, close descriptors. Idempotent."""


@runtime_checkable
class System(Protocol):
    """An execution core on this host."""

    @property
    def name(self) -> str:
        """As `--core` names it."""

    def capabilities(self) -> frozenset[Capability]:
        """What it can do on this host."""

    def supported_cpuid(self) -> list[CpuidEntry]:
        """The most that Vcpu.set_cpuid() may be given."""

    def create_vm(self, config: VmConfig) -> Vm:
        """A new virtual machine. HostError if the host refuses."""

    def close(self) -> None:
        """Give back what it holds; its VMs must be closed. Idempotent."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a core can be had here: `reason` is one sentence, `cure` what the user can do (may be empty)."""

    available: bool
    capabilities: frozenset[Capability]
    reason: str
    cure: str = ""
    max_vcpus: int = 64
    """Of one VM; no core has more."""
