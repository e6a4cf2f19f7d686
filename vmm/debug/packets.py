"""Packets of GDB's remote serial protocol ("Debugging with GDB", appendix E.1), without I/O.

A packet is `$data#checksum`; data escapes `#`, `$`, `}` and `*` by `}` and the character xor 0x20. Between packets
stand `+` and `-` (acknowledgements) and 0x03 (interrupt).
"""

from __future__ import annotations

import enum

from cpu.values import dataclass
from vmm.errors import VmmError

MAX_PACKET = 0x4000
"""The longest data that the stub takes, which it tells as PacketSize."""
_ESCAPED = b"#$}*"


class ProtocolError(VmmError):
    """The other side does not speak the protocol; its connection is closed."""


class Signal(enum.Enum):
    """What stands between packets."""

    ACK = "+"
    NAK = "-"
    INTERRUPT = "\x03"
    BAD = "bad"
    """A packet with a wrong checksum: it is to be sent again."""


@dataclass(frozen=True, slots=True)
class Packet:
    """The data of a packet, without its escapes."""

    data: bytes


def checksum(data: bytes) -> int:
    """Of the data as it is sent."""
    return sum(data) & 0xFF


def encode(data: bytes) -> bytes:
    """A whole packet."""
    escaped = bytearray()
    for byte in data:
        if byte in _ESCAPED:
            escaped += b"}%c" % (byte ^ 0x20)
        else:
            escaped.append(byte)
    content = bytes(escaped)
    return b"$%b#%02x" % (content, checksum(content))


def unescape(data: bytes) -> bytes:
    """Raises ProtocolError for an escape without its character."""
    if b"}" not in data:
        return data
    plain, rest = bytearray(), iter(data)
    for byte in rest:
        if byte == ord("}"):
            following = next(rest, None)
            if following is None:
                raise ProtocolError("a packet ends within an escape")
            plain.append(following ^ 0x20)
        else:
            plain.append(byte)
    return bytes(plain)


class Parser:
    """Bytes in, packets and signals out. Holds at most one unfinished packet, of limited size."""

    def __init__(self) -> None:
        self._partial = bytearray()

    def feed(self, data: bytes) -> list[Packet | Signal]:
        """Everything that is whole now. Raises ProtocolError for a packet that is too long."""
        self._partial += data
        buffer, found, at = self._partial, list[Packet | Signal](), 0
        while at < len(buffer):
            byte = buffer[at]
            if byte != ord("$"):
                at += 1
                if byte in b"+-\x03":
                    found.append(Signal(chr(byte)))
                continue  # anything else between packets means nothing
            end = buffer.find(b"#", at)
            length = (len(buffer) if end < 0 else end) - at - 1
            if length > 2 * MAX_PACKET:  # each character may be escaped
                raise ProtocolError(f"a packet of more than {MAX_PACKET} bytes")
            if end < 0 or len(buffer) < end + 3:
                break
            content = bytes(buffer[at + 1 : end])
            try:
                correct = int(bytes(buffer[end + 1 : end + 3]), 16) == checksum(content)
            except ValueError:
                correct = False
            found.append(Packet(unescape(content)) if correct else Signal.BAD)
            at = end + 3
        del buffer[:at]
        return found
