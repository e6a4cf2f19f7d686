"""A virtio-pci driver whose vCPU is a thread: it rings the device's answerers, and the loop hears of the rest."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.support.answering import AnsweringDriver
from tests.support.virtio import PciDriver
from virtio.device import Device
from virtio.fake import FakeMemory


class VcpuDriver(AnsweringDriver):
    """`left`: notifications that the loop heard of. `direct`: wake-ups of the loop by interrupts that the vCPU's thread
    sent. With `waits` the loop does nothing while the vCPU is at it, so that runs can be repeated."""

    def __init__(self, device: Device, memory: FakeMemory | None = None, *, waits: bool = True, **options: Any) -> None:
        super().__init__(device, memory, **options)
        self.left = self.direct = 0
        self._waits = waits
        self._vcpu = ThreadPoolExecutor(1, "vcpu")
        self._loop = asyncio.get_running_loop()

    def _interrupt(self) -> None:
        super()._interrupt()
        self.direct += 1

    def notify(self, index: int) -> None:
        ringing = self._vcpu.submit(self.ask, index)
        if self._waits:
            self._rung(index, ringing.result())
        else:
            ringing.add_done_callback(
                lambda future: self._loop.call_soon_threadsafe(self._rung, index, future.result())
            )

    def _rung(self, index: int, done: bool) -> None:
        if done:
            self.answered += 1
        else:
            self.left += 1
            PciDriver.notify(self, index)

    def close(self) -> None:
        self._vcpu.shutdown()
        super().close()
