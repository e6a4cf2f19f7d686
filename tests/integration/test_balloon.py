"""A Debian kernel with a balloon: memory that the guest gives up or does not use goes back to this host."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import vmm
from vmm.errors import ConfigError
from vmm.vm import VirtualMachine

MIB = 1 << 20
DEADLINE = 120


def resident() -> int:
    """Memory of this process that no file has, bytes: also what it may share, as with direct execution."""
    found = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", Path(f"/proc/{os.getpid()}/status").read_text())
    assert len(found) == 2
    return sum(map(int, found)) * 1024


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.05)


async def kept(vm: VirtualMachine, size: int) -> None:
    """Until the guest keeps so much."""
    balloon = vm.device("balloon")
    await until(lambda: balloon.actual == (vm.config.memory - size) // 4096)


async def fill(vm: VirtualMachine, mib: int) -> None:
    script = f"mkdir -p /big && mount -t tmpfs -o size=90% none /big && dd if=/dev/urandom of=/big/x bs=1M count={mib}"
    await vm.exec("sh", "-c", script, check=True, timeout=DEADLINE)


async def test_memory_goes_back_and_comes_again() -> None:
    async with vmm.run("linux", memory="512M", balloon=True) as vm:
        await fill(vm, 150)
        full = resident()
        # free page reporting: what is freed goes back by itself
        await vm.exec("umount", "/big", check=True, timeout=DEADLINE)
        await until(lambda: resident() < full - 120 * MIB)
        # the balloon: what the guest is to keep
        await fill(vm, 150)
        await vm.exec("umount", "/big", check=True, timeout=DEADLINE)
        await vm.set(memory="192M")
        await kept(vm, 192 * MIB)
        statistics = await vm.memory_statistics(DEADLINE)
        assert 0 < statistics["free"] < 192 * MIB and statistics["total"] > 256 * MIB
        assert vm.device("balloon").discarded > 300 * MIB
        await vm.set(memory="512M")
        await kept(vm, 512 * MIB)
        await fill(vm, 250)
        with pytest.raises(ConfigError, match="more than 512M"):
            await vm.set(memory="513M")


async def test_a_guest_takes_its_memory_back_before_it_kills() -> None:
    async with vmm.run("linux", memory="384M", balloon=True) as vm:
        await vm.set(memory="128M")
        await kept(vm, 128 * MIB)
        hungry = "dd if=/dev/zero of=/dev/null bs=200M count=1 2>&1 && echo fed"
        result = await vm.exec("sh", "-c", hungry, timeout=DEADLINE)
        assert result.text.endswith("fed"), result
        assert vm.device("balloon").actual < (384 - 128) * MIB // 4096


async def test_a_copy_of_a_machine_has_zeros_where_it_gave_memory_back(tmp_path: Path) -> None:
    async with vmm.run("linux", memory="320M", balloon=True) as vm:
        await fill(vm, 100)
        (copy,) = await vm.fork()
        before = await copy.exec("sha256sum", "/big/x", timeout=DEADLINE)
        await copy.set(memory="256M")
        await kept(copy, 256 * MIB)
        assert (await copy.exec("sha256sum", "/big/x", timeout=DEADLINE)).text == before.text
        assert (await vm.exec("sha256sum", "/big/x", timeout=DEADLINE)).text == before.text
        await vm.set(memory="256M")
        await kept(vm, 256 * MIB)
        await vm.snapshot(tmp_path / "snapshot")
    async with vmm.restore(tmp_path / "snapshot") as vm:
        assert vm.device("balloon").target == (320 - 256) * MIB // 4096
        assert (await vm.exec("sha256sum", "/big/x", timeout=DEADLINE)).text == before.text
        await vm.set(memory="320M")
        await kept(vm, 320 * MIB)
        await vm.exec("dd", "if=/dev/zero", "of=/big/y", "bs=1M", "count=60", check=True, timeout=DEADLINE)


async def test_without_a_balloon_memory_cannot_be_set() -> None:
    async with vmm.run("linux", memory="128M") as vm:
        with pytest.raises(ConfigError, match="--balloon"):
            await vm.set(memory="64M")
