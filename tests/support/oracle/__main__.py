"""The long campaign: ``python -m tests.support.oracle [--seconds N] [--seed N]``."""

from __future__ import annotations

import argparse
import sys
import time

from tests.support.oracle import build, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.oracle")
    parser.add_argument("--seconds", type=float, default=600, help="how long to go on taking new seeds")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the first seed")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    compared = differences = 0
    program = build()
    seed = options.seed
    while time.monotonic() < deadline:
        for mode in ("64", "32"):
            for what in (("--per-slot", "20"), ("--programs", "50000")):
                arguments = ("--mode", mode, "--seed", str(seed), *what)
                result = run(program, "core", *arguments, timeout_s=900)
                compared += result.compared
                differences += result.differences
                if result.differences:
                    sys.stdout.write(f"oracle core {' '.join(arguments)}\n{result.report}")
        seed += 1
    sys.stdout.write(f"seeds {options.seed} to {seed - 1}: compared {compared} differences {differences}\n")
    return differences != 0


if __name__ == "__main__":
    sys.exit(main())
