"""The configuration of one machine: frozen, validated, the same from Python, from TOML and from the command line.

`Config(...)` takes Python values or the strings that the command line takes; `Config.load(path)` reads TOML;
`Config.to_dict()` and `to_toml()` give back what `from_dict()` and `load()` accept. Unknown keys are refused.
`check_host` checks also whether files exist and the host has enough memory, so that a mistake is told in one line
before anything is built. This module must not know images, devices or cores.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vmm.convert import (
    KIB,
    MIB,
    TIB,
    Checked,
    Converter,
    format_size,
    from_mapping,
    optional,
    plain,
    relative_to,
    split,
    to_boolean,
    to_choice,
    to_forwards,
    to_integer,
    to_mac,
    to_mount,
    to_name,
    to_number,
    to_part,
    to_parts,
    to_path,
    to_rules,
    to_seconds,
    to_servers,
    to_size,
    to_text,
    to_uuid,
    to_words,
    toml,
)
from vmm.errors import ConfigError, os_reason

PAGE = 4096
MAX_CPUS = 64
MIN_MEMORY, MAX_MEMORY = 1 * MIB, 4 * TIB
MAX_CMDLINE = 2047
"""COMMAND_LINE_SIZE of x86 Linux is 2048, and counts the zero byte at the end."""
VIRTUAL_EPOCH = 1_704_067_200
"""2024-01-01T00:00:00Z: where the wall clock of a machine with a virtual clock starts, unless `epoch` says
otherwise."""

ROOT_TAG = "root"
"""The tag of the share that is the guest's root file system."""

CoreName = Literal["auto", "kvm", "soft"]
CpuModel = Literal["v2", "v3", "max", "host"]
ClockKind = Literal["real", "virtual"]
Parallel = Literal["auto", "on", "off"]
EntryMode = Literal["real", "protected", "long"]
Platform = Literal["pc", "bare"]
Direct = Literal["auto", "on", "off"]
ConsoleKind = Literal["stdio", "socket", "none"]
NetKind = Literal["user", "tap", "unix", "switch"]
GdbArchitecture = Literal["x86-64", "i386", "i8086"]


MAX_RATE = TIB
"""The highest limit of operations or bytes a second, and the largest burst (virtio.limits.RATE_MAX)."""


def _limits(*names: str) -> dict[str, Converter]:
    """Converters of limits a second, and of their bursts. Limits of bytes are given as sizes."""
    convert = to_size(0, MAX_RATE) if names[0].startswith("bps") else to_integer(0, MAX_RATE)
    return dict.fromkeys([*names, *(f"{name}_burst" for name in names)], convert)


def _check_bursts(part: Checked) -> None:
    for name in limit_names(type(part)):
        if name.endswith("_burst") and getattr(part, name) and not getattr(part, name.removesuffix("_burst")):
            raise ConfigError(f"{part._where}.{name}: a burst needs its limit; give {name.removesuffix('_burst')} too")


WIRE = ("delay", "jitter", "loss", "duplicate", "reorder", "seed")
"""The fields of a Net that say what a switch's wire does to frames."""
POLICY = ("allow", "deny", "dns")
"""The fields of a Net that are its policy, which may be changed while the machine runs."""


def limit_names(kind: type[Checked]) -> list[str]:
    """The fields of a Disk or Net that limit it, which may be changed while the machine runs."""
    return [name for name in kind._converters if name.startswith(("iops", "bps", "pps"))]


class FlatImage(Checked):
    """Raw bytes loaded at `load` and entered at `entry` in the given processor mode, with interrupts off."""

    path: Path
    """The file."""
    load: int = 0x7C00
    """Guest-physical address of its first byte."""
    entry: int | None = None
    """Guest-physical address of the first instruction; by default the first byte."""
    mode: EntryMode = "real"
    """The processor's mode at the first instruction."""

    _where = "flat"
    _converters = {
        "path": to_path,
        "load": to_integer(0, MAX_MEMORY),
        "entry": optional(to_integer(0, MAX_MEMORY)),
        "mode": to_choice(EntryMode),
    }

    @classmethod
    def parse(cls, text: str) -> FlatImage:
        """FILE[,load=ADDRESS][,entry=ADDRESS][,mode=real|protected|long]"""
        path, values = split("flat", text, {})
        return from_mapping(cls, "flat", {"path": path, **values})


class Disk(Checked):
    """One virtio block device."""

    path: Path
    """An image file, or a block device of the host."""
    readonly: bool = False
    """The guest can only read."""
    id: str = ""
    """The disk's name, and the serial number that the guest sees; by default disk0, disk1…"""
    format: Literal["auto", "raw", "qcow2"] = "auto"
    """auto: the file's first bytes tell. The guest of a raw image found so cannot make it look like another format."""
    backing: Literal["dir", "any", "none"] = "dir"
    """Which backing files the image may name. dir: those in its own directory."""
    data: Path | None = None
    """The external data file of a qcow2 image that has one."""
    transport: Literal["pci", "mmio"] = "pci"
    """How the guest finds the device: as a PCI function, or as virtio-mmio described in ACPI."""
    snapshot: bool = False
    """Writes go to a private copy that vanishes with the machine; the file itself is only read."""
    cache: Literal["writeback", "writethrough", "none"] = "writeback"
    """writethrough: every write is durable before it completes; none: data does not go through the host's page cache
    (O_DIRECT)."""
    io: Literal["auto", "io_uring", "threads"] = "auto"
    """How requests that would block are done; auto: io_uring where the host has it."""
    queues: int = 1
    """How many request queues the disk has; Linux uses at most one for each vCPU."""
    packed: bool = False
    """Offer packed rings (VIRTIO_F_RING_PACKED), which the guest's driver then uses if it knows them."""

    iops: int = 0
    """Requests a second, reads and writes together; 0: no limit."""
    iops_read: int = 0
    """Reads a second."""
    iops_write: int = 0
    """Writes, flushes and discards a second."""
    bps: int = 0
    """Bytes a second, read and written together; 0: no limit."""
    bps_read: int = 0
    """Bytes read a second."""
    bps_write: int = 0
    """Bytes written a second."""
    iops_burst: int = 0
    """Requests that may pass at once after a pause, within iops; 0: a twentieth of a second's worth."""
    iops_read_burst: int = 0
    """Reads that may pass at once after a pause, within iops_read; 0: a twentieth of a second's worth."""
    iops_write_burst: int = 0
    """Writes that may pass at once after a pause, within iops_write; 0: a twentieth of a second's worth."""
    bps_burst: int = 0
    """Bytes that may pass at once after a pause, within bps; 0: a twentieth of a second's worth."""
    bps_read_burst: int = 0
    """Bytes read that may pass at once after a pause, within bps_read; 0: a twentieth of a second's worth."""
    bps_write_burst: int = 0
    """Bytes written that may pass at once after a pause, within bps_write; 0: a twentieth of a second's worth."""

    _where = "disk"
    _converters = {
        "path": to_path,
        "readonly": to_boolean,
        "id": to_name,
        "format": to_choice(Literal["auto", "raw", "qcow2"]),
        "backing": to_choice(Literal["dir", "any", "none"]),
        "data": optional(to_path),
        "transport": to_choice(Literal["pci", "mmio"]),
        "snapshot": to_boolean,
        "cache": to_choice(Literal["writeback", "writethrough", "none"]),
        "io": to_choice(Literal["auto", "io_uring", "threads"]),
        "queues": to_integer(1, 16),
        "packed": to_boolean,
        **_limits("iops", "iops_read", "iops_write"),
        **_limits("bps", "bps_read", "bps_write"),
    }

    def _check(self) -> None:
        _check_bursts(self)
        if self.snapshot and self.readonly:
            raise ConfigError("disk: ro and snapshot exclude each other; give one of them")

    @classmethod
    def parse(cls, text: str) -> Disk:
        """FILE[,ro][,snapshot][,id=NAME][,cache=writeback|writethrough|none][,format=raw|qcow2][,backing=dir|any|none]
        [,data=FILE][,transport=pci|mmio][,io=auto|io_uring|threads][,queues=N][,packed]
        [,iops[-read|-write][-burst]=N][,bps[-read|-write][-burst]=SIZE]"""
        flags = {
            "ro": ("readonly", True),
            "rw": ("readonly", False),
            "snapshot": ("snapshot", True),
            "packed": ("packed", True),
        }
        path, values = split("disk", text, flags)
        return from_mapping(cls, "disk", {"path": path, **values})


class Net(Checked):
    """One virtio network device."""

    kind: NetKind
    """user: the host's own connections, by passt; tap: an interface of the host; unix: frames over a UNIX socket;
    switch: a private switch of this user's machines."""
    target: str = ""
    """The tap's or switch's name, or the socket's path; empty for user."""
    mac: str | None = None
    """The card's address; by default a random one."""
    id: str = ""
    """The card's name; by default net0, net1…"""
    transport: Literal["pci", "mmio"] = "pci"
    """How the guest finds the device: as a PCI function, or as virtio-mmio described in ACPI."""
    pcap: Path | None = None
    """A file into which every frame is written, in pcap format."""
    queues: int = 1
    """How many pairs of queues a tap and its card have; other networks have one pair."""
    forward: str = ""
    """User networking: TCP ports of the host that lead to the guest's, as 8080:80 or 8080:80+2222:22."""
    allow: str = ""
    """User networking: the only places that the guest may connect to, as example.org:443+*.example.net+10.0.0.0/8.
    Names are resolved on this host; the guest itself reaches no name server. host: this host's own addresses, which
    nothing else opens but the very address."""
    deny: str = ""
    """User networking: places that the guest may not connect to, whatever `allow` says; a name here has no port. host:
    this host's own addresses."""
    dns: str = ""
    """User networking: the name servers that resolve the guest's names, as 10.0.0.53+[2001:db8::53]:5353, instead of
    this host's resolver. none: the guest can resolve no names."""
    delay: float = 0.0
    """A switch's wire, for tests: each frame takes this many seconds, in each direction."""
    jitter: float = 0.0
    """A switch's wire: each frame takes up to this many seconds more, at random."""
    loss: float = 0.0
    """A switch's wire: the part of all frames that is lost, 0 to 1."""
    duplicate: float = 0.0
    """A switch's wire: the part of all frames that arrives twice, 0 to 1."""
    reorder: float = 0.0
    """A switch's wire: the part of all frames that arrives after frames sent later, 0 to 1."""
    seed: int = 0
    """A switch's wire: the seed of its random choices."""
    required: bool = True
    """If off and the network cannot be had, the machine runs without this card, and a warning says so."""
    packed: bool = False
    """Offer packed rings (VIRTIO_F_RING_PACKED), which the guest's driver then uses if it knows them."""

    pps_in: int = 0
    """Frames a second that the guest receives; 0: no limit."""
    pps_out: int = 0
    """Frames a second that the guest sends."""
    bps_in: int = 0
    """Bytes (not bits) a second that the guest receives; 0: no limit."""
    bps_out: int = 0
    """Bytes a second that the guest sends."""
    pps_in_burst: int = 0
    """Frames that may come at once after a pause, within pps_in; 0: a twentieth of a second's worth."""
    pps_out_burst: int = 0
    """Frames that may go at once after a pause, within pps_out; 0: a twentieth of a second's worth."""
    bps_in_burst: int = 0
    """Bytes that may come at once after a pause, within bps_in; 0: a twentieth of a second's worth."""
    bps_out_burst: int = 0
    """Bytes that may go at once after a pause, within bps_out; 0: a twentieth of a second's worth."""

    _where = "net"
    _converters = {
        "kind": to_choice(NetKind),
        "target": to_text,
        "mac": optional(to_mac),
        "id": to_name,
        "transport": to_choice(Literal["pci", "mmio"]),
        "pcap": optional(to_path),
        "queues": to_integer(1, 16),
        "forward": to_forwards,
        "allow": to_rules,
        "deny": to_rules,
        "dns": to_servers,
        "delay": to_number(0, 3600),
        "jitter": to_number(0, 3600),
        "loss": to_number(0, 1),
        "duplicate": to_number(0, 1),
        "reorder": to_number(0, 1),
        "seed": to_integer(0, (1 << 64) - 1),
        "required": to_boolean,
        "packed": to_boolean,
        **_limits("pps_in", "pps_out"),
        **_limits("bps_in", "bps_out"),
    }

    def _check(self) -> None:
        _check_bursts(self)
        if self.kind == "user" and self.target:
            raise ConfigError("net: user networking takes no target")
        if self.kind != "user" and not self.target:
            raise ConfigError(f"net: {self.kind} needs a target; write {self.kind}=…")
        if self.kind == "tap" and len(self.target.encode()) > 15:
            raise ConfigError(f"net: {self.target!r} is longer than the 15 bytes of an interface name")
        if self.queues > 1 and (self.kind != "tap" or self.pcap is not None):
            raise ConfigError("net: only a tap has several queues, and not with pcap; leave queues out")
        if self.forward and self.kind != "user":
            raise ConfigError("net: forward is user networking's; a tap's guest has an address of its own")
        if self.policed and self.kind != "user":
            raise ConfigError("net: allow, deny and dns are user networking's; filter a tap with the host's firewall")
        if self.kind == "switch" and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", self.target):
            raise ConfigError(f"net: {self.target!r} is no switch's name; use letters, digits, _, . and -, at most 64")
        if self.impaired and self.kind != "switch":
            raise ConfigError("net: delay, jitter, loss, duplicate, reorder and seed are for a switch; leave them out")
        if self.deny:
            from virtio.backends.rules import parse

            if any(rule.name not in ("", "*") and rule.port for rule in parse(self.deny)):
                raise ConfigError("net.deny: a name is denied for all ports; leave the port out, or give an address")

    @property
    def impaired(self) -> dict[str, Any]:
        """The fields of WIRE that are set, by name; empty if the wire does nothing to frames."""
        return {name: getattr(self, name) for name in WIRE if getattr(self, name)}

    @property
    def policed(self) -> bool:
        """Whether a policy says where the guest may connect to, or who resolves its names."""
        return bool(self.allow or self.deny or self.dns)

    @classmethod
    def parse(cls, text: str) -> Net:
        """user | tap=NAME | unix=PATH | switch=NAME, then [,optional][,mac=…][,id=NAME][,transport=pci|mmio]
        [,pcap=FILE][,queues=N][,forward=HOSTPORT:GUESTPORT+…][,allow=TO+…][,deny=TO+…][,dns=SERVER+…|none][,packed]
        [,pps-in|pps-out[-burst]=N][,bps-in|bps-out[-burst]=SIZE][,delay|jitter=SECONDS]
        [,loss|duplicate|reorder=PART][,seed=N]"""
        first, values = split("net", text, {"optional": ("required", False), "packed": ("packed", True)})
        kind, _, target = first.partition("=")
        if "kind" in values or "target" in values:
            raise ConfigError(f"net: {text!r} is not understood; write user, tap=NAME, unix=PATH or switch=NAME first")
        return from_mapping(cls, "net", {"kind": kind, "target": target, **values})


class Share(Checked):
    """A directory of the host that the guest sees as a file system (virtio-fs)."""

    path: Path
    """The directory. The guest may do there what this process may, and can do nothing outside it."""
    mount: str = ""
    """Where guests of our images mount it. By default none does; the command mount -t virtiofs ID /somewhere mounts
    it."""
    readonly: bool = False
    """The guest can only read."""
    id: str = ""
    """The tag by which the guest finds it; by default share0, share1…"""
    uid: int | None = None
    """The guest's user who owns this user's files, as the guest sees them; by default root. If this process is run by
    root, files by default keep their owners in the guest, and new ones get the owner that the guest gives them."""
    gid: int | None = None
    """The guest's group that owns them, likewise; by default the number in `uid`."""
    cache: Literal["none", "auto", "always"] = "auto"
    """How long the guest believes what it knows of names and attributes. none: not at all; auto: a second; always: a
    day, and it keeps content that it has read."""
    transport: Literal["pci", "mmio"] = "pci"
    """How the guest finds the device: as a PCI function, or as virtio-mmio described in ACPI."""

    _where = "share"
    _converters = {
        "path": to_path,
        "mount": to_mount,
        "readonly": to_boolean,
        "id": to_name,
        "uid": optional(to_integer(0, (1 << 32) - 2)),
        "gid": optional(to_integer(0, (1 << 32) - 2)),
        "cache": to_choice(Literal["none", "auto", "always"]),
        "transport": to_choice(Literal["pci", "mmio"]),
    }

    def _check(self) -> None:
        if len(self.id.encode()) > 36:
            raise ConfigError(f"share: the id {self.id!r} is longer than the 36 bytes of a tag")
        if self.gid is not None and self.uid is None:
            raise ConfigError("share: gid needs uid too")

    @classmethod
    def parse(cls, text: str) -> Share:
        """HOST[:/GUEST][,ro][,uid=N][,gid=N][,cache=none|auto|always][,id=TAG][,transport=pci|mmio]"""
        first, values = split("share", text, {"ro": ("readonly", True)})
        path, colon, mount = first.rpartition(":/")
        given = {"path": path, "mount": f"/{mount}"} if colon else {"path": first}
        return from_mapping(cls, "share", {**given, **values})


class RootDirectory(Checked):
    """A directory of the host that is the guest's root file system (virtio-fs)."""

    path: Path
    """The directory. What the guest writes is written there."""
    readonly: bool = False
    """The guest can only read."""
    uid: int | None = None
    """The guest's user who owns this user's files, as for a share."""
    gid: int | None = None
    """The guest's group that owns them, likewise; by default the number in `uid`."""
    cache: Literal["none", "auto", "always"] = "auto"
    """How long the guest believes what it knows of names and attributes. none: not at all; auto: a second; always: a
    day, and it keeps content that it has read."""

    _where = "root"
    _converters = {name: Share._converters[name] for name in ("path", "readonly", "uid", "gid", "cache")}

    def _check(self) -> None:
        if self.gid is not None and self.uid is None:
            raise ConfigError("root: gid needs uid too")

    @classmethod
    def parse(cls, text: str) -> RootDirectory:
        """DIR[,ro][,uid=N][,gid=N][,cache=none|auto|always]"""
        path, values = split("root", text, {"ro": ("readonly", True)})
        return from_mapping(cls, "root", {"path": path, **values})


class ConsoleConfig(Checked):
    """Where the first serial port leads. With every kind, `vmm console NAME` attaches to a named machine."""

    kind: ConsoleKind = "none"
    """stdio: this process's terminal or pipes; socket: a UNIX socket at `path`; none: only those who attach by name see
    it."""
    path: Path | None = None
    """The socket, for kind socket."""
    log: Path | None = None
    """Everything that the guest writes is appended to this file."""
    log_limit: int = 16 * MIB
    """Bytes after which the log is rotated (one older file is kept)."""

    _where = "console"
    _converters = {
        "kind": to_choice(ConsoleKind),
        "path": optional(to_path),
        "log": optional(to_path),
        "log_limit": to_size(4 * KIB, TIB),
    }

    def _check(self) -> None:
        if (self.kind == "socket") != (self.path is not None):
            raise ConfigError("console: a path belongs to kind socket, and to no other; write socket=PATH")

    @classmethod
    def parse(cls, text: str) -> ConsoleConfig:
        """stdio | none | socket=PATH, then [,log=FILE][,log_limit=SIZE]"""
        first, values = split("console", text, {})
        kind, _, path = first.partition("=")
        return from_mapping(cls, "console", {"kind": kind, "path": path or None, **values})


class GdbConfig(Checked):
    """Where GDB may connect. Whoever can connect rules the guest."""

    address: str
    """[HOST:]PORT or unix:PATH; without a host the port is on 127.0.0.1."""
    wait: bool = True
    """The machine waits for a debugger before its first instruction."""
    arch: GdbArchitecture = "x86-64"
    """The processor that GDB sees: x86-64, or i386 and i8086 for guests that never leave 32-bit and 16-bit modes."""

    _where = "gdb"
    _converters = {"address": to_text, "wait": to_boolean, "arch": to_choice(GdbArchitecture)}

    @classmethod
    def parse(cls, text: str) -> GdbConfig:
        """[HOST:]PORT | unix:PATH, then [,wait=off][,arch=i386|i8086]"""
        address, values = split("gdb", text, {})
        return from_mapping(cls, "gdb", {"address": address, **values})


class PortConfig(Checked):
    """A named port of the virtio console, as a UNIX socket of the host."""

    name: str
    """The name by which the guest finds the port, in /sys/class/virtio-ports/*/name."""
    path: Path
    """The UNIX socket."""

    _where = "port"
    _converters = {"name": to_name, "path": to_path}

    @classmethod
    def parse(cls, text: str) -> PortConfig:
        """NAME=PATH"""
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"port: {text!r} is not understood; write NAME=PATH")
        return cls(name=name, path=Path(path))


class PciSlot(Checked):
    """Where a virtio device stands on the PCI bus."""

    id: str
    """The id of a disk, net or share (by default disk0, net0, share0…), "root", "console", "rng", "vsock", "balloon",
    or the name of one of the embedder's devices."""
    device: int
    """Its device number on bus 0."""

    _where = "slot"
    _converters = {"id": to_name, "device": to_integer(1, 31)}

    @classmethod
    def parse(cls, text: str) -> PciSlot:
        """ID=NUMBER"""
        name, equals, number = text.partition("=")
        if not (name and equals and number):
            raise ConfigError(f"slot: {text!r} is not understood; write ID=NUMBER")
        return from_mapping(cls, "slot", {"id": name, "device": number})


class FwCfgItem(Checked):
    """An item of the user's own in fw_cfg, which firmware and kernels read."""

    name: str
    """The item's name, at most 55 characters. By convention it begins with opt/ and a domain of your own."""
    file: Path | None = None
    """A file whose content is the item's content."""
    string: str | None = None
    """Text that is the item's content, instead of a file. No zero byte is added at its end."""

    _where = "fw_cfg"
    _converters = {"name": to_text, "file": optional(to_path), "string": optional(to_text)}

    def _check(self) -> None:
        if not (0 < len(self.name) <= 55 and self.name.isascii() and self.name.isprintable()):
            raise ConfigError(f"fw_cfg.name: {self.name!r} is no name; use 1 to 55 printable ASCII characters")
        if (self.file is None) == (self.string is None):
            raise ConfigError(f"fw_cfg: {self.name!r} needs either file=FILE or string=TEXT")

    @classmethod
    def parse(cls, text: str) -> FwCfgItem:
        """name=NAME,file=FILE | name=NAME,string=TEXT"""
        first, values = split("fw_cfg", text, {})
        key, equals, value = first.partition("=")
        if not equals or "name" not in (key, *values):
            raise ConfigError(f"fw_cfg: {text!r} is not understood; write name=NAME,file=FILE or name=NAME,string=TEXT")
        values[key] = value
        return from_mapping(cls, "fw_cfg", values)


class Variable(Checked):
    """An environment variable for programs that the agent starts."""

    name: str
    """Its name."""
    value: str = ""
    """Its value."""

    _where = "env"
    _converters = {"name": to_text, "value": to_text}

    def _check(self) -> None:
        if not self.name or "=" in self.name:
            raise ConfigError(f"env: {self.name!r} is no name of a variable; write NAME=VALUE")

    @classmethod
    def parse(cls, text: str) -> Variable:
        """NAME=VALUE"""
        name, _, value = text.partition("=")
        return cls(name=name, value=value)


class Config(Checked):
    """One machine. Strings are accepted wherever the command line takes them."""

    name: str = ""
    """The name by which vmm ps, console, stop … know the machine. A machine without a name is not listed there."""
    uuid: str | None = None
    """The UUID that the guest reads in SMBIOS; by default one made from the name, or a random one without a name."""
    core: CoreName = "auto"
    """The execution core; auto takes the best that this host has for this kernel."""
    cpu_model: CpuModel = "v2"
    """What guests are told of the processor. v2 (x86-64-v2): what all cores offer, so that a saved machine can go on
    with any of them; v3 (x86-64-v3: AVX2, FMA, BMI2): what all cores offer on hosts that have it; max or host: all
    that this host's core offers."""
    cpus: int = 1
    """Virtual processors: 16 at most on the software core, on KVM as many as the host gives a machine (64 at most)."""
    max_cpus: int | None = None
    """The most processors that the machine can have while it runs (`vmm set --cpus`); by default as many as it starts
    with."""
    memory: int = 256 * MIB
    """RAM: bytes, or text such as "512M"."""
    kernel: Path | None = None
    """A kernel: bzImage, vmlinux, PVH or multiboot ELF. The loader finds out which it is."""
    initrd: Path | None = None
    """The initial RAM disk."""
    cmdline: str | None = None
    """The kernel's command line; None: the default for this kernel and core."""
    append: str = ""
    """Text that is added to the command line, whether that is the default or given."""
    flat: FlatImage | None = None
    """Raw code that is run instead of a kernel."""
    disks: tuple[Disk, ...] = ()
    """virtio block devices, in the order in which the guest names them."""
    nets: tuple[Net, ...] = ()
    """virtio network devices."""
    shares: tuple[Share, ...] = ()
    """Directories of the host that the guest sees."""
    root: RootDirectory | None = None
    """A directory of the host that is the guest's root file system; for our images and their initrd."""
    console: ConsoleConfig = ConsoleConfig()
    """Where the first serial port leads."""
    hvc: bool = False
    """A virtio console (hvc0) beside the serial port; its output joins the machine's console."""
    ports: tuple[PortConfig, ...] = ()
    """Named ports of the virtio console."""
    gdb: GdbConfig | None = None
    """Where GDB may connect; a copy of the machine has none."""
    vsock: Path | None = None
    """Base of the vsock sockets: the host connects to it and writes "CONNECT port"; the guest's connections to the host
    arrive at PATH_PORT. None: no such sockets (an agent's vsock device is there all the same)."""
    agent: bool = False
    """The guest runs our agent; VirtualMachine.exec reaches it over vsock."""
    entrypoint: str = ""
    """The program that `vmm run` starts in the guest, in words as a shell has them. Words given behind -- are added."""
    command: str = ""
    """Words that are added to the entrypoint, or the program itself without one. They count if nothing is given behind
    --."""
    env: tuple[Variable, ...] = ()
    """Environment variables of programs that the agent starts. Of two with the same name the later counts."""
    user: str = ""
    """The user as whom the agent's programs run: USER[:GROUP], names or numbers of the guest; by default root."""
    workdir: str = ""
    """The directory in which the agent's programs start; by default the user's home."""
    rng: bool = True
    """A virtio entropy device."""
    balloon: bool = False
    """A virtio balloon: `vmm set --memory` takes memory from the guest and gives it back, and what the guest does not
    use goes back to the host by itself."""
    transport: Literal["pci", "mmio"] = "pci"
    """How the guest finds the virtio console, entropy, vsock and balloon devices, and the embedder's; disks, nets and
    shares have a transport of their own."""
    packed: bool = False
    """Every virtio device offers packed rings. Without this, single disks and nets can offer them."""
    timeout: float | None = None
    """Seconds of host time after which the machine is ended (outcome `timeout`)."""
    clock: ClockKind = "real"
    """virtual: guest time follows the instructions executed, so that runs repeat; only on the software core."""
    parallel: Parallel = "auto"
    """Whether each vCPU of the software core has a host thread of its own. auto: if there are two vCPUs or more, two
    host processors or more, and the real clock. On KVM each vCPU always has one."""
    seed: int | None = None
    """With a seed every random byte that the guest can get is a function of the seed."""
    epoch: int | None = None
    """The guest's wall clock at the start, seconds since 1970; None: now, or VIRTUAL_EPOCH with the virtual clock."""
    platform: Platform = "pc"
    """pc: what stock kernels expect. bare: memory, interrupt controllers, one serial port, reset and debug ports; no
    PIT, ACPI, PCI or virtio."""
    reboot: bool = False
    """The machine starts again when the guest reboots; without this a reboot ends it."""
    fw_cfg: tuple[FwCfgItem, ...] = ()
    """Items of your own in fw_cfg, beside the machine's."""
    slots: tuple[PciSlot, ...] = ()
    """The PCI device numbers of these devices. The other devices get the lowest free numbers, in order."""
    testdev: bool = False
    """Interrupt lines, I/O RAM and a device's memory at the ports of QEMU's pc-testdev, for processor tests."""
    hugepages: bool = False
    """Guest memory is taken from the host's reserved 2 MiB pages."""
    direct: Direct = "off"
    """Whether 64-bit programs of a guest on the software core run natively, in processes beside this one. on: always;
    auto: where the host can and it pays."""

    _converters = {
        "name": to_name,
        "uuid": optional(to_uuid),
        "core": to_choice(CoreName),
        "cpu_model": to_choice(CpuModel),
        "cpus": to_integer(1, MAX_CPUS),
        "max_cpus": optional(to_integer(1, MAX_CPUS)),
        "memory": to_size(MIN_MEMORY, MAX_MEMORY, PAGE),
        "kernel": optional(to_path),
        "initrd": optional(to_path),
        "cmdline": optional(to_text),
        "append": to_text,
        "flat": optional(to_part(FlatImage)),
        "disks": to_parts(Disk),
        "nets": to_parts(Net),
        "shares": to_parts(Share),
        "root": optional(to_part(RootDirectory)),
        "console": to_part(ConsoleConfig),
        "hvc": to_boolean,
        "ports": to_parts(PortConfig),
        "gdb": optional(to_part(GdbConfig)),
        "vsock": optional(to_path),
        "agent": to_boolean,
        "entrypoint": to_words,
        "command": to_words,
        "env": to_parts(Variable),
        "user": to_text,
        "workdir": to_text,
        "rng": to_boolean,
        "balloon": to_boolean,
        "transport": to_choice(Literal["pci", "mmio"]),
        "packed": to_boolean,
        "timeout": optional(to_seconds),
        "clock": to_choice(ClockKind),
        "parallel": to_choice(Parallel),
        "seed": optional(to_integer(0, (1 << 64) - 1)),
        "epoch": optional(to_integer(0, 1 << 40)),
        "platform": to_choice(Platform),
        "reboot": to_boolean,
        "fw_cfg": to_parts(FwCfgItem),
        "slots": to_parts(PciSlot),
        "testdev": to_boolean,
        "hugepages": to_boolean,
        "direct": to_choice(Direct),
    }

    def _check(self) -> None:
        length = len(" ".join((self.cmdline or "", self.append, *self.share_words.split())).encode())
        if length > MAX_CMDLINE:
            raise ConfigError(f"cmdline: {length} bytes; a kernel takes {MAX_CMDLINE} at most")
        if self.flat is not None and self.kernel is not None:
            raise ConfigError("flat and kernel exclude each other; give one of them")
        if self.kernel is None and self.initrd is not None:
            raise ConfigError("initrd: without a kernel nothing would read it; add --kernel")
        if self.most_cpus < self.cpus:
            raise ConfigError(f"max_cpus: {self.max_cpus} is less than the {self.cpus} processors that it starts with")
        if self.platform == "bare" and self.most_cpus > self.cpus:
            raise ConfigError("max_cpus: platform bare has no ACPI to tell of new processors; use --platform pc")
        if self.hugepages and self.memory % (2 * MIB):
            raise ConfigError(f"memory: {format_size(self.memory)} is not a multiple of 2M, as hugepages need")
        virtio = (self.disks, self.nets, self.shares, self.root, self.hvc, self.ports, self.vsock, self.agent)
        if self.platform == "bare" and any(virtio):
            raise ConfigError("platform: bare has no virtio devices; use --platform pc")
        if self.platform == "bare" and (self.fw_cfg or self.testdev):
            raise ConfigError("platform: bare has neither fw_cfg nor testdev; use --platform pc")
        if self.parallel == "on" and self.clock == "virtual":
            raise ConfigError("parallel: on, but with the virtual clock one thread runs all vCPUs; use --parallel auto")
        items = [item.name for item in self.fw_cfg]
        for name in items:
            if items.count(name) > 1:
                raise ConfigError(f"fw_cfg: {name!r} is given twice; give each item a name of its own")
        numbers, ids = [str(slot.device) for slot in self.slots], [slot.id for slot in self.slots]
        for what, given in (("number", numbers), ("id", ids)):
            for value in given:
                if given.count(value) > 1:
                    raise ConfigError(f"slot: the {what} {value} is given twice; a slot takes one device")
        names = [disk.id for disk in self.disks if disk.id] + [net.id for net in self.nets if net.id]
        names += [share.id for share in self.all_shares]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"id: {name!r} is given to two devices; make it unique")

    @property
    def most_cpus(self) -> int:
        """The most processors that the machine can have."""
        return self.cpus if self.max_cpus is None else self.max_cpus

    @property
    def runs_in_parallel(self) -> bool:
        """Whether each vCPU of the software core gets a host thread of its own."""
        if self.parallel == "auto":
            return self.most_cpus > 1 and self.clock == "real" and len(os.sched_getaffinity(0)) > 1
        return self.parallel == "on"

    @property
    def all_shares(self) -> tuple[Share, ...]:
        """The directories that the guest sees, each with its id. The root is the first."""
        shares = [share if share.id else share.replace(id=f"share{at}") for at, share in enumerate(self.shares)]
        return (*([Share(id=ROOT_TAG, **vars(self.root))] if self.root is not None else []), *shares)

    @property
    def share_words(self) -> str:
        """Words of the kernel's command line that tell guests of our images of shared directories
        (images/init/root.c)."""
        words = [f"loopvisor.share.{share.id}={share.mount}" for share in self.all_shares if share.mount]
        if self.root is not None:
            words.append(f"root={ROOT_TAG} rootfstype=virtiofs {'ro' if self.root.readonly else 'rw'}")
        return " ".join(words)

    @property
    def epoch_seconds(self) -> int | None:
        """The guest's wall clock at the start, seconds since 1970; None: the host's time at that moment."""
        if self.epoch is not None:
            return self.epoch
        return VIRTUAL_EPOCH if self.clock == "virtual" else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """A configuration from what `to_dict` gives; None values may be left out. Raises ConfigError, also for unknown
        keys."""
        return from_mapping(cls, "", values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-like values, without what is None."""
        values: dict[str, Any] = plain(self)
        return values

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """The values in a TOML file, validated, to be merged with options. Relative paths in the file are relative to
        its folder. Raises ConfigError."""
        import tomllib

        try:
            values = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path}: {os_reason(error)}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from error
        try:
            config = cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        given = relative_to(cls, plain(config), path.parent)
        return {key: value for key, value in given.items() if key in values}

    @classmethod
    def load(cls, path: Path) -> Config:
        """A configuration from a TOML file. Raises ConfigError."""
        return cls.from_dict(cls.read(path))

    def to_toml(self) -> str:
        """The configuration as TOML, which `load` reads back as an equal one."""
        return toml(self.to_dict())

    def check_host(self) -> None:
        """Raise ConfigError if a file is missing or unreadable, or the host has less memory."""
        for where, path, writable in self._files():
            check_file(where, path, writable=writable)
        for share in self.all_shares:
            check_directory("root" if share.id == ROOT_TAG else "share", share.path)
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if self.memory > total:
            raise ConfigError(
                f"memory: {format_size(self.memory)} is more than this host's {total // MIB}M; ask for less"
            )

    def _files(self) -> list[tuple[str, Path, bool]]:
        found = [("disk", disk.path, not (disk.readonly or disk.snapshot)) for disk in self.disks]
        if self.kernel is not None:
            found.append(("kernel", self.kernel, False))
        if self.initrd is not None:
            found.append(("initrd", self.initrd, False))
        if self.flat is not None:
            found.append(("flat", self.flat.path, False))
        found += [("fw_cfg", item.file, False) for item in self.fw_cfg if item.file is not None]
        return found


def check_directory(where: str, path: Path) -> None:
    """Raise ConfigError unless a directory of the host that is to be shared is there and may be listed."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{where}: {path}: is no directory; share the directory that it is in")
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise ConfigError(f"{where}: {path}: {os_reason(error)}") from error


def check_file(where: str, path: Path, *, writable: bool) -> None:
    """Raise ConfigError unless the file of a machine's part is there and may be used."""
    if path.is_dir():
        raise ConfigError(f"{where}: {path}: is a directory")
    if path.is_fifo():  # opening it to read would stop the loop
        raise ConfigError(f"{where}: {path}: is a pipe; put its content into a file")
    try:
        os.close(os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        cure = "; add ,ro to only read it" if writable and os.access(path, os.R_OK) else ""
        raise ConfigError(f"{where}: {path}: {os_reason(error)}{cure}") from error
