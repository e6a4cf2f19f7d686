"""The image `linux`, for tests that boot it, and shell scripts in a guest."""

from __future__ import annotations

import pytest

import vmm
from images import catalog
from images.errors import ImageError


def need() -> catalog.Image:
    """The image, built if there is none yet; the test is skipped where that cannot be."""
    try:
        return catalog.resolve("linux", build=True)
    except ImageError as error:
        pytest.skip(f"the image linux cannot be built here: {error}")


async def sh(vm: vmm.VirtualMachine, script: str, *, seconds: float) -> str:
    """Run a script in the guest, for so many seconds at most; its output. GuestError if it fails."""
    result = await vm.exec("sh", "-c", script, timeout=seconds, check=True)
    return result.stdout.decode()
