"""Errors of the public API: whose fault something is. Every public call of `vmm` raises subclasses of VmmError.

`str(error)` is one line that names the input and the cure; the command line prints it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cpu import errors as cpu
from cpu.errors import CpuError
from virtio import errors as virtio
from virtio.errors import VirtioError


class VmmError(Exception):
    """Base of everything that vmm raises on purpose."""


class GuestError(VmmError):
    """The guest broke a rule, and the machine has no way to report that to it. It ends this machine alone."""


class HostError(VmmError):
    """The host could not do what was asked: a file, a descriptor, memory, a permission, the core itself."""


class ConfigError(VmmError):
    """What the user asked for is not possible as it stands."""


class StateError(VmmError):
    """The call does not fit the machine's present state."""


_OURS: tuple[tuple[tuple[type[Exception], ...], type[VmmError]], ...] = (
    ((cpu.GuestError, virtio.GuestError), GuestError),
    ((cpu.HostError, virtio.HostError), HostError),
    ((cpu.ConfigError, virtio.ConfigError), ConfigError),
    ((cpu.StateError, virtio.StateError), StateError),
)
"""The lower packages' errors, and which of ours says the same."""


_BY_NAME = {kind.__name__: kind for _, kind in _OURS}


def fault_of(error: VmmError) -> str:
    """Whose fault it is, for another process: "GuestError", "HostError", "ConfigError" or "StateError"."""
    return next((name for name, kind in _BY_NAME.items() if isinstance(error, kind)), "HostError")


def error_from(fault: object, text: str) -> VmmError:
    """The error that another process told as (fault_of(error), str(error)); a HostError if the name is none of the
    four."""
    return _BY_NAME.get(str(fault), HostError)(text)


def os_reason(error: OSError) -> str:
    """'no such file or directory' of an OSError, without its number and file name."""
    return virtio.os_reason(error).lower()


@contextmanager
def core_errors() -> Iterator[None]:
    """Re-raise what an execution core or virtio raises as the VmmError that says the same, `from` its cause."""
    try:
        yield
    except VmmError:
        raise
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise HostError(f"{name}{os_reason(error)}") from error
    except (CpuError, VirtioError) as error:
        for kinds, ours in _OURS:
            if isinstance(error, kinds):
                raise ours(str(error)) from error
        raise
