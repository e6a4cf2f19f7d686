"""Domain XML to a machine's definition.

Elements and values are libvirt's (formatdomain). Each is one of three: it is configured here; the machine has it, or is
that way, whatever the XML says (ACPI, an APIC, its PCI bus), then it is taken and a note says so where it makes a
difference; or the machine has no such thing, then the definition is refused and the element named.
vmm/libvirt/format.py is the other way. What libvirt has no words for stands in <loopvisor:machine xmlns:loopvisor="…">.
Pure, but for looking at the host's devices.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmm.config import PAGE, Config
from vmm.libvirt.cpusets import cpu_set
from vmm.libvirt.devices_xml import DeviceList, read_devices
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.extras import read_extras
from vmm.libvirt.spec import CORE_OF_TYPE, CPU_MODEL, CPU_MODELS, EMULATOR, Pins, Spec
from vmm.libvirt.xmltree import Reader, malformed, parse, serialise, unsupported

UNITS = {
    "b": 1, "bytes": 1, "kb": 1000, "k": 1 << 10, "kib": 1 << 10, "mb": 1000**2, "m": 1 << 20, "mib": 1 << 20,
    "gb": 1000**3, "g": 1 << 30, "gib": 1 << 30, "tb": 1000**4, "t": 1 << 40, "tib": 1 << 40,
}  # fmt: skip
MACHINE = re.compile(r"(pc|q35)(-.*)?|(pc-(i440fx|q35)-.*)")


def read_domain(text: str, channels: Callable[[str, str], Path]) -> Spec:
    """A definition from a client. `channels` gives the path of a channel's socket that the XML leaves open, by the
    domain's name and the channel's. Raises LibvirtError, ConfigError."""
    root = Reader(parse(text, "domain"))
    kind = root.choice("type", tuple(CORE_OF_TYPE))
    if kind is None:
        raise malformed("<domain>: attribute 'type' is missing")
    root.ignore("id")
    notes: list[str] = []
    name = _text(root, "name")
    if not name:
        raise LibvirtError(Code.NO_NAME, "missing name information", From.DOMAIN)
    values: dict[str, Any] = {"name": name, "core": CORE_OF_TYPE[kind], "uuid": _uuid(_text(root, "uuid"))}
    if genid := root.child("genid"):
        genid.take_all()
        notes.append("genid: the machine makes its own")
    values["memory"] = _memory(root)
    values |= _vcpus(root)
    values |= _os(root)
    _features(root)
    values |= _cpu(root, values["cpus"], notes)
    values |= _clock(root)
    values |= _life(root)
    _pm(root)
    if backing := root.child("memoryBacking"):
        for item in backing.children("hugepages", "source", "access"):
            item.take_all()  # shared memory is what others need for virtiofs; here the machine serves it itself
            if item.element.tag == "hugepages":
                values["hugepages"] = True
    for ignored in root.children("resource", "seclabel"):
        if ignored.element.tag == "resource" or ignored.element.get("type") in ("none", "dynamic"):
            ignored.take_all()
            notes.append(f"{ignored.element.tag}: the machine is an ordinary process")
    metadata = root.child("metadata")
    if metadata is not None:
        metadata.take_all()
    found = DeviceList(name, channels, notes)
    if devices := root.child("devices"):
        read_devices(devices, found)
    values |= found.values()
    disks = [(target, disk) for target, disk, _ in found.disks]
    extras = read_extras(root, disks, found.nets, values["console"])
    if "shares" in extras:
        extras["shares"] = [*found.shares, *extras["shares"]]
    values |= extras
    pins = _pins(root, values.get("max_cpus") or values["cpus"])
    title, description = _text(root, "title"), _text(root, "description", strip=False)
    if "\n" in title:
        raise malformed("<title> takes no line break")
    root.done()
    if values.get("kernel") is None and "flat" not in values:
        raise unsupported("<os>: this machine has no firmware that would boot a disk; give <kernel> in <os>")
    return Spec(
        Config.from_dict({key: value for key, value in values.items() if value is not None}),
        title,
        description,
        "" if metadata is None else "".join(serialise(child) for child in metadata.element),
        tuple(found.disk_names),
        tuple(found.net_names),
        pins,
        tuple(notes),
    )


def scaled(value: str, unit: str | None, default: str) -> int:
    """A number with libvirt's units, in bytes. Raises LibvirtError."""
    factor = UNITS.get((unit or default).lower())
    if factor is None or not re.fullmatch(r"[0-9]{1,19}", value):
        raise malformed(f"{value!r} {unit or ''}: not a size".replace(" :", ":"))
    return int(value) * factor


def _text(root: Reader, tag: str, *, strip: bool = True) -> str:
    child = root.child(tag)
    if child is None:
        return ""
    text = child.text()
    return text if strip else (child.element.text or "")


def _uuid(text: str) -> str:
    if not text:
        return str(uuid.uuid4())
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise malformed(f"<uuid>: {text!r} is no UUID") from None


def _memory(root: Reader) -> int:
    def size(tag: str) -> int | None:
        child = root.child(tag)
        if child is None:
            return None
        child.choice("dumpCore", ("on",))
        return scaled(child.text(), child.attribute("unit"), "KiB")

    memory = size("memory")
    if memory is None:
        raise malformed("<memory> is missing")
    current = size("currentMemory")
    rounded = -(-memory // PAGE) * PAGE
    if current not in (None, memory, rounded):
        raise unsupported(
            f"<currentMemory>: {current} bytes, <memory>: {memory}; a machine begins with all of it, so make them equal"
        )
    return rounded


def _vcpus(root: Reader) -> dict[str, int]:
    child = root.child("vcpu")
    if child is None:
        return {"cpus": 1}
    child.choice("placement", ("static",))
    text, current = child.text(), child.attribute("current")
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) == 0:
        raise malformed(f"<vcpu>: {text!r} is no number of processors")
    if current is not None and (not re.fullmatch(r"[0-9]{1,6}", current) or not 1 <= int(current) <= int(text)):
        raise malformed(f"<vcpu current='{current}'>: not 1 to {text}")
    for one in root.children("vcpus"):
        for vcpu in one.children("vcpu"):
            vcpu.ignore("enabled", "hotpluggable", "id", "order")
    return {"cpus": int(text)} if current is None else {"cpus": int(current), "max_cpus": int(text)}


def _pins(root: Reader, most: int) -> Pins:
    tune = root.child("cputune")
    if tune is None:
        return Pins()
    pins = Pins()
    for one in tune.children("vcpupin"):
        vcpu = one.needed("vcpu")
        if not re.fullmatch(r"[0-9]{1,5}", vcpu) or int(vcpu) >= most:
            raise malformed(f"<cputune/vcpupin vcpu='{vcpu}'>: there is no such processor of {most}")
        if int(vcpu) in dict(pins.vcpus):
            raise malformed(f"<cputune/vcpupin vcpu='{vcpu}'>: is there twice")
        pins = pins.changed(int(vcpu), cpu_set(one.needed("cpuset")))
    if emulator := tune.child("emulatorpin"):
        pins = pins.changed(EMULATOR, cpu_set(emulator.needed("cpuset")))
    return pins


def _os(root: Reader) -> dict[str, Any]:
    system = root.child("os")
    if system is None:
        raise malformed("<os> is missing")
    values: dict[str, Any] = {}
    kind = system.child("type")
    if kind is None or kind.text() not in ("hvm", "linux"):
        raise unsupported("<os/type>: here is only hvm")
    kind.choice("arch", ("x86_64",))
    machine = kind.attribute("machine")
    if machine == "bare":
        values["platform"] = "bare"
    elif machine is not None and not MACHINE.fullmatch(machine):
        raise unsupported(f"<os/type machine='{machine}'>: here is only pc, which q35 names as well, or bare")
    for key in ("kernel", "initrd"):
        if path := _text(system, key):
            values[key] = path
    if command_line := system.child("cmdline"):
        values["cmdline"] = command_line.text()
    for boot in system.children("boot"):
        boot.choice("dev", ("hd",))
    return values


FEATURES = {
    "acpi": (), "apic": (), "pae": (), "vmport": ("off",), "pvspinlock": ("off",), "smm": ("off",), "hap": ("on",),
    "privnet": (), "viridian": (),
}  # fmt: skip
REFUSED_FEATURES = ("viridian", "privnet")


def _features(root: Reader) -> None:
    features = root.child("features")
    if features is None:
        return
    for feature in features.children(*(name for name in FEATURES if name not in REFUSED_FEATURES)):
        if FEATURES[feature.element.tag]:
            feature.choice("state", FEATURES[feature.element.tag])


def _cpu(root: Reader, cpus: int, notes: list[str]) -> dict[str, Any]:
    cpu = root.child("cpu")
    if cpu is None:
        return {}
    mode = cpu.choice("mode", ("host-passthrough", "host-model", "maximum", "custom"), "custom")
    cpu.ignore("check", "migratable", "match")
    made = {"host-passthrough": "host", "maximum": "max"}.get(mode or "custom", "v2")
    if model := cpu.child("model"):
        ours = {name: key for key, name in CPU_MODELS.items()}.get(model.text())
        if mode == "custom" and ours is not None:
            made = ours
        elif model.text() != CPU_MODEL:
            notes.append(f"cpu model {model.text()}: the guest is told of {CPU_MODEL}")
        model.ignore("fallback", "vendor_id")
    elif mode == "host-model":
        notes.append(f"cpu mode host-model: the guest is told of {CPU_MODEL}")
    if topology := cpu.child("topology"):
        product = 1
        for key in ("sockets", "dies", "clusters", "cores", "threads"):
            text = topology.attribute(key, "1") or "1"
            if not re.fullmatch(r"[0-9]{1,5}", text):
                raise malformed(f"<cpu/topology {key}='{text}'>: not a number")
            product *= int(text)
        if product != cpus:
            raise unsupported(f"<cpu/topology>: {product} processors, <vcpu> says {cpus}")
        notes.append("cpu topology: every processor is a socket of its own")
    return {"cpu_model": made}


def _clock(root: Reader) -> dict[str, Any]:
    clock = root.child("clock")
    if clock is None:
        return {}
    values: dict[str, Any] = {}
    if clock.choice("offset", ("utc", "absolute"), "utc") == "absolute":
        start = clock.needed("start")
        values["epoch"] = start
    for timer in clock.children("timer"):
        name = timer.choice("name", ("rtc", "pit", "hpet", "tsc", "kvmclock", "hypervclock"))
        present = ("no",) if name in ("hpet", "hypervclock") else ("yes",)
        if timer.choice("present", present) is None and present == ("no",):
            raise unsupported(f"<clock/timer name='{name}'>: this machine has none; say present='no'")
        timer.ignore("tickpolicy", "track")
    return values


def _life(root: Reader) -> dict[str, Any]:
    def action(tag: str, allowed: tuple[str, ...]) -> str:
        text = _text(root, tag)
        if text and text not in allowed:
            raise unsupported(f"<{tag}>: {text!r}; here is only {' or '.join(allowed)}")
        return text or allowed[0]

    action("on_poweroff", ("destroy",))
    action("on_crash", ("destroy",))
    return {"reboot": action("on_reboot", ("restart", "destroy")) == "restart"}


def _pm(root: Reader) -> None:
    if pm := root.child("pm"):
        for item in pm.children("suspend-to-mem", "suspend-to-disk"):
            item.choice("enabled", ("no",))
