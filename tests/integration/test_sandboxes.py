"""Sandboxes from Python: programs of a container image with limits whose ends are values, with and without a loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmm
from images import builder
from images.oci import find
from tests.support.oci import base, layout, need_container_kernel

pytestmark = pytest.mark.debian
SECONDS = 120


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    need_container_kernel()
    folder = tmp_path_factory.mktemp("sandbox")
    name = f"oci:{layout(folder / 'image', [base()], Env=['PATH=/bin', 'WHO=image'], Cmd=['/bin/echo', 'its own'])}"
    yield name
    find.remove(name)


@pytest.fixture(autouse=True)
def own_warm_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPVISOR_CACHE", str(builder.cache.cache_directory()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


async def test_programs_and_their_ends(image: str) -> None:
    async with vmm.sandbox(image, core="soft", memory="128M") as box:
        assert (await box.run()).text == "its own"
        script = "echo $WHO $MORE; cat; echo oops >&2; exit 3"
        result = await box.run("sh", "-c", script, input=b"in", env={"MORE": "x"})
        assert (result.end, result.status, result.stdout, result.stderr) == ("exited", 3, b"image x\nin", b"oops\n")
        assert not result.ok and 0 < result.seconds < SECONDS and result.memory_peak > 100_000
        with pytest.raises(vmm.GuestError, match="status 3: oops"):
            result.check()
        busy = await box.run("sh", "-c", "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done", timeout=SECONDS)
        assert busy.check().cpu_seconds > 0.01
        assert (await box.run("sh", "-c", "kill -9 $$")).status == 137
        assert (await box.run("none-such")).status == 127


async def test_limits_are_values(image: str) -> None:
    async with vmm.sandbox(image, core="soft", lifetime=SECONDS) as box:
        late = await box.run("sh", "-c", "echo begun; sleep 100", timeout=1)
        assert (late.end, late.status, late.stdout) == ("timeout", -1, b"begun\n")
        much = await box.run("busybox", "yes", output_limit=100_000, timeout=SECONDS)
        assert (much.end, len(much.stdout)) == ("output", 100_000)
        exact = await box.run("echo", "12345", output_limit=6)
        assert (exact.end, exact.text) == ("exited", "12345")
        gone = await box.run("sh", "-c", "kill -s INT 1; sleep 100", user="root", timeout=SECONDS)
        assert gone.end == "machine" and "machine" in gone.detail
        assert (await box.run("true")).end == "machine"


async def test_there_is_no_network_unless_it_is_allowed(image: str) -> None:
    async with vmm.sandbox(image, core="soft") as box:
        assert (await box.run("sh", "-c", "ls /sys/class/net")).text == "lo"
    with pytest.raises(vmm.ConfigError, match="nothing is in it"):
        async with vmm.sandbox(image, allow=[]):
            pass


async def test_a_directory_is_shared(image: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "in").write_text("from the host")
    async with vmm.sandbox(image, core="soft", share=f"{tmp_path / 'work'}:/mnt/work") as box:
        assert (await box.run("sh", "-c", "cat /mnt/work/in; echo back >/mnt/work/out")).check().text == "from the host"
    assert (tmp_path / "work" / "out").read_text() == "back\n"


async def test_several_at_once_are_apart(image: str) -> None:
    async def one(number: int) -> str:
        async with vmm.sandbox(image, core="soft", memory="128M") as box:
            await box.run("sh", "-c", f"echo {number} >/tmp/x")
            return (await box.run("cat", "/tmp/x")).text

    assert await one(0) == "0"  # so that the others start warm
    assert await asyncio.gather(*map(one, range(1, 6))) == [str(number) for number in range(1, 6)]


async def test_without_a_loop_of_ones_own(image: str) -> None:
    """The loop that runs here must not matter, as in a notebook."""
    with vmm.SyncSandbox(image, core="soft") as box:
        assert box.run("echo", os.fspath("hello")).check().text == "hello"
    with pytest.raises(vmm.StateError, match="with block"):
        box.run("true")
    with pytest.raises(vmm.ConfigError):
        with vmm.SyncSandbox("oci:/none/such"):
            pass


async def test_without_a_block(image: str) -> None:
    """In the cells of a notebook: started in one, used in others, and closed once or twice."""
    box = vmm.SyncSandbox(image, core="soft")
    box.close()
    assert box.start() is box
    try:
        with pytest.raises(vmm.StateError, match="started before"):
            box.start()
        assert box.run("echo", "one").text == "one"
        assert box.run("sleep", "100", timeout=0.1).end == "timeout"
    finally:
        box.close()
    box.close()
    with pytest.raises(vmm.StateError, match="not running"):
        box.run("true")


async def test_what_a_run_takes_is_limited_and_told(image: str) -> None:
    """Limits of the guest end a run with everything it started, as a value; what it used is told, also then."""
    async with vmm.sandbox(image, core="soft", memory="192M", lifetime=SECONDS) as box:
        fork = "i=0; while [ $i -lt 9 ]; do sleep 90 & i=$((i+1)); done; wait"
        many = await box.run("sh", "-c", fork, processes=4, timeout=SECONDS)
        assert (many.end, many.status, many.detail) == ("processes", -1, "more processes than allowed")
        wide = await box.run("sh", "-c", "busybox tail -c 60000000 /dev/zero", memory=12 << 20, timeout=SECONDS)
        assert (wide.end, wide.ok) == ("memory", False)
        with pytest.raises(vmm.GuestError, match="more memory than allowed"):
            wide.check()
        full = await box.run("busybox", "dd", "if=/dev/zero", "of=/full", "bs=64k", "count=500", disk=2 << 20)
        assert full.end == "disk" and full.disk_used > 2 << 20
        left = await box.run("sh", "-c", "busybox rm /full; busybox ps | busybox grep -c '[s]leep 90'")
        assert (left.end, left.text) == ("exited", "0"), "what a run over its limit had started goes with it"
        within = await box.run(
            "sh", "-c", "echo 123456789 >/small; (i=0; while [ $i -lt 9000 ]; do i=$((i+1)); done); echo ok",
            memory=64 << 20, disk=1 << 20, processes=10,
        )  # fmt: skip
        assert within.check().text == "ok" and within.cpu_seconds > 0.005
        assert within.disk_used <= 1 << 20 and (within.network_sent, within.network_received) == (0, 0)
        late = await box.run("sh", "-c", "while :; do :; done", timeout=1)
        assert late.end == "timeout" and late.cpu_seconds > 0.01, "what it used is known although it was ended"
        with pytest.raises(vmm.ConfigError, match="processes: -1 is no limit"):
            await box.run("true", processes=-1)
