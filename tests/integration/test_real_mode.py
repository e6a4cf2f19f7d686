"""What a program in real mode finds that a BIOS would have left: vectors without services, and the reset vector."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import vmm
from cpu import select

EXIT_WITH_CARRY = bytes.fromhex("0f92c0 e6f4 f4")  # setc al; out 0xf4, al; hlt


@pytest.fixture(params=["soft", pytest.param("kvm", marks=pytest.mark.kvm)])
def core(request: pytest.FixtureRequest) -> Any:
    found = select.probe(request.param)
    if not found.available:
        pytest.skip(f"{request.param}: {found.reason}")
    return request.param


async def run(folder: Path, core: Any, code: bytes, cpus: int = 1) -> vmm.Outcome:
    image = folder / "code"
    image.write_bytes(code)
    async with vmm.VirtualMachine(core=core, flat=str(image), memory="2M", timeout=60, cpus=cpus) as machine:
        return await machine.run()


async def test_a_bios_call_returns_with_carry(tmp_path: Path, core: Any) -> None:
    code = bytes.fromhex("f8 b820e8 cd15") + EXIT_WITH_CARRY  # clc; mov ax, 0xe820; int 0x15
    assert (await run(tmp_path, core, code)).code == 1


async def test_an_interrupt_without_a_service_returns(tmp_path: Path, core: Any) -> None:
    code = bytes.fromhex("f8 cd70 cd21") + EXIT_WITH_CARRY  # clc; int 0x70; int 0x21
    assert (await run(tmp_path, core, code)).code == 0


async def test_a_jump_to_the_reset_vector_resets(tmp_path: Path, core: Any) -> None:
    outcome = await run(tmp_path, core, bytes.fromhex("ea f0ff 00f0"))  # jmp f000:fff0
    assert outcome.reason is vmm.Reason.RESET


async def test_port_92_resets(tmp_path: Path, core: Any) -> None:
    outcome = await run(tmp_path, core, bytes.fromhex("e492 0c01 e692 f4"))  # in al, 0x92; or al, 1; out 0x92, al; hlt
    assert outcome.reason is vmm.Reason.RESET


@pytest.mark.parametrize("cpus", [1, 2])
async def test_halted_with_interrupts_off_is_an_end(tmp_path: Path, core: Any, cpus: int) -> None:
    outcome = await run(tmp_path, core, bytes.fromhex("fa f4 ebfd"), cpus)  # cli; hlt; jmp to the hlt
    assert (outcome.reason, outcome.status) == (vmm.Reason.HALTED, 0)


@pytest.mark.kvm
async def test_halted_with_interrupts_on_is_none(tmp_path: Path) -> None:
    """KVM is asked now and then whether all vCPUs are halted for good; one that an interrupt can wake is not."""
    found = select.probe("kvm")
    if not found.available:
        pytest.skip(found.reason)
    image = tmp_path / "code"
    image.write_bytes(bytes.fromhex("fb f4 ebfd"))  # sti; hlt; jmp to the hlt
    async with vmm.VirtualMachine(core="kvm", flat=str(image), memory="2M") as machine:
        machine.resume()
        async with asyncio.timeout(60):
            while machine.stats()["exit.interrupted"] < 2:
                await asyncio.sleep(0.01)
        assert machine.state is vmm.State.RUNNING
        machine.kill()
