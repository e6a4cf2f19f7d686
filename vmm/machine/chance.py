"""Chance as an input: the random bytes that devices may use."""

from __future__ import annotations

import os
from typing import ClassVar

from cpu.values import U64, dataclass


@dataclass(frozen=True, slots=True)
class ChanceState:
    """How many bytes were drawn; None without a seed, where the host's entropy has no position."""

    kind: ClassVar = "chance"
    version: ClassVar = 1
    drawn: U64 | None


class Chance:
    """The host's entropy, or with a seed a stream that is a function of it: SHA-256 of seed, purpose and block number.

    The position is state, so that a restored machine goes on where the saved one stopped.
    """

    state_type = ChanceState
    _BLOCK = 32

    def __init__(self, seed: int | None, purpose: str) -> None:
        """`purpose` keeps several streams of one seed apart."""
        self._key = None if seed is None else f"{purpose} {seed} ".encode()
        self._drawn = 0

    def __call__(self, count: int) -> bytes:
        """`count` random bytes."""
        if self._key is None:
            return os.urandom(count)
        import hashlib  # only machines with a seed need it

        first, last = self._drawn // self._BLOCK, (self._drawn + count + self._BLOCK - 1) // self._BLOCK
        stream = b"".join(hashlib.sha256(self._key + str(block).encode()).digest() for block in range(first, last))
        start = self._drawn - first * self._BLOCK
        self._drawn += count
        return stream[start : start + count]

    def save(self) -> ChanceState:
        return ChanceState(None if self._key is None else self._drawn)

    def restore(self, state: ChanceState) -> None:
        """A state of a machine without a seed says nothing."""
        if self._key is not None and state.drawn is not None:
            self._drawn = state.drawn
