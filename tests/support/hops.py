"""Hops in mid-operation: a component is driven step by step, and before one step it is saved, and another goes on.

`check(make, drive)` runs a driver's program once without a hop. Then it runs it once for each of its steps, with a hop
before that step, and once with a hop before every step. What the driver reads, the levels of the interrupt lines after
each step, messages, requests and the state at the end must be those of the run without a hop.

A test that makes a component hop says so with `moves(kind, ...)`; tests/conformance/state/test_complete.py holds the
list of those kinds against all that are declared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from typing import Any, TypeVar

from tests.support.pc import FakePort, Pc
from vmm.state.payload import decode, encode

Function = TypeVar("Function", bound=Callable[..., Any])
EACH = range(1 << 30)
"""A hop before every step."""


def moves(*kinds: str) -> Callable[[Function], Function]:
    """Of a test: components of these kinds hop in it while they are in the middle of something. A part of a vCPU or of
    what vCPUs share is `vcpu.FIELD` or `core.FIELD`."""

    def mark(function: Function) -> Function:
        function.moves = (*getattr(function, "moves", ()), *kinds)  # type: ignore[attr-defined]
        return function

    return mark


class Driven:
    """A component on a Pc, and its driver's view: each access is a step. What is beside the machine, as the console's
    other end, stays where it is over a hop: `port`."""

    def __init__(self, make: Callable[[Driven], Any], hops: Container[int]) -> None:
        """`make(driven)` attaches a new component to `driven.pc` and returns it."""
        self._make, self._hops = make, hops
        self.pc = Pc()
        self.port = FakePort()
        self.host: list[Any] = []
        """What the component told the host."""
        self.trace: list[Any] = []
        self.steps = 0
        self.component = make(self)

    def step(self) -> None:
        """Another step begins."""
        if self.steps in self._hops:
            self.hop()
        self.steps += 1

    def hop(self) -> None:
        """Save it as a file would have it; a new one at the same moment takes it over."""
        text = json.dumps(encode(self.component.save()))
        old, self.pc = self.pc, Pc()
        self.pc.clock.time.now = old.clock.time.now
        self.pc.messages, self.pc.requests = old.messages, old.requests
        self.port.ready = None
        self.component = self._make(self)
        self.component.restore(decode(self.component, "it", json.loads(text)))

    def _note(self, what: Any) -> None:
        self.trace.append((what, sorted(gsi for gsi, level in self.pc.levels.items() if level)))

    def inp(self, port: int, size: int = 1) -> int:
        self.step()
        value = self.pc.inp(port, size)
        self._note(value)
        return value

    def out(self, port: int, value: int, size: int = 1) -> None:
        self.step()
        self.pc.out(port, value, size)
        self._note(None)

    def read(self, address: int, size: int = 4) -> int:
        self.step()
        value = self.pc.read(address, size)
        self._note(value)
        return value

    def write(self, address: int, value: int, size: int = 4) -> None:
        self.step()
        self.pc.write(address, value, size)
        self._note(None)

    def advance(self, ns: int) -> None:
        """Time passes."""
        self.step()
        self.pc.clock.advance(ns)
        self._note(None)

    def do(self, act: Callable[[Any], Any]) -> Any:
        """Something that the host does with the component."""
        self.step()
        value = act(self.component)
        self._note(None)
        return value

    def outcome(self) -> Any:
        """All that anybody can tell."""
        end = encode(self.component.save())
        text = bytes(self.port.written)
        return self.trace, self.pc.messages, self.pc.requests, text, self.port.events, self.host, end


def check(make: Callable[[Driven], Any], drive: Callable[[Driven], None], *, least: int = 4) -> None:
    """A hop before any step, and before every one, changes nothing. `least`: steps that there are at least."""

    def run(hops: Container[int]) -> tuple[Driven, Any]:
        driven = Driven(make, hops)
        drive(driven)
        return driven, driven.outcome()

    plain, wanted = run(())
    assert plain.steps >= least
    for at in range(plain.steps):
        _, found = run((at,))
        assert found == wanted, f"a hop before step {at}"
    assert run(EACH)[1] == wanted, "a hop before every step"
