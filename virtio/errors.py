"""Whose fault it is. Every error this package raises on purpose is one of these four."""

from __future__ import annotations


class VirtioError(Exception):
    """Base of everything this package raises on purpose."""


class GuestError(VirtioError):
    """The driver broke the specification. The device latches DEVICE_NEEDS_RESET; nothing else is affected."""


class HostError(VirtioError):
    """The host failed: a backend is gone, a disk is full, a system call was refused."""


class ConfigError(VirtioError):
    """The embedder asked for something that cannot be."""


class StateError(VirtioError):
    """The call does not fit the object's state: after a reset, while requests are in flight."""


def os_reason(error: OSError) -> str:
    """What the system says of an OSError; the text of one that Python made without asking it (a path too long)."""
    return error.strerror or str(error)
