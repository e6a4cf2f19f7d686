"""A reboot in place finds the same machine: what the host gave it stays."""

from __future__ import annotations

from typing import Any

import vmm
from vmm.events import Rebooted


async def test_disk_address_and_network_outlive_a_reboot(linux: Any) -> None:
    """The private copy of a snapshot disk, the card's address, the process behind the user network."""
    async with vmm.run("linux", reboot=True) as vm:
        async def look() -> tuple[str, str, str]:
            mac = await vm.exec("cat", "/sys/class/net/eth0/address", timeout=60)
            boot = await vm.exec("cat", "/proc/sys/kernel/random/boot_id", timeout=60)
            kept = await vm.exec("sh", "-c", "cat /kept 2>/dev/null || echo none", timeout=60)
            return mac.text, boot.text, kept.text

        mac, first, kept = await look()
        assert kept == "none"
        card = vm.device("net0")
        events = vm.events()
        await vm.exec("sh", "-c", "echo survived >/kept; sync; (sleep 0.2; reboot -f) >/dev/null 2>&1 &", timeout=60)
        async for event in events:
            if isinstance(event, Rebooted):
                break
        again, second, kept = await look()
        assert (again, kept) == (mac, "survived") and second != first
        assert vm.device("net0") is card
