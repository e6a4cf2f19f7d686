"""The read-only socket: every procedure of the tables is called over it, and nothing changes."""

import random
import struct
from pathlib import Path

import pytest

from tests.fuzz.libvirt_fuzz import furnish
from tests.support.libvirtd import tiny
from tests.support.rpc import Generator, RpcClient
from vmm.libvirt import rpc
from vmm.libvirt.daemon import PROGRAMS, Daemon, Settings
from vmm.libvirt.errors import Code
from vmm.libvirt.procedures import Procedure
from vmm.libvirt.rpc import RpcStatus

READ_ONLY = 1
"""VIR_CONNECT_RO, which clients send when they open a connection to look only."""
ROUNDS = 3
SESSIONS = frozenset({"connect_open", "connect_close"})
ALL = [(program, one) for program, table in PROGRAMS.items() for one in table.values()]


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    settings = Settings(("/bin/false",), "/usr/bin/vmm", tmp_path / "state", tmp_path / "s")
    async with Daemon(settings, ("qemu",)) as daemon:
        furnish(daemon, tmp_path)
        domain = next(iter(daemon.domains.all()))
        texts = ["a", "p", "v", "default", tiny("a"), tiny("b"), str(tmp_path / "pool" / "v")]
        made = Generator(random.Random(1), texts, [domain.ref.uuid, bytes(16)])

        def all_of_it() -> tuple[object, ...]:
            names = [(one.name, one.active) for one in daemon.domains.all()]
            return names, everything(tmp_path / "state"), everything(tmp_path / "pool")

        before = all_of_it()
        client = await (await RpcClient.connect(f"{daemon.socket}-ro")).open(READ_ONLY)

        async def code(program: int, procedure: Procedure) -> int | None:
            """Of the error it is answered with."""
            reply = await client.call(procedure.number, made.body(procedure), program=program)
            failed = reply.header.status == RpcStatus.ERROR
            return struct.unpack(">i", reply.body[:4])[0] if failed else None

        for program, procedure in ALL:
            for _ in range(ROUNDS if procedure.name not in SESSIONS else 0):
                answer = await code(program, procedure)
                assert procedure.read_only or answer == Code.OPERATION_DENIED, f"{procedure.name}: {answer}"
        client.close()
        assert all_of_it() == before


def test_what_clients_may_not_do_is_most_of_what_changes_things() -> None:
    """The tables say which procedures change something: no name among the others says that it does."""
    verbs = [
        "create",
        "define",
        "undefine",
        "destroy",
        "start",
        "suspend",
        "resume",
        "shutdown",
        "reboot",
        "reset",
        "restore",
        "attach",
        "detach",
        "update",
        "delete",
        "build",
        "refresh",
        "resize",
        "wipe",
        "upload",
        "download",
        "rename",
        "inject",
        "abort",
        "migrate",
        "pull",
        "commit",
        "copy",
        "rebase",
        "revert",
        "fstrim",
        "fsfreeze",
        "fsthaw",
        "set",
        "open",
        "dump",
        "send",
    ]
    looks = {one.name for program, one in ALL if one.read_only and set(verbs) & set(one.name.split("_"))}
    # A connection is opened to look as well, and a client's identity is the client's own affair.
    assert looks == {"connect_open", "connect_set_identity"}
    assert sum(not one.read_only for _, one in ALL) > 90
    assert all(not one.read_only for program, one in ALL if program == rpc.QEMU)
