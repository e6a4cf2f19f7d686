"""Fuzz the software core for a while: `python3 -m tests.fuzz.campaign SECONDS [SEED]`.

Every case runs twice: interpreted under ASan and UBSan, and as host code between guard pages. Neither may crash, hang
or grow, and what both leave behind (registers, FPU, RAM, instruction count) must be equal. A failing case is named by
its seed: `build/soft-sanitize/soft_fuzz --case SEED`.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import soft_programs

BATCH = 100
MEMORY_KIB = 1 << 20
"""No process may take more. A quarter of it is what ASan holds back of freed memory."""
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def cases(program: Path, seed: int, count: int) -> list[str]:
    """The lines "seed hash" of `count` cases; exits with the program's own report if it fails."""
    run = subprocess.run(
        [program, "--list", str(seed), str(count)], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    lines = run.stdout.splitlines()
    if run.returncode:
        sys.exit(f"{program} failed with {run.returncode} in case {seed + len(lines)} or near:\n{run.stderr[-6000:]}")
    return lines


def main() -> int:
    """Run batches until the time is over; 0: nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", type=int, nargs="?", default=random.SystemRandom().randrange(1 << 40))
    arguments = parser.parse_args()
    sanitized = soft_programs.build("soft_fuzz", sanitize=True)
    hot = soft_programs.build("soft_fuzz", hot=True)
    end, seed, done = time.monotonic() + arguments.seconds, arguments.seed, 0
    with ThreadPoolExecutor(2) as pool:
        while time.monotonic() < end:
            one, other = pool.map(cases, (sanitized, hot), (seed, seed), (BATCH, BATCH))
            for left, right in zip(one, other, strict=True):
                if left != right:
                    sys.exit(f"case {left.split()[0]}: interpreted and translated differ ({left} / {right})")
            if (peak := resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) > MEMORY_KIB:
                sys.exit(f"cases {seed} to {seed + BATCH} took {peak >> 10} MiB")
            seed += BATCH
            done += BATCH
    sys.stdout.write(f"{done} cases from seed {arguments.seed}: nothing found\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
