"""Which execution core a configuration runs on: what its guest needs, and opening it."""

from __future__ import annotations

from collections.abc import Callable

from cpu import model
from cpu.contract import Capability, Probe, System
from cpu.errors import CpuError
from cpu.select import NAMES, Choice, choose, probe
from cpu.select import open_system as open_choice
from cpu.values import dataclass
from vmm.config import Config
from vmm.convert import MIB
from vmm.errors import core_errors

SMALL_KERNEL = 1 * MIB
"""Kernel files below this are test guests, which need no more than they say; others count as stock kernels."""


def is_stock_kernel(config: Config) -> bool:
    """Whether the kernel is an operating system's: it has drivers, and needs a core that runs everything."""
    return config.kernel is not None and config.kernel.stat().st_size >= SMALL_KERNEL


def needs(config: Config) -> frozenset[Capability]:
    """What the guest needs beyond what every core offers."""
    found = set()
    if config.clock == "virtual":
        found.add(Capability.VIRTUAL_CLOCK)
    if config.flat is not None and config.flat.mode == "real":
        found.add(Capability.REAL_MODE)
    if is_stock_kernel(config):
        found.add(Capability.STOCK_KERNELS)
    return frozenset(found)


def choice(config: Config) -> Choice:
    """The core that would run, and why. With `core` named by the user only its availability counts: trying a stock
    kernel on a KVM that cannot run one is allowed. Raises HostError with the cure."""
    with core_errors():
        wanted = needs(config)
        if config.core != "auto":
            wanted &= {Capability.VIRTUAL_CLOCK}
        return choose(config.core, wanted, config.most_cpus)


def open_system(config: Config, warn: Callable[[str], None]) -> System:
    """Opens the core that runs; warns of one that was asked for and lacks what this guest needs. Raises HostError."""
    chosen = choice(config)
    if missing := needs(config) - chosen.probe.capabilities:
        lacking = ", ".join(sorted(capability.value for capability in missing))
        warn(f"the {chosen.name} core here lacks {lacking}: {chosen.probe.reason}; --core auto takes one that has it")
    with core_errors():
        return open_choice(chosen)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What every core says of this host, and which one `auto` takes for a stock kernel ("" if none can) and for a
    small test guest."""

    probes: dict[str, Probe]
    stock: str
    small: str


def diagnose() -> Diagnosis:
    """For `vmm doctor`. Raises HostError if no core runs at all."""
    with core_errors():
        probes = {name: probe(name) for name in NAMES}
        small = choose("auto", frozenset()).name
        try:
            stock = choose("auto", frozenset({Capability.STOCK_KERNELS})).name
        except CpuError:
            stock = ""
        return Diagnosis(probes, stock, small)


def models(core: str, wanted: frozenset[Capability] = frozenset()) -> dict[str, list[str]]:
    """For `vmm doctor` and libvirt's clients: the CPU models, each with the names of the features for want of which
    this core cannot have it. `wanted`: what `auto` looks for. Nothing if the core cannot be opened."""
    try:
        system = open_choice(choose(core, wanted))
    except CpuError:
        return {}
    try:
        supported = system.supported_cpuid()
        return {name: model.unavailable(name, supported) for name in model.NAMES}
    finally:
        system.close()
