"""What `vmm run hello` loads: the first byte of a guest must not wait for what it does not need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NOT_FOR_HELLO = {
    "typer", "click", "rich", "pydoc", "tomllib", "virtio.devices.blk", "virtio.devices.net", "virtio.backends.net",
    "vmm.guest.agent", "vmm.disassemble", "cli.app", "cli.images", "cli.machines", "pyroute2", "aiofiles", "lz4.frame",
    "pyzstd", "importlib.metadata", "cpu.scripted", "vmm.pytest_plugin", "random", "ssl", "uvloop",
    "ast", "base64", "cpu.state", "dis", "ipaddress", "json", "urllib.parse", "vmm.state.payload",
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


def test_what_vmm_run_imports(tmp_path: Path) -> None:
    """In a runtime directory of its own: a daemon that asks the machine something makes it load more."""
    from cpu.select import choose

    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CODE, choose().name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "Hello from guest mode!\n"
    loaded = set(done.stderr.split("\n"))
    assert not loaded & NOT_FOR_HELLO
    ours = {name for name in loaded if name.split(".")[0] in FIRST_PARTY}
    assert len(ours) < 80, sorted(ours)
    assert len(loaded) < 420, len(loaded)


LEAN = """
import sys
from cli.lean import prepare
prepare()
import asyncio, functools, inspect, pathlib, types
class Host:
    async def method(self): pass
    def plain(self): pass
class Awaits:
    def __await__(self): yield
async def generator(): yield
@types.coroutine
def old(): yield
host = Host()
functions = [host.method, Host.method, host.plain, functools.partial(host.method), functools.partial(print), print,
             generator, lambda: None, Host, old, 7]
values = [host.method(), Awaits(), old(), generator(), 7, None, iter([])]
stand_in = [[inspect.iscoroutinefunction(f) for f in functions], [inspect.isawaitable(v) for v in values]]
assert "dis" not in sys.modules
assert str(inspect.signature(lambda a, b=1: 0)) == "(a, b=1)"
import inspect as real
assert real is not inspect and "dis" in sys.modules
assert stand_in == [[real.iscoroutinefunction(f) for f in functions], [real.isawaitable(v) for v in values]]
assert "urllib.parse" not in sys.modules
assert pathlib.Path("/a b").as_uri() == "file:///a%20b"
import urllib.parse
assert urllib.parse.quote("a b") == "a%20b"
values[0].close()
asyncio.run(host.method())
"""


def test_stand_ins_are_as_the_real_modules() -> None:
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
