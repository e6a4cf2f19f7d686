"""Fixtures of the integration tests: `stock_core` is each core that runs stock kernels; `linux`, the image."""

from __future__ import annotations

import shutil

import pytest

from cpu import select
from cpu.contract import Capability
from images import builder
from images.built import current
from images.errors import ImageError


def require_stock_core(name: str) -> str:
    """`name`, if that core runs stock kernels here; else the test is skipped with the reason."""
    found = select.probe(name)
    if not found.available or Capability.STOCK_KERNELS not in found.capabilities:
        pytest.skip(f"{name}: {found.reason}")
    return name


@pytest.fixture(
    params=["soft", pytest.param("kvm", marks=[pytest.mark.kvm, pytest.mark.stock_kvm])]
)
def stock_core(request: pytest.FixtureRequest) -> str:
    """A core on which Debian's kernels run: "soft", and in tests.rig or on a host with VT-x or SVM "kvm"."""
    return require_stock_core(request.param)


@pytest.fixture(scope="module")
def linux() -> builder.Built:
    """The image `linux`."""
    return built_linux()


def built_linux() -> builder.Built:
    """The image, built from what apt offers now; else the test is skipped with the reason. Where there is no apt (a rig
    that has only some files), the one that was brought along."""
    if shutil.which("apt-get") is None and (brought := current("linux")) is not None:
        return brought
    try:
        return builder.build("linux")
    except ImageError as error:
        pytest.skip(f"no linux image: {error}")
