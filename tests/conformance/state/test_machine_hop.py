"""Whole machines in the middle of something, and the parts of them that are no devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vmm
from tests.integration.conftest import built_linux
from tests.support.hops import moves
from vmm.console.hub import ConsoleHub, ConsoleRingState
from vmm.guest.frames import STDIN, frame
from vmm.machine.chance import Chance
from vmm.machine.peripheral import Peripheral, Seat
from vmm.state.payload import decode, encode, parse


def moved(old: Any, new: Any) -> Any:
    new.restore(decode(new, "it", json.loads(json.dumps(encode(old.save())))))
    return new


@moves("chance")
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=12))
def test_chance_goes_on_where_it_was(counts: list[int]) -> None:
    """Also in the middle of a block of its stream."""
    whole, parts = Chance(9, "devices"), Chance(9, "devices")
    for count in counts:
        parts = moved(parts, Chance(9, "devices"))
        assert parts(count) == whole(count)


@moves("console-ring")
@settings(max_examples=20, deadline=None)
@given(st.lists(st.binary(max_size=40000), max_size=8))
async def test_a_console_with_half_a_line(pieces: list[bytes]) -> None:
    """Who attaches later sees the same end of the output, whether or not it was saved in between."""
    whole, hopping = ConsoleHub(), ConsoleHub()
    for piece in (b"half a li", *pieces, b"ne\n"):
        whole.write(piece)
        hopping.write(piece)
        state = json.loads(json.dumps(encode(hopping.save())))
        hopping = ConsoleHub()
        hopping.restore(parse(ConsoleRingState, "console", state))
        assert hopping.total == whole.total
        assert hopping.output(hopping.replay_position, 1 << 20) == whole.output(whole.replay_position, 1 << 20)


@moves("stateless")
def test_a_device_with_nothing_to_save() -> None:
    from tests.support.pc import Pc
    from vmm.machine.peripheral import Stateless

    class Lamp(Peripheral):
        address, size, state_type = 0x500, 1, Stateless

        def read(self, offset: int, size: int) -> int:
            return 7

    pc = Pc()
    moved(Seat(Pc(), "lamp", Lamp()), Seat(pc, "lamp", Lamp()))
    assert pc.inp(0x500) == 7


@moves("machine", "machine.agent", "virtio")
@pytest.mark.debian
@pytest.mark.slow
async def test_a_guest_that_writes_to_a_disk_while_its_agent_is_being_told_something(tmp_path: Path) -> None:
    """A disk over virtio-mmio, a program that runs, a message to the agent of which half has arrived. The disk's writes
    go on until they are stopped; what depended on the host that is gone has ended; the agent answers."""
    built_linux()
    sectors = 49152
    (tmp_path / "data").write_bytes(bytes(sectors * 512))
    disk = vmm.Disk(path=tmp_path / "data", id="data", transport="mmio", snapshot=True)
    write = (
        f"d=/dev/$(basename $(dirname $(grep -lx {sectors} /sys/block/*/size))); [ -b $d ] || exit 3; echo $d >/where;"
        "(i=0; while [ ! -e /stop ]; do printf %512d $i | dd of=$d bs=512 seek=$i oflag=direct conv=notrunc "
        "2>/dev/null || exit; i=$((i + 1)); echo $i >/at.new; mv /at.new /at; done; echo >/done) "
        ">/dev/null 2>&1 </dev/null &"
    )
    async with vmm.run("linux", memory="128M", nets=[], disks=[disk]) as vm:
        await vm.exec("sh", "-c", write, check=True, timeout=120)
        _, writer = await vm.agent.dial()
        writer.write(frame(STDIN, b"x" * 1000)[:400])
        await writer.drain()
        process = await vm.start_process("cat")
        await process.write(b"half a line")
        begun = await vm.exec("sh", "-c", "until [ -s /at ]; do sleep 0.05; done; cat /at", check=True, timeout=120)
        await vm.snapshot(tmp_path / "saved")
        writer.close()
        await process.aclose()
    async with vmm.restore(tmp_path / "saved") as copy:
        go_on = (
            "at=$(cat /at); until [ $(cat /at) -gt $at ]; do sleep 0.05; done; echo >/stop;"
            "until [ -e /done ]; do sleep 0.05; done; echo $at $(cat /at)"
        )
        resumed, blocks = map(int, (await copy.exec("sh", "-c", go_on, check=True, timeout=300)).text.split())
        assert int(begun.text) <= resumed < blocks
        found = await copy.exec("sh", "-c", f"dd if=$(cat /where) bs=512 count={blocks} 2>/dev/null", timeout=120)
        assert found.stdout == b"".join(b"%512d" % number for number in range(blocks))
        gone = await copy.exec("sh", "-c", "while pidof cat >/dev/null; do sleep 0.1; done; echo gone", timeout=120)
        assert gone.text == "gone"
