"""Disks of a running Debian guest: snapshots, commits, streams, mirrors and size, by API, socket and command, while it
writes and verifies."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support.command import vmm as command
from tests.support.patience import PATIENCE
from tests.support.qcow2 import our_check
from virtio.images.chain import open_chain
from virtio.images.create import create_qcow2
from vmm.config import Disk
from vmm.errors import ConfigError, StateError
from vmm.events import DiskJobChanged

OPTIONS: dict[str, Any] = {"nets": [], "memory": "128M"}
MIB = 1 << 20
SIZE = 24 * MIB
WRITER = """
n=0
while [ ! -e /stop ]; do
  n=$((n + 1))
  dd if=/dev/urandom of=/ram bs=64k count=32 2>/dev/null
  dd if=/ram of=/dev/vdb bs=64k seek=$((n % 10 * 32)) conv=fsync,notrunc 2>/dev/null || echo write >>/bad
  echo 3 >/proc/sys/vm/drop_caches
  dd if=/dev/vdb bs=64k skip=$((n % 10 * 32)) count=32 2>/dev/null | cmp - /ram || echo "compare $n" >>/bad
  echo $n >/rounds
done
echo >/stopped
"""


async def text(vm: vmm.VirtualMachine, script: str) -> str:
    result = await vm.exec("sh", "-c", script, timeout=60 * PATIENCE, check=True)
    return result.text


async def begin(vm: vmm.VirtualMachine) -> None:
    """A program that writes pieces of the second disk and reads them back."""
    await text(vm, f"cat >/writer <<'E'\n{WRITER}E\nsh /writer >/dev/null 2>&1 &")
    await rounds(vm, 1)


async def rounds(vm: vmm.VirtualMachine, more: int) -> None:
    done = f"until [ $(cat /rounds 2>/dev/null || echo 0) -ge $((r + {more})) ]; do sleep 0.02; done"
    await text(vm, f"r=$(cat /rounds 2>/dev/null || echo 0); {done}")


async def end(vm: vmm.VirtualMachine) -> bytes:
    """It stops, having read what it wrote; the SHA-256 of the disk."""
    await text(vm, "echo >/stop; until [ -e /stopped ]; do sleep 0.02; done")
    assert await text(vm, "cat /bad 2>/dev/null; echo none") == "none"
    return bytes.fromhex((await text(vm, "echo 3 >/proc/sys/vm/drop_caches; sha256sum /dev/vdb")).split()[0])


def digest(path: Path, format: Any = "qcow2") -> bytes:
    import hashlib

    with open_chain(path, format=format, read_only=True, backing="any") as chain:
        data = bytearray(chain.size)
        chain.image.read(0, data)
    return hashlib.sha256(data).digest()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.qcow2"
    create_qcow2(str(path), SIZE)
    return path


async def test_snapshots_commits_streams_and_a_mirror_under_writes(linux: Any, tmp_path: Path, base: Path) -> None:
    async with vmm.run("linux", disks=[Disk(path=base, id="data")], **OPTIONS) as vm:
        await begin(vm)
        disk = vm.disks["data"]
        assert set(vm.disks) == {"disk0", "data"} and vm.disks["vdb"].name == "data" and len(vm.disks) == 2
        seen: list[DiskJobChanged] = []

        async def follow() -> None:
            async for event in vm.events():
                if isinstance(event, DiskJobChanged):
                    seen.append(event)

        async with asyncio.TaskGroup() as group:
            following = group.create_task(follow())
            await asyncio.sleep(0)
            for turn in range(2):
                await disk.snapshot(tmp_path / f"s{turn}.qcow2")
                await rounds(vm, 1)
                assert vm.present.disks[1].path == tmp_path / f"s{turn}.qcow2"
                await disk.commit()
                await rounds(vm, 1)
                assert vm.present.disks[1].path == base and disk.chain == [str(base)]
                (tmp_path / f"s{turn}.qcow2").unlink()
            await disk.snapshot(tmp_path / "top.qcow2")
            await rounds(vm, 1)
            await disk.stream()
            assert disk.chain == [str(tmp_path / "top.qcow2")]
            base.unlink()
            await rounds(vm, 1)
            (tmp_path / "elsewhere").mkdir()
            raw = tmp_path / "elsewhere" / "disk.raw"
            await disk.mirror(raw, format="raw")
            await rounds(vm, 1)
            assert (vm.present.disks[1].path, vm.present.disks[1].format) == (raw, "raw")
            following.cancel()
        kinds = {(event.kind, event.state) for event in seen}
        assert {(kind, state) for kind in ("commit", "stream", "mirror") for state in ("running", "done")} <= kinds
        assert all(event.disk == "data" and 0 <= event.done <= max(event.total, event.done) for event in seen)
        assert vm.config.disks[1].path == base
        whole = await end(vm)
    assert digest(raw, "raw") == whole
    assert our_check(tmp_path / "top.qcow2").clean


async def test_a_mirror_that_follows_and_is_finished_or_cancelled(linux: Any, tmp_path: Path, base: Path) -> None:
    async with vmm.run("linux", disks=[Disk(path=base, id="data")], **OPTIONS) as vm:
        await begin(vm)
        disk = vm.disks["data"]

        async def ready(job: Any) -> None:
            async with asyncio.timeout(60 * PATIENCE):
                while job.state != "ready":
                    assert job.active, job.detail
                    await asyncio.sleep(0.02)

        job = disk.start_mirror(tmp_path / "m.qcow2", follow=True)
        for call in (
            lambda: disk.snapshot(tmp_path / "x"),
            lambda: disk.resize(2 * SIZE),
            lambda: disk.commit(),
            lambda: vm.detach("data"),
            lambda: vm.snapshot(tmp_path / "state"),
        ):
            with pytest.raises(StateError, match="mirror is under way"):
                await call()
        await ready(job)
        await rounds(vm, 2)
        await job.cancel()
        assert (job.state, (tmp_path / "m.qcow2").exists()) == ("cancelled", False) and disk.chain == [str(base)]
        with pytest.raises(StateError, match="cancelled"):
            await job.wait()
        job = disk.start_mirror(tmp_path / "m.qcow2", follow=True)
        await ready(job)
        await rounds(vm, 2)
        job.finish()
        await job.wait()
        assert disk.chain == [str(tmp_path / "m.qcow2")]
        with pytest.raises(StateError, match="mirror done"):
            job.finish()
        await rounds(vm, 1)
        await vm.snapshot(tmp_path / "state")
        whole = await end(vm)
    assert digest(tmp_path / "m.qcow2") == whole and our_check(tmp_path / "m.qcow2").clean and our_check(base).clean
    async with vmm.restore(tmp_path / "state") as copy:
        await rounds(copy, 1)
        assert await text(copy, "cat /bad 2>/dev/null; echo none") == "none"


async def test_what_cannot_be(linux: Any, tmp_path: Path, base: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(MIB))
    shared = [Disk(path=raw, id="ro", readonly=True), Disk(path=raw, id="own", snapshot=True)]
    disks = [Disk(path=base, id="data"), *shared]
    async with vmm.run("linux", disks=disks, **OPTIONS) as vm:
        (tmp_path / "there").write_bytes(b"mine")
        with pytest.raises(KeyError):
            vm.disks["vdz"]
        for call, kinds, message in (
            (lambda: vm.disks.find("vdz"), ConfigError, "no 'vdz'; it has disk0, data, ro, own"),
            (lambda: vm.disks["data"].snapshot(tmp_path / "there"), ConfigError, "is there already"),
            (lambda: vm.disks["data"].mirror(tmp_path / "there"), ConfigError, "is there already"),
            (lambda: vm.disks["data"].commit(), ConfigError, "no backing file"),
            (lambda: vm.disks["data"].stream(), ConfigError, "no backing file"),
            (lambda: vm.disks["data"].resize(MIB), ConfigError, "only grows"),
            (lambda: vm.disks["data"].resize(SIZE + 1), ConfigError, "whole sectors"),
            (lambda: vm.disks["data"].snapshot_internal(""), ConfigError, "no name"),
            (lambda: vm.disks["ro"].snapshot(tmp_path / "x"), ConfigError, "reading only"),
            (lambda: vm.disks["ro"].mirror(tmp_path / "x"), ConfigError, "reading only"),
            (lambda: vm.disks["own"].mirror(tmp_path / "x"), StateError, "ends with the machine"),
            (lambda: vm.disks["own"].snapshot(tmp_path / "x"), StateError, "ends with the machine"),
        ):
            with pytest.raises(kinds, match=message):
                await call()  # type: ignore[misc]
        assert (tmp_path / "there").read_bytes() == b"mine" and not (tmp_path / "x").exists()
        job = vm.disks["data"].start_mirror(tmp_path / "m", follow=True)
    assert job.state == "cancelled" and not (tmp_path / "m").exists()


async def test_the_command(linux: Any, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run))

    async def cli(*arguments: str, status: int = 0) -> tuple[str, str]:
        done = await asyncio.to_thread(command, run, "block", *arguments, cwd=tmp_path)
        assert done.returncode == status, (arguments, done.stdout, done.stderr)
        assert status == 0 or done.stderr.count("\n") == 1
        return done.stdout, done.stderr

    async with vmm.run("linux", name="web", disks=[Disk(path=base, id="data")], **OPTIONS) as vm:
        await begin(vm)
        await cli("snapshot", "web", "vdb", "top.qcow2")
        (listed,) = [disk for disk in json.loads((await cli("ls", "web", "--json"))[0]) if disk["id"] == "data"]
        assert listed["chain"] == [str(tmp_path / "top.qcow2"), str(base)] and listed["job"] is None
        assert "data is " in (await cli("commit", "web", "data"))[1]
        await cli("snapshot", "web", "data", "--internal", "then")
        await cli("snapshot", "web", "data", "--delete", "then")
        await cli("snapshot", "web", "data", status=2)
        await cli("resize", "web", "data", "+8M")
        assert await text(vm, "cat /sys/block/vdb/size") == str((SIZE + 8 * MIB) // 512)
        await cli("mirror", "web", "data", "m.raw", "--format", "raw", "--follow")
        ((job,),) = [[disk["job"] for disk in vm.attached() if disk["id"] == "data"]]
        assert (job["kind"], job["state"]) == ("mirror", "ready")
        assert "data" in (await cli("ls", "web"))[0]
        assert "is under way" in (await cli("commit", "web", "data", status=2))[1]
        await cli("cancel", "web", "data")
        await cli("mirror", "web", "data", "m.raw", "--format", "raw", "--follow")
        assert str(tmp_path / "m.raw") in (await cli("finish", "web", "data"))[1]
        assert "no job" in (await cli("cancel", "web", "disk0", status=2))[1]
        # Somebody else reads the file below: the commit is refused, as what was asked for cannot be.
        await cli("snapshot", "web", "data", "again.qcow2")
        with open_chain(tmp_path / "m.raw", format="raw", read_only=True):
            assert "m.raw: is used by others" in (await cli("commit", "web", "data", status=2))[1]
        await cli("commit", "web", "data")
        assert "nope" in (await cli("commit", "web", "nope", status=2))[1]
        await text(vm, "echo >/stop; until [ -e /stopped ]; do sleep 0.02; done")
        assert await text(vm, "cat /bad 2>/dev/null; echo none") == "none"
    assert os.path.getsize(tmp_path / "m.raw") == SIZE + 8 * MIB
