"""The neighbour's SSH sessions in tests.soak.migration: `python neighbour.py COMMAND…` with an ssh command without the
program that it is to run. One session echoes lines, and the longest wait for one is told; in another the guest's shell
computes a checksum of each. Every line is compared. It prints "echoes sums longest-wait" again and again, and ends with
a message when something is wrong or a session ends.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time

SUM = 'while read -r line; do printf %s "$line" | sha256sum; done'
sums = 0


def session(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*sys.argv[1:], program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


def ask(shell: subprocess.Popen[bytes], line: bytes) -> bytes:
    """A line in, a line out."""
    assert shell.stdin is not None and shell.stdout is not None
    shell.stdin.write(line + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        part = shell.stdout.read(65536)
        if not part:
            raise OSError(f"the SSH session ended with status {shell.wait()}")
        answer += part
    return answer[:-1]


def compute() -> None:
    """Checksums by the guest's shell."""
    global sums
    chance = random.Random(2)
    try:
        shell = session(SUM)
        while True:
            line = chance.randbytes(100).hex().encode()
            if ask(shell, line).split()[0] != hashlib.sha256(line).hexdigest().encode():
                raise OSError(f"a wrong checksum of {line!r}")
            sums += 1
            time.sleep(0.3)
    except (OSError, IndexError) as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(1)


def main() -> None:
    threading.Thread(target=compute, daemon=True).start()
    chance, echoes, worst, last = random.Random(1), 0, 0.0, 0.0
    shell = session("cat")
    while True:
        line = chance.randbytes(100).hex().encode()
        began = time.monotonic()
        if ask(shell, line) != line:
            sys.exit(f"wrong bytes in line {echoes}")
        echoes += 1
        worst = max(worst, time.monotonic() - began)
        if time.monotonic() - last > 0.2:
            last = time.monotonic()
            sys.stdout.write(f"{echoes} {sums} {worst}\n")
            sys.stdout.flush()
            worst = 0.0
        time.sleep(0.02)


if __name__ == "__main__":
    main()
