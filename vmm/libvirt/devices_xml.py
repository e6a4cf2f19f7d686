"""The devices of domain XML: disks, interfaces, consoles, channels, entropy, vsock, and what the machine has anyway."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmm.convert import KIB
from vmm.libvirt.defaults_xml import OLD_BUSES, OLD_CARDS, is_default, no_display, take
from vmm.libvirt.iotune import BANDWIDTH, IO_TUNE, REFUSED_BANDWIDTH
from vmm.libvirt.spec import DiskName, NetName, disk_name, tap_name
from vmm.libvirt.xmltree import Reader, malformed, unsupported
from vmm.network.bridge import NAME as INTERFACE

TARGET = re.compile(r"vd[a-z]{1,2}")
CHOSEN = re.compile(r"vnet[0-9]|lv[0-9a-f]{12}$")
"""Names that libvirt or this daemon chose, and choose anew."""
CHANNEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class DeviceList:
    """What has been read so far of one domain's devices."""

    def __init__(self, domain: str, channels: Callable[[str, str], Path], notes: list[str]) -> None:
        self.domain, self.channels, self.notes = domain, channels, notes
        self.disks: list[tuple[str, dict[str, Any], DiskName]] = []
        self.nets: list[dict[str, Any]] = []
        self.net_names: list[NetName] = []
        self.ports: list[dict[str, Any]] = []
        self.console: dict[str, Any] | None = None
        self.hvc = self.rng = self.balloon = False
        self.shares: list[dict[str, Any]] = []
        self.vsock: str | None = None
        self.default = False
        """A client wrote them unasked (vmm/libvirt/defaults_xml.py)."""

    @property
    def disk_names(self) -> list[DiskName]:
        return [name for _, _, name in self.disks]

    def values(self) -> dict[str, Any]:
        """As fields of the configuration."""
        values: dict[str, Any] = {
            "disks": [disk for _, disk, _ in self.disks],
            "nets": self.nets,
            "ports": self.ports,
            "rng": self.rng,
            "balloon": self.balloon,
            "shares": self.shares,
            "console": dict(self.console or {"kind": "none"}),
        }
        if self.hvc:
            values["hvc"] = True
        if self.vsock is not None:
            values["vsock"] = self.vsock
        return values


def read_devices(devices: Reader, found: DeviceList) -> None:
    """All of <devices>. Raises LibvirtError for what the machine does not have."""
    found.default = is_default(devices.element)
    for item in devices.children(*READERS):
        for alias in item.children("alias"):
            alias.ignore("name")
        READERS[item.element.tag](item, found)
    # The guest names its disks in the order in which they stand, so that is the order of their names.
    found.disks.sort(key=_order)
    _rename_disks(found)
    for index, (target, _, _) in enumerate(found.disks):
        if target != disk_name(index):
            found.notes.append(f"disk {target}: the guest names disks in order, and may call it {disk_name(index)}")


def _rename_disks(found: DeviceList) -> None:
    """Those of other buses get the first names of virtio disks that are free."""
    taken = {target for target, _, _ in found.disks}
    for place, (target, values, name) in enumerate(found.disks):
        if not TARGET.fullmatch(target):
            free = next(one for one in map(disk_name, range(len(found.disks) + 1)) if one not in taken)
            taken.add(free)
            found.disks[place] = free, values, DiskName(free, name.block)
            found.notes.append(f"disk {target}: this machine has no such bus; it is the virtio disk {free}")
    found.disks.sort(key=_order)


def _order(disk: tuple[str, dict[str, Any], DiskName]) -> tuple[int, str]:
    return len(disk[0]), disk[0]


def _address(item: Reader, found: DeviceList, what: str) -> str:
    """The transport that <address> asks for."""
    address = item.child("address")
    if address is None:
        return "pci"
    kind = address.choice("type", ("pci", "virtio-mmio", "virtio-serial", "isa"), "pci")
    if any(key != "type" for key, _ in address.element.items()):
        found.notes.append(f"{what}: the machine chooses its address")
    address.take_all()
    return "mmio" if kind == "virtio-mmio" else "pci"


def _disk(item: Reader, found: DeviceList) -> None:
    target = item.child("target")
    if target is None:
        raise malformed("<disk>: <target> is missing")
    name = target.needed("dev")
    where = f"<disk {name}>"
    if item.choice("device", ("disk", "lun"), "disk") == "lun":
        raise unsupported(f"{where}: SCSI passthrough is not available; use device='disk'")
    bus = target.attribute("bus", "virtio" if name.startswith("vd") else "another")
    instead = found.default and name[:2] == OLD_BUSES.get(str(bus))
    if not instead and (bus != "virtio" or not TARGET.fullmatch(name)):
        raise unsupported(f"{where}: bus {bus!r} is not available; use <target dev='vda' bus='virtio'/>")
    target.choice("removable", ("off",))
    kind = item.choice("type", ("file", "block"), "file")
    item.choice("model", ("virtio", "virtio-non-transitional", "virtio-transitional"))
    item.ignore("snapshot")
    source = item.child("source")
    path = source.attribute("file" if kind == "file" else "dev") if source is not None else None
    if not path:
        raise malformed(f"{where}: <source> names no {'file' if kind == 'file' else 'device'}")
    assert source is not None
    source.ignore("index")
    values: dict[str, Any] = {"path": path}
    if driver := item.child("driver"):
        driver.choice("name", ("qemu",))
        values["format"] = driver.choice("type", ("raw", "qcow2"), "raw")
        cache = driver.choice("cache", ("default", "writeback", "writethrough", "none"), "default")
        values["cache"] = "writeback" if cache == "default" else cache
        io = driver.choice("io", ("native", "threads", "io_uring"))
        if io == "native":
            found.notes.append(f"disk {name}: io 'native' is done by io_uring or threads")
        values["io"] = io if io in ("threads", "io_uring") else "auto"
        if (queues := driver.attribute("queues")) is not None:
            values["queues"] = queues
        if driver.choice("packed", ("on", "off")) == "on":
            values["packed"] = True
        if driver.attribute("discard", "unmap") != "unmap":
            raise unsupported(f"{where}: what the guest discards is always given back to the host; discard is 'unmap'")
        driver.choice("detect_zeroes", ("off",))
        driver.choice("error_policy", ("report",))
    else:
        values["format"] = "raw"
    if item.child("readonly"):
        values["readonly"] = True
    if item.child("transient"):
        values["snapshot"] = True
    if serial := item.child("serial"):
        values["id"] = serial.text()
    if boot := item.child("boot"):
        boot.ignore("order")
        found.notes.append(f"disk {name}: the kernel is given, so no disk is booted")
    if tune := item.child("iotune"):
        for limit in tune.children(*IO_TUNE):
            values[IO_TUNE[limit.element.tag]] = limit.text()
    if backing := item.child("backingStore"):
        backing.take_all()
        if len(backing.element):
            found.notes.append(f"disk {name}: the image's own header says what backs it")
    values["transport"] = _address(item, found, f"disk {name}")
    if any(other == name for other, _, _ in found.disks):
        raise malformed(f"{where} stands there twice")
    found.disks.append((name, values, DiskName(name, kind == "block")))


def _interface(item: Reader, found: DeviceList) -> None:
    kind = item.choice("type", ("user", "network", "bridge", "ethernet", "unix"))
    if kind is None:
        raise malformed("<interface>: attribute 'type' is missing")
    values: dict[str, Any] = {}
    network = bridge = ""
    if model := item.child("model"):
        known = ("virtio", "virtio-net", "virtio-non-transitional", "virtio-transitional")
        card = model.choice("type", (*known, *OLD_CARDS) if found.default else known)
        if card in OLD_CARDS:
            found.notes.append(f"interface {card}: this machine has no such card; the guest gets a virtio card")
    source = item.child("source")
    target = item.child("target")
    if kind == "network":
        if source is None:
            raise malformed("<interface type='network'>: <source> is missing")
        network = source.needed("network")
        source.ignore("portid", "bridge")
        values["kind"] = "user" if network == "default" else "tap"
    elif kind == "bridge":
        if source is None:
            raise malformed("<interface type='bridge'>: <source> is missing")
        bridge = source.needed("bridge")
        if not INTERFACE.fullmatch(bridge):
            raise malformed(f"<interface>: {bridge!r} is no bridge's name")
        values["kind"] = "tap"
    elif kind == "ethernet":
        if target is None:
            raise malformed("<interface type='ethernet'>: <target> names no device")
        target.choice("managed", ("no",))
        values |= {"kind": "tap", "target": target.needed("dev")}
    elif kind == "unix":
        if source is None:
            raise malformed("<interface type='unix'>: <source> is missing")
        values |= {"kind": "unix", "target": source.needed("path")}
    else:
        values["kind"] = "user"
    mac = item.child("mac")
    values["mac"] = mac.needed("address") if mac is not None else random_mac()
    if target is not None and kind != "ethernet":
        wanted = target.attribute("dev", "") or ""
        target.choice("managed", ("yes",))
        if values["kind"] == "tap" and wanted and not CHOSEN.match(wanted):
            if not INTERFACE.fullmatch(wanted):
                raise malformed(f"<interface>: {wanted!r} is no interface's name")
            values["target"] = wanted
    if values["kind"] == "tap" and "target" not in values:
        values["target"] = tap_name(values["mac"])
    if driver := item.child("driver"):
        driver.choice("name", ("qemu",))
        if (queues := driver.attribute("queues")) is not None:
            values["queues"] = queues
        if driver.choice("packed", ("on", "off")) == "on":
            values["packed"] = True
    plugged = True
    if link := item.child("link"):
        plugged = link.choice("state", ("up", "down"), "up") == "up"
    if bandwidth := item.child("bandwidth"):
        _bandwidth(bandwidth, values)
    if backend := item.child("backend"):
        backend.choice("type", ("passt",))
    forwards = [_forward(forward) for forward in item.children("portForward")]
    if forwards:
        values["forward"] = "+".join(forwards)
    if boot := item.child("boot"):
        boot.ignore("order")
        found.notes.append("interface: the kernel is given, so nothing boots from the network")
    values["transport"] = _address(item, found, "interface")
    found.nets.append(values)
    found.net_names.append(NetName(network, bridge, plugged))


def _bandwidth(item: Reader, values: dict[str, Any]) -> None:
    """Limits; libvirt's inbound is what the guest receives, in KiB."""
    for way in ("inbound", "outbound"):
        if limit := item.child(way):
            for name, why in REFUSED_BANDWIDTH.items():
                if limit.attribute(name) not in (None, "0"):
                    raise unsupported(f"<bandwidth/{way} {name}>: {why}")
            for name in ("average", "burst"):
                given = limit.attribute(name)
                if given is not None and not re.fullmatch(r"[0-9]{1,10}", given):
                    raise malformed(f"<bandwidth/{way} {name}='{given}'>: a number of KiB is expected")
                if given is not None:
                    values[BANDWIDTH[f"{way}.{name}"]] = int(given) * KIB


def random_mac() -> str:
    """In the range that KVM's users take for their guests."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in os.urandom(3))


def _forward(forward: Reader) -> str:
    forward.choice("proto", ("tcp",))
    ranges = list(forward.children("range"))
    pairs = []
    for one in ranges:
        start = one.needed("start")
        pairs.append(f"{start}:{one.attribute('to', start)}")
    if not pairs:
        raise malformed("<interface/portForward>: <range> is missing")
    return "+".join(pairs)


def _character(item: Reader, found: DeviceList) -> None:
    """<serial> and <console>: two names of one thing, the first serial port."""
    tag = item.element.tag
    kind = item.choice("type", ("pty", "unix", "file", "null", "stdio"), "pty")
    item.ignore("tty")
    values: dict[str, Any] = {"kind": "none"}
    if source := item.child("source"):
        if kind == "unix":
            source.choice("mode", ("bind",))
            values = {"kind": "socket", "path": source.needed("path")}
        elif kind == "file":
            values["log"] = source.needed("path")
            source.choice("append", ("on",))
        else:
            source.ignore("path", "mode")
    elif kind in ("unix", "file"):
        raise malformed(f"<{tag} type='{kind}'>: <source> is missing")
    if log := item.child("log"):
        values["log"] = log.needed("file")
        log.choice("append", ("on",))
    if target := item.child("target"):
        port = target.attribute("port", "0")
        wanted = target.choice("type", ("serial", "virtio", "isa-serial"), "serial")
        if model := target.child("model"):
            model.choice("name", ("isa-serial", "virtconsole"))
        if wanted == "virtio":
            found.hvc = True
            return
        if port != "0":
            raise unsupported(f"<{tag}>: this machine has one serial port, not port {port}")
    _address(item, found, tag)
    if found.console is not None and found.console != values and tag == "serial":
        raise unsupported("<serial>: this machine has one serial port")
    if tag == "serial" or found.console is None:
        found.console = values


def _channel(item: Reader, found: DeviceList) -> None:
    if item.element.get("type") == "spicevmc":
        return take(item, found.default, found.notes)
    if item.choice("type", ("unix",)) is None:
        raise malformed("<channel>: attribute 'type' is missing")
    target = item.child("target")
    if target is None:
        raise malformed("<channel>: <target> is missing")
    target.choice("type", ("virtio",))
    target.ignore("state")
    name = target.needed("name")
    if not CHANNEL.fullmatch(name):
        raise unsupported(f"<channel>: {name!r} is no name; use letters, digits, '-', '_' or '.'")
    source = item.child("source")
    path = None
    if source is not None:
        source.choice("mode", ("bind",))
        path = source.attribute("path")
    _address(item, found, f"channel {name}")
    found.ports.append({"name": name, "path": path or str(found.channels(found.domain, name))})


def _rng(item: Reader, found: DeviceList) -> None:
    item.choice("model", ("virtio", "virtio-non-transitional", "virtio-transitional"))
    backend = item.child("backend")
    if backend is None:
        raise malformed("<rng>: <backend> is missing")
    if backend.choice("model", ("random", "builtin")) == "random" and backend.text() not in (
        "",
        "/dev/urandom",
        "/dev/random",
    ):
        raise unsupported(f"<rng>: bytes come from the host's own source, not from {backend.text()}")
    backend.text()
    _address(item, found, "rng")
    found.rng = True


def _vsock(item: Reader, found: DeviceList) -> None:
    item.choice("model", ("virtio", "virtio-non-transitional", "virtio-transitional"))
    if cid := item.child("cid"):
        cid.ignore("auto", "address")
    if source := item.child("source"):
        found.vsock = source.needed("path")
    else:
        found.vsock = str(found.channels(found.domain, "vsock"))
    _address(item, found, "vsock")


def _filesystem(item: Reader, found: DeviceList) -> None:
    if item.choice("type", ("mount",), "mount") is None:
        raise malformed("<filesystem>: attribute 'type' is wrong")
    item.choice("accessmode", ("passthrough",))
    values: dict[str, Any] = {}
    driver = item.child("driver")
    if driver is None or driver.choice("type", ("virtiofs",)) is None:
        raise unsupported("<filesystem>: here is only <driver type='virtiofs'/>")
    driver.ignore("queue")
    if binary := item.child("binary"):
        binary.take_all()
        found.notes.append("filesystem: the machine serves it itself, without a program")
    source, target = item.child("source"), item.child("target")
    if source is None or target is None:
        raise malformed("<filesystem>: <source dir='…'/> and <target dir='tag'/> are needed")
    values = {"path": source.needed("dir"), "id": target.needed("dir")}
    if item.child("readonly"):
        values["readonly"] = True
    values["transport"] = _address(item, found, "filesystem")
    found.shares.append(values)


def _controller(item: Reader, found: DeviceList) -> None:
    kind = item.choice("type", ("pci", "usb", "virtio-serial", "isa"))
    model = item.attribute("model")
    if kind == "usb" and model != "none":
        found.notes.append(f"usb controller{' ' + model if model else ''}: this machine has no USB")
    # A controller says where devices stand; this machine places every device by itself.
    item.take_all()


def _input(item: Reader, found: DeviceList) -> None:
    if item.element.get("type") not in ("mouse", "keyboard"):
        return take(item, found.default, found.notes)
    kind = item.choice("type", ("mouse", "keyboard"))
    item.choice("bus", ("ps2",), "ps2")
    found.notes.append(f"ps2 {kind}: this machine has no display to use it with")


def _balloon(item: Reader, found: DeviceList) -> None:
    model = item.choice("model", ("none", "virtio", "virtio-non-transitional", "virtio-transitional"), "virtio")
    found.balloon = model != "none"
    item.take_all()


def _panic(item: Reader, found: DeviceList) -> None:
    item.choice("model", ("isa", "pvpanic"))
    _address(item, found, "panic")


def _emulator(item: Reader, found: DeviceList) -> None:
    item.text()


def _display(item: Reader, found: DeviceList) -> None:
    """<graphics>, <sound>, <redirdev>."""
    if item.element.tag == "redirdev" and item.element.get("type") != "spicevmc":
        raise no_display("redirdev", item.element.get("type") or "")
    take(item, found.default, found.notes)


def _video(item: Reader, found: DeviceList) -> None:
    if found.default:
        return take(item, True, found.notes)
    _nothing(item, found)


def _nothing(item: Reader, found: DeviceList) -> None:
    """<video>, <audio> that say that there is none."""
    item.choice("type", ("none",))
    item.ignore("id")
    if model := item.child("model"):
        model.choice("type", ("none",))


READERS: dict[str, Callable[[Reader, DeviceList], None]] = {
    "emulator": _emulator,
    "disk": _disk,
    "interface": _interface,
    "serial": _character,
    "console": _character,
    "channel": _channel,
    "rng": _rng,
    "filesystem": _filesystem,
    "vsock": _vsock,
    "controller": _controller,
    "input": _input,
    "memballoon": _balloon,
    "panic": _panic,
    "graphics": _display,
    "sound": _display,
    "redirdev": _display,
    "video": _video,
    "audio": _nothing,
}
