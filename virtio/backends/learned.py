"""What a policy before a network card has learned of its guest, as it is saved. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

RESOLVED_MAX = 4096
"""Addresses that a policy opened by names."""
NAMES_MAX = 8
"""Names of one of them."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """An address that the guest was told."""

    address: Annotated[bytes, range(4, 17)]
    names: Annotated[tuple[Annotated[str, range(1, 256)], ...], range(1, NAMES_MAX + 1)]
    """What it asked for, the latest last."""


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What a policy before a card has learned of its guest."""

    guest: Annotated[bytes, range(5)]
    """The guest's IPv4 address; empty: it has none yet."""
    resolved: Annotated[tuple[Resolved, ...], range(RESOLVED_MAX + 1)]
    """The latest last."""
