"""What libvirt has no words for, in domain XML: <loopvisor:machine> and in it one element for each part that has some.

    <loopvisor:machine xmlns:loopvisor="…" agent="on" seed="7">
      <loopvisor:disk target="vda" backing="any"/> <loopvisor:net index="0" pcap="/f"/>
    </loopvisor:machine>

Whatever field a configuration gets, it has a place here until libvirt's own words are used for it. Pure.
"""

from __future__ import annotations

from typing import Any
from xml.etree.ElementTree import Element

from vmm.config import Config, ConsoleConfig, Disk, Net, Share
from vmm.convert import Checked, parts, plain, takes
from vmm.libvirt.iotune import BANDWIDTH, IO_TUNE, says_bandwidth
from vmm.libvirt.spec import Spec
from vmm.libvirt.xmltree import Reader, add, malformed

NAMESPACE = "urn:loopvisor:domain:1"
WORDS: dict[type[Checked], frozenset[str]] = {
    Config: frozenset(
        {
            *(
                "name",
                "uuid",
                "core",
                "cpu_model",
                "cpus",
                "max_cpus",
                "memory",
                "kernel",
                "initrd",
                "cmdline",
                "platform",
                "epoch",
            ),
            *("disks", "nets", "console", "ports", "hvc", "vsock", "rng", "reboot", "hugepages", "balloon"),
        }
    ),  # fmt: skip
    Disk: frozenset(
        {"path", "readonly", "id", "transport", "snapshot", "cache", "io", "queues", "packed", *IO_TUNE.values()}
    ),
    Net: frozenset({"kind", "target", "mac", "id", "transport", "queues", "forward", "packed"}),
    ConsoleConfig: frozenset({"kind", "path", "log"}),
}
"""Fields that libvirt's elements say."""


def is_plain(share: Share) -> bool:
    """Whether libvirt's <filesystem> says all of it."""
    said = Share(path=share.path, id=share.id, readonly=share.readonly, transport=share.transport)
    return bool(share.id) and share == said


def _others(kind: type[Checked]) -> list[str]:
    return [name for name in kind._converters if name not in WORDS.get(kind, ())]


def _lists(kind: type[Checked]) -> dict[str, type[Checked]]:
    """Those of them that are lists of parts, with the part's class."""
    found = {}
    for name in _others(kind):
        function, arguments = takes(kind._converters[name])
        if function is parts:
            found[name] = arguments[0]
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):  # a part whose first field stands alone on the command line
        first, *rest = value.items()
        return ",".join([str(first[1]), *(f"{key}={_text(content)}" for key, content in rest)])
    return str(value)


def _given(part: Checked, skip: tuple[str, ...] = ()) -> dict[str, str]:
    defaults = type(part)
    values = plain(part)
    return {
        name: _text(values[name])
        for name in _others(defaults)
        if name not in (*skip, *_lists(defaults)) and name in values and getattr(part, name) != getattr(defaults, name)
    }


def write_extras(root: Element, spec: Spec) -> None:
    """Append the element to a domain, if there is anything to say."""
    config = spec.config
    told: list[tuple[str, dict[str, str], dict[str, str]]] = [
        *(("loopvisor:disk", {"target": spec.disks[at].target}, _disk(disk)) for at, disk in enumerate(config.disks)),
        *(("loopvisor:net", {"index": str(at)}, _net(net)) for at, net in enumerate(config.nets)),
        ("loopvisor:console", {}, _given(config.console)),
    ]
    given = _given(config)
    for name in _lists(Config):
        items = getattr(config, name)
        if name == "shares":  # those that <filesystem> says stand there
            items = [one for one in config.shares if not is_plain(one)]
        told += [(f"loopvisor:{name}", {}, {key: _text(value) for key, value in plain(item).items()}) for item in items]
    if given or any(more for _, _, more in told):
        machine = add(root, "loopvisor:machine", **{"xmlns:loopvisor": NAMESPACE, **given})
        for tag, which, more in told:
            if more:
                add(machine, tag, **which, **more)


def _disk(disk: Disk) -> dict[str, str]:
    # libvirt's images are raw unless something else is said; here a format may be left to the file.
    given = _given(disk, ("format",))
    return {"format": "auto", **given} if disk.format == "auto" else given


def _net(net: Net) -> dict[str, str]:
    given = _given(net, tuple(BANDWIDTH.values()) if says_bandwidth(net) else ())
    if net.kind == "switch":
        given |= {"kind": net.kind, "target": net.target}
    return {**given, "id": net.id} if net.id else given


def read_extras(
    root: Reader, disks: list[tuple[str, dict[str, Any]]], nets: list[dict[str, Any]], console: dict[str, Any]
) -> dict[str, Any]:
    """Fields of the configuration; those of its parts are set in the lists given. Raises LibvirtError."""
    machine = root.child("loopvisor:machine")
    if machine is None:
        return {}
    by_target = dict(disks)
    for disk in machine.children("loopvisor:disk"):
        target = disk.needed("target")
        if target not in by_target:
            raise malformed(f"<loopvisor:disk target='{target}'>: there is no such disk")
        by_target[target] |= _read(disk, Disk)
    for net in machine.children("loopvisor:net"):
        index = net.needed("index")
        if not index.isascii() or not index.isdecimal() or len(index) > 4 or int(index) >= len(nets):
            raise malformed(f"<loopvisor:net index='{index}'>: there is no such interface")
        values = _read(net, Net, "id", "kind", "target")
        if values.get("kind", "switch") != "switch":
            raise malformed(f"<loopvisor:net kind='{values['kind']}'>: only switch is possible")
        nets[int(index)] |= values
    for one in machine.children("loopvisor:console"):
        console |= _read(one, ConsoleConfig)
    values = _read(machine, Config)
    for name, kind in _lists(Config).items():
        items = [_read(one, kind) for one in machine.children(f"loopvisor:{name}")]
        if items:
            values[name] = items
    return values


def _read(reader: Reader, kind: type[Checked], *more: str) -> dict[str, Any]:
    lists = _lists(kind)
    found = {name: reader.attribute(name) for name in (*_others(kind), *more) if name not in lists}
    return {name: value for name, value in found.items() if value is not None}
