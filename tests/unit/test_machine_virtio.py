"""The virtio devices of a machine: what of them stays if one cannot be made, and console output that is held back for
who must not miss any."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.virtio import MmioDriver
from virtio.backends.file import FileBlock
from virtio.devices.console import ConsoleDevice
from virtio.errors import ConfigError, HostError
from vmm.config import Config, Disk, PortConfig
from vmm.console.hub import PRESSURE_HIGH, ConsoleHub, ConsoleReader
from vmm.devices.virtio.console import ConsoleMaker, HubChar
from vmm.devices.virtio.disk import DiskMaker, open_disk

CHUNK = 65536


def joined(hub: ConsoleHub) -> HubChar:
    char = HubChar(input=True)
    char.join(hub.port())
    return char


async def test_output_is_taken_as_fast_as_a_lossless_reader_takes_it() -> None:
    """A buffer may name the same MiB many times, so what is available to the device is far more than the guest's
    memory, and a machine that is held still has it: the host keeps no more of it than the mark and a piece."""
    hub = ConsoleHub()
    reader = ConsoleReader(hub, lossless=True)
    device = ConsoleDevice(joined(hub))
    driver = MmioDriver(device)
    driver.initialize()
    driver.submit(1, [driver.buffer(b"a" * (1 << 20))] * 16, indirect=True)
    await driver.wait(lambda: hub.pressed)
    for _ in range(100):
        await asyncio.sleep(0)
    assert hub.total <= PRESSURE_HIGH + 2 * CHUNK
    got = 0
    while got < 16 << 20:
        got += len(await asyncio.wait_for(reader.read(), 10))
        assert hub.total - got <= PRESSURE_HIGH + 2 * CHUNK
    await driver.used(1)
    await device.aclose()


async def test_output_of_a_console_that_was_closed_goes_nowhere() -> None:
    """The lossless reader does not read on; the device is not held by it."""
    hub = ConsoleHub()
    reader = ConsoleReader(hub, lossless=True)
    device = ConsoleDevice(joined(hub))
    driver = MmioDriver(device)
    driver.initialize()
    driver.submit(1, [driver.buffer(b"a" * (1 << 20))] * 2, indirect=True)
    await driver.wait(lambda: hub.pressed)
    hub.close()
    await driver.used(1)
    reader.close()
    await device.aclose()


async def test_ports_that_cannot_all_be_bound_leave_none(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "missing" / "second"
    config = Config(ports=(PortConfig(path=first, name="first"), PortConfig(path=second, name="second")))
    with pytest.raises(ConfigError):
        await ConsoleMaker(config).make()
    assert not first.exists()
    with pytest.raises(OSError):
        await asyncio.open_unix_connection(first)


async def test_a_disk_that_the_host_cannot_serve_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(self: FileBlock, serial: bytes) -> Any:
        raise OSError(24, "Too many open files")

    (tmp_path / "disk").write_bytes(bytes(4096))
    disk = Disk(path=tmp_path / "disk")
    monkeypatch.setattr(FileBlock, "engine", none_left)
    with pytest.raises(HostError, match="disk: Too many open files"):
        await DiskMaker(disk, "disk0").make()
    again = await open_disk(disk)
    await again.aclose()


async def test_a_snapshot_without_a_place_for_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"missing: No such file or directory.*TMPDIR"):
        await open_disk(Disk(path=tmp_path / "disk", snapshot=True))
