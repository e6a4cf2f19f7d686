"""Where a stock kernel's exits go, from start to a shell: by class, by reason, and the synchronous ones by device.

Debian's cloud kernel on the software core, once with nothing but the platform's own devices and once as the image
`linux` (virtio disk, network, vsock, entropy). With an available KVM that runs stock kernels the same on it.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import vmm
from cpu.contract import Capability
from cpu.select import probe
from tests.support import debian
from vmm.machine.bus import Bus

GOAL = 5000
SHELL = rb"BusyBox v.* built-in shell"


class Counted:
    """Counts the accesses that reach a bus, which are the synchronous exits, by the range that answers."""

    def __enter__(self) -> Counter[str]:
        self.counter: Counter[str] = Counter()
        self._read, self._write = Bus.read, Bus.write
        counter, plain_read, plain_write = self.counter, Bus.read, Bus.write

        def name(bus: Bus, address: int) -> str:
            found = bus.find(address)
            return found.name if found is not None else f"nobody ({bus.name})"

        def read(bus: Bus, address: int, size: int) -> int:
            counter[f"{name(bus, address)}, read"] += 1
            return plain_read(bus, address, size)

        def write(bus: Bus, address: int, size: int, value: int) -> None:
            counter[f"{name(bus, address)}, write"] += 1
            plain_write(bus, address, size, value)

        Bus.read, Bus.write = read, write  # type: ignore[method-assign]
        return counter

    def __exit__(self, *_: object) -> None:
        Bus.read, Bus.write = self._read, self._write  # type: ignore[method-assign]


async def plain(core: str, folder: Path) -> dict[str, int]:
    config = vmm.Config(
        core=core, kernel=debian.kernel(), initrd=debian.initramfs(folder), append="do=shell"  # type: ignore[arg-type]
    )
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        await machine.console.expect(SHELL, timeout=120)
        counters = machine.stats()
        machine.kill()
    return counters


async def image(core: str) -> dict[str, int]:
    async with vmm.run("linux", core=core) as machine:
        await machine.console.expect(SHELL, timeout=120)
        counters = machine.stats()
        machine.kill()
    return counters


def rows() -> Iterator[Mapping[str, object]]:
    with tempfile.TemporaryDirectory() as name:
        for core in ("soft", "kvm"):
            found = probe(core)
            if Capability.STOCK_KERNELS not in found.capabilities:
                yield {"name": f"exits of a boot, {core}", "value": None, "unit": "", "note": found.reason}
                continue
            for guest in ("cloud kernel", "image linux"):
                with Counted() as devices:
                    counters = asyncio.run(plain(core, Path(name)) if guest == "cloud kernel" else image(core))
                synchronous = sum(count for key, count in counters.items() if key.startswith("exit."))
                where = f"{guest}, {core}"
                yield {"name": f"{where}: synchronous exits", "value": synchronous, "unit": "", "goal": GOAL}
                for key, count in sorted(counters.items()):
                    if count and (key.startswith("exit.") or key in ("posted", "shadow", "ioeventfd", "sleeps")):
                        yield {"name": f"{where}: {key}", "value": count, "unit": ""}
                for key, count in devices.most_common(8):
                    yield {"name": f"{where}: {key}", "value": count, "unit": ""}
