"""What holds for every test: where machines are named, and which tests are campaigns.

`make test` runs the tests in two processes (tests/support/lanes.py), and somebody may run others at the same time: each
process names its machines, by which commands find them, in a directory of its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CAMPAIGN = "LOOPVISOR_CAMPAIGN"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that are marked as a campaign run only in one."""
    if os.environ.get(CAMPAIGN):
        return
    for item in items:
        if item.get_closest_marker("campaign") is not None:
            item.add_marker(pytest.mark.skip(reason="a campaign: make test-long"))


@pytest.fixture(scope="session", autouse=True)
def natively() -> Iterator[None]:
    """Direct execution in this process and in those that tests start, where LOOPVISOR_DIRECT asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("LOOPVISOR_DIRECT"):
            from tests.support.natively import sitecustomize

            patch.setenv("PYTHONPATH", str(Path(sitecustomize.__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[None]:
    """XDG_RUNTIME_DIR, while the tests run."""
    before = os.environ.get("XDG_RUNTIME_DIR")
    place = before if before is not None and Path(before).is_dir() else None
    made = tempfile.TemporaryDirectory(prefix="tests-", dir=place, ignore_cleanup_errors=True)
    with made as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        yield
