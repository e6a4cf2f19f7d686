"""What makers of random system-level programs share: chance, the text, and what QEMU does otherwise."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import ClassVar


class ProgramMaker:
    """The text of one program: a row of steps, which depend on the seed alone and not on each other."""

    PRELUDE: ClassVar[str]
    """What stands before the steps."""
    STEPS: ClassVar[int] = 80
    """As many as surely fit into an image."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.lines: list[str] = []
        self.label = 0
        self.number = 0
        self.unlike: dict[int, str] = {}
        """Steps in which QEMU 7.2 differs from the manuals: how, and by which clause."""
        self.bochs_unlike: dict[int, str] = {}
        """Steps in which Bochs 2.7 differs, likewise."""
        self.kvm_unlike: dict[int, str] = {}
        """Steps in which kvm-amd in QEMU's emulation of SVM differs, where QEMU alone does not."""
        self.hits: dict[int, list[int]] = {}
        """What DR6's low bits must say in each #DB of a step with breakpoints."""
        self.expected: dict[int, list[str]] = {}
        """What steps must print, where the maker knows all of it."""

    def make(self, steps: int, kinds: Sequence[Callable[[], None]]) -> None:
        """Add `steps` steps of random kinds; `begin` is called before each."""
        for self.number in range(steps):
            kind = self.chance.choice(kinds)
            self.begin(kind.__name__)
            kind()

    def begin(self, name: str) -> None:
        """A step of that name begins: print its number and name."""
        raise NotImplementedError

    @property
    def text(self) -> str:
        return self.PRELUDE + "\n".join(self.lines) + "\n"

    def differs(self, reason: str) -> None:
        """QEMU does not do this step as the manuals have it."""
        self.unlike.setdefault(self.number, reason)

    def bochs_differs(self, reason: str) -> None:
        """Bochs does not do this step as the manuals have it."""
        self.bochs_unlike.setdefault(self.number, reason)

    def kvm_differs(self, reason: str) -> None:
        """kvm-amd in QEMU's emulation of SVM does not do this step as the manuals have it."""
        self.kvm_unlike.setdefault(self.number, reason)

    def add(self, *lines: str) -> None:
        self.lines += lines

    def new(self) -> str:
        """A label of its own."""
        self.label += 1
        return f"l{self.label}"

    def one(self, *choices: str) -> str:
        return self.chance.choice(choices)

    def often(self, percent: int) -> bool:
        return self.chance.randrange(100) < percent
