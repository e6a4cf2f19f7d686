"""`python -m tests.soak SECONDS`: both of Debian's kernels with 1, 2 and 4 vCPUs, each for that long; prints a table.

Status 0: every result was the host's, and no kernel log has a warning.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

import pytest

import vmm
from tests.soak.machine import Host, Result, initramfs, prepare, soak, vmlinux

KERNELS = ("linux-image-cloud-amd64", "linux-image-amd64")
CPUS = (1, 2, 4)


async def progress(result: Result) -> None:
    sys.stderr.write(f"\r  {result.rounds} rounds, {len(result.problems)} problems ")
    sys.stderr.flush()


async def run(arguments: argparse.Namespace, folder: Path) -> int:
    host = Host(folder, arguments.kib)
    prepare(folder)
    initrd = initramfs(folder)
    failed = 0
    for meta in arguments.kernels:
        for cpus in arguments.cpus:
            try:
                result = await soak(
                    vmlinux(meta, folder), initrd, host, cpus=cpus, seconds=arguments.seconds, kib=arguments.kib,
                    seed=arguments.seed, direct=arguments.direct, parallel=arguments.parallel,
                    progress=progress if sys.stderr.isatty() else None,
                )  # fmt: skip
            except (vmm.VmmError, TimeoutError) as error:
                result = Result(problems=[str(error)])
            verdict = "ok" if not result.problems else "FAILED"
            sys.stdout.write(
                f"{meta:<24} {cpus} vCPU: {verdict}, shell after {result.boot_seconds:.1f} s, {result.rounds} rounds "
                f"in {result.seconds:.0f} s, {result.lines} results equal to the host's, "
                f"{result.instructions / 1e9:.1f} G instructions\n"
            )
            for problem in result.problems[:40]:
                sys.stdout.write(f"  {problem}\n")
            sys.stdout.flush()
            failed += bool(result.problems)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("seconds", type=float, help="of rounds, for each kernel and number of vCPUs")
    parser.add_argument("--seed", type=int, help="of the first round (default: any)")
    parser.add_argument("--direct", choices=("auto", "on", "off"), default="off", help="as of vmm run")
    parser.add_argument("--parallel", choices=("auto", "on", "off"), default="auto", help="as of vmm run")
    parser.add_argument("--kib", type=int, default=512, help="of text that is compressed, sorted, hashed a round")
    parser.add_argument("--cpus", type=int, nargs="+", default=CPUS)
    parser.add_argument("--kernels", nargs="+", default=KERNELS, help="Debian's meta packages")
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(1, 1 << 30)
    sys.stdout.write(f"rounds from seed {arguments.seed}\n")
    with tempfile.TemporaryDirectory() as folder:
        try:
            return asyncio.run(run(arguments, Path(folder)))
        except pytest.skip.Exception as reason:
            sys.stdout.write(f"cannot run here: {reason}\n")
            return 1


if __name__ == "__main__":
    sys.exit(main())
