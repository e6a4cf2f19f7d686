"""pytest plugin: a `vm` fixture that makes machines and ends them with the test.

    async def test_kernel(vm):
        machine = await vm("linux")
        assert (await machine.exec("uname", "-s")).text == "Linux"

    async def test_boot(vm):
        machine = await vm(kernel="bzImage", initrd="initrd")
        await machine.console.expect(rb"# ", timeout=60)

Needs pytest-asyncio. Imports nothing of the machine before the fixture is used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest_asyncio

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

MachineFactory = Callable[..., Awaitable["VirtualMachine"]]


@pytest_asyncio.fixture(name="vm")
async def vm_fixture() -> AsyncIterator[MachineFactory]:
    """A function that takes what `vmm.run` takes and returns a running machine; all end with the test."""
    from vmm.launch import run

    async with AsyncExitStack() as stack:

        async def start(image: Any = None, **options: Any) -> VirtualMachine:
            return await stack.enter_async_context(run(image, **options))

        yield start
