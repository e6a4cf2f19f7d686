"""Errors of the execution cores: whose fault it is. `vmm/` raises its own four `from` these."""

from __future__ import annotations


class CpuError(Exception):
    """Base of every error that `cpu` raises."""


class GuestError(CpuError):
    """The guest did something that no machine allows."""


class HostError(CpuError):
    """The host refused or failed: an ioctl, memory, a descriptor."""


class ConfigError(CpuError):
    """An argument is wrong: the caller's fault."""


class StateError(CpuError):
    """Not now: the vCPU is not parked, the VM is closed, an answer does not fit the exit."""
