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
DATACLASSES = """
import sys
if sys.argv[1] == "late":
    from cli.lean import prepare
    prepare()
from dataclasses import FrozenInstanceError, asdict, dataclass, field, replace
@dataclass
class Base:
    "One field."
    a: int
@dataclass(slots=True)
class Derived(Base):
    "With a default, and one that is made."
    b: str = "b"
    c: list = field(default_factory=list, repr=False)
    def __post_init__(self): self.c.append(self.a)
@dataclass(frozen=True, order=True)
class Frozen:
    "Cannot be changed."
    a: int
    b: int = 2
for _ in range(2):
    made = Derived(1)
    print(made, Derived(1, c=[]), made == Derived(1), made == Derived(2), Base(1) == made)
    print(asdict(replace(made, a=3, c=[])))
    print(Frozen(1), hash(Frozen(1)) == hash(Frozen(1)), sorted([Frozen(2), Frozen(1)]), {Frozen(1): 1})
    print(Frozen(1) != Frozen(1, 3), Frozen(1) < Frozen(1, 1))
    change, remove = lambda: setattr(Frozen(1), "a", 2), lambda: delattr(Frozen(1), "a")
    for wrong in (change, remove, lambda: Derived(), lambda: Base(1, 2)):
        try:
            wrong()
        except (FrozenInstanceError, TypeError) as error:
            print(repr(error))
print(Derived.__init__.__qualname__, Derived.__eq__.__qualname__, Frozen.__hash__.__name__)
"""
UVLOOP = """
import sys
from cli.lean import import_asyncio, import_uvloop, prepare
prepare()
import_asyncio()
import_uvloop()
import asyncio, uvloop
assert "ssl" not in sys.modules and "_ssl" not in sys.modules
import ssl
async def main():
    assert type(asyncio.get_running_loop()).__module__ == "uvloop"
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await reader.read() == b""
    writer.close()
    try:
        await asyncio.open_connection("127.0.0.1", port, ssl=ssl.create_default_context())
    except RuntimeError as error:
        print(error)
    server.close()
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


def test_stand_ins_are_as_the_real_modules() -> None:
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_data_classes_whose_methods_are_compiled_late_are_as_others() -> None:
    early, late = (
        subprocess.run([sys.executable, "-c", DATACLASSES, when], capture_output=True, text=True, timeout=60)
        for when in ("early", "late")
    )
    assert (late.returncode, late.stderr, late.stdout) == (0, "", early.stdout)
    assert early.returncode == 0 and early.stdout.count("Error(") == 8


def test_the_loop_works_without_tls() -> None:
    done = subprocess.run([sys.executable, "-c", UVLOOP], capture_output=True, text=True, timeout=60)
    refusal = "the event loop of this command was loaded without TLS\n"
    assert (done.returncode, done.stderr, done.stdout) == (0, "", refusal)
