"""Errors on the control socket: what a machine raises is what its client raises, whichever subclass it was."""

from __future__ import annotations

import pytest

from vmm.console.hub import ConsoleTimeout
from vmm.errors import ConfigError, GuestError, HostError, StateError, VmmError, error_from, fault_of
from vmm.machine.memory import OutsideMemory


@pytest.mark.parametrize("kind", [GuestError, HostError, ConfigError, StateError])
def test_whose_fault_it_is_arrives(kind: type[VmmError]) -> None:
    error = error_from(fault_of(kind("disk0: gone")), "box: disk0: gone")
    assert type(error) is kind and str(error) == "box: disk0: gone"


def test_a_subclass_arrives_as_what_it_is() -> None:
    assert fault_of(OutsideMemory("0x0")) == "GuestError"


def test_an_error_that_is_nobody_elses_is_the_hosts() -> None:
    assert fault_of(ConsoleTimeout("late")) == "HostError"


@pytest.mark.parametrize("fault", [None, 3, "", "KeyError", ["GuestError"]])
def test_what_is_no_fault_is_the_hosts(fault: object) -> None:
    assert type(error_from(fault, "text")) is HostError
