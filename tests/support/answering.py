"""A driver whose doorbells are answered on the vCPU's thread (virtio/native/answerer.h), without a vCPU.

What an answerer calls is C alone, since it holds locks that the loop's thread may wait for while it has the GIL.
"""

from __future__ import annotations

import asyncio
import ctypes
import enum
import errno
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.virtio import FakePciHost, PciDriver
from virtio.device import Device
from virtio.fake import FakeMemory

CAPSULE = b"loopvisor.answerer.1"
_libc = ctypes.CDLL(None)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def reads_at_once(folder: Path) -> bool:
    """Whether its file system can be told to read what the page cache has and no more (RWF_NOWAIT). tmpfs cannot."""
    file = folder / "asked"
    file.write_bytes(b"x")
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    finally:
        os.close(descriptor)
        file.unlink()
    return True


class _Host(ctypes.Structure):
    """struct lv_answerer_host"""

    _fields_ = (("machine", ctypes.c_void_p), ("written", ctypes.c_void_p), ("message", ctypes.c_void_p))


class _Answerer(ctypes.Structure):
    """struct lv_answerer"""

    _fields_ = (
        ("ring", ctypes.c_void_p),
        ("retain", ctypes.c_void_p),
        ("release", ctypes.c_void_p),
        ("asked", ctypes.c_uint32),
    )


class Asked(enum.IntEnum):
    """enum lv_asked"""

    AT_ONCE, IF_CROWDED, LATER = range(3)


_RING = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.POINTER(_Host))


class _AnsweringHost(FakePciHost):
    """Keeps the answerers, and says where messages go: address 1 makes an eventfd readable."""

    def __init__(self, woken: asyncio.Event) -> None:
        super().__init__(woken)
        self.answerers: dict[int, Any] = {}
        self.masked = False

    def msix_message(self, vector: int) -> tuple[int, int] | None:
        return None if self.masked else (1, vector)

    def ioeventfd(
        self,
        space: Any,
        address: int,
        size: int,
        match: int | None,
        callback: Callable[[], None],
        answerer: object = None,
    ) -> Callable[[], None]:
        if answerer is not None:
            self.answerers[address] = answerer
        return super().ioeventfd(space, address, size, match, callback, answerer)


class AnsweringDriver(PciDriver):
    """PciDriver whose doorbells ask the device's answerers first. Made and closed while its loop runs."""

    host: _AnsweringHost

    def __init__(self, device: Device, memory: FakeMemory | None = None, **options: Any) -> None:
        super().__init__(device, memory, **options)
        self.answered = 0
        """Doorbells of which the loop's side did not have to hear."""
        self._messages = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        written = ctypes.cast(_libc.getpid, ctypes.c_void_p)
        message = ctypes.cast(_libc.eventfd_write, ctypes.c_void_p)
        self._answerer_host = _Host(self._messages, written, message)
        self.host = _AnsweringHost(self.interrupted)
        self.pci._drop_ioeventfds()
        self.pci.attach(self.host)
        self.pci.bars_changed()
        asyncio.get_running_loop().add_reader(self._messages, self._interrupt)

    def _interrupt(self) -> None:
        os.eventfd_read(self._messages)
        self.interrupted.set()

    def ask(self, index: int) -> bool:
        """What a vCPU's thread does for a doorbell; whether nobody else has to hear of it. *any thread*"""
        answerer = self._answerer(index)
        return bool(_RING(answerer.ring)(ctypes.addressof(answerer), ctypes.byref(self._answerer_host)))

    def asked(self, index: int) -> Asked:
        """When a core asks the answerer of a doorbell."""
        return Asked(self._answerer(index).asked)

    def _answerer(self, index: int) -> _Answerer:
        address = (self.host.addresses[4] or 0) + 0x3000 + 4 * index
        return _Answerer.from_address(_pointer(self.host.answerers[address], CAPSULE))

    def notify(self, index: int) -> None:
        if self.ask(index):
            self.answered += 1
        else:
            super().notify(index)

    @property
    def told(self) -> bool:
        """Whether a message has come that the loop has not seen yet."""
        return bool(select.select([self._messages], (), (), 0)[0])

    def close(self) -> None:
        """After the device."""
        asyncio.get_running_loop().remove_reader(self._messages)
        os.close(self._messages)


class VcpuThread:
    """A thread that rings a driver's doorbells all the time, beside the loop."""

    def __init__(self, driver: AnsweringDriver, queues: int) -> None:
        self.answered = 0
        self._driver, self._queues, self._ending = driver, queues, False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending:
            for index in range(self._queues):
                self.answered += self._driver.ask(index)

    def end(self) -> None:
        """Waits for it."""
        self._ending = True
        self._thread.join()
