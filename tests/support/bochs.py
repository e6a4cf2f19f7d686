"""Bochs, an emulator of processors with everything that is in the manuals, VMX and debug registers included. Tests use
it as a second oracle beside QEMU's emulation, and `tests.rig.bochs` to have a KVM that stops at breakpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

SHARED = Path("/usr/share/bochs")
FIRMWARE, VIDEO = SHARED / "BIOS-bochs-latest", SHARED / "VGABIOS-lgpl-latest"
MISSING = "Bochs is missing; as root: apt-get install bochs bochsbios vgabios"
INSTRUCTIONS_A_SECOND = 200_000_000
"""Of the guest's time: it counts instructions."""


def program() -> str | None:
    """Its path, or None where it is not installed."""
    found = shutil.which("bochs")
    return found if found and FIRMWARE.is_file() and VIDEO.is_file() else None


def start(work: Path, settings: Iterable[str], *, model: str, memory_mib: int) -> subprocess.Popen[bytes]:
    """Start it with further `settings` (lines of its configuration). What it and port 0xE9 say goes to `work`/output,
    its log to `work`/log. The caller ends it. FileNotFoundError if it is not installed."""
    found = program()
    if found is None:
        raise FileNotFoundError(MISSING)
    lines = [
        "config_interface: textconfig",
        'display_library: rfb, options="timeout=0"',
        f"cpu: model={model}, count=1, ips={INSTRUCTIONS_A_SECOND}, reset_on_triple_fault=0, ignore_bad_msrs=1",
        f"memory: guest={memory_mib}, host={memory_mib}",
        f"vgaromimage: file={VIDEO}",
        "pci: enabled=1, chipset=i440fx",
        "clock: sync=none, time0=utc",
        f"log: {work}/log",
        "panic: action=fatal",
        "plugin_ctrl: speaker=0",
        "sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy",
        *settings,
    ]
    (work / "bochsrc").write_text("\n".join(lines) + "\n")
    (work / "commands").write_text("continue\n")  # for builds with Bochs' own debugger, as Debian's is
    with (work / "output").open("wb") as output:
        return subprocess.Popen(
            [found, "-q", "-f", work / "bochsrc", "-rc", work / "commands"], stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.DEVNULL, env={**os.environ, "BXSHARE": str(SHARED)},
        )  # fmt: skip
