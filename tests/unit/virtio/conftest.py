"""Drivers over both transports; devices are closed when a test ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.support.virtio import DRIVERS, Driver
from virtio.device import Device

Connect = Callable[..., Driver]


@pytest.fixture(params=DRIVERS)
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """connect(device, **transport options) -> a driver that has not touched the device yet."""
    made: list[Driver] = []

    def make(device: Device, **options: Any) -> Driver:
        made.append(DRIVERS[request.param](device, **options))
        return made[-1]

    yield make
    for driver in made:
        driver.transport.reset()
        await driver.transport.device.aclose()
