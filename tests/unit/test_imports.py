"""What `vmm run hello` loads: the first byte of a guest must not wait for what it does not need."""

from __future__ import annotations

import subprocess
import sys

NOT_FOR_HELLO = {
    "typer", "click", "rich", "pydoc", "tomllib", "virtio.devices.blk", "virtio.devices.net", "virtio.backends.net",
    "vmm.guest.agent", "vmm.disassemble", "cli.app", "cli.images", "cli.machines", "pyroute2", "aiofiles", "lz4.frame",
    "pyzstd", "importlib.metadata", "cpu.scripted", "vmm.pytest_plugin", "random", "ssl", "uvloop",
}  # fmt: skip
FIRST_PARTY = {"cli", "cpu", "images", "virtio", "vmm"}

CODE = """
import os, sys
os._exit = sys.exit
sys.argv = ["vmm", "run", "hello", "--core", sys.argv[1]]
from cli.main import main
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
sys.stderr.write("\\n".join(sys.modules))
"""


def test_what_vmm_run_imports() -> None:
    from cpu.select import choose

    done = subprocess.run(
        [sys.executable, "-c", CODE, choose().name], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "Hello from guest mode!\n"
    loaded = set(done.stderr.split("\n"))
    assert not loaded & NOT_FOR_HELLO
    ours = {name for name in loaded if name.split(".")[0] in FIRST_PARTY}
    assert len(ours) < 80, sorted(ours)
    assert len(loaded) < 420, len(loaded)
