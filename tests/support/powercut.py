"""Power cuts, simulated: what a process did to a file is recorded (writelog.c) and replayed up to some moment, from
there in any order that a disk may have chosen.

What a barrier (fdatasync) followed is on the disk. Of what came after the last barrier any part may be, sector by
sector, and later writes of a sector only over earlier ones or without them.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WRITE, BARRIER, PUNCH, ZERO, TRUNCATE, MARK = range(1, 7)
SECTOR = 512
ROOT = Path(__file__).parents[2]

WORKLOAD = """
import ctypes, random, struct, sys
from virtio.images.chain import open_chain
mark = ctypes.CDLL(None).lv_mark
mark.argtypes = [ctypes.c_uint64]
path, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
source = random.Random(seed)
chain = open_chain(path, format="qcow2", cache_bytes=source.choice((1 << 12, 32 << 20)))
image, sectors = chain.image, chain.size // 512
with open(path + ".ops", "wb") as ops:
    for number in range(1, count + 1):
        first, length = source.randrange(sectors), source.choice((1, 1, 8, 8, 64, 200))
        length = min(length, sectors - first)
        kind = source.choice("wwwwwzzdf")
        if kind == "d":
            length = min(length * 8, sectors - first)
        ops.write(struct.pack("<cIII", kind.encode(), number, first, length))
        ops.flush()
        mark(2 * number)
        if kind == "w":
            image.write(first * 512, struct.pack("<Q", number) * (64 * length))
        elif kind == "z":
            image.zero(first * 512, length * 512, source.random() < 0.5)
        elif kind == "d":
            image.discard(first * 512, length * 512)
        else:
            image.flush()
        mark(2 * number + 1)
chain.close()
"""


@dataclass(frozen=True)
class Call:
    """One recorded call."""

    kind: int
    offset: int
    length: int
    data: bytes


def library(folder: Path) -> Path:
    """The recording library, compiled."""
    made = folder / "writelog.so"
    source = ROOT / "tests/support/writelog.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", made, source, "-ldl", "-pthread"], check=True)
    return made


def record(library: Path, image: Path, program: str, *arguments: str | Path) -> list[Call]:
    """Run a program in Python that uses an image; what it did to the file."""
    log = image.with_suffix(".log")
    log.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "WRITELOG_FILE": f"/{image.name}",
        "WRITELOG_OUT": str(log),
    }
    subprocess.run([sys.executable, "-c", program, image, *arguments], check=True, env=environment, cwd=ROOT)
    calls: list[Call] = []
    with open(log, "rb") as file:
        while head := file.read(32):
            kind, offset, length, _ = struct.unpack("<4Q", head)
            calls.append(Call(kind, offset, length, file.read(length) if kind == WRITE else b""))
    return calls


def parts(call: Call) -> Iterator[tuple[int, bytes | None]]:
    """(offset, bytes) of what a disk does as one: sectors; None: a hole is punched."""
    for at in range(0, call.length, SECTOR):
        step = SECTOR - (call.offset + at) % SECTOR if at == 0 and call.offset % SECTOR else SECTOR
        if call.kind == WRITE:
            yield call.offset + at, call.data[at : at + step]
        else:
            yield call.offset + at, None


def apply(disk: bytearray, call: Call, source: random.Random | None, share: float = 1.0) -> None:
    """Do a call to an image in memory; with `source` only a share of its sectors."""
    if call.kind == TRUNCATE:
        if source is None or source.random() < share:
            del disk[call.offset :]
            disk.extend(bytes(call.offset - len(disk)))
        return
    if call.kind not in (WRITE, PUNCH, ZERO):
        return
    if source is None:
        end = call.offset + call.length
        if call.kind == WRITE:
            disk.extend(bytes(max(0, end - len(disk))))
            disk[call.offset : end] = call.data
        else:
            end = min(end, len(disk))
            disk[call.offset : end] = bytes(max(0, end - call.offset))
        return
    for offset, data in parts(call):
        if source.random() >= share:
            continue
        if data is None:
            data = bytes(max(0, min(SECTOR, len(disk) - offset)))
        disk.extend(bytes(max(0, offset + len(data) - len(disk))))
        disk[offset : offset + len(data)] = data


def crash(before: bytes, calls: list[Call], at: int, source: random.Random) -> tuple[bytearray, int, int]:
    """(the file after a power cut before call `at`, last mark that a barrier followed, last mark)."""
    last = max((index for index in range(at) if calls[index].kind == BARRIER), default=-1)
    disk = bytearray(before)
    for call in calls[: last + 1]:
        apply(disk, call, None)
    share = source.choice((0.0, 0.3, 0.7, 1.0, 1.0))
    for call in calls[last + 1 : at]:
        if source.random() < 0.8:
            apply(disk, call, source if share < 1 else None, share)
    marks = [call.offset for call in calls[:at] if call.kind == MARK]
    return disk, max((mark for mark in marks if mark & 1), default=0), max(marks, default=0)


@dataclass(frozen=True)
class Operation:
    kind: str
    number: int
    first: int
    length: int


def operations(image: Path) -> list[Operation]:
    """What the workload did."""
    data = Path(f"{image}.ops").read_bytes()
    return [Operation(kind.decode(), *rest) for kind, *rest in struct.iter_unpack("<cIII", data)]


def allowed(operations: list[Operation], ended: int, begun: int, sectors: int) -> list[set[int]]:
    """The numbers that each sector may hold, 0 being zeroes: what it had at the last flush that ended, and what came
    after. `ended`, `begun`: numbers of operations."""
    flushed = max((item.number for item in operations if item.kind == "f" and item.number <= ended), default=0)
    held: list[set[int]] = [{0} for _ in range(sectors)]
    for item in operations:
        if item.number > begun:
            break
        if item.kind == "f":
            continue
        for sector in range(item.first, item.first + item.length):
            value = item.number if item.kind == "w" else 0
            if item.number <= flushed and item.kind != "d":
                held[sector] = {value}
            else:  # a discard that was not taken leaves what was there
                held[sector].add(value)
    return held
