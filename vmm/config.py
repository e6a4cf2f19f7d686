"""The configuration of one machine: frozen, validated, the same from Python, from TOML and from the command line.

`Config(...)` takes Python values or the strings that the command line takes; `Config.load(path)` reads TOML;
`Config.to_dict()` and `to_toml()` give back what `from_dict()` and `load()` accept. Unknown keys are refused.
Whether files exist and the host has enough memory is checked here as well (`check_host`), so that a mistake is one
line before anything is built. It must not know images, devices or cores.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from vmm.errors import ConfigError, os_reason

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PAGE = 4096
MAX_CPUS = 64
MIN_MEMORY, MAX_MEMORY = 1 * MIB, 4 * TIB
MAX_CMDLINE = 2047
"""COMMAND_LINE_SIZE of x86 Linux is 2048 with its zero byte."""
VIRTUAL_EPOCH = 1_704_067_200
"""2024-01-01T00:00:00Z: where the wall clock of a machine with a virtual clock starts, unless `epoch` says."""

CoreName = Literal["auto", "kvm", "soft"]
ClockKind = Literal["real", "virtual"]
Mode = Literal["real", "protected", "long"]
Platform = Literal["pc", "bare"]
ConsoleKind = Literal["stdio", "socket", "none"]
NetKind = Literal["user", "tap", "unix"]

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_UNITS = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}

T = TypeVar("T")
Converter = Callable[[str, Any], Any]


def parse_size(where: str, value: object) -> int:
    """Bytes from an integer (bytes) or text such as 256M, 1G, 512KiB (powers of 1024)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{where}: {value!r} is not a size; write for instance 256M or 2G")
    return int(match[1]) * _UNITS[match[2].lower()]


def format_size(size: int) -> str:
    """The shortest text that parse_size reads back as `size`."""
    for suffix, unit in (("T", TIB), ("G", GIB), ("M", MIB), ("K", KIB)):
        if size and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {value!r} is not text")
    if "\0" in value:
        raise ConfigError(f"{where}: a zero byte is not allowed")
    return value


def _name(where: str, value: object) -> str:
    text = _text(where, value)
    if text and not _NAME.fullmatch(text):
        raise ConfigError(f"{where}: {text!r} is no name; use up to 63 letters, digits, '-', '_' or '.'")
    return text


def _mac(where: str, value: object) -> str:
    text = _text(where, value)
    if not _MAC.fullmatch(text) or int(text[:2], 16) & 1:
        raise ConfigError(f"{where}: {text!r} is no unicast MAC address; write for instance 52:54:00:12:34:56")
    return text.lower()


def _boolean(where: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("on", "yes", "true", "off", "no", "false"):
        return value.lower() in ("on", "yes", "true")
    raise ConfigError(f"{where}: {value!r} is neither true nor false")


def _integer(low: int, high: int) -> Converter:
    def convert(where: str, value: object) -> int:
        try:
            number = int(value, 0) if isinstance(value, str) else value
        except ValueError:
            number = None
        if not isinstance(number, int) or isinstance(number, bool):
            raise ConfigError(f"{where}: {value!r} is not a whole number")
        if not low <= number <= high:
            raise ConfigError(f"{where}: {number} is outside {low} to {high}")
        return number

    return convert


def _size(low: int, high: int, multiple: int = 1) -> Converter:
    def convert(where: str, value: object) -> int:
        size = parse_size(where, value)
        if size < low:
            hint = f"; write {value}M for MiB" if size and str(value).isdigit() else ""
            raise ConfigError(f"{where}: {value} is less than {format_size(low)}{hint}")
        if size > high:
            raise ConfigError(f"{where}: {value} is more than {format_size(high)}")
        if size % multiple:
            raise ConfigError(f"{where}: {value} is not a multiple of {format_size(multiple)}")
        return size

    return convert


def _seconds(where: str, value: object) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {value!r} is not a number of seconds") from None
    if not 0 < seconds < 1e9:
        raise ConfigError(f"{where}: {value} seconds is not a time limit; give more than 0")
    return seconds


def _path(where: str, value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ConfigError(f"{where}: {value!r} is not a path")
    return Path(_text(where, str(value))).expanduser()


def _choice(kind: Any) -> Converter:
    choices: tuple[str, ...] = get_args(kind)

    def convert(where: str, value: object) -> str:
        if value not in choices:
            raise ConfigError(f"{where}: {value!r} is none of {', '.join(choices)}")
        return str(value)

    return convert


def _optional(convert: Converter) -> Converter:
    return lambda where, value: None if value is None else convert(where, value)


def _part(kind: type[T]) -> Converter:
    """A part (Disk, Net…) from itself, a mapping, or its command line text."""

    def convert(where: str, value: object) -> T:
        if isinstance(value, kind):
            return value
        if isinstance(value, str):
            return kind.parse(value)  # type: ignore[attr-defined,no-any-return]
        if isinstance(value, Mapping):
            return _from_mapping(kind, where, value)
        raise ConfigError(f"{where}: {value!r} is neither a table nor text")

    return convert


def _parts(kind: type[T]) -> Converter:
    one = _part(kind)

    def convert(where: str, value: object) -> tuple[T, ...]:
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
            raise ConfigError(f"{where}: {value!r} is not a list")
        return tuple(one(f"{where}[{index}]", item) for index, item in enumerate(value))

    return convert


def _from_mapping(kind: type[T], where: str, values: Mapping[str, Any]) -> T:
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    unknown = [key for key in values if key not in known]
    if unknown:
        prefix = f"{where}: " if where else ""
        raise ConfigError(f"{prefix}unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _split(where: str, text: str, flags: Mapping[str, tuple[str, Any]]) -> tuple[str, dict[str, Any]]:
    """'first,flag,key=value' -> ('first', {...}); `flags` maps a bare word to (key, value)."""
    first, *rest = text.split(",")
    values: dict[str, Any] = {}
    for item in rest:
        key, equals, value = item.partition("=")
        if not equals and item in flags:
            key, content = flags[item]
            values[key] = content
        elif equals:
            values[key] = value
        else:
            raise ConfigError(f"{where}: {item!r} in {text!r} is not understood; write key=value")
    return first, values


class _Checked:
    """Base of the frozen parts: runs every field through its converter, then `_check`."""

    _converters: Mapping[str, Converter]
    _where = ""

    def __post_init__(self) -> None:
        for name, convert in self._converters.items():
            where = f"{self._where}.{name}" if self._where else name
            object.__setattr__(self, name, convert(where, getattr(self, name)))
        self._check()

    def _check(self) -> None:
        """Rules between fields."""

    # Not generated for each class, which `vmm run` would wait for (tests.bench start).

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self._converters)

    def __hash__(self) -> int:
        return hash(tuple([getattr(self, name) for name in self._converters]))

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._converters)
        return f"{type(self).__name__}({inside})"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FlatImage(_Checked):
    """Raw bytes loaded at `load` and entered at `entry` in the given processor mode, with interrupts off."""

    path: Path
    load: int = 0x7C00
    entry: int | None = None
    mode: Mode = "real"

    _where = "flat"
    _converters = {
        "path": _path,
        "load": _integer(0, MAX_MEMORY),
        "entry": _optional(_integer(0, MAX_MEMORY)),
        "mode": _choice(Mode),
    }

    @classmethod
    def parse(cls, text: str) -> FlatImage:
        """FILE[,load=ADDRESS][,entry=ADDRESS][,mode=real|protected|long]"""
        path, values = _split("flat", text, {})
        return _from_mapping(cls, "flat", {"path": path, **values})


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Disk(_Checked):
    """One virtio block device."""

    path: Path
    readonly: bool = False
    id: str = ""
    format: Literal["auto", "raw", "qcow2"] = "auto"
    transport: Literal["pci", "mmio"] = "pci"
    snapshot: bool = False
    """Writes go to a private copy that vanishes with the machine; the file itself is only read."""
    cache: Literal["writeback", "writethrough", "none"] = "writeback"
    """writethrough: every write is durable before it completes; none: past the host's page cache (O_DIRECT)."""

    _where = "disk"
    _converters = {
        "path": _path,
        "readonly": _boolean,
        "id": _name,
        "format": _choice(Literal["auto", "raw", "qcow2"]),
        "transport": _choice(Literal["pci", "mmio"]),
        "snapshot": _boolean,
        "cache": _choice(Literal["writeback", "writethrough", "none"]),
    }

    def _check(self) -> None:
        if self.snapshot and self.readonly:
            raise ConfigError("disk: ro and snapshot exclude each other; give one of them")

    @classmethod
    def parse(cls, text: str) -> Disk:
        """FILE[,ro][,snapshot][,id=NAME][,cache=writeback|writethrough|none][,format=raw|qcow2][,transport=pci|mmio]"""
        flags = {"ro": ("readonly", True), "rw": ("readonly", False), "snapshot": ("snapshot", True)}
        path, values = _split("disk", text, flags)
        return _from_mapping(cls, "disk", {"path": path, **values})


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Net(_Checked):
    """One virtio network device. `target` is the tap's name or the peer's socket; empty for user networking."""

    kind: NetKind
    target: str = ""
    mac: str | None = None
    id: str = ""
    transport: Literal["pci", "mmio"] = "pci"
    pcap: Path | None = None
    """Every frame is written there, in pcap format."""

    _where = "net"
    _converters = {
        "kind": _choice(NetKind),
        "target": _text,
        "mac": _optional(_mac),
        "id": _name,
        "transport": _choice(Literal["pci", "mmio"]),
        "pcap": _optional(_path),
    }

    def _check(self) -> None:
        if self.kind == "user" and self.target:
            raise ConfigError("net: user networking takes no target")
        if self.kind != "user" and not self.target:
            raise ConfigError(f"net: {self.kind} needs a target; write {self.kind}=…")
        if self.kind == "tap" and len(self.target.encode()) > 15:
            raise ConfigError(f"net: {self.target!r} is longer than the 15 bytes of an interface name")

    @classmethod
    def parse(cls, text: str) -> Net:
        """user | tap=NAME | unix=PATH, then [,mac=…][,id=NAME][,transport=pci|mmio][,pcap=FILE]"""
        first, values = _split("net", text, {})
        kind, _, target = first.partition("=")
        if "kind" in values or "target" in values:
            raise ConfigError(f"net: {text!r} is not understood; write user, tap=NAME or unix=PATH first")
        return _from_mapping(cls, "net", {"kind": kind, "target": target, **values})


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Console(_Checked):
    """Where the first serial port leads. With every kind, `vmm console NAME` attaches to a named machine."""

    kind: ConsoleKind = "none"
    path: Path | None = None
    log: Path | None = None
    log_limit: int = 16 * MIB
    """Bytes after which the log is rotated (one older file is kept)."""

    _where = "console"
    _converters = {
        "kind": _choice(ConsoleKind),
        "path": _optional(_path),
        "log": _optional(_path),
        "log_limit": _size(4 * KIB, TIB),
    }

    def _check(self) -> None:
        if (self.kind == "socket") != (self.path is not None):
            raise ConfigError("console: a path belongs to kind socket, and to no other; write socket=PATH")

    @classmethod
    def parse(cls, text: str) -> Console:
        """stdio | none | socket=PATH, then [,log=FILE][,log_limit=SIZE]"""
        first, values = _split("console", text, {})
        kind, _, path = first.partition("=")
        return _from_mapping(cls, "console", {"kind": kind, "path": path or None, **values})


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Port(_Checked):
    """A named port of the virtio console, as a UNIX socket of the host."""

    name: str
    path: Path

    _where = "port"
    _converters = {"name": _name, "path": _path}

    @classmethod
    def parse(cls, text: str) -> Port:
        """NAME=PATH"""
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"port: {text!r} is not understood; write NAME=PATH")
        return cls(name=name, path=Path(path))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Config(_Checked):
    """One machine. Strings are accepted wherever the command line takes them."""

    name: str = ""
    core: CoreName = "auto"
    cpus: int = 1
    memory: int = 256 * MIB
    """Bytes."""
    kernel: Path | None = None
    """bzImage, vmlinux, PVH or multiboot ELF; the loader finds out which."""
    initrd: Path | None = None
    cmdline: str | None = None
    """None: the default for this kernel and core."""
    append: str = ""
    """Added to the command line, whether that is the default or given."""
    flat: FlatImage | None = None
    disks: tuple[Disk, ...] = ()
    nets: tuple[Net, ...] = ()
    console: Console = Console()
    hvc: bool = False
    """A virtio console (hvc0) beside the serial port; its output joins the machine's console."""
    ports: tuple[Port, ...] = ()
    vsock: Path | None = None
    """Base of the vsock sockets: the host connects to it and writes "CONNECT port"; the guest's connections to the host
    arrive at PATH_PORT. None: no such sockets (an agent's vsock device is there all the same)."""
    agent: bool = False
    """The guest runs our agent; VirtualMachine.exec reaches it over vsock."""
    rng: bool = True
    """A virtio entropy device."""
    timeout: float | None = None
    """Seconds of host time after which the machine is ended (outcome `timeout`)."""
    clock: ClockKind = "real"
    seed: int | None = None
    """Makes every random byte that the guest can get a function of it."""
    epoch: int | None = None
    """The guest's wall clock at the start, seconds since 1970; None: now, or VIRTUAL_EPOCH with the virtual clock."""
    platform: Platform = "pc"
    """pc: what stock kernels expect. bare: memory, one serial port, reset and debug ports; no ACPI, PCI or virtio."""
    reboot: bool = False
    """Restart in place when the guest reboots; otherwise a reboot ends the machine."""
    hugepages: bool = False
    """Guest memory from the host's reserved 2 MiB pages."""

    _converters = {
        "name": _name,
        "core": _choice(CoreName),
        "cpus": _integer(1, MAX_CPUS),
        "memory": _size(MIN_MEMORY, MAX_MEMORY, PAGE),
        "kernel": _optional(_path),
        "initrd": _optional(_path),
        "cmdline": _optional(_text),
        "append": _text,
        "flat": _optional(_part(FlatImage)),
        "disks": _parts(Disk),
        "nets": _parts(Net),
        "console": _part(Console),
        "hvc": _boolean,
        "ports": _parts(Port),
        "vsock": _optional(_path),
        "agent": _boolean,
        "rng": _boolean,
        "timeout": _optional(_seconds),
        "clock": _choice(ClockKind),
        "seed": _optional(_integer(0, (1 << 64) - 1)),
        "epoch": _optional(_integer(0, 1 << 40)),
        "platform": _choice(Platform),
        "reboot": _boolean,
        "hugepages": _boolean,
    }

    def _check(self) -> None:
        length = len(f"{self.cmdline or ''} {self.append}".encode())
        if length > MAX_CMDLINE:
            raise ConfigError(f"cmdline: {length} bytes; a kernel takes {MAX_CMDLINE} at most")
        if self.flat is not None and self.kernel is not None:
            raise ConfigError("flat and kernel exclude each other; give one of them")
        if self.kernel is None and self.initrd is not None:
            raise ConfigError("initrd: without a kernel nothing would read it; add --kernel")
        if self.hugepages and self.memory % (2 * MIB):
            raise ConfigError(f"memory: {format_size(self.memory)} is not a multiple of 2M, as hugepages need")
        if self.platform == "bare" and (self.disks or self.nets or self.hvc or self.ports or self.vsock or self.agent):
            raise ConfigError("platform: bare has no virtio devices; use --platform pc")
        names = [part.id for part in self.disks if part.id] + [part.id for part in self.nets if part.id]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"id: {name!r} is given to two devices; make it unique")

    @property
    def epoch_seconds(self) -> int:
        """What `epoch` comes to; 0 means now."""
        if self.epoch is not None:
            return self.epoch
        return VIRTUAL_EPOCH if self.clock == "virtual" else 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """From what `to_dict` gives (None values may be left out). Raises ConfigError, also for unknown keys."""
        return _from_mapping(cls, "", values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-like values, without what is None."""
        values: dict[str, Any] = _plain(self)
        return values

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """A TOML file's values, validated; relative paths in it are relative to the file. For merging with options."""
        import tomllib

        try:
            values = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path}: {os_reason(error)}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from error
        try:
            config = cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        given: dict[str, Any] = _relative_to(_plain(config), path.parent)
        return {key: value for key, value in given.items() if key in values}

    @classmethod
    def load(cls, path: Path) -> Config:
        """From a TOML file."""
        return cls.from_dict(cls.read(path))

    def to_toml(self) -> str:
        """TOML that `load` reads back as an equal configuration."""
        return _toml(self.to_dict())

    def check_host(self) -> None:
        """Raise ConfigError if a file is missing or unreadable, or the host has not got that much memory."""
        for where, path, writable in self._files():
            if path.is_dir():
                raise ConfigError(f"{where}: {path}: is a directory")
            try:
                os.close(os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK))
            except OSError as error:
                cure = "; add ,ro to only read it" if writable and os.access(path, os.R_OK) else ""
                raise ConfigError(f"{where}: {path}: {os_reason(error)}{cure}") from error
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
        return found


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        pairs = ((item.name, getattr(value, item.name)) for item in fields(value))
        return {name: _plain(content) for name, content in pairs if content is not None}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


_PATH_KEYS = frozenset({"kernel", "initrd", "path", "log", "pcap", "vsock"})


def _relative_to(values: Any, folder: Path) -> Any:
    if isinstance(values, list):
        return [_relative_to(item, folder) for item in values]
    if not isinstance(values, dict):
        return values
    return {
        key: str(folder / item) if key in _PATH_KEYS and isinstance(item, str) else _relative_to(item, folder)
        for key, item in values.items()
    }


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    escaped = "".join(
        f"\\u{ord(char):04x}" if ord(char) < 32 or ord(char) == 127 else "\\" + char if char in '"\\' else char
        for char in str(value)
    )
    return f'"{escaped}"'


def _toml(values: dict[str, Any]) -> str:
    lines = [f"{key} = {_toml_value(value)}" for key, value in values.items() if not isinstance(value, dict | list)]
    for key, value in values.items():
        tables = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
        header = f"[[{key}]]" if isinstance(value, list) else f"[{key}]"
        for table in tables:
            lines += ["", header, *(f"{name} = {_toml_value(item)}" for name, item in table.items())]
    return "\n".join(lines) + "\n"
