"""Linux's own driver finds fw_cfg by ACPI and reads its items."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import vmm
from tests.support import debian

pytestmark = [pytest.mark.debian]

RAW = "/sys/firmware/qemu_fw_cfg/by_name"


async def test_linux_reads_the_items(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_bytes(bytes(range(251)) * 40)  # byte by byte, and from the start again for each page
    initrd = debian.initramfs(tmp_path, loaded=debian.modules("linux-image-cloud-amd64", "qemu_fw_cfg.ko"))
    config = vmm.Config(
        core="soft", kernel=debian.kernel(), initrd=initrd, append="do=shell",
        fw_cfg=(f"name=opt/org.example/own,file={own}", "name=opt/org.example/text,string=hello"),
    )  # fmt: skip
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        await machine.console.expect(rb"shell# ", timeout=120 * debian.PATIENCE)
        await machine.console.write(
            f"cd {RAW}; busybox=/bin/busybox; $busybox cat opt/org.example/text/raw; echo; $busybox ls etc/acpi etc; "
            "$busybox sha256sum opt/org.example/own/raw; echo DO''NE\n"
        )
        text = (await machine.console.expect(rb"(?s).*DONE", timeout=60 * debian.PATIENCE))[0].decode()
        machine.kill()
    assert "hello\r" in text
    assert {"e820", "table-loader", "rsdp", "tables"} <= set(text.split())
    assert hashlib.sha256(own.read_bytes()).hexdigest() in text
