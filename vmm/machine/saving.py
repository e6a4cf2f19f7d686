"""The state of a whole machine: how it is taken from one machine and given to another. Loop thread.

A state is taken while every vCPU is parked between two instructions and no virtio request is in flight. It says what a
machine needs to take it (vCPUs, memory, platform, kind of clock), but not on which core it was taken.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from cpu.state import VcpuState, VmState
from cpu.values import I64, U8, U32, U64, dataclass
from vmm.errors import StateError, core_errors
from vmm.machine.chance import ChanceState
from vmm.machine.origin import Restore
from vmm.state.payload import decode, encode, prepare

if TYPE_CHECKING:
    from vmm.machine.builder import Machine


IA32_TSC = 0x10
"""SDM volume 4, 2.1."""
AGENT_OF_V1 = 2
"""Programs that wrote version 1 of the state spoke this version of the agent's protocol."""


@dataclass(frozen=True, slots=True)
class MachineFields:
    """What every version of a machine's state has."""

    memory: U64
    """Bytes of RAM."""
    platform: Literal["pc", "bare"]
    clock: Literal["real", "virtual"]
    now_ns: U64
    """The core's time."""
    epoch_ns: I64
    """CLOCK_REALTIME of the guest at core time 0, ns since 1970."""
    saved_ns: I64
    """CLOCK_REALTIME of the host when the state was taken."""
    vm: VmState
    vcpus: Annotated[tuple[VcpuState, ...], range(1, 65)]
    halted: Annotated[tuple[U32, ...], range(65)]
    """vCPUs that halted with interrupts off, for good."""
    chance: ChanceState
    components: dict[str, object]


@dataclass(frozen=True, slots=True)
class MachineStateV1(MachineFields):
    """Version 1: it says whether the agent listened, but not which version of its protocol it spoke."""

    kind: ClassVar = "machine"
    version: ClassVar = 1
    agent: bool
    """Whether the guest's agent had said that it listens. It then spoke AGENT_OF_V1."""


@dataclass(frozen=True, slots=True)
class MachineState(MachineFields):
    """A whole machine but for its memory and disks."""

    kind: ClassVar = "machine"
    version: ClassVar = 2
    previous: ClassVar = MachineStateV1
    agent: U8
    """The version of its protocol that the guest's agent named when it said that it listens; 0: it had not said so."""

    @classmethod
    def upgrade(cls, old: MachineStateV1) -> MachineState:
        """Make this state from one of version 1."""
        same = {name: getattr(old, name) for name in MachineFields.__match_args__}
        return cls(**same, agent=AGENT_OF_V1 if old.agent else 0)


class _Root:
    """A machine as vmm.state.payload sees it."""

    state_type = MachineState

    def __init__(self, machine: Machine) -> None:
        self.stateful = {
            name: part for name, part in machine.components.items() if getattr(part, "state_type", None) is not None
        }

    def state_parts(self) -> Mapping[str, Any]:
        return {"components": self.stateful}


def versions(machine: Machine) -> dict[str, int]:
    """The version of each component's state, by the component's name. Their parts are in it as COMPONENT/PART."""
    found: dict[str, int] = {}

    def visit(name: str, part: Any, depth: int) -> None:
        if part is None or depth <= 0:
            return
        if isinstance(part, Mapping):
            for key, inner in part.items():
                visit(f"{name}/{key}", inner, depth - 1)
            return
        found[name] = part.state_type.version
        for key, inner in part.state_parts().items() if hasattr(part, "state_parts") else ():
            visit(f"{name}/{key}", inner, depth - 1)

    for name, part in _Root(machine).stateful.items():
        visit(name, part, 8)
    return {"machine": MachineState.version, "core": VmState.version, "vcpu": VcpuState.version, **found}


def save(machine: Machine) -> dict[str, Any]:
    """The state of a machine whose vCPUs are parked and whose virtio devices are quiet, encoded. Raises StateError,
    HostError."""
    dispatcher = machine.dispatcher
    if not dispatcher.parked:
        raise StateError("a machine that runs has no state to save; pause it first")
    with core_errors():
        vm = machine.vm.state()
        agent = machine.resources.agent
        state = MachineState(
            memory=machine.memory.size,
            platform=machine.config.platform,
            clock=machine.config.clock,
            now_ns=machine.board.clock.now_ns(),
            epoch_ns=machine.board.clock.epoch_ns,
            saved_ns=time.time_ns(),
            vm=vm,
            vcpus=tuple(vcpu.state() for vcpu in machine.vcpus),
            halted=tuple(sorted(dispatcher.halted)),
            chance=machine.resources.random.save(),
            agent=0 if agent is None else agent.spoken,
            components={name: part.save() for name, part in _Root(machine).stateful.items()},  # type: ignore[attr-defined]
        )
        return encode(state)


def prepare_parsing(machine: Machine) -> None:
    """Make what `parse` needs now, so that it parses its first state sooner. *any thread*"""
    prepare(_Root(machine))


def parse(machine: Machine, data: Any) -> MachineState:
    """Parse a state, and check that it fits this machine. Raises StateError."""
    state = decode(_Root(machine), "machine", data)
    assert isinstance(state, MachineState)
    config = machine.config
    for what, saved, ours in (
        ("bytes of memory", state.memory, machine.memory.size),
        ("vCPUs", len(state.vcpus), len(machine.vcpus)),
        ("platform", state.platform, config.platform),
        ("clock", state.clock, config.clock),
    ):
        if saved != ours:
            raise StateError(f"machine: {what}: the state has {saved}, this machine {ours}")
    if any(index >= len(state.vcpus) for index in state.halted):
        raise StateError("machine: halted: there is no such vCPU")
    return state


def later(state: MachineState, ns: int) -> MachineState:
    """The state that follows `state` when the machine does nothing for `ns`: its clocks have gone on, and timers whose
    time came are due."""
    core = state.vm.core
    if core is not None:
        core = replace(core, now_ns=core.now_ns + ns)
    ticks = ns * state.vm.tsc_khz // 1_000_000
    vcpus = tuple(
        replace(
            vcpu,
            msrs=tuple(
                replace(msr, value=msr.value + ticks & 2**64 - 1) if msr.index == IA32_TSC else msr for msr in vcpu.msrs
            ),
        )
        for vcpu in state.vcpus
    )
    vm = replace(state.vm, clock_ns=state.vm.clock_ns + ns, core=core)
    return replace(state, now_ns=state.now_ns + ns, vm=vm, vcpus=vcpus)


def restore(machine: Machine, origin: Restore, state: MachineState | None = None, *, quiet: bool = False) -> None:
    """Give the state of `origin` to a machine that is built and has not run. `state` is that state, if the caller has
    parsed it already. `quiet`: virtio devices take nothing from their drivers until `machine.resume_devices()`. Raises
    StateError, HostError."""
    if state is None:
        state = parse(machine, origin.state)
    with core_errors():
        # The core comes first. Lines that devices raise below are high in it then, and make no new edge.
        core = state.vm.core
        if origin.seed is not None and core is not None:
            core = replace(core, seeded=True, seed=origin.seed, position=0)
        machine.vm.set_state(replace(state.vm, core=core))
        for vcpu, saved in zip(machine.vcpus, state.vcpus, strict=True):
            machine.cpuid[vcpu.index] = list(saved.cpuid)
            vcpu.set_state(saved)
        for index in state.halted:
            machine.dispatcher.restore_halted(index)
        if origin.seed is None:
            machine.resources.random.restore(state.chance)
        for name, part in _Root(machine).stateful.items():
            part.restore(state.components[name])  # type: ignore[attr-defined]
        agent = machine.resources.agent
        if agent is not None and state.agent:
            agent.set_ready(state.agent)
        if not quiet:
            machine.resume_devices()
