"""Which execution core would run here, and why.

`probe(name)` does not raise when a core cannot run here: it says in one sentence what is wrong and what the user can
do. `choose()` picks the core for `--core`.
"""

from __future__ import annotations

import errno
import os
import stat

from cpu.contract import Capability, Probe, System
from cpu.errors import ConfigError, CpuError, HostError
from cpu.values import dataclass

NAMES = ("kvm", "soft")
"""The cores in order of preference. The scripted core is for tests only and never chosen."""

_NONE: frozenset[Capability] = frozenset()
_OF_HARDWARE = frozenset({Capability.STOCK_KERNELS, Capability.PAE_PAGING})
"""Capabilities that a KVM may have or lack, depending on the virtualization below it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The core that will run, its probe, and one sentence that says why this one."""

    name: str
    probe: Probe
    reason: str


def probe(name: str) -> Probe:
    """Whether the core `name` can be used on this host. Raises ConfigError only for a name that no core has."""
    match name:
        case "kvm":
            return _probe_kvm()
        case "soft":
            return _probe_soft()
        case "scripted":
            from cpu.scripted import ScriptedSystem

            return Probe(True, ScriptedSystem.DEFAULT, "the scripted core replays what a test wrote")
        case _:
            raise ConfigError(f"no execution core is named {name!r}; there are {', '.join(NAMES)}")


def choose(core: str = "auto", needs: frozenset[Capability] = _NONE, vcpus: int = 1) -> Choice:
    """The core for `--core`. "auto" takes the first of NAMES that is available, has what the guest needs, and can give
    one VM this many vCPUs.

    Raises HostError, with the cure, if there is no such core; ConfigError if only the number of vCPUs is too large.
    """
    if core != "auto":
        found = probe(core)
        if not found.available:
            raise HostError(_sentence(found))
        missing = needs - found.capabilities
        if missing:
            if never := missing - _OF_HARDWARE:
                lacks = f"the {core} core has no {_list(never)}, on any host"
                raise HostError(f"{lacks}; --core auto takes one that has it")
            raise HostError(f"the {core} core here lacks {_list(missing)}: {found.reason}" + _cure(found))
        if vcpus > found.max_vcpus:
            raise ConfigError(f"cpus: {vcpus} is more than the {found.max_vcpus} of one machine on the {core} core")
        return Choice(core, found, f"{core} was asked for")
    refused: list[str] = []
    most = 0
    for name in NAMES:
        found = probe(name)
        missing = needs - found.capabilities
        if found.available and not missing and vcpus > found.max_vcpus:
            refused.append(f"{name} has {found.max_vcpus} vCPUs a machine")
            most = max(most, found.max_vcpus)
            continue
        if found.available and not missing:
            because = f", as {'; '.join(refused)}" if refused else ""
            return Choice(name, found, f"{name}{because}: {found.reason}")
        refused.append(f"{name} lacks {_list(missing)}" if found.available else found.reason)
    if most:
        raise ConfigError(f"cpus: {vcpus} is more than the {most} of one machine on the cores here")
    raise HostError(f"no execution core can run this guest: {'; '.join(refused)}")


def open_system(choice: Choice) -> System:
    """Open a chosen core. Raises HostError if it has vanished since it was chosen."""
    match choice.name:
        case "kvm":
            from cpu.kvm.system import KvmSystem

            return KvmSystem(choice.probe.capabilities)
        case "soft":
            from cpu.system import soft_system

            return soft_system()
        case _:
            from cpu.scripted import ScriptedSystem

            return ScriptedSystem()


def _list(capabilities: frozenset[Capability]) -> str:
    return ", ".join(sorted(capability.value for capability in capabilities))


def _cure(found: Probe) -> str:
    return f" ({found.cure})" if found.cure else ""


def _sentence(found: Probe) -> str:
    return found.reason + _cure(found)


def _probe_soft() -> Probe:
    from cpu import _core

    if "soft" not in _core.CORES:
        return Probe(False, _NONE, "this build has no software core", "build the package with all of its C sources")
    from cpu.system import SOFT_CAPABILITIES, SOFT_MAX_VCPUS

    reason = "the software core runs on any x86-64 host"
    return Probe(True, SOFT_CAPABILITIES, reason, max_vcpus=SOFT_MAX_VCPUS)


def _probe_kvm() -> Probe:
    from cpu.kvm.probe import has_hardware
    from cpu.kvm.system import DEVICE, KvmSystem

    try:
        node = os.stat(DEVICE)
    except OSError:
        if has_hardware():
            cure = "load the kernel module: modprobe kvm-intel or kvm-amd"
        else:
            cure = "turn on VT-x or SVM in the firmware, or nested virtualization in the host of this virtual machine"
        return Probe(False, _NONE, f"there is no {DEVICE}", cure)
    if not stat.S_ISCHR(node.st_mode):
        return Probe(False, _NONE, f"{DEVICE} is not a device", "remove it and load kvm-intel or kvm-amd")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return Probe(
            False, _NONE, f"no permission to open {DEVICE}", "join its group: sudo adduser $USER kvm, then log in again"
        )
    try:
        system = KvmSystem()
        try:
            capabilities = system.capabilities()
            most = system.max_vcpus()
        finally:
            system.close()
    except CpuError as error:
        cause = error.__cause__
        busy = isinstance(cause, OSError) and cause.errno == errno.EBUSY
        cure = "another hypervisor uses the processor's virtualization: stop it" if busy else ""
        return Probe(False, _NONE, str(error), cure)
    if Capability.STOCK_KERNELS not in capabilities:
        return Probe(
            True,
            capabilities,
            f"{DEVICE} has no VT-x or SVM below it: small guests run, stock kernels do not",
            "turn on nested virtualization in the host of this virtual machine",
            most,
        )
    return Probe(True, capabilities, f"{DEVICE} runs stock kernels", max_vcpus=most)
