"""Debugging a machine: the stub as a client of GDB's protocol sees it, on both cores, and GDB itself on tiny guests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import vmm
from cpu.contract import CpuidEntry
from cpu.kvm.probe import has_hardware
from cpu.model import has_avx, table
from images import guests
from tests.support.assemble import assemble
from tests.support.cores import open_core
from tests.support.gdbclient import DEADLINE_S, GdbClient, require_gdb, run_gdb
from tests.support.patience import PATIENCE
from vmm.management import debugging

CORES = ["soft", pytest.param("kvm", marks=pytest.mark.kvm)]
CODE, COUNTER, COPY, LEAVE = 0x100000, 0x180000, 0x180008, 0x180010
PROGRAM = f"""
    mov rbx, {COUNTER}
again:
    inc qword ptr [rbx]
    mov rax, [rbx]
    mov [rbx + 8], rax
    cmp byte ptr [rbx + 16], 0
    je again
    mov al, 3
    out 0xf4, al
    hlt
"""
AGAIN, COPIES, COMPARES = CODE + 7, CODE + 7 + 6, CODE + 7 + 10
"""Where the loop begins, where it stores the copy, and the instruction behind that."""


@contextlib.asynccontextmanager
async def counting(core: str, folder: Path, **options: object) -> AsyncIterator[vmm.VirtualMachine]:
    """A machine that counts at COUNTER and copies the count to COPY until LEAVE is set; then it exits with 3."""
    path = folder / "counting.bin"
    path.write_bytes(assemble(PROGRAM, CODE, 64))
    flat = {"path": path, "load": CODE, "entry": CODE, "mode": "long"}
    config = {"flat": flat, "core": core, "platform": "bare", "memory": "4M", **options}
    async with vmm.VirtualMachine(**config) as machine:
        yield machine


def number(text: str) -> int:
    """A register's or memory's value."""
    return int.from_bytes(bytes.fromhex(text), "little")


def reason(stop: str) -> dict[str, str]:
    """The pairs of a stop reply."""
    assert stop[0] == "T", stop
    return dict(pair.partition(":")[::2] for pair in stop[3:].split(";") if pair)


async def count(machine: vmm.VirtualMachine) -> int:
    return int.from_bytes(machine.machine.memory.read(COUNTER, 8), "little")


async def runs(machine: vmm.VirtualMachine) -> bool:
    """The count goes up, before a deadline."""
    before = await count(machine)
    async with asyncio.timeout(DEADLINE_S):
        while await count(machine) <= before:
            await asyncio.sleep(0.001)
    return True


async def stands(machine: vmm.VirtualMachine, before: int) -> bool:
    """The count stays what it was, for a while."""
    await asyncio.sleep(0.05)
    return await count(machine) == before


async def leave(machine: vmm.VirtualMachine) -> None:
    """Let the guest end; it does."""
    machine.machine.memory.write(LEAVE, b"\1")
    async with asyncio.timeout(DEADLINE_S):
        assert (await machine.wait()).status == 7


STEPS_IN_PLACE = os.environ.get("LOOPVISOR_RIG") == "bochs"
"""Bochs 2.7 enters the guest with a pending single step after an EPT violation: a step that touches a page for the
first time stops where it was, one that touches none moves. Against SDM vol. 3, Saving Non-Register State: "The pending
debug exceptions field is saved as clear for all VM exits except the following", of which an EPT violation is none
unless MOV SS blocks debug exceptions. KVM's own trace shows it: kvm_exit EPT_VIOLATION rip A, kvm_entry rip A,
kvm_exit EXCEPTION_NMI rip A with BS."""


async def step(gdb: GdbClient) -> dict[str, str]:
    """A single step's stop reply."""
    before = await gdb.ask("p10")
    stop = reason(await gdb.ask("vCont;s:1"))
    for _ in range(4 if STEPS_IN_PLACE else 0):  # code, data and both page tables' pages, at most
        if stop["10"] == before:
            stop = reason(await gdb.ask("vCont;s:1"))
    return stop


NO_BREAKPOINTS = "QEMU's emulation of SVM loads DR7 without its breakpoints, and INT3 is not intercepted as #BP"
"""Against APM vol. 2, 15.5.1 and 15.12.4."""


def emulated_svm() -> bool:
    """The processor is QEMU's emulation."""
    return "QEMU TCG" in Path("/proc/cpuinfo").read_text()


# The machine's life.


@pytest.mark.parametrize("core", CORES)
async def test_it_waits_for_a_debugger_steps_and_runs_on_when_it_leaves(core: str, tmp_path: Path) -> None:
    async with counting(core, tmp_path, gdb="0") as machine:
        machine.resume()
        assert await stands(machine, 0)
        server = await machine_server(machine)
        async with GdbClient(server) as gdb:
            assert reason(await gdb.ask("?"))["thread"] == "1"
            assert number(await gdb.ask("p10")) == CODE
            for at in (AGAIN, AGAIN + 3, COPIES, COMPARES):
                assert (await step(gdb))["10"] == at.to_bytes(8, "little").hex()
            assert await count(machine) == 1
            assert await gdb.ask("D") == "OK"
        assert await runs(machine)
        await leave(machine)


async def machine_server(machine: vmm.VirtualMachine) -> str:
    """Where the stub of a machine's configuration listens."""
    (server,) = [each for each in machine._closers if hasattr(each, "target")]
    return str(server.target)


@pytest.mark.parametrize("core", CORES)
async def test_a_breakpoint_stops_each_time_and_is_not_in_memory(core: str, tmp_path: Path) -> None:
    if core == "kvm" and emulated_svm():
        pytest.skip(NO_BREAKPOINTS)
    async with counting(core, tmp_path) as machine, await machine.gdb() as server:
        machine.resume()
        assert await runs(machine)
        code = machine.machine.memory.read(CODE, 64)
        async with GdbClient(server.target) as gdb:
            for kind, word in (("0", "swbreak"), ("1", "hwbreak")):
                assert await gdb.ask(f"Z{kind},{COPIES:x},1") == "OK"
                seen = []
                for _ in range(3):
                    stop = reason(await gdb.ask("vCont;c"))
                    assert word in stop
                    assert number(stop["10"]) == COPIES
                    seen.append(number(await gdb.ask("p0")))
                    assert await gdb.ask(f"m{CODE:x},40") == code.hex()
                    assert await gdb.ask(f"z{kind},{COPIES:x},1") == "OK"
                    assert number((await step(gdb))["10"]) == COMPARES
                    assert await gdb.ask(f"Z{kind},{COPIES:x},1") == "OK"
                assert seen == [seen[0], seen[0] + 1, seen[0] + 2]
                assert await gdb.ask(f"z{kind},{COPIES:x},1") == "OK"
        assert await runs(machine)
        assert machine.machine.memory.read(CODE, 64) == code
        await leave(machine)


@pytest.mark.parametrize("core", CORES)
async def test_watched_ranges(core: str, tmp_path: Path) -> None:
    if core == "kvm" and not has_hardware():
        pytest.skip("this host's KVM interprets supervisor code: its debug registers watch nothing")
    if core == "kvm" and emulated_svm():
        pytest.skip(NO_BREAKPOINTS)
    async with counting(core, tmp_path) as machine, await machine.gdb() as server:
        machine.resume()
        async with GdbClient(server.target) as gdb:
            for kind, name in (("2", "watch"), ("4", "awatch")):
                assert await gdb.ask(f"Z{kind},{COPY:x},8") == "OK"
                for _ in range(3):
                    stop = reason(await gdb.ask("vCont;c"))
                    assert int(stop[name], 16) == COPY
                    assert number(stop["10"]) == COMPARES
                    assert number(await gdb.ask(f"m{COPY:x},8")) == number(await gdb.ask("p0"))
                assert await gdb.ask(f"z{kind},{COPY:x},8") == "OK"
            assert await gdb.ask("D") == "OK"
        await leave(machine)


async def test_the_software_core_watches_reads_and_ranges_of_any_size(tmp_path: Path) -> None:
    async with counting("soft", tmp_path) as machine, await machine.gdb() as server:
        machine.resume()
        async with GdbClient(server.target) as gdb:
            assert await gdb.ask(f"Z3,{COPY:x},8") == "OK"  # never read
            assert await gdb.ask(f"Z3,{LEAVE - 0:x},4000") == "OK"
            stop = reason(await gdb.ask("vCont;c"))
            assert int(stop["rwatch"], 16) == LEAVE
            assert number(stop["10"]) == COMPARES + 4


@pytest.mark.parametrize("core", CORES)
async def test_an_interrupt_stops_it_and_registers_and_memory_can_be_changed(core: str, tmp_path: Path) -> None:
    async with counting(core, tmp_path) as machine, await machine.gdb() as server:
        machine.resume()
        async with GdbClient(server.target) as gdb:
            gdb.send(b"vCont;c")
            assert await runs(machine)
            gdb.writer.write(b"\x03")
            assert (await gdb.receive()).startswith(b"T02thread:1;")
            assert await stands(machine, await count(machine))
            assert await gdb.ask(f"M{COUNTER:x},8:{(1 << 40).to_bytes(8, 'little').hex()}") == "OK"
            assert await gdb.ask(b"X%x,2:\x01\x02" % (COPY + 4)) == "OK"
            assert await gdb.ask(f"m{COPY + 4:x},2") == "0102"
            assert await gdb.ask(f"P10={AGAIN.to_bytes(8, 'little').hex()}") == "OK"
            everything = await gdb.ask("g")
            assert await gdb.ask(f"G{everything}") == "OK"
            assert await gdb.ask("g") == everything
            assert await step(gdb)
            assert number(await gdb.ask(f"m{COUNTER:x},8")) == (1 << 40) + 1
            assert await gdb.ask(f"m{1 << 45:x},8") == "E0e"
            assert await gdb.ask(f"M{1 << 45:x},1:00") == "E0e"
            assert await gdb.ask(f"m{0x400000 - 4:x},8") == await gdb.ask(f"m{0x400000 - 4:x},4")  # RAM ends there
        await leave(machine)


async def test_physical_memory_and_monitor_commands(tmp_path: Path) -> None:
    async with counting("soft", tmp_path) as machine, await machine.gdb() as server:
        machine.resume()
        async with GdbClient(server.target) as gdb:
            code = (await gdb.ask(f"m{CODE:x},10"))
            assert await gdb.ask("Qqemu.PhyMemMode:1") == "OK"
            assert await gdb.ask("qqemu.PhyMemMode") == "1"
            assert await gdb.ask(f"m{CODE:x},10") == code
            assert await gdb.ask("Qqemu.PhyMemMode:0") == "OK"
            assert f"{CODE:016x}: {bytes.fromhex(code).hex(' ')}" in await gdb.monitor(f"physical {CODE:#x} 16")
            assert await gdb.monitor(f"translate {CODE:#x}") == f"{CODE:#x}\n"
            assert "not mapped" in await gdb.monitor("translate 0x7fffffffffff")
            text = await gdb.monitor("registers")
            assert "64-bit mode" in text
            assert "cr3" in text
            assert "physical ADDRESS" in await gdb.monitor("help")
            assert "number" in await gdb.monitor("physical x")
            assert "no vCPU 7" in await gdb.monitor("registers 7")
            assert "the last exits" in await gdb.monitor("exits 0")


async def test_time_stands_still_with_the_virtual_clock(tmp_path: Path) -> None:
    async with counting("soft", tmp_path, clock="virtual") as machine, await machine.gdb() as server:
        machine.resume()
        async with GdbClient(server.target) as gdb:
            await gdb.ask("?")
            before = machine.machine.vm.now_ns()
            await asyncio.sleep(0.02)
            assert machine.machine.vm.now_ns() == before
            assert await step(gdb)
            assert machine.machine.vm.now_ns() - before in (0, 1, 2)
        await leave(machine)


@pytest.mark.parametrize("core", CORES)
async def test_reset_keeps_the_debugger_and_its_breakpoints(core: str, tmp_path: Path) -> None:
    if core == "kvm" and emulated_svm():
        pytest.skip(NO_BREAKPOINTS)
    async with counting(core, tmp_path) as machine, await machine.gdb() as server:
        machine.resume()
        assert await runs(machine)
        async with GdbClient(server.target) as gdb:
            assert await gdb.ask(f"Z0,{CODE:x},1") == "OK"  # executed once in a boot
            gdb.send(b"vCont;c")
            assert await runs(machine)
            machine.reset()
            stop = reason((await gdb.receive()).decode())
            assert number(stop["10"]) == CODE
            assert "started again" in gdb.output
            await gdb.monitor("reset")
            assert number(reason(await gdb.ask("vCont;c"))["10"]) == CODE
            assert await count(machine) == 0


async def test_the_end_is_told(tmp_path: Path) -> None:
    async with counting("soft", tmp_path) as machine, await machine.gdb() as server:
        machine.resume()
        async with GdbClient(server.target) as gdb:
            machine.machine.memory.write(LEAVE, b"\1")
            assert await gdb.ask("vCont;c") == "W07"
        async with asyncio.timeout(DEADLINE_S):
            assert (await machine.wait()).status == 7
    async with counting("soft", tmp_path) as machine, await machine.gdb() as server:
        machine.resume()
        async with GdbClient(server.target) as gdb:
            gdb.send(b"k")
            async with asyncio.timeout(DEADLINE_S):
                assert (await machine.wait()).status == 137


async def test_stop_goes_before_a_debugger_that_holds_the_machine(tmp_path: Path) -> None:
    async with counting("soft", tmp_path) as machine, await machine.gdb() as server:
        machine.resume()
        async with GdbClient(server.target) as gdb:
            await gdb.ask("?")
            outcome = await machine.stop(timeout=5)
            assert "power button" in outcome.detail
            with pytest.raises((EOFError, OSError)):
                await gdb.receive()
                await gdb.receive()


async def test_a_snapshot_and_a_copy_of_a_machine_that_is_debugged(tmp_path: Path) -> None:
    async with counting("soft", tmp_path) as machine, await machine.gdb() as server:
        machine.resume()
        async with GdbClient(server.target) as gdb:
            assert await gdb.ask(f"Z0,{COPIES:x},1") == "OK"
            assert await gdb.ask("vCont;c")
            (copy,) = await machine.fork(1)
            assert await runs(copy)  # the breakpoint is not the copy's
            await machine.snapshot(tmp_path / "saved")
            assert await stands(machine, await count(machine))
            assert number((await step(gdb))["10"]) == COMPARES
            await leave(copy)


# Clients.


async def test_one_debugger_at_a_time_and_a_lost_one_lets_it_run(tmp_path: Path) -> None:
    async with counting("soft", tmp_path) as machine, await machine.gdb(f"unix:{tmp_path}/gdb") as server:
        assert (tmp_path / "gdb").stat().st_mode & 0o777 == 0o600
        machine.resume()
        async with GdbClient(server.target) as gdb:
            await gdb.ask("?")
            async with GdbClient(server.target) as second:
                with pytest.raises((EOFError, OSError)):
                    await second.ask("?")
            assert await gdb.ask(f"Z1,{COPIES:x},1") == "OK"
            gdb.send(b"vCont;c")
            gdb.writer.transport.abort()  # in the middle of it
        assert await runs(machine)
        async with GdbClient(server.target) as gdb:
            assert (await gdb.ask("?")).startswith("T02")
        assert await runs(machine)
        await leave(machine)
    assert not (tmp_path / "gdb").exists()


async def test_garbage_harms_only_who_sends_it(tmp_path: Path) -> None:
    async with counting("soft", tmp_path, gdb="0") as machine:
        machine.resume()
        target = await machine_server(machine)
        async with GdbClient(target) as nobody:  # what scans ports
            nobody.writer.write(b"GET / HTTP/1.1\r\n\r\n")
        async with GdbClient(target) as endless:
            endless.writer.write(b"$" + b"0" * 100_000)
            with pytest.raises((EOFError, OSError)):
                await endless.receive()
        assert await stands(machine, 0)
        async with GdbClient(target) as gdb:
            for packet in (
                "m", "m,", "mzz,1", "m0", "M0,4:00", "G00", "P999=0", "p-1", "Hg99", "Hx1", "vCont;q", "vCont;s:77",
                "vCont;", "Z2,0,0", "Z2,0,ffffffff", "Z1", "Z2,ffffffffffffffff,8", "T99",
                "qXfer:features:read:target.xml:zz,1",
                "qXfer:threads:write::0,1", "qRcmd,zz", "c1z", "qXfer:features:read:other.xml:0,100", "P0=00",
            ):  # fmt: skip
                answer = await gdb.ask(packet)
                assert answer == "" or answer.startswith("E"), (packet, answer)
            assert await gdb.ask("unknown") == ""
            assert await gdb.ask(b"\xff\xfe") in ("", "E16")
            for at in range(1100):
                answer = await gdb.ask(f"Z1,{at:x},1")
            assert answer == "E1c"
            assert number(await gdb.ask("p10")) == CODE
            assert len(await gdb.ask("m0,ffffffff")) < 0x8000
        assert await runs(machine)
        await leave(machine)


async def test_a_wrong_address_or_architecture_is_named(tmp_path: Path) -> None:
    async with counting("soft", tmp_path) as machine:
        with pytest.raises(vmm.ConfigError, match="no address"):
            await machine.gdb("nonsense")
        with pytest.raises(vmm.ConfigError, match="x86-64, i386"):
            await machine.gdb(architecture="arm")
        server = await machine.gdb()
        with pytest.raises(vmm.HostError, match="in use"):
            await machine.gdb(server.address)


# Registers and traces.


@pytest.mark.parametrize("core", CORES)
async def test_registers_and_traces_of_a_machine_that_runs(core: str, tmp_path: Path) -> None:
    async with counting(core, tmp_path) as machine:
        machine.resume()
        assert await runs(machine)
        (cpu,) = (await debugging.registers(machine, {}))["cpus"]
        assert json.loads(json.dumps(cpu)) == cpu
        assert cpu["mode"] == "64-bit mode"
        assert CODE <= cpu["pc"] <= COMPARES + 8
        assert cpu["general"]["rbx"] == COUNTER
        with pytest.raises(vmm.ConfigError, match="no vCPU 5"):
            await debugging.registers(machine, {"cpu": 5})
        (cpu,) = (await debugging.trace(machine, {"seconds": 0.1}))["cpus"]
        found = {each["address"] for each in cpu.get("trace", cpu.get("samples"))}
        assert found
        assert all(CODE <= address <= COMPARES + 8 for address in found)
        assert await runs(machine)
        assert "trace" not in (await debugging.trace(machine, {}))["cpus"][0]
        await leave(machine)


@pytest.mark.parametrize("core", CORES)
async def test_the_last_exits_are_kept(core: str) -> None:
    async with vmm.run("echo", core=core) as machine:
        await machine.console.expect(rb"ends\n", timeout=30 * PATIENCE)
        (cpu,) = (await debugging.trace(machine, {}))["cpus"]
        written = bytes(
            each["value"]
            for each in cpu["exits"]
            for _ in range(each["times"])
            if each["kind"] == "port-out" and each["address"] == 0x3F8
        )
        assert written.decode() == "echo: type, Ctrl-D ends\n"
        assert all(each["ago_ns"] < 600e9 for each in cpu["exits"])


# GDB itself.


@pytest.mark.parametrize("core", CORES)
async def test_gdb_follows_a_driver_through_its_interrupt(core: str) -> None:
    require_gdb()
    if core == "kvm" and emulated_svm():
        pytest.skip(NO_BREAKPOINTS)
    symbols = Path(guests.__file__).parent / "echo.bin"
    async with vmm.run("echo", core=core) as machine, await machine.gdb() as server:
        await machine.console.expect(rb"ends\n", timeout=30 * PATIENCE)

        async def type_when_it_waits() -> None:
            async with asyncio.timeout(DEADLINE_S):
                while machine.debugger is None or machine.debugger.stopped is not None:
                    await asyncio.sleep(0.01)
            await machine.console.write(b"h")

        typing = asyncio.create_task(type_when_it_waits(), name="typing")
        output = await run_gdb(
            server.target,
            ["break uart", "continue", "bt", "stepi", "stepi", "stepi", "stepi", "p/x $al", "x/i $rip", "info threads",
             "p $eflags", "p $cr0", "delete", "tbreak *main+143", "continue", "p $rip", "stepi", "p $rip", "detach"],
            str(symbols),
        )  # fmt: skip
        await typing
        assert "Breakpoint 1, 0x" in output, output
        assert "in main ()" in output
        assert "= 0x61" in output  # LSR: data ready, transmitter empty
        assert 'Thread 1 "vCPU 0"' in output
        assert "IF" not in output.split("p $eflags")[-1].split("]")[0].split("$2 = [")[-1]
        assert "<main+143>" in output  # back from the interrupt
        assert "<main+130>" in output
        assert "detached" in output
        await machine.console.write(b"hello\x04")
        async with asyncio.timeout(DEADLINE_S):
            await machine.wait()
        assert "hhello" in machine.console.text


VECTORS = f"""
    mov rax, cr4
    or eax, 0x40600
    mov cr4, rax
    xor ecx, ecx
    xor edx, edx
    mov eax, 7
    xsetbv
    mov rbx, {COUNTER}
    vpcmpeqd ymm0, ymm0, ymm0
    vpcmpeqd xmm15, xmm15, xmm15
again:
    vmovdqu [rbx], ymm0
    vmovdqu [rbx + 32], ymm15
    jmp again
"""
LOOP = CODE + 39
"""Where both registers are full, and what they hold goes to memory again and again."""


@pytest.mark.parametrize("core", CORES)
async def test_gdb_reads_and_sets_vectors_of_avx(core: str, tmp_path: Path) -> None:
    """GDB makes ymm0 of xmm0 and the upper half that the description has, and finds no ymm0 without AVX."""
    require_gdb()
    if not has_avx(table("max", _supported(core))):
        pytest.skip("this host, or its KVM, has no AVX")
    path = tmp_path / "vectors.bin"
    path.write_bytes(assemble(VECTORS, CODE, 64))
    flat = {"path": path, "load": CODE, "entry": CODE, "mode": "long"}
    config = {"flat": flat, "core": core, "platform": "bare", "memory": "4M", "cpu_model": "max"}
    async with vmm.VirtualMachine(**config) as machine, await machine.gdb() as server:
        machine.resume()
        output = await run_gdb(
            server.target,
            [f"hbreak *{LOOP:#x}", "continue", "info registers ymm0", "p/x $ymm15.v2_int128",
             "set var $ymm0.v8_int32[7] = 0x1234", "set var $ymm15.v4_int64[3] = 0x5678",
             "set var $ymm15.v4_int64[0] = 9", "p/x $ymm0.v8_int32", "stepi", "stepi", f"x/8gx {COUNTER:#x}"],
        )  # fmt: skip
        assert f"v8_int32 = {{{', '.join(8 * ['0xffffffff'])}}}" in output, output
        assert "{0xffffffffffffffffffffffffffffffff, 0x0}" in output, output
        assert f"= {{{', '.join([*7 * ['0xffffffff'], '0x1234'])}}}" in output, output
        words = [int(word, 16) for word in re.findall(r"\t0x([0-9a-f]+)", output)]
        ones = (1 << 64) - 1
        assert words == [ones, ones, ones, 0x1234 << 32 | 0xFFFF_FFFF, 9, ones, 0, 0x5678], output
    async with counting("soft", tmp_path) as machine, await machine.gdb() as server:
        assert "Invalid register `ymm0'" in await run_gdb(server.target, ["info registers ymm0"])


def _supported(core: str) -> list[CpuidEntry]:
    system = open_core(core)
    try:
        return system.supported_cpuid()
    finally:
        system.close()
