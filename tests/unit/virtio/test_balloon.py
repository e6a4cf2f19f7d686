"""Balloon device (5.5): pages given up and reported, statistics, hostile numbers, state."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.virtio import Driver
from virtio.devices.balloon import STATISTICS, BalloonDevice, BalloonFeature, page_ranges
from virtio.errors import ConfigError

from .conftest import Connect

PAGE = 4096
INFLATE, DEFLATE, STATS, REPORT = range(4)


def page(driver: Driver) -> int:
    """A page of the driver's own that holds something."""
    at = driver.allocator.take(PAGE, PAGE)
    driver.memory.view(at, PAGE)[:] = b"x" * PAGE
    return at


def held(driver: Driver, at: int) -> bytes:
    return bytes(driver.memory.view(at, PAGE))


def start(connect: Connect, wanted: int = -1) -> tuple[BalloonDevice, Any]:
    device = BalloonDevice()
    driver = connect(device)
    driver.initialize(wanted)
    return device, driver


async def test_inflated_pages_go_back_to_the_host(connect: Connect) -> None:
    device, driver = start(connect)
    pages = [page(driver) for _ in range(5)]
    numbers = [pages[4], pages[0], pages[1], pages[3]]
    await driver.request(INFLATE, [struct.pack("<4I", *(at // PAGE for at in numbers))])
    assert [held(driver, at) == bytes(PAGE) for at in pages] == [True, True, False, True, True]
    assert device.discarded == 4 * PAGE
    await driver.request(DEFLATE, [struct.pack("<I", pages[0] // PAGE)])
    driver.config_write(4, 4, 3)
    assert device.actual == 3


async def test_the_target_is_told(connect: Connect) -> None:
    device, driver = start(connect)
    assert driver.config_read(0, 4) == 0
    driver.interrupted.clear()
    device.set_target(1234)
    assert driver.interrupted.is_set(), "a configuration change notification"
    assert driver.config_read(0, 4) == 1234
    with pytest.raises(ConfigError):
        device.set_target(1 << 32)
    driver.config_write(0, 4, 7)
    assert driver.config_read(0, 4) == 1234, "the driver writes `actual` only"


async def test_reported_pages_go_back_in_any_shape(connect: Connect) -> None:
    device, driver = start(connect, ~BalloonFeature.PAGE_POISON)
    pages = [page(driver) for _ in range(6)]
    driver.submit(REPORT, [], [(pages[0], 2 * PAGE), (pages[4] + 100, 2 * PAGE - 100)])
    await driver.used(REPORT)
    assert [held(driver, at) == bytes(PAGE) for at in pages] == [True, True, False, False, False, True]


@pytest.mark.clause("5.5.6.7.2-a")
@pytest.mark.parametrize("poison", [0, 0xAA])
async def test_reported_pages_keep_what_free_pages_hold(connect: Connect, poison: int) -> None:
    device = BalloonDevice()
    driver = connect(device)
    driver.initialize(go=False)
    driver.config_write(12, 4, poison)
    driver.write_status(driver.read_status() | 4)
    at = page(driver)
    driver.memory.view(at, PAGE)[:] = bytes([poison]) * PAGE
    driver.submit(REPORT, [], [(at, PAGE)])
    await driver.used(REPORT)
    assert held(driver, at) == bytes([poison]) * PAGE
    assert device.discarded == (0 if poison else PAGE)


@pytest.mark.clause("5.5.6.3.2-a", "5.5.6.3.2-b")
async def test_statistics(connect: Connect) -> None:
    device, driver = start(connect)

    def buffer(*entries: tuple[int, int]) -> None:
        driver.submit(STATS, [driver.buffer(b"".join(struct.pack("<HQ", *entry) for entry in entries))])

    buffer((5, 1 << 30), (999, 7), (4, 5000))
    await driver.wait(lambda: device.statistics)
    assert device.statistics == {"total": 1 << 30, "free": 5000}
    assert not device.active.queues[STATS].in_flight, "the buffer stays the driver's"
    asking = asyncio.create_task(device.refresh(30))
    await driver.used(STATS)
    buffer((0, 3), (4, 6000))
    assert await asking == {"swap_in": 3, "free": 6000}
    assert await device.refresh(0.01) == {"swap_in": 3, "free": 6000}, "a driver that does not answer"
    await asyncio.wait_for(driver.transport.quiesce(), 30)
    driver.transport.resume()
    assert len(STATISTICS) == 10


async def test_numbers_outside_memory_are_the_drivers_fault(connect: Connect) -> None:
    for number in (0, 0xFFFFFFFF, 0x10_0000):
        device, driver = start(connect)
        driver.submit(INFLATE, [driver.buffer(struct.pack("<I", number))])
        await driver.wait(lambda driver=driver: driver.needs_reset)
        assert not device.discarded
        driver.initialize()
        at = page(driver)
        await driver.request(INFLATE, [struct.pack("<I", at // PAGE)])
        assert device.discarded == PAGE


async def test_a_request_may_be_cut_and_odd(connect: Connect) -> None:
    device, driver = start(connect)
    at = page(driver)
    data = struct.pack("<II", at // PAGE, at // PAGE)
    await driver.request(INFLATE, [data[:3], data[3:], b"odd"])
    assert held(driver, at) == bytes(PAGE)
    await driver.request(INFLATE, [], [16])
    assert not driver.needs_reset


async def test_queues_are_counted_by_what_was_negotiated(connect: Connect) -> None:
    device, driver = start(connect, ~(BalloonFeature.STATS_VQ | BalloonFeature.PAGE_POISON))
    at = page(driver)
    driver.submit(2, [], [(at, PAGE)])
    await driver.used(2)
    assert held(driver, at) == bytes(PAGE)
    assert await device.refresh(0.01) == {}


async def test_state(connect: Connect) -> None:
    device, driver = start(connect)
    device.set_target(77)
    driver.config_write(4, 4, 50)
    other = BalloonDevice()
    other.restore_device(device.save_device())
    assert (other.target, other.actual) == (77, 50)
    driver.write_status(0)
    assert (device.target, device.actual) == (77, 0), "a driver that begins again has given up nothing"


@given(st.lists(st.integers(0, 50) | st.integers(0, 0xFFFFFFFF)))
def test_ranges_hold_each_page_once(numbers: list[int]) -> None:
    ranges = page_ranges(numbers)
    assert sorted(set(numbers)) == [
        number for gpa, length in ranges for number in range(gpa // PAGE, (gpa + length) // PAGE)
    ]
    assert all(one[0] + one[1] < two[0] for one, two in zip(ranges, ranges[1:], strict=False))
