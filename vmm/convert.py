"""From what users write to checked values and back: converters of configuration fields, the base of the frozen parts,
and TOML output. Every converter is `convert(where, value)`: it returns the value or raises ConfigError that begins with
`where`. What is made by a function here is a partial, so that vmm/schema.py can see what it takes. Knows no particular
option.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, dataclass_transform, get_args

from vmm.errors import ConfigError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
MOUNT = re.compile(r"/[!#-+\--~]{1,254}")
"""images/init/root.c has room for so much."""
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
FORWARD = re.compile(r"[0-9]{1,5}:[0-9]{1,5}")
TRUE, FALSE = ("on", "yes", "true"), ("off", "no", "false")
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


def _refuse_zero_byte(where: str, text: str) -> None:
    if "\0" in text:
        raise ConfigError(f"{where}: a zero byte is not allowed")


def to_text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {value!r} is not text")
    _refuse_zero_byte(where, value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{where}: {value!r} is not text in UTF-8") from None
    return value


def to_words(where: str, value: object) -> str:
    """Words as a shell has them, quotes and all."""
    text = to_text(where, value)
    try:
        if text:
            import shlex

            shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r}: {str(error).lower()}") from None
    return text


def to_name(where: str, value: object) -> str:
    text = to_text(where, value)
    if text and not NAME.fullmatch(text):
        raise ConfigError(f"{where}: {text!r} is no name; use up to 63 letters, digits, '-', '_' or '.'")
    return text


def to_forwards(where: str, value: object) -> str:
    """ "" or HOSTPORT:GUESTPORT, several of them with + between."""
    text = to_text(where, value)
    for pair in text.split("+") if text else ():
        if not FORWARD.fullmatch(pair) or not all(0 < int(port) < 1 << 16 for port in pair.split(":")):
            raise ConfigError(f"{where}: {pair!r} is not HOSTPORT:GUESTPORT; write for instance 8080:80+2222:22")
    return text


def to_rules(where: str, value: object) -> str:
    """ "" or destinations with + between: virtio.backends.rules.parse."""
    text = to_text(where, value)
    if text:
        from virtio.backends.rules import parse
        from virtio.errors import ConfigError as RulesError

        try:
            parse(text)
        except RulesError as error:
            raise ConfigError(f"{where}: {error}") from None
    return text


def to_servers(where: str, value: object) -> str:
    """ "", none, or name servers with + between: virtio.backends.resolver.parse_servers."""
    text = to_text(where, value)
    if text and text != "none":
        from virtio.backends.resolver import parse_servers
        from virtio.errors import ConfigError as ServersError

        try:
            parse_servers(text)
        except ServersError as error:
            raise ConfigError(f"{where}: {error}") from None
    return text


def to_mac(where: str, value: object) -> str:
    text = to_text(where, value)
    if not MAC.fullmatch(text) or int(text[:2], 16) & 1:
        raise ConfigError(f"{where}: {text!r} is no unicast MAC address; write for instance 52:54:00:12:34:56")
    return text.lower()


def to_mount(where: str, value: object) -> str:
    """An absolute path in the guest, or nothing."""
    text = to_text(where, value)
    if text and (not MOUNT.fullmatch(text) or ".." in text.split("/")):
        raise ConfigError(
            f"{where}: {text!r} is no absolute path of at most 255 plain characters,"
            " which the kernel's command line can carry"
        )
    return text


def to_uuid(where: str, value: object) -> str:
    text = to_text(where, value)
    if not UUID.fullmatch(text):
        raise ConfigError(f"{where}: {text!r} is no UUID; write for instance 0e7d2a52-0b3c-4a36-9f3c-6a5f1f0b8f60")
    return text.lower()


def to_boolean(where: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in TRUE + FALSE:
        return value.lower() in TRUE
    raise ConfigError(f"{where}: {value!r} is neither true nor false")


def in_range(low: int, high: int, where: str, value: object) -> int:
    try:
        number = int(value, 0) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool):
        raise ConfigError(f"{where}: {value!r} is not a whole number")
    if not low <= number <= high:
        raise ConfigError(f"{where}: {number} is outside {low} to {high}")
    return number


def to_integer(low: int, high: int) -> Converter:
    return partial(in_range, low, high)


def sized(low: int, high: int, multiple: int, where: str, value: object) -> int:
    size = parse_size(where, value)
    if size < low:
        hint = f"; write {value}M for MiB" if size and str(value).isdigit() else ""
        raise ConfigError(f"{where}: {value} is less than {format_size(low)}{hint}")
    if size > high:
        raise ConfigError(f"{where}: {value} is more than {format_size(high)}")
    if size % multiple:
        raise ConfigError(f"{where}: {value} is not a multiple of {format_size(multiple)}")
    return size


def to_size(low: int, high: int, multiple: int = 1) -> Converter:
    return partial(sized, low, high, multiple)


def _float(where: str, value: object, what: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {value!r} is not {what}") from None


def to_seconds(where: str, value: object) -> float:
    seconds = _float(where, value, "a number of seconds")
    if not 0 < seconds < 1e9:
        raise ConfigError(f"{where}: {value} seconds is not a time limit; give more than 0 and less than 1e9")
    return seconds


def numbered(least: float, most: float, where: str, value: object) -> float:
    number = _float(where, value, "a number")
    if not least <= number <= most:
        raise ConfigError(f"{where}: {value} is outside {least:g} to {most:g}")
    return number


def to_number(least: float, most: float) -> Converter:
    """A number in these bounds."""
    return partial(numbered, least, most)


def to_path(where: str, value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ConfigError(f"{where}: {value!r} is not a path")
    _refuse_zero_byte(where, str(value))
    try:
        return Path(value).expanduser()
    except RuntimeError:
        return Path(value)  # ~name of a user that does not exist is a file's name, as in a shell


def one_of(choices: tuple[str, ...], where: str, value: object) -> str:
    if value not in choices:
        raise ConfigError(f"{where}: {value!r} is none of {', '.join(choices)}")
    return str(value)


def to_choice(kind: Any) -> Converter:
    return partial(one_of, get_args(kind))


def or_none(convert: Converter, where: str, value: object) -> Any:
    return None if value is None else convert(where, value)


def optional(convert: Converter) -> Converter:
    return partial(or_none, convert)


def part(kind: type[T], where: str, value: object) -> T:
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        return kind.parse(value)  # type: ignore[attr-defined,no-any-return]
    if isinstance(value, Mapping):
        return from_mapping(kind, where, value)
    raise ConfigError(f"{where}: {value!r} is neither a table nor text")


def to_part(kind: type[T]) -> Converter:
    """A part (Disk, Net…) from itself, a mapping, or its command line text."""
    return partial(part, kind)


def parts(kind: type[T], where: str, value: object) -> tuple[T, ...]:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise ConfigError(f"{where}: {value!r} is not a list")
    return tuple([part(kind, f"{where}[{index}]", item) for index, item in enumerate(value)])


def to_parts(kind: type[T]) -> Converter:
    return partial(parts, kind)


def from_mapping(kind: type[T], where: str, values: Mapping[str, Any]) -> T:
    """A part from a table; unknown keys are refused."""
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    unknown = [key for key in values if key not in known]
    if unknown:
        prefix = f"{where}: " if where else ""
        raise ConfigError(f"{prefix}unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def split(where: str, text: str, flags: Mapping[str, tuple[str, Any]]) -> tuple[str, dict[str, Any]]:
    """'first,flag,key=value' -> ('first', {...}); `flags` maps a bare word to (key, value). - in keys is _."""
    first, *rest = text.split(",")
    values: dict[str, Any] = {}
    for item in rest:
        key, equals, value = item.partition("=")
        if not equals and item in flags:
            key, content = flags[item]
            values[key] = content
        elif equals:
            values[key.replace("-", "_")] = value
        else:
            raise ConfigError(f"{where}: {item!r} in {text!r} is not understood; write key=value")
    return first, values


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False)
class Checked:
    """Base of the frozen parts, whose subclasses are keyword-only dataclasses: runs every field through its converter,
    then `_check`. What the standard decorator would compile for each class is here once, since `vmm run` would wait for
    it (tests.bench start)."""

    _converters: Mapping[str, Converter]
    _where = ""

    def __init_subclass__(cls) -> None:
        dataclass(kw_only=True, init=False, repr=False, eq=False)(cls)

    def __init__(self, **values: Any) -> None:
        if unknown := values.keys() - self._converters:
            raise TypeError(f"{type(self).__name__}() takes no {', '.join(sorted(unknown))}")
        for name, convert in self._converters.items():
            where = f"{self._where}.{name}" if self._where else name
            if name not in values and not hasattr(type(self), name):
                raise TypeError(f"{type(self).__name__}() needs {name}")
            value = values[name] if name in values else getattr(type(self), name)
            object.__setattr__(self, name, convert(where, value))
        self._check()

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def _check(self) -> None:
        """Rules between fields."""

    def replace(self, **values: Any) -> Self:
        """The same with other values, checked. Raises ConfigError."""
        return type(self)(**{name: getattr(self, name) for name in self._converters} | values)

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self._converters)

    def __hash__(self) -> int:
        return hash(tuple([getattr(self, name) for name in self._converters]))

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._converters)
        return f"{type(self).__name__}({inside})"


def plain(value: Any) -> Any:
    """JSON-like values, without what is None."""
    if is_dataclass(value):
        pairs = ((item.name, getattr(value, item.name)) for item in fields(value))
        return {name: plain(content) for name, content in pairs if content is not None}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def takes(convert: Converter) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What a converter is: its function and what it was made with. `optional` is looked through."""
    while isinstance(convert, partial):
        if convert.func is not or_none:
            return convert.func, convert.args
        convert = convert.args[0]
    return convert, ()


def relative_to(kind: type[Checked], values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Plain values of a part, its paths relative to a folder as a configuration file means them."""
    found = dict(values)
    for key, value in values.items():
        what, arguments = takes(kind._converters[key])
        if what is to_path:
            found[key] = str(folder / value)
        elif what is part:
            found[key] = relative_to(arguments[0], value, folder)
        elif what is parts:
            found[key] = [relative_to(arguments[0], item, folder) for item in value]
    return found


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    try:
        str(value).encode()
    except UnicodeEncodeError:  # a path is bytes; TOML is UTF-8
        raise ConfigError(f"{str(value)!r} is not UTF-8, which a file must be; rename what it names") from None
    escaped = "".join(
        f"\\u{ord(char):04x}" if ord(char) < 32 or ord(char) == 127 else "\\" + char if char in '"\\' else char
        for char in str(value)
    )
    return f'"{escaped}"'


def toml(values: dict[str, Any]) -> str:
    """Plain values as TOML: scalars first, then one table for each dictionary or item of a list."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in values.items() if not isinstance(value, dict | list)]
    for key, value in values.items():
        tables = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
        header = f"[[{key}]]" if isinstance(value, list) else f"[{key}]"
        for table in tables:
            lines += ["", header, *(f"{name} = {_toml_value(item)}" for name, item in table.items())]
    return "\n".join(lines) + "\n"
