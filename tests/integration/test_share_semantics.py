"""What a share does beside what the host's own directory does, for two programs that run natively and in a guest.

SHARE_OPERATIONS sets the random operations of fsx in a guest; `make soak-share` takes many. A program in the guest may
take as long as it likes, if only it gets on: busy hosts are slow.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support import guestprograms
from vmm.config import Share
from vmm.guest.process import ExecResult, GuestStream

OPERATIONS = int(os.environ.get("SHARE_OPERATIONS", "1500"))
PATIENCE = 900
"""Seconds in which a program must get on; for the one that runs on the host, to its end."""
DIFFERENT = {
    "make/a character device": "EPERM",  # a share makes no device nodes
}
"""What a share does otherwise, by its guide (docs/shares.md)."""


@pytest.fixture(params=["none", "auto", "always"])
def cache(request: pytest.FixtureRequest) -> str:
    """Each of a share's ways to remember; only one in the short run."""
    if request.param != "auto" and OPERATIONS <= 1500:
        pytest.skip("SHARE_OPERATIONS above 1500 runs every cache mode")
    return str(request.param)


async def run(vm: vmm.VirtualMachine, *command: str, progress: bytes = rb".+") -> ExecResult:
    """Run a program in the guest to its end; TimeoutError when nothing that it writes and that matches `progress` has
    changed for PATIENCE seconds."""
    loop = asyncio.get_running_loop()
    async with await vm.start_process(*command) as process, asyncio.timeout(PATIENCE) as limit:

        async def read(stream: GuestStream) -> bytes:
            whole, last = bytearray(), b""
            async for part in stream:
                whole += part
                if (said := re.findall(progress, part)) and said[-1] != last:
                    last = said[-1]
                    limit.reschedule(loop.time() + PATIENCE)
            return bytes(whole)

        stdout, stderr = await asyncio.gather(read(process.stdout), read(process.stderr))
        return ExecResult(await process.wait(), stdout, stderr)


def machine(path: Path, cache: str) -> Any:
    share = Share.parse(f"{path}:/work,cache={cache}")
    return vmm.run("linux", core="soft", nets=[], memory="256M", shares=[share])


def lines(text: str) -> dict[str, str]:
    """Label to outcome; the program prints a label again for what it saw after a call."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        label, _, outcome = line.partition(": ")
        while label in found:
            label += "'"
        found[label] = outcome
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="owners and permissions are tried as root")
async def test_calls_do_what_they_do_on_the_host(linux: Any, tmp_path: Path, cache: str) -> None:
    program = guestprograms.static("posix")
    native, share = tmp_path / "native", tmp_path / "share"
    native.mkdir()
    (share / "files").mkdir(parents=True)
    shutil.copy(program, share / "posix")
    done = subprocess.run([program, native], capture_output=True, text=True, errors="surrogateescape", timeout=PATIENCE)
    assert not done.returncode
    async with machine(share, cache) as vm:
        result = await run(vm, "/work/posix", "/work/files")
        log = (await vm.exec("dmesg", check=True)).text
    assert not result.status, result.stderr
    wanted, found = lines(done.stdout), lines(result.stdout.decode(errors="surrogateescape"))
    assert len(wanted) > 5000
    assert {label: outcome for label, outcome in found.items() if wanted.get(label) != outcome} == DIFFERENT
    assert not set(wanted) - set(found)
    assert "WARN" not in log
    # The host sees the same tree as after the native run, but for the device.
    trees = [sorted(str(path.relative_to(top)) for path in top.rglob("*")) for top in (native, share / "files")]
    trees[0].remove("make/device")
    assert trees[0] == trees[1]


async def test_random_operations_beside_a_model_of_the_bytes(linux: Any, tmp_path: Path, cache: str) -> None:
    shutil.copy(guestprograms.static("fsx"), tmp_path / "fsx")
    seed = random.SystemRandom().randrange(1 << 32)
    async with machine(tmp_path, cache) as vm:
        result = await run(vm, "/work/fsx", "/work", str(OPERATIONS), str(seed))
        # Two processes with files of their own, beside each other.
        both = "mkdir one two; (/work/fsx one $0 $1 || echo failed) & /work/fsx two $0 $1$1 || echo failed; wait"
        many = await run(vm, "sh", "-c", f"cd /work; {both}", str(OPERATIONS // 4), str(seed))
    assert result.text == f"fsx: {OPERATIONS} operations", f"seed {seed}: {result.text}"
    assert many.text.splitlines() == [f"fsx: {OPERATIONS // 4} operations"] * 2, f"seed {seed}: {many.text}"


async def test_fio_verifies_what_it_wrote(linux: Any, tmp_path: Path, cache: str) -> None:
    """By system calls and by mappings; then again, by programs that open what is there anew."""
    job = f"--filename=/work/data --size={max(4, OPERATIONS // 1000)}M --verify=crc32c --verify_fatal=1 --randseed=7"
    told = "--eta=always --eta-newline=5s"
    async with machine(tmp_path, cache) as vm:
        fio = await guestprograms.install(vm, "fio")
        for engine, way in (("psync", "randwrite"), ("mmap", "randwrite"), ("psync", "write")):
            blocks = "--bs=4k" if engine == "mmap" else "--bs=4k-64k --bs_unaligned"
            command = f"{fio} --name={engine} --ioengine={engine} --rw={way} {blocks} {job} {told}"
            for more in ("", " --verify_only"):
                result = await run(vm, "sh", "-c", command + more, progress=rb"\d+\.\d+%")
                assert not result.status, f"{engine} {way}{more}: {result.text[-800:]} {result.stderr[-800:]!r}"
                assert "verify: bad" not in result.text
                await vm.exec("sh", "-c", "echo 3 >/proc/sys/vm/drop_caches", check=True)
