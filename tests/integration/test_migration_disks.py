"""Live migration: a qcow2 image on shared storage goes from hand to hand; the state may overtake the last round."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.integration.test_migration import OPTIONS, echo, talks, text, waiting
from vmm import disks
from vmm.errors import ConfigError
from vmm.migration.protocol import Kind
from vmm.migration.target import Session


async def test_a_shared_qcow2_image_is_handed_over_with_its_lock(linux: Any, tmp_path: Path) -> None:
    """There and back: each side finds what the other wrote, in clusters that the other allocated; nobody else gets it,
    and it is consistent."""
    image = tmp_path / "disk.qcow2"
    disks.create_disk(str(image), 64 << 20)
    disk = vmm.Disk(path=image, format="qcow2", id="data")
    device = "/dev/$(grep -l data /sys/block/*/serial | cut -d/ -f4)"
    write = f"head -c 3000000 /dev/urandom >/tmp/{{0}}; dd if=/tmp/{{0}} of={device} bs=1M seek={{1}} conv=fsync"
    compare = f"dd if={device} bs=1M skip={{1}} 2>/dev/null | head -c 3000000 | cmp - /tmp/{{0}} && echo same"
    fresh = "sync; echo 3 >/proc/sys/vm/drop_caches; "
    async with vmm.run("linux", disks=[disk], **OPTIONS) as vm:
        await text(vm, write.format("one", 1))
        async with waiting(f"unix:{tmp_path / 'a'}") as receiver:
            await vm.migrate(receiver.uri)
            new = await receiver.arrive()
            assert await text(new, fresh + compare.format("one", 1)) == "same"
            with pytest.raises(ConfigError, match="in use"):
                async with echo(disks=[disk]):
                    pass
            await text(new, write.format("two", 20))
            async with waiting(f"unix:{tmp_path / 'b'}") as back:
                await new.migrate(back.uri)
                last = await back.arrive()
                checks = fresh + compare.format("one", 1) + ";" + compare.format("two", 20)
                assert await text(last, checks) == "same\nsame"
                await text(last, write.format("three", 40))
                assert await text(last, fresh + compare.format("three", 40)) == "same"
    report, _ = disks.check(str(image))
    assert not report.corruptions


async def test_the_state_may_overtake_the_last_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the last round on the second connection is held back until the state has come on the first."""
    took, came = Session._took, threading.Event()
    order: list[str] = []

    def later(self: Session, kind: Kind, payload: memoryview) -> None:
        if kind is Kind.STATE:
            took(self, kind, payload)
            order.append("state")
            came.set()
            return
        source = vm.migration
        if kind is Kind.ROUND and source is not None and source.progress.phase == "switching":
            first = threading.current_thread() is self._links[0]._reader
            if not first:
                copy = bytes(payload)
                assert came.wait(60)
                order.append("round")
                payload = memoryview(copy)
        took(self, kind, payload)

    monkeypatch.setattr(Session, "_took", later)
    async with echo() as vm, waiting(f"unix:{tmp_path / 'm'}") as receiver:
        await vm.migrate(receiver.uri, connections=2)
        assert order == ["state", "round"]
        await talks(await receiver.arrive(), "moved")
