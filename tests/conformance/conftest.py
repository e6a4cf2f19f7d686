"""Fixtures of the cores' conformance suite: `core` is each core, `real_core` each that executes instructions."""

from collections.abc import Callable, Iterator

import pytest

from cpu.contract import System, VmConfig
from tests.support.cores import CORES, REAL_CORES, Guest, make, open_core


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest) -> Iterator[System]:
    system = open_core(request.param)
    yield system
    system.close()


@pytest.fixture(params=REAL_CORES)
def real_core(request: pytest.FixtureRequest) -> Iterator[System]:
    system = open_core(request.param)
    yield system
    system.close()


MakeGuest = Callable[..., Guest]


@pytest.fixture
def guests() -> Iterator[MakeGuest]:
    """guests(system, **config) -> Guest; all are closed afterwards."""
    made: list[Guest] = []

    def factory(system: System, *, log_dirty: bool = False, **config: object) -> Guest:
        made.append(make(system, config=VmConfig(**config), log_dirty=log_dirty))  # type: ignore[arg-type]
        return made[-1]

    yield factory
    for guest in made:
        guest.close()
