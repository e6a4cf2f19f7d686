"""The second serial port: there, and connected to nothing."""

from __future__ import annotations

from vmm.devices.uart import Uart
from vmm.machine import layout
from vmm.machine.interfaces import Assembly


def attach(assembly: Assembly) -> None:
    assembly.add("com2", Uart(assembly.board, layout.COM2, layout.COM2_GSI, None, "com2"))
