"""The host's KVM gives up many of a guest's instructions: the software core executes them, and the machine says so."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest

import vmm
from tests.support.assemble import assemble
from tests.support.patience import PATIENCE
from vmm.machine.finishwatch import FinishWatch

pytestmark = pytest.mark.kvm
CODE = 0x100000
DEVICE = 0xC000_0000
"""Nothing is there, so that an access leaves KVM, whose emulator knows no x87 instruction."""
PROGRAM = f"fninit; mov edx, {DEVICE:#x}; again: fild dword ptr [rdx]; fstp st(0); jmp again"


async def listed(name: str) -> dict[str, object]:
    """What `vmm ps --json` says of a machine."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from cli.main import main; main()", "ps", "--json", stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    (found,) = [machine for machine in json.loads(output) if machine["name"] == name]
    return dict(found)


async def test_the_machine_says_how_many_and_names_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, above a limit: here any number a second, for how many a host manages depends on what else it does."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    defaults = FinishWatch.__init__.__kwdefaults__
    assert defaults["limit"] == 500
    monkeypatch.setitem(defaults, "limit", 0)
    path = tmp_path / "program.bin"
    path.write_bytes(assemble(PROGRAM, CODE, 64))
    flat = {"path": path, "load": CODE, "entry": CODE, "mode": "long"}
    async with vmm.VirtualMachine(flat=flat, core="kvm", platform="bare", memory="4M", name="slow") as machine:
        machine.resume()
        events = machine.events()
        async with asyncio.timeout(60 * PATIENCE):
            said = await anext(event.text async for event in events if isinstance(event, vmm.Warned))
        found = re.fullmatch(
            r"the host's KVM gave up \d+ instructions in a second, (\d+) in all, and the software core executed them, "
            r"slowly; one is ((?:[0-9a-f]{2} ?)+); without KVM: --core soft",
            said,
        )
        assert found, said
        assert found[2].startswith(("db 02", "db e3", "dd d8"))
        counted = int(found[1])
        async with asyncio.timeout(60 * PATIENCE):
            while machine.stats()["finished"] <= counted:
                await asyncio.sleep(0.01)
        row = await listed("slow")
        assert isinstance(row["finished"], int)
        assert row["finished"] > counted
