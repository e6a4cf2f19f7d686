"""Who a machine is that was copied from another: what tells it from the original, and how its agent hears of it.

The guest gets random numbers of its own, the right time, and where they are given another host name, machine id and
network addresses (images/init/identity.c).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

from cpu.values import dataclass
from vmm.errors import ConfigError

IDENTITY = 7
"""The frame's type."""
ENTROPY = 64
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,62}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Identity:
    """What differs in a copy."""

    hostname: str
    """"": it stays."""
    machine_id: str
    """machine-id(5), 32 hexadecimal digits; "": it stays."""
    addresses: Mapping[bytes, bytes]
    """MAC addresses, old to new."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.hostname and not _HOST.fullmatch(self.hostname):
            raise ConfigError(f"{self.hostname!r} is no host name: letters, digits and hyphens, 64 at most")


def hostname_of(name: str) -> str:
    """A host name made of a machine's name."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-")[:64].strip("-")


def payload(identity: Identity, now_ns: int, entropy: bytes) -> bytes:
    """What IDENTITY carries. `now_ns`: since 1970; `entropy`: 64 bytes."""
    host, machine = identity.hostname.encode(), identity.machine_id.encode()
    pairs = b"".join(old + new for old, new in identity.addresses.items())
    head = struct.pack("<Q", now_ns) + entropy
    return head + bytes([len(host)]) + host + bytes([len(machine)]) + machine + bytes([len(identity.addresses)]) + pairs
