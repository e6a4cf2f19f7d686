"""The suite leaves nothing out: every state that is declared has a hop in mid-operation, and every part of a machine
has a state or is known to need none."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import vmm
from cpu.state import VcpuState, VmState
from vmm.machine.saving import MachineState
from vmm.state.declared import state_types

MODULES = (
    "tests.conformance.state.test_devices_hop",
    "tests.conformance.state.test_pci_hop",
    "tests.conformance.state.test_core_hop",
    "tests.conformance.state.test_virtio_hop",
    "tests.conformance.state.test_machine_hop",
    "tests.unit.virtio.test_state",
    "tests.unit.virtio.test_connections",
)
"""Where components hop in mid-operation. A test there says of which kinds with tests.support.hops.moves."""
NO_COMPONENT = {
    "vmm.migration.protocol": "messages of a migration, which is itself the hop",
    "vmm.state.manifest": "what a directory says of itself",
}
"""Modules whose declarations are of no component."""
CONSTANT = {
    "core.tsc_khz": "told to the guest once; test_core_hops.py moves guests between rates",
    "vcpu.cpuid": "told to the guest once; test_core_hops.py moves guests between tables",
    "vcpu.pending_interrupt": "KVM alone has one; test_core_hops.py compares it over each hop there",
}
"""Fields that no instruction of a program on the software core changes."""
WITHOUT_STATE = {
    "acpi": "tables in the guest's memory",
    "debug-port": "passes on what is written",
    "exit-port": "ends the machine",
    "finish-watch": "looks at the core's counters",
    "halt-watch": "looks at vCPUs; those that halted for good are the machine's `halted`",
    "mp-table": "a table in the guest's memory",
    "pci-hotplug": "part of the bus's state",
    "pvpanic": "ends the machine",
    "smbios": "a table in the guest's memory",
}
"""Parts of a machine without a state, and why."""


def hopping() -> set[str]:
    """The kinds and fields that some test moves."""
    found: set[str] = set()
    for name in MODULES:
        for value in vars(importlib.import_module(name)).values():
            found.update(getattr(value, "moves", ()))
    return found


def test_every_kind_of_state_hops_in_mid_operation() -> None:
    declared = {kind.kind for kind in state_types() if kind.__module__ not in NO_COMPONENT}
    assert declared - hopping() == set(), "write a test that moves these, and mark it with moves()"
    fields = {f"core.{field.name}" for field in dataclasses.fields(VmState)}
    fields |= {f"vcpu.{field.name}" for field in dataclasses.fields(VcpuState)}
    assert fields - hopping() - set(CONSTANT) == set(), "put these into a program of test_core_hop.py"
    assert {name for name in hopping() if "." in name} <= fields | {"machine.agent"}
    assert {name for name in hopping() if "." not in name} <= declared


async def test_every_part_of_a_machine_has_a_state_or_needs_none(tmp_path: Path) -> None:
    """A machine with everything that has a state of its own."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    disk = vmm.Disk(path=tmp_path / "disk", id="data", transport="mmio")
    async with vmm.run(
        "echo", disks=[disk], balloon=True, cpus=1, max_cpus=2, testdev=True, vsock=tmp_path / "v"
    ) as vm:
        components = vm.machine.components
        stateless = {name for name, part in components.items() if getattr(part, "state_type", None) is None}
        assert stateless <= set(WITHOUT_STATE), "give these a state, or say why they need none"
        kinds = {part.state_type.kind for name, part in components.items() if name not in stateless}  # type: ignore[attr-defined]
        assert kinds >= {"uart", "rtc", "i8042", "pci", "fw-cfg", "acpi-pm", "generation-id", "virtio"}
    fields = {field.name for field in dataclasses.fields(MachineState)}
    assert fields == {
        "memory", "platform", "clock", "now_ns", "epoch_ns", "saved_ns", "vm", "vcpus", "halted", "chance",
        "components", "agent",
    }, "say here where a new part of a machine hops"  # fmt: skip
