"""One debugger's hold on one machine: it stops, looks, changes, and lets run. Knows no protocol; `session.py` does.

All-stop: when one vCPU stops, all are parked (a hold of the dispatcher). Running some vCPUs alone leaves the others
resumed but frozen in the core, so that nothing else has to know of it. A reboot in place keeps the debugger: its
breakpoints are set again before the first instruction. Loop thread.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from cpu.contract import Capability, Vcpu
from cpu.debug import Debugging, Point, PointKind
from cpu.exits import Debug
from cpu.model import has_avx
from cpu.values import dataclass
from cpu.views import StateKind
from vmm.debug.points import Patches, Placed, Wanted, place
from vmm.debug.target import KERNEL_GS_BASE, XSAVE_HEADER, XSAVE_LEGACY, XSAVE_UPPER, CpuState
from vmm.errors import ConfigError, GuestError, StateError, core_errors
from vmm.machine.builder import Machine

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

PAGE = 4096
_STEP = 1 << 14
_HITS = 15
_UPPER = XSAVE_LEGACY + XSAVE_HEADER
_numbers = itertools.count(1)


class Why(enum.StrEnum):
    """Why the machine stopped."""

    INTERRUPTED = "interrupted"
    STEP = "step"
    BREAKPOINT = "breakpoint"
    WATCH = "watch"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Stop:
    """`point`: the breakpoint or watched range that was hit; `address`: what was touched of it."""

    why: Why
    vcpu: int = 0
    point: Point | None = None
    address: int = 0


class Action(enum.Enum):
    """What a vCPU is to do."""

    RUN = "run"
    STEP = "step"


class Debugger:
    """Attached to a machine from `attach` to `detach`."""

    def __init__(self, vm: VirtualMachine) -> None:
        self._vm = vm
        self._hold = f"debugger {next(_numbers)}"
        self._wanted: dict[Point, Wanted] = {}
        self._applied: dict[int, Debugging] = {}
        self._placed = Placed((), {})
        self._patches: Patches | None = None
        self._actions: dict[int, Action] = {}
        self._stop: Stop | None = None
        self._late: list[Stop] = []
        """Watched ranges that other vCPUs touched while the first stop was under way."""
        self._changed = asyncio.Event()
        self._ended = False
        self.attached = False
        self.hold_interrupts = True
        """A vCPU that is stepped gets no interrupts, so that it does not end up in the handler of the next tick."""
        self.on_dismiss: Callable[[], None] | None = None
        """Called by dismiss(): the client is to be cut off."""
        self._detaching: asyncio.Task[None] | None = None
        self.notices: list[str] = []
        """What the user should hear of, such as a reboot."""

    # Life.

    async def attach(self) -> None:
        """Stop the machine. StateError if it cannot be debugged, or ended."""
        machine = self._vm.machine
        if Capability.DEBUG not in machine.capabilities:
            raise StateError("this machine's core cannot be debugged")
        if self._vm.debugger is not None:
            raise StateError("a debugger is attached to this machine already; let it detach first")
        if self._vm.migration is not None:
            raise StateError("the machine is on its way to another host; wait, or cancel that")
        machine.memory.check_whole()
        self._vm.debugger = self
        self.attached = True
        self._take(machine)
        machine.dispatcher.hold(self._hold)
        await machine.dispatcher.wait_parked()
        if self._stop is None:
            self._stop = Stop(Why.ENDED if self._ended else Why.INTERRUPTED)

    def _take(self, machine: Machine) -> None:
        machine.dispatcher.on_debug = self._hit
        self._patches = Patches(machine.memory)
        self._applied = {}

    def detach(self) -> None:
        """Forget all breakpoints and let the machine run on. Idempotent."""
        if not self.attached:
            return
        self.attached = False
        if self._vm.debugger is self:
            self._vm.debugger = None
        self._wanted.clear()
        self._actions.clear()
        try:
            machine = self._vm.machine
        except StateError:
            return
        if machine.dispatcher.on_debug == self._hit:
            machine.dispatcher.on_debug = None
        if not machine.dispatcher.ended:
            self._unpatch()
            if machine.dispatcher.parked:
                self._set_all(machine, {vcpu.index: Debugging() for vcpu in machine.vcpus})
                machine.dispatcher.release(self._hold)
            else:
                self._finish_detaching(machine)

    def _finish_detaching(self, machine: Machine) -> None:
        """The vCPUs run: their breakpoints go when they next stand."""
        machine.dispatcher.hold(self._hold)

        async def finish() -> None:
            await machine.dispatcher.wait_parked()
            if not machine.dispatcher.ended:
                self._set_all(machine, {vcpu.index: Debugging() for vcpu in machine.vcpus})
            machine.dispatcher.release(self._hold)

        self._detaching = asyncio.create_task(finish(), name="debugger detaches")

    def dismiss(self) -> None:
        """Somebody else wants the machine to run: detach, and cut the client off."""
        self.detach()
        if self.on_dismiss is not None:
            self.on_dismiss()

    def rebuilt(self, machine: Machine) -> None:
        """The machine was started again in place; called before its first instruction."""
        if not self.attached:
            return
        stopped = self._stop is not None
        self._take(machine)
        lost = [f"{address:#x}" for address in self._placed.int3]
        self._wanted = {point: replace(each, gpa=None) for point, each in self._wanted.items()}
        self.notices.append("the machine was started again")
        self._changed.set()
        if stopped:
            machine.dispatcher.hold(self._hold)
            return
        try:
            self._apply(machine, self._actions)
        except ConfigError:
            self.notices.append(f"breakpoints in memory are gone: {', '.join(lost)}")
            self._wanted = {point: each for point, each in self._wanted.items() if not each.memory}
            self._apply(machine, self._actions)

    def ended(self) -> None:
        """The machine is over."""
        self._ended = True
        self._stop = Stop(Why.ENDED)
        self._changed.set()

    # Stopping and running.

    @property
    def stopped(self) -> Stop | None:
        """Why the machine stands; None while it runs, or is about to stop."""
        return self._stop if self._stop is not None and (self._ended or self._parked) else None

    @property
    def _parked(self) -> bool:
        try:
            return self._vm.machine.dispatcher.parked
        except StateError:
            return False

    async def wait(self) -> Stop:
        """Until the machine stands because of this debugger, or has ended."""
        while True:
            if self._stop is not None:
                if self._ended:
                    return self._stop
                try:
                    machine = self._vm.machine
                except StateError:  # between two boots
                    machine = None
                if machine is not None:
                    await machine.dispatcher.wait_parked()
                    if machine.dispatcher.parked and not machine.dispatcher.ended:
                        self._unpatch()
                        return self._stop
            self._changed.clear()
            await self._changed.wait()

    def interrupt(self) -> None:
        """Stop a machine that runs; wait() tells when it stands."""
        if self._stop is None:
            self._halt(Stop(Why.INTERRUPTED, next(iter(self._actions), 0)))

    def resume(self, actions: Mapping[int, Action] | None = None) -> None:
        """Let the vCPUs in `actions` (default: all run) do what it says; the others stand still. StateError if the
        machine does not stand; ConfigError for a vCPU that there is not, or breakpoints that the core does not have."""
        machine = self._standing()
        chosen = dict(actions) if actions is not None else {vcpu.index: Action.RUN for vcpu in machine.vcpus}
        if not chosen or any(index not in range(len(machine.vcpus)) for index in chosen):
            raise ConfigError("no such vCPU")
        while self._late:
            stop = self._late.pop(0)
            if stop.point in self._wanted:
                self._stop = stop
                return
        self._apply(machine, chosen)
        self._actions = chosen
        self._stop = None
        machine.dispatcher.release(self._hold)

    def _apply(self, machine: Machine, actions: Mapping[int, Action]) -> None:
        everything = place(self._wanted.values(), machine.capabilities)
        per_vcpu: dict[int, Debugging] = {}
        passed: set[int] = set()
        for vcpu in machine.vcpus:
            action = actions.get(vcpu.index)
            points = everything.points
            if action is Action.STEP and everything.points + tuple(everything.int3):
                pc = self.state(vcpu.index).pc
                points = tuple(p for p in points if p.kind is not PointKind.EXECUTE or p.address != pc)
                passed.add(pc)
            per_vcpu[vcpu.index] = Debugging(
                step=action is Action.STEP,
                frozen=action is None,
                hold_interrupts=action is Action.STEP and self.hold_interrupts,
                int3=bool(everything.int3),
                points=points,
            )
        self._set_all(machine, per_vcpu)
        self._placed = everything
        if self._patches is not None:
            self._patches.insert(gpa for linear, gpa in everything.int3.items() if linear not in passed)

    def _set_all(self, machine: Machine, settings: Mapping[int, Debugging]) -> None:
        with core_errors():
            for vcpu in machine.vcpus:
                debugging = settings[vcpu.index]
                if self._applied.get(vcpu.index, Debugging()) != debugging or debugging.step:
                    vcpu.set_debug(debugging)
                    self._applied[vcpu.index] = debugging

    def _hit(self, index: int, exit_: Debug) -> None:
        """Called by the dispatcher: a vCPU parked with a Debug exit."""
        if not self.attached:
            return
        if exit_.exception == 3 and exit_.dr6 & (_STEP | _HITS) == 0:
            linear = self.state(index).pc
            if linear not in self._placed.int3:
                self._give_int3(index)
                return
            self._halt(Stop(Why.BREAKPOINT, index, Point(PointKind.EXECUTE, linear), linear))
            return
        if exit_.dr6 & _HITS:
            point = self._point_at(index, exit_.address)
            why = Why.BREAKPOINT if point.kind is PointKind.EXECUTE else Why.WATCH
            self._halt(Stop(why, index, point, exit_.address))
        elif self._actions.get(index) is Action.STEP:
            self._halt(Stop(Why.STEP, index))
        # Anything else was asked for before the last stop: the vCPU goes on.

    def _point_at(self, index: int, address: int) -> Point:
        for point in self._wanted:
            if point.kind is not PointKind.EXECUTE and point.address <= address < point.address + point.length:
                watched = point
                break
        else:
            watched = None
        execute = Point(PointKind.EXECUTE, address)
        if watched is None or (execute in self._wanted and self.state(index).pc == address):
            return execute
        return watched

    def _halt(self, stop: Stop) -> None:
        if self._stop is None:
            self._stop = stop
            with suppress(StateError):  # between two boots: rebuilt() holds the next
                self._vm.machine.dispatcher.hold(self._hold)
            self._changed.set()
        elif stop.why is Why.WATCH:
            self._late.append(stop)
        # A breakpoint of execution is hit again when its vCPU goes on.

    def _give_int3(self, index: int) -> None:
        """The guest's own INT3: it gets its #BP."""
        debugging = replace(self._applied.get(index, Debugging()), give_int3=True)
        with core_errors():
            self._vm.machine.vcpus[index].set_debug(debugging)
        self._applied[index] = debugging

    # Guest memory while others look at it.

    def lift(self) -> None:
        """Take INT3 out of guest memory, which is about to be saved or copied; every vCPU is parked."""
        self._unpatch()

    def put_back(self) -> None:
        """Undo lift()."""
        if self.attached and not self._ended and self._stop is None and self._patches is not None:
            self._patches.insert(self._placed.int3.values())

    def _unpatch(self) -> None:
        if self._patches is not None:
            self._patches.remove()

    # Looking and changing.

    def _standing(self) -> Machine:
        if not self.attached or self._ended:
            raise StateError("the machine has ended" if self._ended else "the debugger is not attached")
        machine = self._vm.machine
        if self._stop is None or not machine.dispatcher.parked:
            raise StateError("the machine runs")
        return machine

    def vcpu(self, index: int) -> Vcpu:
        """A parked vCPU. StateError if the machine runs; ConfigError if there is none."""
        machine = self._vm.machine
        if not 0 <= index < len(machine.vcpus):
            raise ConfigError(f"there is no vCPU {index}")
        return machine.vcpus[index]

    @property
    def count(self) -> int:
        """vCPUs."""
        return self._vm.config.cpus

    @property
    def avx(self) -> bool:
        """Whether the guest has YMM registers. StateError between two boots."""
        return has_avx(self._vm.machine.cpuid[0])

    def state(self, index: int) -> CpuState:
        """The registers of a parked vCPU."""
        with core_errors():
            return cpu_state(self.vcpu(index))

    def set_state(self, index: int, state: CpuState) -> None:
        """Change registers: only what differs is set. ConfigError for what no processor can hold."""
        self._standing()
        before, vcpu = self.state(index), self.vcpu(index)
        with core_errors():
            if (state.legacy, state.upper) != (before.legacy, before.upper):
                blob = bytearray(vcpu.get_blob(StateKind.XSAVE))
                blob[:XSAVE_LEGACY] = state.legacy
                blob[XSAVE_LEGACY] |= 3  # XSTATE_BV: x87 and SSE are there
                if state.upper != before.upper:
                    blob[_UPPER : _UPPER + XSAVE_UPPER] = state.upper
                    blob[XSAVE_LEGACY] |= 4
                vcpu.set_blob(StateKind.XSAVE, blob)
            if state.system != before.system:
                vcpu.set_system_registers(state.system)
            if state.general != before.general:
                vcpu.set_registers(state.general)
            if state.kernel_gs_base != before.kernel_gs_base:
                vcpu.set_msr(KERNEL_GS_BASE, state.kernel_gs_base)

    def read(self, index: int, address: int, length: int, *, physical: bool = False) -> bytes:
        """Up to `length` bytes of RAM at a linear (as vCPU `index` translates) or guest-physical address, as far as
        they are there."""
        machine = self._standing()
        found = bytearray()
        for gpa, size in self._runs(index, address, length, physical):
            try:
                found += machine.memory.read(gpa, size)
            except GuestError:
                break
        return bytes(found)

    def write(self, index: int, address: int, data: bytes, *, physical: bool = False) -> None:
        """ConfigError, with nothing written, if not all of it is RAM."""
        memory = self._standing().memory
        runs = list(self._runs(index, address, len(data), physical))
        if sum(size for _, size in runs) < len(data):
            raise ConfigError(f"{address:#x} is not mapped")
        try:
            for gpa, size in runs:
                memory.view(gpa, size)
        except GuestError:
            raise ConfigError(f"{address:#x} is not RAM") from None
        at = 0
        for gpa, size in runs:
            memory.write(gpa, data[at : at + size])
            at += size

    def translate(self, index: int, linear: int) -> int | None:
        """The guest-physical address; None: not mapped."""
        with core_errors():
            return self.vcpu(index).translate(linear)

    def _runs(self, index: int, address: int, length: int, physical: bool) -> Iterable[tuple[int, int]]:
        """(guest-physical address, length) of the parts within pages, up to the first that is not mapped."""
        while length > 0 and address < 1 << 64:
            size = min(length, PAGE - address % PAGE)
            gpa = address if physical else self.translate(index, address)
            if gpa is None:
                return
            yield gpa, size
            address, length = address + size, length - size

    # Breakpoints.

    def insert(self, point: Point, *, memory: bool = False, vcpu: int = 0) -> None:
        """Have a breakpoint from the next resume() on. With `memory` it may be an INT3, where vCPU `vcpu` has the
        address now, on cores that have no better. ConfigError if it cannot be."""
        machine = self._standing()
        native = Capability.BREAKPOINTS in machine.capabilities
        gpa = self.translate(vcpu, point.address) if memory and not native else None
        if gpa is not None:
            try:
                machine.memory.read(gpa, 1)
            except GuestError:
                gpa = None
        wanted = {**self._wanted, point: Wanted(point, memory, gpa)}
        place(wanted.values(), machine.capabilities)
        self._wanted = wanted

    def remove(self, point: Point) -> None:
        """Nothing if it is not there."""
        self._wanted.pop(point, None)


def cpu_state(vcpu: Vcpu) -> CpuState:
    """The registers of a parked vCPU."""
    area = vcpu.get_blob(StateKind.XSAVE)
    upper = area[_UPPER : _UPPER + XSAVE_UPPER] if area[XSAVE_LEGACY] & 4 else bytes(XSAVE_UPPER)
    return CpuState(
        vcpu.registers(), vcpu.system_registers(), area[:XSAVE_LEGACY], vcpu.msr(KERNEL_GS_BASE), bytes(upper)
    )
