"""A machine's definition as domain XML: what vmm/libvirt/domain_xml.py reads."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree.ElementTree import Element

from vmm.config import Net
from vmm.convert import KIB
from vmm.libvirt.cpusets import cpu_text
from vmm.libvirt.extras import is_plain, write_extras
from vmm.libvirt.iotune import BANDWIDTH, IO_TUNE, says_bandwidth
from vmm.libvirt.spec import CPU_MODELS, TYPE_OF_CORE, Pins, Spec, tap_name
from vmm.libvirt.xmltree import add, parse, serialise


@dataclass(frozen=True)
class Live:
    """What is known only of a machine that runs."""

    id: int
    core: str
    """Which execution core it runs on."""
    macs: tuple[str, ...] = ()


def domain_xml(spec: Spec, emulator: str, live: Live | None = None) -> str:
    """The whole document."""
    config = spec.config
    core = live.core if live is not None and live.core in TYPE_OF_CORE else config.core
    root = Element("domain", {"type": TYPE_OF_CORE[core]})
    if live is not None:
        root.set("id", str(live.id))
    add(root, "name", config.name)
    add(root, "uuid", str(spec.uuid))
    if spec.title:
        add(root, "title", spec.title)
    if spec.description:
        add(root, "description", spec.description)
    if spec.metadata:
        root.append(parse(f"<metadata>{spec.metadata}</metadata>", "metadata"))
    add(root, "memory", str(-(-config.memory // KIB)), unit="KiB")
    add(root, "currentMemory", str(-(-config.memory // KIB)), unit="KiB")
    if config.hugepages:
        add(add(root, "memoryBacking"), "hugepages")
    current = str(config.cpus) if config.max_cpus is not None else None
    add(root, "vcpu", str(config.most_cpus), placement="static", current=current)
    _os(root, spec)
    if config.platform == "pc":
        features = add(root, "features")
        add(features, "acpi")
        add(features, "apic")
    if config.cpu_model == "host":
        add(root, "cpu", mode="host-passthrough")
    elif config.cpu_model == "max":
        add(root, "cpu", mode="maximum")
    else:
        custom = add(root, "cpu", mode="custom", match="exact")
        add(custom, "model", CPU_MODELS[config.cpu_model], fallback="forbid")
    if config.epoch is not None:
        add(root, "clock", offset="absolute", start=config.epoch)
    else:
        add(root, "clock", offset="utc")
    add(root, "on_poweroff", "destroy")
    add(root, "on_reboot", "restart" if config.reboot else "destroy")
    add(root, "on_crash", "destroy")
    if spec.pins != Pins():
        tune = add(root, "cputune")
        for vcpu, cpus in spec.pins.vcpus:
            add(tune, "vcpupin", vcpu=vcpu, cpuset=cpu_text(cpus))
        if spec.pins.emulator is not None:
            add(tune, "emulatorpin", cpuset=cpu_text(spec.pins.emulator))
    _devices(add(root, "devices"), spec, emulator, live)
    write_extras(root, spec)
    return serialise(root)


def _os(root: Element, spec: Spec) -> None:
    config = spec.config
    system = add(root, "os")
    add(system, "type", "hvm", arch="x86_64", machine=config.platform)
    if config.kernel is not None:
        add(system, "kernel", str(config.kernel))
    if config.initrd is not None:
        add(system, "initrd", str(config.initrd))
    if config.cmdline is not None:
        add(system, "cmdline", config.cmdline)


def _devices(devices: Element, spec: Spec, emulator: str, live: Live | None) -> None:
    config = spec.config
    add(devices, "emulator", emulator)
    for index, disk in enumerate(config.disks):
        name = spec.disks[index]
        element = add(devices, "disk", type="block" if name.block else "file", device="disk")
        driver = {"name": "qemu", "type": "raw" if disk.format == "auto" else disk.format}
        if disk.cache != "writeback":
            driver["cache"] = disk.cache
        if disk.io != "auto":
            driver["io"] = disk.io
        if disk.queues != 1:
            driver["queues"] = str(disk.queues)
        if disk.packed:
            driver["packed"] = "on"
        if not disk.readonly:
            driver["discard"] = "unmap"
        add(element, "driver", **driver)
        add(element, "source", **{"dev" if name.block else "file": str(disk.path)})
        add(element, "target", dev=name.target, bus="virtio")
        tune = {name: getattr(disk, ours) for name, ours in IO_TUNE.items() if getattr(disk, ours)}
        if tune:
            limits = add(element, "iotune")
            for limit, value in tune.items():
                add(limits, limit, str(value))
        if disk.readonly:
            add(element, "readonly")
        if disk.snapshot:
            add(element, "transient")
        if disk.id:
            add(element, "serial", disk.id)
        _place(element, disk.transport, f"virtio-disk{index}" if live else None)
    if config.platform == "pc":
        add(devices, "controller", type="pci", index="0", model="pcie-root")
    for index, net in enumerate(config.nets):
        network, bridge = spec.nets[index].network, spec.nets[index].bridge
        # libvirt has no word for our switches: the extras say which it is
        plain = {"user": "user", "tap": "ethernet", "unix": "unix", "switch": "user"}[net.kind]
        kind = "network" if network else "bridge" if bridge else plain
        element = add(devices, "interface", type=kind)
        mac = net.mac or (live.macs[index] if live is not None and index < len(live.macs) else None)
        if mac:
            add(element, "mac", address=mac)
        if network:
            add(element, "source", network=network)
        elif bridge:
            add(element, "source", bridge=bridge)
        elif net.kind == "unix":
            add(element, "source", path=net.target)
        if kind == "ethernet":
            add(element, "target", dev=net.target, managed="no")
        elif net.kind == "tap" and (live is not None or net.target != tap_name(mac or "")):
            add(element, "target", dev=net.target)
        add(element, "model", type="virtio")
        if net.queues != 1 or net.packed:
            queues = net.queues if net.queues != 1 else None
            add(element, "driver", name="qemu", queues=queues, packed="on" if net.packed else None)
        if net.kind == "user":
            add(element, "backend", type="passt")
        for pair in net.forward.split("+") if net.forward else ():
            host, _, guest = pair.partition(":")
            add(add(element, "portForward", proto="tcp"), "range", start=host, to=guest)
        if not spec.nets[index].link:
            add(element, "link", state="down")
        if says_bandwidth(net):
            _bandwidth(element, net)
        _place(element, net.transport, f"net{index}" if live else None)
    for share in filter(is_plain, config.shares):
        element = add(devices, "filesystem", type="mount", accessmode="passthrough")
        add(element, "driver", type="virtiofs")
        add(element, "source", dir=str(share.path))
        add(element, "target", dir=share.id)
        if share.readonly:
            add(element, "readonly")
        _place(element, share.transport, None)
    _characters(devices, spec, live)
    if config.platform == "pc":
        if config.vsock is not None:
            element = add(devices, "vsock", model="virtio")
            add(element, "cid", auto="yes")
            add(element, "source", path=str(config.vsock))
        add(devices, "memballoon", model="virtio" if config.balloon else "none")
        if config.rng:
            add(add(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")
        add(devices, "panic", model="pvpanic")


def _bandwidth(element: Element, net: Net) -> None:
    limits = {name: getattr(net, ours) // KIB for name, ours in BANDWIDTH.items() if getattr(net, ours)}
    if limits:
        bandwidth = add(element, "bandwidth")
        for way in ("inbound", "outbound"):
            said = {name.partition(".")[2]: value for name, value in limits.items() if name.startswith(way)}
            if said:
                add(bandwidth, way, **said)


def _place(element: Element, transport: str, alias: str | None) -> None:
    if alias is not None:
        add(element, "alias", name=alias)
    if transport == "mmio":
        add(element, "address", type="virtio-mmio")


def _characters(devices: Element, spec: Spec, live: Live | None) -> None:
    console = spec.config.console
    for tag in ("serial", "console"):
        element = add(devices, tag, type="unix" if console.kind == "socket" else "pty")
        if console.kind == "socket":
            add(element, "source", mode="bind", path=str(console.path))
        if console.log is not None:
            add(element, "log", file=str(console.log), append="on")
        add(element, "target", type="isa-serial" if tag == "serial" else "serial", port=0)
        if live is not None:
            add(element, "alias", name="serial0")
    if spec.config.hvc:
        element = add(devices, "console", type="pty")
        add(element, "target", type="virtio", port=1)
    for port in spec.config.ports:
        element = add(devices, "channel", type="unix")
        add(element, "source", mode="bind", path=str(port.path))
        add(element, "target", type="virtio", name=port.name)
