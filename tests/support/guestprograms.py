"""Programs for the guests of tests: the host's own with their libraries, and small static ones compiled here."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

import vmm
from images import cache

HERE = Path(__file__).parent / "guests"


@functools.cache
def static(name: str) -> Path:
    """tests/support/guests/NAME.c as a static program; the test is skipped where that cannot be linked."""
    target = cache.directory("tests") / name
    source = HERE / f"{name}.c"
    if target.exists() and target.stat().st_mtime > source.stat().st_mtime:
        return target
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / name
        command = ["cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-o", made, source]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{name}.c cannot be linked statically here: {done.stderr.splitlines()[-1:]}")
        made.rename(target)  # whole at once, for whoever else runs tests
    return target


async def install(vm: vmm.VirtualMachine, program: str) -> str:
    """Copy a program of the host's with its libraries into the guest's /tmp; how the guest calls it."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
    libraries = [word for word in listed.split() if word.startswith("/")]
    folder = f"/tmp/{program}"
    await vm.exec("mkdir", "-p", folder, check=True)
    for file in (found, *libraries):
        await vm.copy_in(os.path.realpath(file), f"{folder}/{Path(file).name}")
    loader = next(Path(library).name for library in libraries if Path(library).name.startswith("ld-"))
    await vm.exec("sh", "-c", f"chmod +x {folder}/*", check=True)
    return f"{folder}/{loader} --library-path {folder} {folder}/{Path(found).name}"
