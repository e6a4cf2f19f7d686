"""Hostile clients against `vmm daemon` for a given time: `python -m tests.fuzz.libvirt_fuzz SECONDS [SEED]`.

Each round connects a few clients to a daemon in this process that send calls: whole, broken, cut anywhere, in other
orders, with and without a greeting, and read what comes or do not. Failures: an exception that is not declared (the
daemon logs those), a whole call that gets no reply, a client beside them that is not served, memory that is not given
back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import struct
import sys
import tempfile
import time
import uuid
from pathlib import Path

import uvloop

from tests.support.libvirtd import tiny
from tests.support.rpc import Generator, RpcClient
from tests.support.stalls import resident
from vmm.libvirt import rpc
from vmm.libvirt.daemon import Daemon, Settings
from vmm.libvirt.rpc import RpcHeader, RpcKind, RpcStatus
from vmm.libvirt.storage import Pool

ROUNDS_WARM = 200
GROWTH = 64 << 20
"""Bytes that the process may grow by after it is warm."""
CLIENTS = 4
CALLS = 40
ANSWER_SECONDS = 30.0


class Failures(logging.Handler):
    """What the daemon could not help logging as its own failure."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None:
            self.seen.append(logging.Formatter().format(record))


def texts(folder: Path) -> list[str]:
    """Strings that clients send: names, paths in the folder, XML of all kinds."""
    volume = "<volume><name>v</name><capacity>%s</capacity><target><format type='%s'/></target></volume>"
    pool = f"<pool type='dir'><name>p</name><target><path>{folder / 'pool'}</path></target></pool>"
    domains = [tiny("a"), tiny("b", "hello"), tiny("a", extra="<cputune/>"), tiny("../a")]
    known = "<uuid>0e7d2a52-0b3c-4a36-9f3c-6a5f1f0b8f60</uuid>"
    return [
        *(("a", "p", "v", "default", "computer", str(folder / "pool" / "v")) * 12),
        *([tiny("c", extra=known), tiny("c", extra=known + "<title>t</title>")] * 3),
        *(
            "",
            "a",
            "b",
            "p",
            "v",
            "w",
            "default",
            "x" * 5000,
            "ż\n",
            "%s%n",
            "/",
            "..",
            "../v",
            "serial0",
            "vda",
            "net0",
        ),
        *(str(folder / "pool" / name) for name in ("v", "w", "../x")),
        *("qemu", "kvm", "x86_64", "52:54:00:00:00:01", "computer", "eth0", "urn:x", "loopvisor:///system", "xen:///"),
        *domains,
        *(text[: len(text) // 2] for text in domains),
        pool,
        pool.replace("dir", "nfs"),
        *(
            volume % pair
            for pair in (("4096", "raw"), ("99999999999999999999", "raw"), ("65536", "qcow2"), ("-1", "x"))
        ),
        "<disk type='file'><source file='/d'/><target dev='vda' bus='virtio'/></disk>",
        "<interface type='user'/>",
        "<a>" * 3000,
        "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>",
        "<domainsnapshot><name>s</name></domainsnapshot>",
        '{"execute": "guest-ping"}',
    ]


def furnish(daemon: Daemon, folder: Path) -> None:
    """There is a domain and a pool with a volume, so that most calls find what they are about."""
    if not any(domain.name == "a" for domain in daemon.domains.all()):
        daemon.domains.define(daemon.domains.read(tiny("a")))
    (folder / "pool").mkdir(exist_ok=True)
    (folder / "pool" / "v").write_bytes(bytes(4096))
    pools = daemon.pools.all() or [daemon.pools.add(Pool("p", uuid.uuid4(), folder / "pool"))]
    for pool in pools:
        if not pool.active:
            daemon.pools.set_active(pool, on=True)


async def one_client(daemon: Daemon, source: random.Random, generator: Generator) -> None:
    client = await RpcClient.connect(str(daemon.socket))
    procedures = list(daemon.programs[rpc.REMOTE].values())
    try:
        if source.random() < 0.9:
            await client.open(source.choice((0, 0, 1)))
        whole: set[int] = set()
        for _ in range(source.randrange(1, CALLS)):
            procedure = source.choice(procedures)
            if procedure.number == 1:
                continue
            body = generator.body(procedure)
            what = source.random()
            if what < 0.6:
                whole.add(client.send(procedure.number, body))
            elif what < 0.8:
                whole.add(client.send(procedure.number, generator.broken(body)))
            elif what < 0.9:
                status = source.choice((RpcStatus.OK, RpcStatus.ERROR, RpcStatus.CONTINUE))
                serial = source.choice((client.serial, 0, 1, 77))
                header = RpcHeader(
                    rpc.REMOTE, 1, procedure.number, source.choice((RpcKind.STREAM, RpcKind.HOLE)), serial, status
                )
                client.writer.write(rpc.pack(header, body[:1000]))
            elif what < 0.95:
                program = source.choice((0, 1, rpc.REMOTE, rpc.QEMU, rpc.ADMIN, rpc.KEEPALIVE, 0xFFFF))
                version, number, kind = source.choice((0, 1, 7)), source.randrange(-5, 500), source.randrange(9)
                header = RpcHeader(program, version, number, kind, 1 << 20, source.randrange(5))
                client.writer.write(rpc.pack(header, body))
            else:
                client.writer.write(
                    generator.broken(rpc.pack(RpcHeader(rpc.REMOTE, 1, procedure.number, 0, 1, 0), body))
                )
                return  # whatever is read from here on is nothing in particular
        if source.random() < 0.2:
            return  # leave without reading
        async with asyncio.timeout(ANSWER_SECONDS):
            while whole:
                message = await client.message()
                if message.header.kind == RpcKind.REPLY:
                    whole.discard(message.header.serial)
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # sent away, as a client deserves that greets wrongly
    finally:
        client.close()


async def a_good_client(daemon: Daemon) -> None:
    """Is served whatever the others do."""
    client = await (await RpcClient.connect(str(daemon.socket))).open()
    try:
        for _ in range(3):
            reply = await asyncio.wait_for(client.call(273, struct.pack(">iI", 1, 0)), ANSWER_SECONDS)
            assert reply.header.status == RpcStatus.OK
            reply = await asyncio.wait_for(client.call(59), ANSWER_SECONDS)
            assert reply.header.status == RpcStatus.OK
    finally:
        client.close()


async def campaign(seconds: float, first: int, folder: Path) -> tuple[int, int, int]:
    """(rounds, memory when warm, most memory later)"""
    failures = Failures()
    logging.getLogger("vmm.libvirt").addHandler(failures)
    settings = Settings(("/bin/false",), "/usr/bin/vmm", folder / "state", folder / "sock")
    end, rounds, base, most = time.monotonic() + seconds, 0, 0, 0
    async with Daemon(settings, ("qemu",)) as daemon:
        while time.monotonic() < end:
            source = random.Random(first + rounds)
            furnish(daemon, folder)
            identities = [domain.uuid.bytes for domain in daemon.domains.all()]
            identities += [pool.uuid.bytes for pool in daemon.pools.all()]
            generator = Generator(source, texts(folder), [*identities, source.randbytes(16)])
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(one_client(daemon, source, generator))
                group.create_task(a_good_client(daemon))
            rounds += 1
            assert not failures.seen, f"seed {first + rounds - 1}: {failures.seen[0]}"
            if rounds == ROUNDS_WARM:
                base = resident()
            elif rounds > ROUNDS_WARM and rounds % 50 == 0:
                most = max(most, resident())
                assert most - base < GROWTH, f"seed {first + rounds - 1}: {base} bytes, then {most}"
    logging.getLogger("vmm.libvirt").removeHandler(failures)
    return rounds, base, most


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120
    first = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() & 0xFFFFFFFF
    logging.getLogger("vmm.libvirt").propagate = False
    with tempfile.TemporaryDirectory(prefix="lvf") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder  # clients end and save machines: none but the campaign's own
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rounds, base, most = runner.run(campaign(seconds, first, Path(folder)))
    sys.stdout.write(
        f"libvirt: {rounds} rounds of {CLIENTS} clients from seed {first}, nothing but declared errors; "
        f"memory {base >> 20} MiB, later {most >> 20}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
