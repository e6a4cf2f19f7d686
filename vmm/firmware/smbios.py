"""SMBIOS: how the machine introduces itself to the guest's system management.

Specification: DMTF DSP0134 3.4: 5.2.2 (64-bit entry point), 6.1 (structures), 7.1 BIOS, 7.2 system, 7.4 chassis,
7.45 end of table. The entry point stands at 0xF0000, where guests look for its anchor.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from vmm import __version__
from vmm.machine import layout
from vmm.machine.interfaces import Assembly

if TYPE_CHECKING:
    from uuid import UUID

ENTRY_POINT = Struct(
    "anchor" / Const(b"_SM3_"), "checksum" / Int8ul, "length" / Int8ul, "major" / Int8ul, "minor" / Int8ul,
    "docrev" / Int8ul, "revision" / Int8ul, "reserved" / Int8ul, "maximum_size" / Int32ul, "address" / Int64ul,
)
HEADER = Struct("type" / Int8ul, "length" / Int8ul, "handle" / Int16ul)
BIOS = Struct(
    "vendor" / Int8ul, "version" / Int8ul, "segment" / Int16ul, "release_date" / Int8ul, "rom_size" / Int8ul,
    "characteristics" / Int64ul, "extension1" / Int8ul, "extension2" / Int8ul, "bios_major" / Int8ul,
    "bios_minor" / Int8ul, "ec_major" / Int8ul, "ec_minor" / Int8ul, "extended_rom_size" / Int16ul,
)
CHARACTERISTICS_UNSUPPORTED = 1 << 3
EXTENSION2_VIRTUAL_MACHINE = 1 << 4
SYSTEM = Struct(
    "manufacturer" / Int8ul, "product" / Int8ul, "version" / Int8ul, "serial" / Int8ul, "uuid" / Bytes(16),
    "wake_up" / Int8ul, "sku" / Int8ul, "family" / Int8ul,
)
WAKE_UP_POWER_SWITCH = 6
CHASSIS = Struct(
    "manufacturer" / Int8ul, "type" / Int8ul, "version" / Int8ul, "serial" / Int8ul, "asset" / Int8ul,
    "boot_state" / Int8ul, "power_state" / Int8ul, "thermal_state" / Int8ul, "security" / Int8ul, "oem" / Int32ul,
    "height" / Int8ul, "cords" / Int8ul, "elements" / Int8ul, "element_length" / Int8ul, "sku" / Int8ul,
)
CHASSIS_OTHER, STATE_SAFE = 1, 3
NAME = "loopvisor"
RELEASE_DATE = "01/01/2024"


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    """6.1.3: the formatted area, then the strings that it counts from 1, then a zero byte."""
    head = HEADER.build({"type": kind, "length": HEADER.sizeof() + len(body), "handle": handle})
    text = b"".join(string.encode() + b"\0" for string in strings) if strings else b"\0"
    return bytes(head + body + text + b"\0")


def tables(identity: UUID, serial: str) -> tuple[bytes, bytes]:
    """(entry point, structures) for layout.SMBIOS."""
    bios = BIOS.build(
        dict(
            vendor=1, version=2, segment=0xE000, release_date=3, rom_size=0, extension1=0, bios_major=0, bios_minor=0,
            characteristics=CHARACTERISTICS_UNSUPPORTED, extension2=EXTENSION2_VIRTUAL_MACHINE, ec_major=0xFF,
            ec_minor=0xFF, extended_rom_size=0,
        )
    )
    system = SYSTEM.build(
        dict(
            manufacturer=1, product=2, version=3, serial=4 if serial else 0, uuid=identity.bytes_le,
            wake_up=WAKE_UP_POWER_SWITCH, sku=0, family=0,
        )
    )
    chassis = CHASSIS.build(
        dict(
            manufacturer=1, type=CHASSIS_OTHER, version=0, serial=0, asset=0, boot_state=STATE_SAFE,
            power_state=STATE_SAFE, thermal_state=STATE_SAFE, security=2, oem=0, height=0, cords=0, elements=0,
            element_length=0, sku=0,
        )
    )
    structures = (
        _structure(0, 0, bios, NAME, __version__, RELEASE_DATE)
        + _structure(1, 1, system, NAME, "Standard PC", __version__, *([serial] if serial else []))
        + _structure(3, 2, chassis, NAME)
        + _structure(127, 3, b"")
    )
    entry = bytearray(
        ENTRY_POINT.build(
            dict(
                checksum=0, length=ENTRY_POINT.sizeof(), major=3, minor=4, docrev=0, revision=1, reserved=0,
                maximum_size=len(structures), address=layout.SMBIOS.start + 32,
            )
        )
    )
    entry[5] = -sum(entry) & 0xFF
    return bytes(entry), structures


def name_uuid(name: str) -> UUID:
    """The UUID of a machine with this name to which none was given: version 5 (RFC 9562), of a URL."""
    import uuid  # loads what a machine that is restored does not need

    try:
        sha1 = import_module("_sha1").sha1  # hashlib, as uuid5() has it, loads OpenSSL: longer than all tables take
    except ImportError:
        return uuid.uuid5(uuid.NAMESPACE_URL, f"{NAME}:{name}")
    digest = sha1(uuid.NAMESPACE_URL.bytes + f"{NAME}:{name}".encode()).digest()
    return uuid.UUID(bytes=digest[:16], version=5)


class Smbios:
    """Written once, before the first instruction; a restored machine has it in its memory. Without a given UUID it
    belongs to the machine's name; nameless machines get a random one."""

    def __init__(
        self, write: Callable[[int, bytes], None], name: str, random: Callable[[int], bytes], given: str | None = None
    ) -> None:
        self._write, self._name, self._given = write, name, given
        # Here, so that with a seed it does not depend on when others ask for chance.
        self._random = b"" if given is not None or name else random(16)

    def populate(self) -> None:
        """Write entry point and structures."""
        from uuid import UUID

        if self._given is not None:
            identity = UUID(self._given)
        else:
            identity = name_uuid(self._name) if self._name else UUID(bytes=self._random, version=4)
        entry, structures = tables(identity, self._name)
        self._write(layout.SMBIOS.start, entry)
        self._write(layout.SMBIOS.start + 32, structures)


def attach(assembly: Assembly) -> None:
    # With a seed a run is a function of its inputs, and a name made up by the command line has a process id in it.
    name = assembly.config.name if assembly.config.seed is None else ""
    assembly.add("smbios", Smbios(assembly.memory.write, name, assembly.board.random, assembly.config.uuid))
