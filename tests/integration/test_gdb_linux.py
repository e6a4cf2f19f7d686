"""GDB on a running Debian kernel, by the commands that a user types: symbols, breakpoints, registers, traces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import vmm
from images.builder import Built
from tests.support.gdbclient import DEADLINE_S, require_gdb
from tests.support.patience import PATIENCE
from vmm.debug.symbols import read_symbols

pytestmark = pytest.mark.debian

SCRIPT = """\
info threads
break do_sys_openat2
continue
echo \\n--opened--\\n
bt 3
x/s $rsi
stepi
p $rip
delete
watch *(unsigned long *)&jiffies_64
continue
echo \\n--ticked--\\n
bt 1
delete
break native_irq_return_iret
continue
echo \\n--returns--\\n
x/i $rip
p/x *(unsigned long *)$rsp
stepi
p/x $rip
stepi
stepi
thread 2
p $cs
thread 1
detach
"""


async def command(*words: str) -> str:
    """`vmm WORDS`, whose exit status is 0: its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from cli.main import main; main()", *words,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(3 * DEADLINE_S):
            output, errors = await process.communicate()
    except BaseException:
        process.kill()
        await process.communicate()
        raise
    assert process.returncode == 0, (output + errors).decode("utf-8", "replace")
    return output.decode("utf-8", "replace") + errors.decode("utf-8", "replace")


@contextlib.asynccontextmanager
async def busy(machine: vmm.VirtualMachine) -> AsyncIterator[None]:
    """Programs start and end in the guest all the time."""

    async def work() -> None:
        while True:
            await machine.exec("cat", "/etc/hostname")

    working = asyncio.create_task(work(), name="work")
    try:
        yield
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


@pytest.fixture
async def debian(
    linux: Built, stock_core: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[vmm.VirtualMachine]:
    """Debian on two vCPUs, named "debian", up."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    async with vmm.run("linux", core=stock_core, cpus=2, name="debian") as machine:
        async with asyncio.timeout(120 * PATIENCE):
            await machine.exec("true")
        yield machine


async def test_gdb_with_the_kernels_symbols(debian: vmm.VirtualMachine, tmp_path: Path) -> None:
    require_gdb()
    if debian.core == "kvm" and "QEMU TCG" in Path("/proc/cpuinfo").read_text():
        pytest.skip("QEMU's emulation of SVM has no breakpoints: see test_gdb.py")
    script = tmp_path / "commands"
    script.write_text(SCRIPT)
    async with busy(debian):
        output = await command("gdb", "debian", "-x", str(script))
    start, opened = output.split("--opened--")
    opened, ticked = opened.split("--ticked--")
    ticked, returns = ticked.split("--returns--")
    assert '"vCPU 0"' in start
    assert '"vCPU 1"' in start
    assert "in do_sys_openat2 ()" in start
    assert "__x64_sys_openat" in opened
    assert '"' in opened  # the name of a file
    assert "<do_sys_openat2+" in opened
    assert "Old value" in opened
    assert "tick_do_update_jiffies64" in ticked
    assert "iretq" in returns
    values = dict(re.findall(r"\$(\d) = (0x[0-9a-f]+)$", returns, re.MULTILINE))
    assert values["2"] == values["3"]  # where the interrupt returns to is where the step went
    assert "$4 = 16" in returns  # the kernel's CS
    assert "detached" in returns
    assert (await debian.exec("uname", "-s")).text == "Linux"
    assert debian.debugger is None


async def test_symbols_registers_and_a_trace(debian: vmm.VirtualMachine, tmp_path: Path) -> None:
    made = tmp_path / "kernel.sym"
    await command("symbols", "debian", "-o", str(made))
    symbols = {symbol.name: symbol for symbol in read_symbols(made)}
    assert symbols["do_sys_openat2"].code
    assert not symbols["jiffies_64"].code
    moved = tmp_path / "System.map"
    moved.write_text(
        "".join(
            f"{each.address - 0x2000000:016x} {'T' if each.code else 'D'} {each.name}\n" for each in symbols.values()
        )
    )
    again = tmp_path / "again.sym"
    await command("symbols", str(moved), "--of", "debian", "-o", str(again))
    assert {each.name: each.address for each in read_symbols(again)} == {
        name: symbol.address for name, symbol in symbols.items()
    }
    registers = json.loads(await command("registers", "debian", "--json"))
    assert [cpu["cpu"] for cpu in registers] == [0, 1]
    assert all(cpu["msrs"]["lstar"] == symbols["entry_SYSCALL_64"].address for cpu in registers)
    assert all(cpu["handlers"]["14"] == symbols["asm_exc_page_fault"].address for cpu in registers)
    assert all(cpu["lapic"]["enabled"] for cpu in registers)
    async with busy(debian):
        text = await command("trace", "debian", "--for", "0.2", "--symbols", str(moved))
    assert "mmio-write" in text
    assert "vCPU 1: " in text
    assert "entry_SYSCALL_64" in text or "asm_" in text or "native_safe_halt" in text
    assert (await debian.exec("uname", "-s")).text == "Linux"
