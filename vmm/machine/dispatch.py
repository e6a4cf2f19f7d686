"""The only interpreter of exits: takes what a core has to say, calls buses and devices, answers.

Also the place where vCPUs are held, all of them (while at least one hold is set) or the one whose access a device
cannot end at once: such a vCPU completes its instruction and parks. A paused machine is one whose vCPUs are all
parked. Loop thread; no logging on the hot path.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from cpu.contract import Vcpu, Vm
from cpu.exits import (
    CompleteRead,
    Debug,
    Entry,
    Exit,
    FailEntry,
    Halt,
    InternalError,
    Interrupted,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Posted,
    Resume,
    Shutdown,
    SystemEvent,
)
from vmm.errors import GuestError, HostError, StateError
from vmm.lifecycle import Outcome, Reason
from vmm.machine.board import MachineBoard

RESUME = Resume()
STANDSTILL = 1.0
"""Seconds after which a vCPU that runs on is told that it stood still. Guests' watchdogs wait for several."""
EMULATION_FAILURE = 1  # KVM_INTERNAL_ERROR_EMULATION
_SYSTEM_EVENTS = {
    1: Outcome(Reason.SHUTDOWN, "system event: shutdown"),
    2: Outcome(Reason.RESET, "system event: reset"),
    3: Outcome(Reason.CRASH, "system event: crash"),
}


class Dispatcher:
    """Runs one machine's vCPUs. `finish(outcome)` is called once, from within `drain`, when the machine ended."""

    def __init__(self, vm: Vm, vcpus: Sequence[Vcpu], board: MachineBoard, finish: Callable[[Outcome], None]) -> None:
        self._vm = vm
        self._take, self._linger = vm.take, vm.linger
        self._vcpus = tuple(vcpus)
        self._board = board
        self._posted = board.posted
        self._finish = finish
        self._holds = {"pause"}
        self._held: dict[int, Entry] = dict.fromkeys(range(len(self._vcpus)), RESUME)
        self._since: dict[int, float] = {}
        """time.monotonic() when each vCPU of _held was parked. One that has not run is not here: it missed nothing."""
        self._stalls: dict[object, int] = {}
        """The vCPU that each stall keeps parked."""
        self._asking: int | None = None
        """The vCPU whose exit is being handled."""
        self._barred: set[int] = set()
        """vCPUs that are not to run although nobody holds the machine; see `allow`."""
        self._leaving: set[int] = set()
        """Barred vCPUs that are not parked yet."""
        self.halted: set[int] = set()
        """vCPUs that halted with interrupts off; they never run again."""
        self._waiters: list[asyncio.Future[None]] = []
        self.ended = False
        self.on_debug: Callable[[int, Debug], None] | None = None
        """Set by a debugger. Called with a vCPU's index and what it parked for. The vCPU runs on unless the callback
        holds the machine."""
        board.stall = self.stall

    @property
    def parked(self) -> bool:
        """Every vCPU is parked, so state may be read, set and saved."""
        return len(self._held) + len(self.halted) == len(self._vcpus)

    def restore_halted(self, index: int) -> None:
        """In the saved machine this vCPU, which has not run yet, had halted for good."""
        self.halted.add(index)
        self._held.pop(index, None)

    @property
    def held(self) -> bool:
        """Somebody keeps the vCPUs from running on."""
        return bool(self._holds)

    def hold(self, why: str) -> None:
        """Park all vCPUs soon, until `release(why)`."""
        first = not self._holds
        self._holds.add(why)
        if first and not self.ended:
            for vcpu in self._vcpus:
                vcpu.kick()

    def release(self, why: str) -> None:
        """Take back a hold; with the last one the vCPUs run on."""
        self._holds.discard(why)
        self._go_on()

    def allow(self, index: int, on: bool) -> None:
        """Let a vCPU run, or park it for as long as it is not allowed to: a processor that the machine has not got."""
        if on:
            self._barred.discard(index)
            self._leaving.discard(index)
            self._go_on()
        elif index not in self._barred:
            self._barred.add(index)
            if index not in self._held and index not in self.halted:
                self._leaving.add(index)
                self._vcpus[index].kick()

    def stall(self) -> Callable[[], None]:
        """vmm.machine.interfaces.Board.stall"""
        if self._asking is None:
            raise StateError("no vCPU makes an access")
        stall = object()
        self._stalls[stall] = self._asking
        return partial(self._unstall, stall)

    def _unstall(self, stall: object) -> None:
        if self._stalls.pop(stall, None) is not None:
            self._go_on()

    def _go_on(self) -> None:
        """Resume those vCPUs that nobody keeps any more."""
        if self._holds or self.ended:
            return
        stalled = self._stalls.values()
        now = time.monotonic()
        for index in [index for index in self._held if index not in stalled and index not in self._barred]:
            if now - self._since.pop(index, now) > STANDSTILL:
                self._vcpus[index].stood_still()
            self._vcpus[index].resume(self._held.pop(index))

    async def wait_parked(self) -> None:
        """Until every vCPU is parked, or the machine ended."""
        while not (self.parked or self.ended):
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    def end(self, outcome: Outcome) -> None:
        """The machine is over: nothing is answered any more."""
        if not self.ended:
            self.ended = True
            self._wake()
            self._finish(outcome)

    def fail(self, error: BaseException) -> None:
        """A device or callback raised: GuestError is the guest's end, anything else the VMM's own failure."""
        if isinstance(error, GuestError):
            self.end(Outcome(Reason.GUEST_ERROR, str(error)))
        elif isinstance(error, HostError):
            self.end(Outcome(Reason.HOST_ERROR, str(error)))
        else:
            import traceback

            last = traceback.extract_tb(error.__traceback__)
            where = f" ({last[-1].filename.rpartition('/')[2]}:{last[-1].lineno})" if last else ""
            self.end(Outcome(Reason.HOST_ERROR, f"{type(error).__name__}: {error}{where}"))

    def drain(self) -> None:
        """Handle everything that happened (the loop's reader of Vm.fileno())."""
        if self.ended:
            return
        board = self._board
        ports, mmio = board.ports, board.mmio
        try:
            for item in self._take():
                if self.ended:
                    return
                if type(item) is tuple:
                    self._asking, exit_ = item
                    index = self._asking
                    kind = type(exit_)
                    entry: Entry
                    if kind is PortIn:
                        entry = CompleteRead(ports.read(exit_.port, exit_.size))  # type: ignore[union-attr]
                    elif kind is PortOut:
                        ports.write(exit_.port, exit_.size, exit_.value)  # type: ignore[union-attr]
                        entry = RESUME
                    elif kind is MmioRead:
                        entry = CompleteRead(mmio.read(exit_.address, exit_.size))  # type: ignore[union-attr]
                    elif kind is MmioWrite:
                        mmio.write(exit_.address, exit_.size, exit_.value)  # type: ignore[union-attr]
                        entry = RESUME
                    elif kind is Interrupted or kind is Debug:
                        entry = RESUME
                        if kind is Debug and self.on_debug is not None:
                            self.on_debug(index, exit_)  # type: ignore[arg-type]
                    else:
                        self._asking = None
                        self._other(index, exit_)
                        continue
                    if not (self._holds or self._stalls or self._leaving or self.ended):
                        self._vcpus[index].resume(entry)
                    else:
                        self._keep(index, entry, between=kind is Interrupted or kind is Debug)
                    self._asking = None
                elif type(item) is Posted:
                    handler = self._posted.get(item.tag)
                    if handler is not None:
                        handler(item.size, item.data)
                else:
                    board.clock.expire()
            if not (len(self._held) > len(self._barred) or self.ended):
                self._linger()
        except Exception as error:
            self.fail(error)

    def _keep(self, index: int, entry: Entry, *, between: bool) -> None:
        """Answer an exit, of a vCPU `between` instructions or within one, so that a vCPU that is held parks."""
        held = bool(self._holds) or index in self._stalls.values() or index in self._leaving
        if self.ended or (held and between):
            self._held[index] = entry
            self._leaving.discard(index)
            self._since[index] = time.monotonic()
            if self.parked:
                self._wake()
        elif held:
            self._vcpus[index].complete(entry)  # a state is whole only between instructions
        else:
            self._vcpus[index].resume(entry)

    def _other(self, index: int, exit_: Exit) -> None:
        """The exits that end a vCPU's run."""
        match exit_:
            case Halt():
                self.halted.add(index)
                self._leaving.discard(index)
                if len(self.halted | self._barred) == len(self._vcpus):
                    self.end(Outcome(Reason.HALTED, "every vCPU halted with interrupts off"))
                elif self.parked:
                    self._wake()
            case Shutdown():
                self.end(Outcome(Reason.TRIPLE_FAULT, f"vCPU {index}{self._where(index)}"))
            case SystemEvent(kind=kind) if kind in _SYSTEM_EVENTS:
                self.end(_SYSTEM_EVENTS[kind])
            case InternalError(suberror=suberror, rip=rip, instruction=instruction):
                if suberror == EMULATION_FAILURE:
                    detail = f"vCPU {index}: the core cannot execute the instruction at {rip:#x}"
                else:
                    detail = f"vCPU {index}: internal error {suberror} of the core at {rip:#x}"
                self.end(Outcome(Reason.HOST_ERROR, detail, rip=rip, instruction=instruction))
            case FailEntry(reason=reason):
                self.end(Outcome(Reason.HOST_ERROR, f"vCPU {index}: entry to guest mode failed, {reason:#x}"))
            case _:
                self.end(Outcome(Reason.HOST_ERROR, f"vCPU {index}: unexpected exit {exit_}"))

    def _where(self, index: int) -> str:
        try:
            return f" at rip {self._vcpus[index].registers().rip:#x}"
        except Exception:  # the address is a courtesy; a core that cannot tell it has crashed all the same
            return ""

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
