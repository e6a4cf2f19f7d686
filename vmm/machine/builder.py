"""Puts a machine together: core, memory, buses, devices, boot loader. No other module of vmm sees all of them.

A part is a module with a function `attach(assembly)`, which may be a coroutine. PARTS lists the parts in order. The
machine starts, saves and closes the components that parts add. Nothing here knows what a part does.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from cpu import model
from cpu.contract import Capability, CpuidEntry, Vcpu, Vm
from cpu.cpuid import for_vcpu
from vmm import boot
from vmm.boot.state import BootState
from vmm.config import Config
from vmm.cores import SMALL_KERNEL
from vmm.errors import ConfigError, HostError, core_errors
from vmm.lifecycle import Outcome, Reason
from vmm.machine.board import Action, MachineBoard
from vmm.machine.dispatch import Dispatcher
from vmm.machine.hardware import Hardware, Making
from vmm.machine.interfaces import CharacterPort, Services
from vmm.machine.layout import Layout
from vmm.machine.memory import GuestMemory
from vmm.machine.origin import BOOT, Boot, Origin, Restore
from vmm.machine.resources import Resources
from vmm.pci import level_trigger
from vmm.timeline import Timeline

if TYPE_CHECKING:
    from vmm.devices.virtio.pool import DevicePool

PARTS = (
    "vmm.devices.uart",
    "vmm.devices.com2",
    "vmm.devices.debug",
    "vmm.devices.post",
    "vmm.devices.reset",
    "vmm.devices.rtc",
    "vmm.devices.i8042",
    "vmm.devices.pm",
    "vmm.devices.pvpanic",
    "vmm.pci",
    "vmm.acpi",
    "vmm.pci.hotplug",
    "vmm.devices.cpus",
    "vmm.devices.fwcfg",
    "vmm.devices.testdev",
    "vmm.devices.virtio",
    "vmm.devices.vmgenid",
    "vmm.firmware.smbios",
    "vmm.firmware.mptable",
)
"""Modules with `attach(assembly: vmm.machine.interfaces.Assembly)`, in the order in which they are attached."""
BARE_PARTS = ("vmm.devices.uart", "vmm.devices.debug", "vmm.devices.reset", "vmm.devices.i8042")
"""The parts of the bare platform."""


def effective_cmdline(config: Config, capabilities: frozenset[Capability]) -> str:
    """The kernel command line as the guest gets it: the given one or the default, and what is appended. Kernels smaller
    than SMALL_KERNEL, test guests, have no default."""
    if config.cmdline is not None:
        base = config.cmdline
    elif config.kernel is not None and config.kernel.stat().st_size >= SMALL_KERNEL:
        base = boot.default_cmdline(capabilities)
    else:
        base = ""
    line = f"{base} {config.append}".strip()
    if not config.share_words:
        return line
    # The kernel takes the last of equal words, so the shares' words come last. What follows -- is for init alone.
    words, dashes, init = line.partition(" -- ")
    return f"{words} {config.share_words}{dashes}{init}".strip()


class Machine:
    """What the guest sees, from one boot or restore to its end: memory, vCPUs, board and components. A reboot makes the
    next machine around the same resources. Parts use it as their vmm.machine.interfaces.Assembly. Loop thread."""

    def __init__(
        self,
        resources: Resources,
        console_port: Callable[[], CharacterPort],
        debug_output: Callable[[bytes], None],
        finish: Callable[[Outcome], None],
        timeline: Timeline | None = None,
        making: Making | None = None,
        origin: Origin = BOOT,
    ) -> None:
        """`making`: its hardware, if that was begun before; the machine closes it in any case."""
        self.resources = resources
        self.config = resources.config
        self.system = system = resources.system
        self._origin = origin
        self._console_port = console_port
        self.debug_output = debug_output
        self.mark = (timeline or Timeline()).mark
        self.warn = resources.warn
        self.capabilities: frozenset[Capability] = system.capabilities()
        self.components: dict[str, object] = {}
        self.services = Services()
        self.cpuid: list[list[CpuidEntry]] = []
        """What CPUID tells each vCPU."""
        self._finish = finish
        self._loop = asyncio.get_running_loop()
        self._reading = -1
        self._closer: threading.Thread | None = None
        self._core_closed = asyncio.Event()
        self._making = making
        self._hardware: Hardware | None = None
        self._board: MachineBoard | None = None
        self._dispatcher: Dispatcher | None = None
        self.rsdp: int | None = None
        """Guest-physical address of the ACPI root pointer, set by the part that builds the tables."""

    # vmm.machine.interfaces.Assembly

    @property
    def console(self) -> CharacterPort:
        return self._console_port()

    @property
    def board(self) -> MachineBoard:
        assert self._board is not None
        return self._board

    @property
    def memory(self) -> GuestMemory:
        assert self._hardware is not None
        return self._hardware.memory

    @property
    def vm(self) -> Vm:
        assert self._hardware is not None
        return self._hardware.vm

    @property
    def vcpus(self) -> list[Vcpu]:
        assert self._hardware is not None
        return self._hardware.vcpus

    @property
    def dispatcher(self) -> Dispatcher:
        assert self._dispatcher is not None
        return self._dispatcher

    def add(self, name: str, component: object) -> None:
        if name in self.components:
            raise ConfigError(f"two components are called {name!r}; give the devices different ids")
        self.components[name] = component

    @property
    def pool(self) -> DevicePool:
        return self.resources.pool

    @property
    def present_cpus(self) -> set[int]:
        return self.resources.present_cpus

    def allow_cpu(self, index: int, on: bool) -> None:
        if self.config.clock != "virtual":  # the virtual clock stands while a vCPU is parked
            self.dispatcher.allow(index, on)

    # For VirtualMachine.

    async def build(self) -> None:
        """Do everything up to the first instruction. On failure or cancellation nothing is left behind."""
        try:
            with core_errors():
                await self._build()
        except BaseException:
            with suppress(HostError):  # the caller gets the first error, not one of closing
                await self.aclose()
            raise

    async def _build(self) -> None:
        config = self.config
        if self._making is None:
            self._making = Making(config, self.system, self._origin)
        # Meanwhile a thread makes the hardware.
        parts = [importlib.import_module(name) for name in (BARE_PARTS if config.platform == "bare" else PARTS)]
        supported = self.system.supported_cpuid()
        if not isinstance(self._origin, Boot) and (missing := model.unavailable(config.cpu_model, supported)):
            raise HostError(f"the guest was told of what the core {self.system.name} lacks: {', '.join(missing)}")
        cpuid = model.table(config.cpu_model, supported, address_limit=Layout(config.memory).mmio64.end)
        made = asyncio.Event()
        self._making.when_done(partial(self._call_soon, made.set))
        await made.wait()
        hardware = self._hardware = self._making.result()
        for index, vcpu in enumerate(hardware.vcpus):
            self.cpuid.append(for_vcpu(cpuid, index, config.most_cpus))
            vcpu.set_cpuid(self.cpuid[index])
        board = self._board = MachineBoard(
            hardware.vm,
            self._loop,
            epoch_ns=hardware.epoch_ns,
            random=self.resources.random,
            virtual_clock=config.clock == "virtual",
            request=self._request,
            fail=self._fail,
        )
        self._dispatcher = Dispatcher(hardware.vm, hardware.vcpus, board, self._finish)
        for part in parts:
            attached = part.attach(self)
            if attached is not None:
                await attached
        if self.resources.own is not None:
            from vmm.machine.peripheral import attach

            attach(self, self.resources.own)
        if Capability.DETECTS_HALT not in self.capabilities:
            from vmm.machine.haltwatch import HaltWatch

            self.add("halt-watch", HaltWatch(self._dispatcher, hardware.vcpus, self.stats))
        if "finished" in hardware.vm.stats():
            from vmm.machine.finishwatch import FinishWatch

            self.add("finish-watch", FinishWatch(hardware.vm, self.stats, self.warn))
        if config.platform != "bare":
            level_trigger(hardware.vm)
        if isinstance(self._origin, Boot):
            await self._load()
        for component in tuple(self.components.values()):
            populate = getattr(component, "populate", None)
            if populate is not None and isinstance(self._origin, Boot):
                populate()
            begin = getattr(component, "start", None)
            if begin is not None:
                result = begin()
                if inspect.isawaitable(result):
                    await result
        if isinstance(self._origin, Restore):
            from vmm.machine.saving import restore

            restore(self, self._origin)
        self._reading = hardware.vm.fileno()
        self._loop.add_reader(self._reading, self._first_exit)

    def _first_exit(self) -> None:
        self.mark("first exit")
        self._loop.add_reader(self._reading, self.dispatcher.drain)
        self.dispatcher.drain()

    async def _load(self) -> None:
        """Run the boot loader, and set vCPU 0's registers. A large kernel is unpacked in a worker thread."""
        kernel = self.config.kernel
        self.mark("load")
        if kernel is not None and kernel.stat().st_size >= SMALL_KERNEL:
            loading = asyncio.ensure_future(asyncio.to_thread(self._load_image))
            try:
                state = await asyncio.shield(loading)
            except asyncio.CancelledError:
                # The thread writes to guest memory, which therefore must stay until the thread has ended.
                await asyncio.gather(loading, return_exceptions=True)
                raise
        else:
            state = self._load_image()
        self.mark("loaded")
        self.vcpus[0].set_system_registers(state.system_registers)
        self.vcpus[0].set_registers(state.registers)

    def _load_image(self) -> BootState:
        """Fill memory, and touch nothing else: this may run in a worker thread."""
        config, memory = self.config, self.memory
        if config.flat is not None:
            flat = config.flat
            return boot.load_flat(memory, flat.path, load=flat.load, entry=flat.entry, mode=flat.mode)
        if config.kernel is None:
            raise ConfigError("nothing to boot: give an image, a kernel or a flat image")
        return boot.load(
            memory,
            config.kernel,
            initrd=config.initrd,
            cmdline=effective_cmdline(config, self.capabilities),
            rsdp=self.rsdp,
        )

    def _request(self, action: Action, detail: str, status: int | None = None) -> None:
        """vmm.machine.interfaces.Board.request"""
        if status is not None:
            self.dispatcher.end(Outcome(Reason.EXIT, detail, code=status))
        else:
            reason = {"shutdown": Reason.SHUTDOWN, "reset": Reason.RESET, "crash": Reason.CRASH}[action]
            self.dispatcher.end(Outcome(reason, detail))

    def _fail(self, error: BaseException) -> None:
        self.dispatcher.fail(error)

    async def quiesce(self) -> None:
        """Make the virtio devices take no more requests, and wait for those in flight."""
        if self.services.virtio is not None:
            await self.services.virtio.quiesce()

    def save_state(self) -> dict[str, Any]:
        """vmm.machine.saving.save"""
        from vmm.machine.saving import save

        return save(self)

    def resume_devices(self) -> None:
        """Let the virtio devices take requests again, after quiesce() or a restored state."""
        if self.services.virtio is not None:
            self.services.virtio.resume()

    def stats(self) -> dict[str, int]:
        """The core's counters and the buses'."""
        counters = dict(self.vm.stats()) if self._closer is None else {}
        counters["unclaimed"] = self.board.ports.unclaimed + self.board.mmio.unclaimed
        return counters

    def begin_close(self) -> None:
        """Begin to stop every vCPU and to give back what the core holds. A thread does it, since KVM takes up to 20 ms.
        Idempotent; `aclose` waits for the thread and does the rest."""
        if self._closer is not None:
            return
        if self._reading >= 0:
            self._loop.remove_reader(self._reading)
        if self._board is not None:
            self._board.close()
        if self._hardware is not None:
            memory = self._hardware.memory
            memory.on_written = memory.on_written_ranges = None
            if memory.absent is not None:
                memory.absent.forget()
        self._closer = threading.Thread(target=self._close_core, name="close-vm")
        try:
            self._closer.start()
        except RuntimeError:  # the host has no room for a thread
            self._close_core()

    def _close_core(self) -> None:
        """What the closing thread does."""
        try:
            if self._hardware is not None:  # a vCPU that waits for a page of another host goes on, so that it can stop
                self._hardware.memory.abandon()
            if self._making is not None:
                self._making.close_core()
        finally:
            self._call_soon(self._core_closed.set)

    def _call_soon(self, what: Callable[[], object]) -> None:
        """Have the loop call `what`. *any thread*"""
        with suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(what)

    def close(self) -> None:
        """begin_close(), and wait until the core is closed. This blocks, for callers whose loop does not go on."""
        self.begin_close()
        assert self._closer is not None
        if self._closer.ident is not None:  # it was started
            self._closer.join()

    async def aclose(self) -> None:
        """Close the components and the core, and then memory. Idempotent."""
        self.begin_close()
        try:
            await self.close_components()
        finally:
            try:
                await self._core_closed.wait()
            finally:
                self.close()
                if self._making is not None:
                    self._making.close_memory()

    async def close_components(self) -> None:
        """Close the components in reverse order. Raises HostError for the first that could not be closed.
        Idempotent."""
        components, self.components = self.components, {}
        failure: BaseException | None = None
        for name, component in reversed(components.items()):
            close = getattr(component, "aclose", None) or getattr(component, "close", None)
            if close is None:
                continue
            try:
                result = close()
                if inspect.isawaitable(result):
                    await result
            except Exception as error:
                failure = failure or HostError(f"closing {name}: {type(error).__name__}: {error}")
                failure.__cause__ = failure.__cause__ or error
        if failure is not None:
            raise failure
