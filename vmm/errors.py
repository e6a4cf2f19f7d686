"""Errors of the public API: whose fault something is. Every public call of `vmm` raises subclasses of VmmError.

`str(error)` is one line that names the input and the cure; the command line prints it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from virtio import errors as virtio


class VmmError(Exception):
    """Base of everything that vmm raises on purpose."""


class GuestError(VmmError):
    """The guest broke a rule that the machine cannot answer within the guest: its own fault, its own end."""


class HostError(VmmError):
    """The host could not do what was asked: a file, a descriptor, memory, a permission, the core itself."""


class ConfigError(VmmError):
    """What the user asked for is not possible as it stands."""


class StateError(VmmError):
    """The call does not fit the machine's present state."""


def os_reason(error: OSError) -> str:
    """'no such file or directory' of an OSError, without its number and file name."""
    return virtio.os_reason(error).lower()


@contextmanager
def core_errors() -> Iterator[None]:
    """Re-raise what an execution core or virtio raises as the VmmError of the same name, `from` its cause."""
    try:
        yield
    except VmmError:
        raise
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise HostError(f"{name}{os_reason(error)}") from error
    except Exception as error:
        for base in type(error).__mro__:
            match base.__name__:
                case "GuestError":
                    raise GuestError(str(error)) from error
                case "HostError":
                    raise HostError(str(error)) from error
                case "ConfigError":
                    raise ConfigError(str(error)) from error
                case "StateError":
                    raise StateError(str(error)) from error
        raise
