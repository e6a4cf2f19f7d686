"""What the control socket offers debuggers: a stub for GDB, registers, traces. Loop thread of the machine's process.

    {"command": "gdb"}                     -> {"ok": true} with a descriptor (SCM_RIGHTS): a connection that speaks
                                              GDB's remote protocol; the last request of its connection
    {"command": "gdb", "address": "1234"}  -> {"ok": true, "address": …, "target": …}; it listens until the machine ends
    {"command": "gdb", "close": true}      -> {"ok": true, "closed": N}: it listens no more where it was asked to
    {"command": "registers", "cpu": 0}     -> {"ok": true, "cpus": […]}; without "cpu" of all
    {"command": "trace", "seconds": 1.0}   -> {"ok": true, "cpus": […]}; without "seconds" only what is always kept
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from cpu.contract import Capability, Vcpu
from vmm.debug import inspect
from vmm.debug.server import GdbServer, check_architecture
from vmm.errors import ConfigError, StateError, core_errors
from vmm.machine.builder import Machine

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

MAX_SECONDS = 60.0
TRACE_ENTRIES = 4096
SAMPLES_A_SECOND = 50
LOOK = "look"
_listening: WeakKeyDictionary[VirtualMachine, list[GdbServer]] = WeakKeyDictionary()
"""Stubs that clients asked to listen."""


async def gdb(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """Raises ConfigError, HostError, StateError."""
    servers = _listening.setdefault(vm, [])
    if request.get("close"):
        _listening[vm] = []
        for server in servers:
            await server.aclose()
        return {"closed": len(servers)}
    architecture = check_architecture(str(request.get("architecture", "x86-64")))
    address = request.get("address")
    if address is not None:
        if not isinstance(address, str):
            raise ConfigError("gdb: an address is text, [HOST:]PORT or unix:PATH")
        server = await vm.gdb(address, architecture=architecture)
        servers.append(server)
        return {"address": server.address, "target": server.target}
    if vm.debugger is not None:
        raise StateError("a debugger is attached already; let it detach first")
    vm.machine  # noqa: B018 - StateError between two boots
    ours, theirs = socket.socketpair()
    server = GdbServer(vm, "0", architecture=architecture)  # of this one connection
    vm.own(server)
    session = server.adopt(*await asyncio.open_connection(sock=ours))
    session.add_done_callback(lambda _: vm.disown(server))
    return {"streams": await asyncio.open_connection(sock=theirs)}


@asynccontextmanager
async def looking(vm: VirtualMachine) -> AsyncIterator[Machine]:
    """Every vCPU is parked for a moment, between two instructions."""
    machine = vm.machine
    machine.memory.check_whole()
    machine.dispatcher.hold(LOOK)
    try:
        await machine.dispatcher.wait_parked()
        if machine.dispatcher.ended:
            raise StateError("the machine ended meanwhile")
        with core_errors():
            yield machine
    finally:
        machine.dispatcher.release(LOOK)


def _chosen(machine: Machine, request: dict[str, Any]) -> Sequence[Vcpu]:
    cpu = request.get("cpu")
    if cpu is None:
        return machine.vcpus
    if isinstance(cpu, bool) or not isinstance(cpu, int) or not 0 <= cpu < len(machine.vcpus):
        raise ConfigError(f"cpu: there is no vCPU {cpu!r}; this machine has 0 to {len(machine.vcpus) - 1}")
    return [machine.vcpus[cpu]]


async def registers(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """Raises ConfigError, StateError."""
    async with looking(vm) as machine:
        return {
            "cpus": [
                inspect.registers(vcpu) | {"handlers": inspect.handlers(vcpu, machine.memory)}
                for vcpu in _chosen(machine, request)
            ]
        }


async def trace(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """Raises ConfigError, StateError."""
    seconds = request.get("seconds", 0)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_SECONDS:
        raise ConfigError(f"for: {seconds!r} is not a number of seconds up to {MAX_SECONDS:g}")
    found: dict[int, dict[str, Any]] = {}
    if seconds:
        found = await _record(vm, request, seconds)
    async with looking(vm) as machine:
        cpus = [inspect.exits(vcpu) | found.get(vcpu.index, {}) for vcpu in _chosen(machine, request)]
        for values, vcpu in zip(cpus, _chosen(machine, request), strict=True):
            values |= {"pc": inspect.pc(vcpu), "does": inspect.activity(vcpu)}
    return {"cpus": cpus, "stats": vm.stats()}


async def _record(vm: VirtualMachine, request: dict[str, Any], seconds: float) -> dict[int, dict[str, Any]]:
    """What the vCPUs execute: blocks, on cores that tell; else where they are, time and again."""
    async with looking(vm) as machine:
        native = Capability.TRACE in machine.capabilities
        if native:
            machine.vm.set_trace(TRACE_ENTRIES)
    if not native:
        return await _sample(vm, request, seconds)
    try:
        await asyncio.sleep(seconds)
        async with looking(vm) as again:
            if again is not machine:
                raise StateError("the machine was started again meanwhile")
            return {vcpu.index: inspect.trace(vcpu) for vcpu in _chosen(machine, request)}
    finally:
        if not machine.dispatcher.ended:
            async with looking(vm) as last:
                if last is machine:
                    machine.vm.set_trace(0)


async def _sample(vm: VirtualMachine, request: dict[str, Any], seconds: float) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[int, int]] = {}
    for _ in range(max(1, round(seconds * SAMPLES_A_SECOND))):
        async with looking(vm) as machine:
            for vcpu in _chosen(machine, request):
                counts, pc = found.setdefault(vcpu.index, {}), inspect.pc(vcpu)
                counts[pc] = counts.get(pc, 0) + 1
        await asyncio.sleep(1 / SAMPLES_A_SECOND)
    return {
        index: {
            "samples": [
                {"address": pc, "times": times} for pc, times in sorted(counts.items(), key=lambda each: -each[1])
            ]
        }
        for index, counts in found.items()
    }
