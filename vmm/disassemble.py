"""Instruction bytes as text for people: hexadecimal, and disassembled where binutils' objdump is installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile


def describe_instruction(instruction: bytes, rip: int) -> str:
    """The bytes at `rip` (64-bit code) and what they mean. Blocks for up to two seconds: not for the loop thread."""
    text = instruction.hex(" ")
    objdump = shutil.which("objdump")
    if objdump is None:
        return text
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(instruction)
        file.flush()
        command = [
            objdump,
            "-D",
            "-b",
            "binary",
            "-m",
            "i386:x86-64",
            "-M",
            "intel",
            f"--adjust-vma={rip:#x}",
            file.name,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
        except (OSError, subprocess.SubprocessError):
            return text
    for line in done.stdout.splitlines():
        fields = line.split("\t")
        if len(fields) >= 3 and fields[0].strip() == f"{rip:x}:":
            return f"{text} ({' '.join(fields[2].split())})"
    return text
