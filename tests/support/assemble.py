"""Small guests as text: assembled and linked to a flat binary with the C compiler."""

from __future__ import annotations

import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path


@cache
def assemble(source: str, address: int, bits: int = 32) -> bytes:
    """Machine code of `source` (GNU assembler, Intel syntax), to stand and be entered at `address`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "guest.S"
        text.write_text(f".intel_syntax noprefix\n.code{bits}\n.globl _start\n_start:\n{source}\n")
        binary = folder / "guest.bin"
        link = ["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,--oformat=binary", "-Wl,-z,noexecstack",
                f"-Wl,-Ttext={address:#x}"]
        # Not for the compiler: a sanitizer that is preloaded for what this process tests.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        subprocess.run(["gcc", "-m64", *link, "-o", binary, text], check=True, timeout=60, env=environment)
        return binary.read_bytes()
