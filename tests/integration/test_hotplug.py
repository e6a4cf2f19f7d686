"""Disks and network cards that come to a running Debian guest and go: asked, refused, ignored, pulled, saved."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support.command import vmm as command
from tests.support.guestprograms import static
from tests.support.patience import PATIENCE
from vmm.config import Disk, Net, Share
from vmm.errors import ConfigError, HostError, StateError
from vmm.events import Attached, Detached, DetachRefused, Rebooted
from vmm.machine import layout
from vmm.pci.hotplug import EJECT_REQUEST, OST_EVENT, OST_STATUS

OPTIONS: dict[str, Any] = {"nets": [], "memory": "128M"}
MIB = 1 << 20


async def text(vm: vmm.VirtualMachine, script: str) -> str:
    result = await vm.exec("sh", "-c", script, timeout=60 * PATIENCE, check=True)
    return result.text


def image(folder: Path, name: str, size: int = 8 * MIB) -> Path:
    path = folder / name
    path.write_bytes(b"")
    os.truncate(path, size)
    return path


def descriptors() -> set[str]:
    """What this process has open under a name of its own."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue
    return {path for path in found if path.startswith("/")}


async def test_rounds_under_io(linux: Any, tmp_path: Path) -> None:
    """What is written to one disk while another comes and goes is what is read; the other's bytes reach its file, which
    is free afterwards. No BAR of a device that stays moves."""
    work, other = image(tmp_path, "work.img"), image(tmp_path, "other.img")
    async with vmm.run("linux", disks=[Disk(path=work)], **OPTIONS) as vm:
        bars = "cat /sys/bus/pci/devices/0000:00:0[1-4].0/resource"
        await text(vm, "dd if=/dev/urandom of=/ram bs=1M count=4 2>/dev/null")
        before = await text(vm, bars)
        await text(
            vm,
            "(while [ ! -e /stop ]; do dd if=/ram of=/dev/vdb bs=64k conv=fsync,notrunc 2>/dev/null || echo >/bad;"
            " done; echo >/stopped) >/dev/null 2>&1 &",
        )
        for turn in range(5):
            made = await vm.attach(Disk(path=other), timeout=60 * PATIENCE)
            assert made.driven and vm.block_devices()[made.id].backend is not None
            there = "while [ ! -b /dev/vdc ]; do sleep 0.01; done"
            await text(vm, f"{there}; printf {turn}{turn}{turn} | dd of=/dev/vdc conv=fsync 2>/dev/null")
            assert await text(vm, bars) == before
            assert await vm.detach(made.id, timeout=60 * PATIENCE) == "guest"
            assert other.read_bytes()[:3] == b"%d%d%d" % (turn, turn, turn) and str(other) not in descriptors()
            assert "vdc" not in await text(vm, "ls /sys/block")
        await text(vm, "echo >/stop; while [ ! -e /stopped ]; do sleep 0.02; done")
        assert await text(vm, "[ ! -e /bad ] && cmp -n 4194304 /ram /dev/vdb && echo same") == "same"


async def test_what_cannot_be_is_refused_and_leaves_nothing(linux: Any, tmp_path: Path) -> None:
    disk, other = image(tmp_path, "a.img"), image(tmp_path, "b.img")
    async with vmm.run("linux", **OPTIONS) as vm:
        await text(vm, "true")
        one, two = await asyncio.gather(vm.attach(Disk(path=disk)), vm.attach(Disk(path=other, id="data")))
        assert {one.id, two.id} == {"disk1", "data"} and one.slot != two.slot
        (tmp_path / "d").mkdir()
        os.mkfifo(tmp_path / "f")
        for part, message in (
            (Disk(path=disk), "is disk1 of this machine already"),
            (Disk(path=disk, readonly=True), "is disk1 of this machine already"),
            (Disk(path=tmp_path / "none"), "no such file"),
            (Disk(path=tmp_path / "d"), "is a directory"),
            (Disk(path=tmp_path / "f"), "is a pipe"),
            (Disk(path=image(tmp_path, "c.img"), transport="mmio"), "transport=mmio"),
            (Disk(path=image(tmp_path, "e.img"), id="data"), "'data' already"),
            (Disk(path=image(tmp_path, "e.img"), id="rng"), "'rng' already"),
            (Net(kind="tap", target="x", transport="mmio"), "transport=mmio"),
        ):
            with pytest.raises(ConfigError, match=message):
                await vm.attach(part)
        with pytest.raises((ConfigError, HostError), match="no-such-socket"):
            await vm.attach(Net(kind="unix", target=str(tmp_path / "no-such-socket")))
        for name, message in (("vsock", "stays as long"), ("nothing", "no such device")):
            with pytest.raises(ConfigError, match=message):
                await vm.detach(name)
        assert [device["id"] for device in vm.attached()] == ["disk0", "disk1", "data"] or [
            device["id"] for device in vm.attached()
        ] == ["disk0", "data", "disk1"]
        assert not {str(tmp_path / name) for name in ("c.img", "e.img")} & descriptors()
        async with vmm.run("linux", disks=[Disk(path=image(tmp_path, "g.img"))], **OPTIONS) as second:
            with pytest.raises(ConfigError, match="in use by another machine"):
                await second.attach(Disk(path=disk))
    assert str(disk) not in descriptors()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"append": "acpi=off"}, "acpi=off"), ({"platform": "bare"}, "platform bare has no PCI bus")],
)
async def test_machines_without_the_means_say_so(
    linux: Any, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    image_name = "hello" if "platform" in options else "linux"
    async with vmm.run(image_name, **({} if image_name == "hello" else OPTIONS), **options) as vm:
        if vm.outcome is None:
            with pytest.raises(StateError, match=message):
                await vm.attach(Disk(path=image(tmp_path, "a.img")))


async def test_31_slots_and_not_one_more(linux: Any, tmp_path: Path) -> None:
    async with vmm.run("linux", **OPTIONS) as vm:
        await text(vm, "true")
        free = 31 - 3
        for index in range(free):
            await vm.attach(Disk(path=image(tmp_path, f"{index}.img", MIB), id=f"d{index}"), timeout=0)
        with pytest.raises(ConfigError, match="no free slot"):
            await vm.attach(Disk(path=image(tmp_path, "more.img"), id="more"))
        assert str(tmp_path / "more.img") not in descriptors()
        count = f"until [ $(ls /sys/block | wc -l) = {free + 1} ]; do sleep 0.1; done; echo all"
        assert await text(vm, count) == "all"
        await vm.detach("d7", timeout=60 * PATIENCE)
        made = await vm.attach(Disk(path=tmp_path / "more.img", id="more"), timeout=60 * PATIENCE)
        assert made.driven


async def test_a_guest_that_refuses_and_one_that_is_silent(linux: Any, tmp_path: Path) -> None:
    """Without acpiphp Linux ignores the request, as a paused or hanging guest does; one whose _OST says busy refuses.
    The disk stays and works, until it is pulled."""
    disk = image(tmp_path, "a.img")
    async with vmm.run("linux", disks=[Disk(path=disk, id="data")], append="acpiphp.disable=1", **OPTIONS) as vm:
        await vm.copy_in(static("outl"), "/outl")
        events = vm.events()
        with pytest.raises(StateError, match="data: the guest does not give it up: no answer within 0.2 s; --force"):
            await vm.detach("data", timeout=0.2)
        assert await asyncio.wait_for(anext(events), 30) == DetachRefused("data", "no answer within 0.2 s")
        asking = asyncio.ensure_future(vm.detach("data", timeout=60 * PATIENCE))
        slot = next(device["slot"] for device in vm.attached() if device["id"] == "data")
        # What the DSDT's _OST(3, 0x81) writes.
        base, event = layout.PCI_HOTPLUG, slot << 16 | EJECT_REQUEST
        await text(vm, f"chmod +x /outl; /outl {base + OST_EVENT} {event} {base + OST_STATUS} 0x81")
        with pytest.raises(StateError, match="data: the guest does not give it up: the device is in use; --force"):
            await asking
        assert await asyncio.wait_for(anext(events), 30) == DetachRefused("data", "the device is in use")
        assert await text(vm, "echo kept | dd of=/dev/vdb conv=fsync 2>/dev/null; echo ok") == "ok"
        assert disk.read_bytes()[:4] == b"kept"
        await vm.pause()
        with pytest.raises(StateError, match="is paused"):
            await vm.detach("data")
        assert await vm.detach("data", force=True) == "force"
        vm.resume()
        assert str(disk) not in descriptors() and [device["id"] for device in vm.attached()] == ["disk0"]
        assert await text(vm, "echo alive") == "alive"
    async with vmm.run("linux", **OPTIONS) as vm:
        await text(vm, "echo 0 >/proc/sys/kernel/panic; true")
        await vm.attach(Disk(path=disk), timeout=60 * PATIENCE)
        await text(vm, "(sleep 0.2; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &")
        await vm.console.expect(rb"end Kernel panic", timeout=60 * PATIENCE)
        with pytest.raises(StateError, match="no answer within 0.2 s"):
            await vm.detach("disk1", timeout=0.2)


async def test_a_disk_that_is_pulled_under_io(linux: Any, tmp_path: Path) -> None:
    """Its file is free at once, the guest's requests fail, its kernel drops the disk without a complaint of its own."""
    disk = image(tmp_path, "a.img")
    async with vmm.run("linux", **OPTIONS) as vm:
        await text(vm, "true")
        await vm.attach(Disk(path=disk), timeout=60 * PATIENCE)
        await text(vm, "until [ -b /dev/vdb ]; do sleep 0.02; done")
        await text(
            vm,
            # By the descriptor: a name that is not there any more would become a file.
            "exec 3<>/dev/vdb; (while dd if=/dev/zero of=/proc/self/fd/3 bs=64k count=100 conv=fsync; do :; done;"
            " echo >/failed) >/dev/null 2>&1 & sleep 0.3",
        )
        events = vm.events()
        assert await vm.detach("disk1", force=True, timeout=0) == "force"
        assert str(disk) not in descriptors()
        assert await asyncio.wait_for(anext(events), 30) == Detached("disk1", "force")
        assert await text(vm, "while [ ! -e /failed ]; do sleep 0.02; done; ls /sys/block") == "vda"
        log = await text(vm, "dmesg")
        assert "cut here" not in log and "BUG" not in log
        made = await vm.attach(Disk(path=disk), timeout=60 * PATIENCE)
        assert made.driven


async def test_a_disk_whose_file_goes_away(linux: Any, tmp_path: Path) -> None:
    """Removed, the file is there until it is detached; cut short, the guest gets errors; both can go as others."""
    gone, short = image(tmp_path, "gone.img"), image(tmp_path, "short.img")
    async with vmm.run("linux", **OPTIONS) as vm:
        await text(vm, "true")
        first = await vm.attach(Disk(path=gone), timeout=60 * PATIENCE)
        second = await vm.attach(Disk(path=short, format="raw"), timeout=60 * PATIENCE)
        gone.unlink()
        os.truncate(short, MIB)
        write = "while [ ! -b /dev/vdb ]; do sleep 0.01; done; echo kept | dd of=/dev/vdb conv=fsync 2>/dev/null"
        assert await text(vm, f"{write}; echo 3 >/proc/sys/vm/drop_caches; head -c 4 /dev/vdb") == "kept"
        await text(vm, "! dd if=/dev/vdc bs=1M skip=4 count=1 of=/dev/null 2>/dev/null")
        for made in (first, second):
            assert await vm.detach(made.id, timeout=60 * PATIENCE) == "guest"
        with pytest.raises(ConfigError, match="no such file"):
            await vm.attach(Disk(path=gone))
        assert not {str(gone), f"{gone} (deleted)", str(short)} & descriptors()


async def test_slots_that_a_configuration_names(linux: Any, tmp_path: Path) -> None:
    disk = [Disk(path=image(tmp_path, "a.img"), id="data")]
    async with vmm.run("linux", disks=disk, slots=["data=9", "disk0=3"], **OPTIONS) as vm:
        assert await text(vm, "ls /sys/bus/pci/devices | tr '\n' ' '; ls /sys/block") == (
            "0000:00:00.0 0000:00:01.0 0000:00:02.0 0000:00:03.0 0000:00:09.0 vda\nvdb"
        )
    for slots, message in ((["nothing=4"], "has no device 'nothing'"), (["data=4", "disk0=4"], "given twice")):
        with pytest.raises(ConfigError, match=message):
            async with vmm.run("linux", disks=disk, slots=slots, **OPTIONS):
                pass


async def test_the_guest_gives_a_disk_up_by_itself(linux: Any, tmp_path: Path) -> None:
    disk = image(tmp_path, "a.img")
    async with vmm.run("linux", **OPTIONS) as vm:
        await text(vm, "true")
        made = await vm.attach(Disk(path=disk), timeout=60 * PATIENCE)
        events = vm.events()
        await text(vm, f"echo 0 >/sys/bus/pci/slots/{made.slot}/power")
        assert await asyncio.wait_for(anext(events), 30 * PATIENCE) == Detached(made.id, "guest")
        assert str(disk) not in descriptors()
        # What may not go stays, whatever the guest writes.
        rng = vm.present.slots[[slot.id for slot in vm.present.slots].index("rng")].device
        await text(vm, f"echo 0 >/sys/bus/pci/slots/{rng}/power")
        assert vm.device("rng") is not None


async def test_a_saved_machine_has_what_was_attached(linux: Any, tmp_path: Path) -> None:
    """Also if the slots have holes; and a reboot in place keeps what is there."""
    first, second = image(tmp_path, "a.img"), image(tmp_path, "b.img")
    boot = [Disk(path=image(tmp_path, "boot.img"), id="boot", snapshot=True)]
    async with vmm.run("linux", disks=boot, reboot=True, **OPTIONS) as vm:
        await text(vm, "true")
        await vm.attach(Disk(path=first, readonly=True, id="first"), timeout=60 * PATIENCE)
        await vm.attach(Disk(path=second, snapshot=True, id="second"), timeout=60 * PATIENCE)
        there = "until [ -b /dev/vdc ] && [ -b /dev/vdd ]; do sleep 0.02; done"
        await text(vm, f"{there}; echo mine | dd of=/dev/vdd conv=fsync 2>/dev/null")
        await vm.detach("boot", timeout=60 * PATIENCE)
        assert [disk.id for disk in vm.config.disks] == ["", "boot"]
        assert [disk.id for disk in vm.present.disks] == ["disk0", "first", "second"]
        slots = {slot.id: slot.device for slot in vm.present.slots}
        await vm.snapshot(tmp_path / "s")
        (copy,) = await vm.fork()
        assert {slot.id: slot.device for slot in copy.present.slots} == slots
        assert await text(copy, "ls /sys/block | tr '\n' ' '; head -c 4 /dev/vdd") == "vda vdc vdd mine"
        await copy.aclose()
        events = vm.events()
        await text(vm, "(sleep 0.2; reboot -f) >/dev/null 2>&1 &")
        async with asyncio.timeout(60 * PATIENCE):
            async for event in events:
                if isinstance(event, Rebooted):
                    break
        assert await text(vm, "ls /sys/block | tr '\n' ' '; head -c 4 /dev/vdc") == "vda vdb vdc mine"
        made = await vm.attach(Disk(path=tmp_path / "boot.img", id="boot"), timeout=60 * PATIENCE)
        assert made.driven
    async with vmm.restore(tmp_path / "s") as copy:
        assert {slot.id: slot.device for slot in copy.present.slots} == slots
        assert await text(copy, "ls /sys/block | tr '\n' ' '; head -c 4 /dev/vdd") == "vda vdc vdd mine"
        await copy.detach("first", timeout=60 * PATIENCE)
        made = await copy.attach(Disk(path=tmp_path / "boot.img", id="again"), timeout=60 * PATIENCE)
        assert made.driven


async def test_events_and_the_command(linux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = image(tmp_path, "a.img")
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run))

    async def cli(*arguments: str) -> tuple[int, str, str]:
        done = await asyncio.to_thread(command, run, *arguments, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    async with vmm.run("linux", name="web", **OPTIONS) as vm:
        await text(vm, "true")
        events = vm.events()
        status, out, said = await cli("attach", "web", "--disk", "a.img,id=data", "--timeout", "60")
        assert (status, out) == (0, "") and said.startswith("vmm: web: attached data in slot "), said
        assert "not taken" not in said
        seen = await asyncio.wait_for(anext(events), 30)
        assert isinstance(seen, Attached) and (seen.id, seen.kind) == ("data", "disk")
        status, out, _ = await cli("ps", "--json")
        (found,) = json.loads(out)
        (told,) = [device for device in found["devices"] if device["id"] == "data"]
        assert (told["path"], told["chain"], told["slot"]) == (str(disk), [str(disk)], seen.slot)
        status, out, said = await cli("attach", "web", "--disk", "a.img")
        assert status == 2 and said.count("\n") == 1 and "is data of this machine already" in said
        assert (await cli("attach", "web"))[0] == 2
        assert (await cli("attach", "none", "--disk", "a.img"))[0] == 2
        status, out, said = await cli("detach", "web", "data", "--timeout", "60", "--json")
        assert status == 0 and json.loads(out) == {"id": "data", "by": "guest"}
        assert await asyncio.wait_for(anext(events), 30) == Detached("data", "guest")
        status, out, said = await cli("detach", "web", "data")
        assert status == 2 and "there is no such device" in said


async def test_a_share_comes_is_mounted_and_goes(linux: Any, tmp_path: Path) -> None:
    """The guest's agent mounts and unmounts it; one that is in use stays, or is pulled."""
    (tmp_path / "from-host").write_text("1")
    long = 60 * PATIENCE
    async with vmm.run("linux", **OPTIONS) as vm:
        made = await vm.attach(Share(path=tmp_path, mount="/there/below"), timeout=long)
        assert made.driven and not made.note
        assert await text(vm, "cd /there/below && cat from-host && echo 2 >from-guest") == "1"
        assert (tmp_path / "from-guest").read_text() == "2\n"
        assert [device["kind"] for device in vm.attached()] == ["disk", "share"]
        assert [share.id for share in vm.present.shares] == [made.id] and not vm.config.shares
        with pytest.raises(ConfigError, match="already"):
            await vm.attach(Share(path=tmp_path, id=made.id))
        await text(vm, "sh -c 'cd /there/below; echo >/inside; exec sleep 10000' >/dev/null 2>&1 &")
        await text(vm, "until [ -e /inside ]; do sleep 0.02; done")
        with pytest.raises(StateError, match="busy"):
            await vm.detach(made.id, timeout=long)
        assert await text(vm, "cat /there/below/from-guest") == "2"
        assert await vm.detach(made.id, force=True, timeout=1) == "force"
        assert "virtiofs" not in await text(vm, "cat /proc/mounts") and str(tmp_path) not in descriptors()
        again = await vm.attach(Share(path=tmp_path, mount="/there", readonly=True), timeout=long)
        assert (await vm.exec("sh", "-c", "cat /there/from-host && ! echo 3 >/there/no", timeout=long)).status == 0
        assert await vm.detach(again.id, timeout=long) == "guest"
        assert "virtiofs" not in await text(vm, "cat /proc/mounts") and not vm.present.shares
        with pytest.raises(ConfigError, match="no directory|not a directory|there is no"):
            await vm.attach(Share(path=tmp_path / "from-host"))
