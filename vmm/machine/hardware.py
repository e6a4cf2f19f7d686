"""What a machine has before its first device: memory, the core's VM with its slots, and the vCPUs.

KVM takes 5 to 20 ms to make them. Most of that time it sleeps, until no other processor uses the tables that it
replaces (tests.bench start). So a thread makes them: the loop serves its other machines meanwhile, and `vmm run` loads
its other modules. Knows no devices and no loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cpu.contract import Capability, System, Vcpu, Vm, VmConfig
from vmm.config import Config
from vmm.cores import open_system
from vmm.errors import ConfigError, HostError
from vmm.machine.direct import runs_directly, start_direct
from vmm.machine.memory import GuestMemory, Shared
from vmm.machine.origin import BOOT, Arrival, Origin, Restore


class Hardware:
    """Made in one thread; from then on the loop's thread owns it. Whoever has it closes `vm`, then `memory`."""

    def __init__(self, memory: GuestMemory, vm: Vm, vcpus: list[Vcpu], epoch_ns: int) -> None:
        self.memory = memory
        self.vm = vm
        self.vcpus = vcpus
        self.epoch_ns = epoch_ns
        """The guest's wall clock at its start, ns since 1970."""


def make(config: Config, system: System, origin: Origin = BOOT) -> Hardware:
    """Memory is in its slots before there are vCPUs, which KVM takes better that way. Raises ConfigError, HostError,
    CpuError, and leaves nothing behind then."""
    virtual = config.clock == "virtual"
    if virtual and Capability.VIRTUAL_CLOCK not in system.capabilities():
        raise ConfigError(f"clock: the core {system.name} has no virtual clock; use --core soft")
    if isinstance(origin, Restore):
        epoch_ns = origin.epoch_ns
        memory = origin.memory()
    else:
        epoch = config.epoch_seconds
        epoch_ns = time.time_ns() if epoch is None else epoch * 1_000_000_000
        if isinstance(origin, Arrival):
            epoch_ns = origin.epoch_ns
        direct = origin is BOOT and runs_directly(config, system)
        memory = GuestMemory(config.memory, hugepages=config.hugepages, source=Shared() if direct else None)
    vm: Vm | None = None
    try:
        vm = system.create_vm(
            VmConfig(
                vcpus=config.most_cpus,
                virtual_clock=virtual,
                parallel=config.runs_in_parallel,
                epoch_ns=epoch_ns,
                seed=config.seed,
                pit=config.platform != "bare",
            )
        )
        memory.attach(vm)
        if isinstance(memory.source, Shared):
            start_direct(vm, memory, always=config.direct == "on")
        return Hardware(memory, vm, [vm.create_vcpu(index) for index in range(config.most_cpus)], epoch_ns)
    except BaseException:
        if vm is not None:
            vm.close()
        memory.close()
        raise


class Making:
    """Hardware that a thread makes, from the construction of this on."""

    def __init__(self, config: Config, system: System, origin: Origin = BOOT) -> None:
        """Raises HostError if the host has no room for a thread."""
        self._config, self._system, self._origin = config, system, origin
        self._made: Hardware | None = None
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._tell: Callable[[], object] | None = None
        self._thread = threading.Thread(target=self._make, name="make-vm")
        try:
            self._thread.start()
        except RuntimeError as error:
            raise HostError(f"cannot make a machine: {error}; raise the limit (ulimit -u) or end others") from error

    def _make(self) -> None:
        try:
            self._made = make(self._config, self._system, self._origin)
        except BaseException as error:
            self._failure = error
        with self._lock:
            tell = self._tell
        if tell is not None:
            tell()

    def when_done(self, tell: Callable[[], object]) -> None:
        """Have `tell` called by the making thread when it is done; here and now if it is."""
        with self._lock:
            if self._made is None and self._failure is None:
                self._tell = tell
                return
        tell()

    def result(self) -> Hardware:
        """Waits for it. Raises what make() raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self._made is not None
        return self._made

    def close_core(self) -> None:
        """Stop every vCPU and give back what the core holds, once the thread is done. *any thread*. Idempotent."""
        self._thread.join()
        if self._made is not None:
            self._made.vm.close()

    def close_memory(self) -> None:
        """After close_core(). Idempotent."""
        if self._made is not None:
            self._made.memory.close()


class HeadStart:
    """A machine's core, chosen and opened, and its hardware in the making, before there is a loop. A VirtualMachine
    of the same configuration takes it over; without one, close it."""

    def __init__(self, config: Config, origin: Origin = BOOT) -> None:
        """Raises ConfigError, HostError."""
        config.check_host()
        self.warnings: list[str] = []
        self.system = open_system(config, self.warnings.append)
        try:
            self.making: Making | None = Making(config, self.system, origin)
        except BaseException:
            self.system.close()
            raise

    def take(self) -> Making:
        """The hardware; it and the system are the taker's to close from now on."""
        making, self.making = self.making, None
        assert making is not None
        return making

    def close(self) -> None:
        """Give it all back, unless it was taken. Idempotent."""
        if self.making is not None:
            making = self.take()
            making.close_core()
            making.close_memory()
            self.system.close()
