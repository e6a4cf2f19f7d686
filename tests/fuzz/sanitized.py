"""The package `virtio` with its C parts under ASan and UBSan, and a campaign in a process that loads those."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]


def build(folder: Path) -> None:
    """Make it in `folder`, which is emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "virtio", folder / "virtio", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    flags = ["-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = sorted((ROOT / "virtio/native").glob("*.c"))
    include = f"-I{sysconfig.get_paths()['include']}"
    output = folder / "virtio" / f"_ring{suffix}"
    subprocess.run(["cc", *flags, include, *sources, "-o", output, "-pthread"], check=True)


def run(folder: Path, script: str, *arguments: object) -> NoReturn:
    """Build it, and run the campaign's script with it, which finds FUZZ_INSIDE set. Ends with its status."""
    build(folder)
    libraries = [
        subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "FUZZ_INSIDE": "1",
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": f"{folder}:{ROOT}",
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-P", script, *map(str, arguments)]
    raise SystemExit(subprocess.run(command, env=environment, cwd=folder).returncode)


def inside() -> bool:
    """Whether this is the campaign itself: under sanitizers, or with FUZZ_PLAIN=1 as the module is installed."""
    return bool(os.environ.get("FUZZ_INSIDE") or os.environ.get("FUZZ_PLAIN"))
