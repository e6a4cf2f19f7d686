"""What the host is, as clients ask for it: processors, memory, their statistics, capabilities. Reads /proc and /sys."""

from __future__ import annotations

import os
import platform
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

from vmm.config import MAX_CPUS
from vmm.libvirt.spec import CPU_MODEL, CPU_MODELS
from vmm.libvirt.xmltree import add, serialise

TICKS = os.sysconf("SC_CLK_TCK")
CPUS = Path("/sys/devices/system/cpu")
DMI = Path("/sys/class/dmi/id")


def _read(path: Path | str, default: str = "") -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return default


class Topology(NamedTuple):
    """Of the host: NUMA nodes are counted as one."""

    cpus: int
    mhz: int
    sockets: int
    cores: int
    """Per socket."""
    threads: int
    """Per core."""


class Processor(NamedTuple):
    number: int
    socket: int
    core: int
    siblings: str


def processor_numbers() -> frozenset[int]:
    """Of the processors that are online."""
    return frozenset(cpu for cpu in range(os.cpu_count() or 1) if not cpu or (CPUS / f"cpu{cpu}").exists())


def processors() -> list[Processor]:
    """Those that are online."""
    found = []
    for number in sorted(processor_numbers()):
        place = CPUS / f"cpu{number}" / "topology"
        socket, core = (_read(place / name, "0") for name in ("physical_package_id", "core_id"))
        siblings = _read(place / "thread_siblings_list", str(number))
        found.append(Processor(number, max(int(socket), 0), int(core), siblings))
    return found


def topology() -> Topology:
    found = processors()
    sockets = {cpu.socket for cpu in found}
    cores = {(cpu.socket, cpu.core) for cpu in found}
    match = re.search(r"^cpu MHz\s*:\s*([0-9]+)", _read("/proc/cpuinfo"), re.MULTILINE)
    per_socket = max(len(cores) // max(len(sockets), 1), 1)
    threads = max(len(found) // max(len(cores), 1), 1)
    if len(sockets) * per_socket * threads != len(found):
        sockets, per_socket, threads = {0}, len(found), 1
    return Topology(len(found), int(match[1]) if match else 0, len(sockets), per_socket, threads)


def neighbours() -> list[tuple[str, str]]:
    """(IPv4 address, MAC) of those that the host has heard of."""
    found = []
    for line in _read("/proc/net/arp").splitlines()[1:]:
        words = line.split()
        if len(words) >= 4 and int(words[2], 16) & 2:  # the entry is whole
            found.append((words[0], words[3].lower()))
    return found


def memory() -> dict[str, int]:
    """/proc/meminfo, in KiB by its names."""
    found = {}
    for line in _read("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0])
    return found


def cpu_times(number: int) -> dict[str, int] | None:
    """Nanoseconds by libvirt's names, of one processor, or of all for -1. None if there is no such processor."""
    wanted = "cpu" if number == -1 else f"cpu{number}"
    for line in _read("/proc/stat").splitlines():
        words = line.split()
        if words and words[0] == wanted:
            user, nice, system, idle, wait, irq, soft = (int(word) * (10**9 // TICKS) for word in words[1:8])
            return {"kernel": system + irq + soft, "user": user + nice, "idle": idle, "iowait": wait}
    return None


def process_times(pid: int) -> tuple[int, int]:
    """(user, system) nanoseconds of a process; zeros if it has gone."""
    words = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(words) < 13:
        return 0, 0
    return int(words[11]) * (10**9 // TICKS), int(words[12]) * (10**9 // TICKS)


def thread_time(pid: int, thread: int) -> tuple[int, int]:
    """(nanoseconds of processor time, the processor that it ran on last) of one of a process's threads; (0, -1) if it
    has gone."""
    words = _read(f"/proc/{pid}/task/{thread}/stat").rpartition(")")[2].split()
    if len(words) < 37:
        return 0, -1
    return (int(words[11]) + int(words[12])) * (10**9 // TICKS), int(words[36])


def resident(pid: int) -> int:
    """KiB of memory that a process has in RAM."""
    match = re.search(r"^VmRSS:\s*([0-9]+)", _read(f"/proc/{pid}/status"), re.MULTILINE)
    return int(match[1]) if match else 0


def host_uuid() -> uuid.UUID:
    """Belongs to the machine id."""
    return uuid.uuid5(uuid.NAMESPACE_OID, "loopvisor host " + (_read("/etc/machine-id") or platform.node()))


def capabilities(emulator: str, kinds: tuple[str, ...]) -> str:
    """virConnectGetCapabilities. `kinds`: the domain types that work here, the best first."""
    root = Element("capabilities")
    host = add(root, "host")
    add(host, "uuid", str(host_uuid()))
    cpu = add(host, "cpu")
    add(cpu, "arch", platform.machine())
    found = topology()
    add(cpu, "topology", sockets=found.sockets, dies=1, cores=found.cores, threads=found.threads)
    add(cpu, "pages", unit="KiB", size=4)
    add(cpu, "pages", unit="KiB", size=2048)
    add(host, "power_management")
    add(host, "iommu", support="no")
    cell = add(add(add(host, "topology"), "cells", num=1), "cell", id=0)
    total = memory().get("MemTotal", 0)
    add(cell, "memory", str(total), unit="KiB")
    add(cell, "pages", str(total // 4), unit="KiB", size=4)
    cpus = processors()
    listed = add(cell, "cpus", num=len(cpus))
    for one in cpus:
        add(listed, "cpu", id=one.number, socket_id=one.socket, die_id=0, core_id=one.core, siblings=one.siblings)
    guest = add(root, "guest")
    add(guest, "os_type", "hvm")
    arch = add(guest, "arch", name="x86_64")
    add(arch, "wordsize", "64")
    add(arch, "emulator", emulator)
    for name in ("pc", "q35", "bare"):
        add(arch, "machine", name, maxCpus=MAX_CPUS, **({"canonical": "pc"} if name == "q35" else {}))
    for kind in kinds:
        add(arch, "domain", type=kind)
    features = add(guest, "features")
    add(features, "acpi", default="on", toggle="no")
    add(features, "apic", default="on", toggle="no")
    return serialise(root)


DMI_NAMES = {
    "bios": {"vendor": "bios_vendor", "version": "bios_version", "date": "bios_date", "release": "bios_release"},
    "system": {"manufacturer": "sys_vendor", "product": "product_name", "version": "product_version",
               "serial": "product_serial", "uuid": "product_uuid", "sku": "product_sku", "family": "product_family"},
    "baseBoard": {"manufacturer": "board_vendor", "product": "board_name", "version": "board_version",
                  "serial": "board_serial", "asset": "board_asset_tag"},
    "chassis": {"manufacturer": "chassis_vendor", "version": "chassis_version", "serial": "chassis_serial",
                "asset": "chassis_asset_tag"},
}  # fmt: skip
"""libvirt's names of what SMBIOS says, and the kernel's."""


def system_information(directory: Path = DMI) -> str | None:
    """virConnectGetSysinfo: what the host's SMBIOS says, as far as the kernel tells this user. None: nothing."""
    root = Element("sysinfo", {"type": "smbios"})
    for tag, names in DMI_NAMES.items():
        told = {name: text for name, file in names.items() if (text := _read(directory / file))}
        if told:
            part = add(root, tag)
            for name, text in told.items():
                add(part, "entry", "".join(char for char in text if char.isprintable()), name=name)
    return serialise(root) if len(root) else None


def _enum(parent: Element, name: str, *values: str) -> None:
    element = add(parent, "enum", name=name)
    for value in values:
        add(element, "value", value)


FEATURE_NAMES = {"lzcnt": "abm", "xsave-avx": ""}
"""Features of processors that libvirt's map calls otherwise than cpu/model.py; "": it has none of that kind."""


def _cpu_modes(parent: Element, lacking: Mapping[str, Sequence[str]]) -> None:
    """`lacking`: the CPU models that the core knows, with what it has not for each. Models without a name in libvirt
    are modes: host is host-passthrough, max is maximum."""
    for mode, model in (("host-passthrough", "host"), ("maximum", "max"), ("host-model", "v2")):
        found = add(parent, "mode", name=mode, supported="yes" if model in lacking else "no")
        if mode == "host-model" and model in lacking:
            add(found, "model", CPU_MODEL, fallback="forbid")
    custom = add(parent, "mode", name="custom", supported="yes" if lacking else "no")
    for model, called in CPU_MODELS.items():
        missing = lacking.get(model)
        if missing is not None:
            add(custom, "model", called, usable="no" if missing else "yes", vendor="unknown")
        if missing:
            blockers = add(custom, "blockers", model=called)
            for name in (FEATURE_NAMES.get(feature, feature) for feature in missing):
                if name:
                    add(blockers, "feature", name=name)


def domain_capabilities(emulator: str, kind: str, machine: str, lacking: Mapping[str, Sequence[str]]) -> str:
    """virConnectGetDomainCapabilities. `machine`: pc or bare, which has no virtio devices; `lacking`: the CPU models
    that domains of this kind may have, each with the features for want of which it cannot be had here."""
    virtio = "yes" if machine == "pc" else "no"
    root = Element("domainCapabilities")
    add(root, "path", emulator)
    add(root, "domain", kind)
    add(root, "machine", machine)
    add(root, "arch", "x86_64")
    add(root, "vcpu", max=MAX_CPUS)
    add(root, "iothreads", supported="no")
    system = add(root, "os", supported="yes")
    _enum(system, "firmware")
    add(system, "loader", supported="no")
    _cpu_modes(add(root, "cpu"), lacking)
    _enum(add(root, "memoryBacking", supported="yes"), "sourceType", "memfd")
    devices = add(root, "devices")
    disk = add(devices, "disk", supported=virtio)
    _enum(disk, "diskDevice", "disk")
    _enum(disk, "bus", "virtio")
    _enum(disk, "model", "virtio", "virtio-transitional", "virtio-non-transitional")
    for name in ("graphics", "video", "hostdev", "tpm", "redirdev"):
        add(devices, name, supported="no")
    rng = add(devices, "rng", supported=virtio)
    _enum(rng, "model", "virtio", "virtio-transitional", "virtio-non-transitional")
    _enum(rng, "backendModel", "random", "builtin")
    _enum(add(devices, "filesystem", supported=virtio), "driverType", "virtiofs")
    _enum(add(devices, "channel", supported=virtio), "type", "unix")
    _enum(add(devices, "interface", supported=virtio), "backendType", "default", "passt")
    _enum(add(devices, "panic", supported="yes"), "model", "isa")
    _enum(add(devices, "console", supported="yes"), "type", "pty", "unix", "file", "null")
    features = add(root, "features")
    for name in ("gic", "vmcoreinfo", "genid", "backingStoreInput", "backup", "sev", "sgx"):
        add(features, name, supported="no")
    return serialise(root)
