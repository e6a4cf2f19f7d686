"""The line that says how many instructions the host's KVM gives up."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from cpu.contract import Vm
from vmm.machine import finishwatch
from vmm.machine.finishwatch import FinishWatch


class Counter:
    """A VM whose guest needs `step` instructions between two looks; closed after `looks`."""

    def __init__(self, step: int, looks: int) -> None:
        self.count, self.step, self.looks = 0, step, looks
        self.over = asyncio.Event()

    def stats(self) -> dict[str, int]:
        self.looks -= 1
        if self.looks < 0:
            self.over.set()
            return {}
        self.count += self.step
        return {"finished": self.count}

    def last_finished(self) -> bytes:
        return bytes.fromhex("db0500000010")


async def lines(step: int, quiet: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said in four looks."""
    monkeypatch.setattr(finishwatch, "INTERVAL_S", 0.01)
    counter, said = Counter(step, 4), list[str]()
    watch = FinishWatch(cast(Vm, counter), counter.stats, said.append, limit=5000, quiet=quiet)
    watch.start()
    async with asyncio.timeout(60):
        await counter.over.wait()
    watch.close()
    return said


async def test_many_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said = await lines(10_000_000, 300.0, monkeypatch)
    assert len(said) == 1
    assert "10000000 in all" in said[0]
    assert "one is db 05 00 00 00 10" in said[0]
    assert "\n" not in said[0]


async def test_it_is_said_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(await lines(10_000_000, 0.0, monkeypatch)) == 4


async def test_few_are_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await lines(1, 0.0, monkeypatch) == []
