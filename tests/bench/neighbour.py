"""The network of bench_migration, a process of its own: `python neighbour.py SOCKET`.

Machines connect to the UNIX socket with frames behind their lengths (32 bits, big endian), as QEMU's `-netdev stream`
does. Every machine gets every frame. A guest at 10.9.0.2 sends datagrams (tick.c) and is pinged every few milliseconds.
On its standard input `begin` starts a measurement, answered as soon as the guest has answered and sent; `end` ends it
once it has done both again, with JSON: the longest that no datagram and that no answer came, in ms.
"""

from __future__ import annotations

import json
import selectors
import socket
import struct
import sys
import time

GUEST_MAC, OUR_MAC = bytes.fromhex("525400090002"), bytes.fromhex("525400090001")
GUEST, OURS = bytes((10, 9, 0, 2)), bytes((10, 9, 0, 1))
PERIOD = 0.004
ICMP, UDP, ECHO_REPLY = 1, 17, 0


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ping(number: int) -> bytes:
    """An echo request, as an Ethernet frame."""
    body = struct.pack(">BBHHH", 8, 0, 0, 1, number & 0xFFFF) + bytes(24)
    body = body[:2] + struct.pack(">H", checksum(body)) + body[4:]
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0, 64, ICMP, 0, OURS, GUEST)
    head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
    return GUEST_MAC + OUR_MAC + b"\x08\0" + head + body


ARP = struct.pack(">HHBBH", 1, 0x800, 6, 4, 2) + OUR_MAC + OURS
"""The head of our answer to who asks for us."""


class Machine:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.read, self.unsent = b"", b""

    def send(self, frame: bytes) -> None:
        """As far as it takes it; frames that come while it takes none are lost. Raises OSError."""
        if not self.unsent:
            self.unsent = struct.pack(">I", len(frame)) + frame
        try:
            self.unsent = self.unsent[self.connection.send(self.unsent) :]
        except BlockingIOError:
            return

    def frames(self) -> list[bytes]:
        """Those that have come. Raises OSError at the end."""
        data = self.connection.recv(1 << 17)
        if not data:
            raise ConnectionResetError
        self.read += data
        found = []
        while len(self.read) >= 4 and len(self.read) >= 4 + (length := struct.unpack(">I", self.read[:4])[0]):
            found.append(self.read[4 : 4 + length])
            self.read = self.read[4 + length :]
        return found


class Network:
    """The loop."""

    def __init__(self, path: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._machines: dict[socket.socket, Machine] = {}
        self._seen = {"ticks": 0.0, "pings": 0.0}
        self._worst = {"ticks": 0.0, "pings": 0.0}
        self._wanted: tuple[str, float] | None = None
        """A command, and when it came, that is not answered yet."""

    def run(self) -> None:
        """Until standard input ends."""
        number, due = 0, time.monotonic()
        while True:
            for key, _ in self._selector.select(max(due - time.monotonic(), 0.0)):
                if key.fileobj is sys.stdin:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self._wanted = line.strip(), time.monotonic()
                elif key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    connection.setblocking(False)
                    self._machines[connection] = Machine(connection)
                    self._selector.register(connection, selectors.EVENT_READ)
                else:
                    self._take(self._machines[key.fileobj])  # type: ignore[index]
            if time.monotonic() >= due:
                number, due = number + 1, time.monotonic() + PERIOD
                for machine in tuple(self._machines.values()):
                    self._send(machine, ping(number))
            self._answer()

    def _drop(self, machine: Machine) -> None:
        self._selector.unregister(machine.connection)
        del self._machines[machine.connection]
        machine.connection.close()

    def _send(self, machine: Machine, frame: bytes) -> None:
        try:
            machine.send(frame)
        except OSError:
            self._drop(machine)

    def _take(self, machine: Machine) -> None:
        try:
            frames = machine.frames()
        except BlockingIOError:
            return
        except OSError:
            self._drop(machine)
            return
        for frame in frames:
            if frame[12:14] == b"\x08\x06" and frame[38:42] == OURS and frame[20:22] == b"\0\1":
                self._send(machine, frame[6:12] + OUR_MAC + b"\x08\x06" + ARP + frame[22:32])
            elif frame[12:14] == b"\x08\0" and frame[26:30] == GUEST:
                if frame[23] == UDP:
                    self._note("ticks")
                elif frame[23] == ICMP and frame[34] == ECHO_REPLY:
                    self._note("pings")

    def _note(self, what: str) -> None:
        now = time.monotonic()
        self._worst[what] = max(self._worst[what], now - self._seen[what])
        self._seen[what] = now

    def _answer(self) -> None:
        if self._wanted is None or min(self._seen.values()) < self._wanted[1]:
            return
        told = {name: worst * 1e3 for name, worst in self._worst.items()}
        self._worst = dict.fromkeys(self._worst, 0.0)
        self._wanted = None
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    Network(sys.argv[1]).run()
