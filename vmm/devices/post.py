"""Ports that software writes only to spend time or to show progress: 0x80 (POST code) and 0xED. Writes are posted
and dropped; 0x80 reads back the last value, as the DMA page register's scratch byte does. No other state."""

from __future__ import annotations

from cpu.contract import Space
from vmm.interfaces import Assembly, Machine, State

PORTS = (0x80, 0xED)


class DelayPorts:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._last = 0

    def attach(self) -> None:
        for port in PORTS:
            self._machine.map(Space.PORT, port, 1, self, f"delay port {port:#x}")
            self._machine.post(Space.PORT, port, 1, self, 0)

    def read(self, offset: int, size: int) -> int:
        return self._last

    def write(self, offset: int, size: int, value: int) -> None:
        self._last = value

    def posted(self, offset: int, size: int, data: bytes) -> None:
        self._last = data[-1]

    def save(self) -> State:
        return {"version": 1, "last": self._last}

    def restore(self, state: State) -> None:
        self._last = state["last"] & 0xFF


def attach(assembly: Assembly) -> None:
    device = DelayPorts(assembly.machine)
    device.attach()
    assembly.add("delay-ports", device)
