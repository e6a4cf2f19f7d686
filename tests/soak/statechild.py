"""One process of tests.soak.state: a machine that begins, or goes on, and is saved; killed by its parent in the end.

`python -m tests.soak.statechild JSON` with the fields of `Orders`. It prints `Facts` as a line of JSON once the
snapshot is there, and lives on with the machine. It is also the host's end of the guest's TCP transfers
(state_guest/peer.c).
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import struct
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import vmm
from vmm.state.taking import SnapshotProgress

IMAGE = "debian-work"
GUEST = Path(__file__).parent / "state_guest"
COUNTERS = ("files", "fio", "compile", "loopback", "tcp")
"""What the guest counts, each in a file of /work."""
EXEC_SECONDS = 900.0
"""Deadline of a program in the guest, far beyond what it takes on a busy host."""
BOOT_SECONDS = 900.0
"""Deadline of the first program, which waits for Debian to boot, on the software core of a busy host perhaps."""
LARGEST = 1 << 20
"""Bytes of one transfer."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What the process is to do. `source`: a snapshot to go on from, "" to boot; `base`: one that the new one is an
    increment on, or ""; `freeze`: the file system is at rest in the new snapshot; `things`: the folder of what the
    guest works with."""

    source: str
    target: str
    base: str
    seconds: float
    port: int
    things: str
    core: str
    cpus: int
    freeze: bool


@dataclass(slots=True)
class Facts:
    """What it saw."""

    before: dict[str, list[int]] = field(default_factory=dict)
    """The guest's counters as the machine began."""
    after: dict[str, list[int]] = field(default_factory=dict)
    wrong: str = ""
    log: str = ""
    received: int = 0
    """Bytes of the guest that the host compared."""
    stood_still_ms: float = 0.0


class HostEnd:
    """The server of TCP transfers: compares what the guest sends, and sends it back."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob
        self.received = 0
        self.wrong = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection. One that is lost is none of the faults that this looks for."""
        try:
            while True:
                offset, length = struct.unpack("<II", await reader.readexactly(8))
                if length > LARGEST or offset + length > len(self._blob):
                    self.wrong = f"the host received a header of {offset}+{length}"
                    return
                part = self._blob[offset : offset + length]
                if await reader.readexactly(length) != part:
                    self.wrong = f"the host received wrong bytes for {offset}+{length}"
                    return
                self.received += length
                writer.write(part)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def _archive(things: Path) -> bytes:
    """What the guest gets as /work."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("workers.sh", "peer.c"):
            tar.add(GUEST / name, name)
        for name in ("blob", "expected"):
            tar.add(things / name, name)
        for source in sorted((GUEST.parent / "guest").glob("*.[ch]")):
            tar.add(source, f"src/{source.name}")
    return out.getvalue()


async def _text(vm: vmm.VirtualMachine, script: str) -> str:
    return (await vm.exec("sh", "-c", script, timeout=EXEC_SECONDS)).text


COUNT = f"cd /work; for n in {' '.join(COUNTERS)}; do echo $n $(cat count.$n 2>/dev/null); done"


def _counters(printed: str) -> dict[str, list[int]]:
    lines = [line.split() for line in printed.splitlines()]
    return {name: [int(value) for value in values] or [0] for name, *values in lines}


async def _begin(vm: vmm.VirtualMachine, orders: Orders) -> None:
    archive = _archive(Path(orders.things))
    await vm.exec("sh", "-c", "mkdir -p /work && tar -xf - -C /work", input=archive, timeout=BOOT_SECONDS, check=True)
    # passt leads what the guest sends to its gateway to the host's loopback interface.
    await vm.exec(
        "sh", "-c",
        "until gateway=$(ip route show default | sed -n 's/.* via \\([0-9.]*\\) .*/\\1/p' | head -n 1); "
        'test -n "$gateway"; do sleep 0.1; done; '
        f"cd /work && setsid bash workers.sh $gateway {orders.port} >workers.log 2>&1 &",
        timeout=EXEC_SECONDS, check=True,
    )  # fmt: skip


async def main(orders: Orders) -> None:
    """Begin or go on, work, save, print; then work on until killed."""
    end = HostEnd((Path(orders.things) / "blob").read_bytes())
    await asyncio.start_server(end.serve, "127.0.0.1", orders.port)
    if orders.source:
        manager = vmm.restore(orders.source, core=orders.core)
    else:
        manager = vmm.run(IMAGE, nets=["user"], memory="320M", cpus=orders.cpus, core=orders.core)
    async with manager as vm:
        if not orders.source:
            await _begin(vm, orders)
        facts = Facts(before=_counters(await _text(vm, COUNT)))
        await asyncio.sleep(orders.seconds)
        told = await _text(vm, f"{COUNT}; echo ---; cat wrong 2>/dev/null; echo ---; dmesg")
        counts, facts.wrong, facts.log = told.split("---\n", 2)
        facts.after = _counters(counts)
        if orders.freeze:
            await vm.exec("sh", "-c", "sync; fsfreeze -f /", timeout=EXEC_SECONDS, check=True)
        progress = SnapshotProgress()
        await vm.snapshot(orders.target, base=Path(orders.base) if orders.base else None, progress=progress)
        facts.stood_still_ms = progress.stood_still_ns / 1e6
        facts.received = end.received
        facts.wrong += end.wrong
        sys.stdout.write(json.dumps(dataclasses.asdict(facts)) + "\n")
        sys.stdout.flush()
        await asyncio.sleep(1000)


if __name__ == "__main__":
    asyncio.run(main(Orders(**json.loads(sys.argv[1]))))
