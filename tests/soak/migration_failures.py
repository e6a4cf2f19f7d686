"""Failures at random moments of migrations: `python -m tests.soak.migration_failures [ROUNDS [SEED]]` (500).

Each round starts a source and a target process with a tiny guest whose disk both share, moves it by pre-copy or
post-copy, and does one of these at a random moment or byte: cancels, kills the source or the target (SIGKILL), cuts the
link, lets it crawl, fills the target's disk while storage is copied, shows the wrong certificate. Then the rule must
hold: one machine runs, with the disk locked by itself, or one or two wait, paused, and say how to go on; then that is
done, and one runs. Never two, never none, unless a killed process took a machine, or its half of one, with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import vmm
from tests.support.slowlink import SlowLink
from vmm.errors import ConfigError, VmmError
from vmm.libvirt import pki
from vmm.lifecycle import State
from vmm.migration.target import Receiver

FAILURES = ("cancel", "kill source", "kill target", "cut", "slow", "full", "certificate")
TINY: dict[str, Any] = {"memory": "32M", "platform": "pc"}
PATIENCE = 60.0
FILL = 6 << 20
"""Bytes of the guest's memory that are not zeroes, so that a move has a length."""


class Broken(Exception):
    """The rule did not hold."""


# ---- the processes; each reads orders, a JSON value a line, and answers each with one ----


async def child(side: str, folder: Path) -> None:
    """A source or a target, until its input ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await (source if side == "source" else target)(reader, folder)


def say(**values: Any) -> None:
    """An answer."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def described(vm: vmm.VirtualMachine | None) -> dict[str, Any]:
    """What has become of a machine; one that runs on must answer."""
    if vm is None or vm.ending or vm.state is State.STOPPED:
        return {"state": "gone"}
    if vm.state is State.RUNNING:
        word = os.urandom(4).hex()
        await vm.console.write(word.encode() + b"\n")
        answering = asyncio.create_task(vm.console.expect(word.encode(), timeout=PATIENCE), name="answer")
        # Its source may have been lost a moment ago: then it is paused, and answers nothing.
        while not answering.done() and vm.state is State.RUNNING:
            await asyncio.wait({answering}, timeout=0.05)
        if answering.done():
            answering.result()
        answering.cancel()
    obstacle = None if vm.obstacle is None else vm.obstacle.text
    broken = vm.migration is not None and vm.migration.broken
    return {"state": vm.state.value, "obstacle": obstacle, "recover": broken}


def nursery(connection: socket.socket) -> None:
    """Forks sources and targets, for whoever asks over the connection: "SIDE FOLDER" with descriptors for its input and
    output; the answer is its process id. So none of them has to import everything anew."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 4096, 2)
        if not message:
            return
        side, folder = message.decode().split(" ", 1)
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            try:
                asyncio.run(child(side, Path(folder)))
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(str(pid).encode())


async def source(orders: asyncio.StreamReader, folder: Path) -> None:
    """Runs the machine and moves it."""
    disk = vmm.Disk(path=folder / "disk", format="raw")
    async with vmm.run("echo", **TINY, disks=[disk]) as vm:
        await vm.console.expect(rb"Ctrl-D ends\n", timeout=PATIENCE)
        with memoryview(vm.machine.memory.regions()[0][1]) as memory:
            memory[16 << 20 : (16 << 20) + FILL] = os.urandom(FILL)
        say(ready=True)
        moving: asyncio.Task[Any] | None = None
        while line := await orders.readline():
            order = json.loads(line)
            what = order.pop("what")
            if what == "migrate":
                moving = asyncio.create_task(vm.migrate(**order), name="migrate")
                say(begun=True)
            elif what == "cancel":
                with contextlib.suppress(VmmError):
                    if vm.migration is not None:
                        vm.migration.cancel()
                say(cancelled=True)
            elif what == "over":
                error = ""
                assert moving is not None
                try:
                    await moving
                except VmmError as failure:
                    error = str(failure)
                say(error=error)
            elif what == "state":
                say(**await described(vm))
            elif what == "take up":
                try:
                    await vm.take_up()
                    say(ok=True)
                except VmmError as failure:
                    say(ok=False, error=str(failure))


async def target(orders: asyncio.StreamReader, folder: Path) -> None:
    """Waits for the machine."""
    options = json.loads(await orders.readline())
    disks = {name: Path(path) for name, path in options.pop("disks", {}).items()}
    async with Receiver(**options, name="", disks=disks) as receiver:
        say(uri=receiver.uri)
        vm: vmm.VirtualMachine | None = None
        arriving = asyncio.create_task(receiver.arrive(), name="arrive")
        while line := await orders.readline():
            what = json.loads(line)["what"]
            if what == "settle":
                error = ""
                try:
                    async with asyncio.timeout(PATIENCE):
                        vm = await asyncio.shield(arriving)
                except TimeoutError:
                    error = "nothing came"
                except VmmError as failure:
                    error = str(failure)
                say(error=error)
            elif what == "state":
                say(**await described(vm))
            elif what == "take up":
                assert vm is not None
                try:
                    await vm.take_up()
                    say(ok=True)
                except VmmError as failure:
                    say(ok=False, error=str(failure))
        os._exit(0)  # whatever it waits for


# ---- the campaign ----


class Side:
    """One process."""

    def __init__(self, name: str, folder: Path, forker: socket.socket) -> None:
        self.name, self.folder = name, folder
        self.killed = False
        self._forker = forker

    async def start(self) -> None:
        """Begin it."""
        theirs_in, self._input = os.pipe()
        output, theirs_out = os.pipe()
        socket.send_fds(self._forker, [f"{self.name} {self.folder}".encode()], [theirs_in, theirs_out])
        self._pid = int(self._forker.recv(64))
        os.close(theirs_in)
        os.close(theirs_out)
        self._output = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(self._output)
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(output))

    def order(self, **values: Any) -> None:
        """Without waiting for the answer."""
        with contextlib.suppress(OSError):
            os.write(self._input, json.dumps(values).encode() + b"\n")

    async def answer(self) -> dict[str, Any]:
        """The next; {"state": "killed"} if there will be none."""
        try:
            async with asyncio.timeout(2.5 * PATIENCE):
                line = await self._output.readline()
        except TimeoutError:
            raise Broken(f"the {self.name} does not answer") from None
        if not line and not self.killed:
            raise Broken(f"the {self.name} ended by itself")
        found: dict[str, Any] = json.loads(line) if line else {"state": "killed"}
        return found

    async def ask(self, **values: Any) -> dict[str, Any]:
        """An order and its answer."""
        self.order(**values)
        return await self.answer()

    def kill(self) -> None:
        """SIGKILL."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    async def close(self) -> None:
        """End it."""
        self.kill()
        while await self._output.read(4096):
            pass
        self._transport.close()
        os.close(self._input)


async def one(
    folder: Path, chance: random.Random, failure: str, forker: socket.socket, *, postcopy: bool
) -> str:
    """A round; what came of it. Raises Broken."""
    disk = folder / "disk"
    disk.write_bytes(bytes(1 << 20))
    here, there = Side("source", folder, forker), Side("target", folder, forker)
    await here.start()
    await there.start()
    options: dict[str, Any] = {"uri": f"unix:{folder / 't'}"}
    move: dict[str, Any] = {"uri": f"unix:{folder / 'p'}"}
    if failure == "certificate":
        options |= {"uri": "tcp:127.0.0.1:0", "tls": str(folder.parent / "good"), "trust": True}
        move["tls"] = str(folder.parent / "bad" / "clients" / "mover")
    if failure == "full":
        full = folder / "small"
        full.mkdir()
        os.system(f"mount -t tmpfs -o size={chance.randrange(4, 900)}k none {full}")
        options["disks"] = {"disk0": str(full / "disk")}
        move["copy_storage"] = True
        disk.write_bytes(os.urandom(1 << 20))
    if postcopy:
        move |= {"postcopy": chance.choice(("now", "auto")), "downtime": 0.001, "bandwidth": 4 << 20}
    elif chance.random() < 0.6:
        move["bandwidth"] = chance.choice((1, 4, 16)) << 20
    if not postcopy and failure != "certificate" and chance.random() < 0.3:
        move["connections"] = 3
    link = SlowLink(folder / "p", folder / "t")
    try:
        with link:
            waits, begun = await asyncio.gather(there.ask(**options), here.answer())
            if "uri" not in waits or not begun.get("ready"):
                raise Broken(f"it does not begin: {waits} {begun}")
            if failure == "certificate":
                move["uri"] = waits["uri"]
            if failure == "slow":
                link.rate, link.delay = chance.choice((2e6, 8e6)), chance.choice((0.0, 0.01, 0.05))
            await here.ask(what="migrate", **move)
            if failure in ("cancel", "kill source", "kill target", "cut", "slow"):
                await moment(chance, link, FILL)
            if failure == "cancel":
                await here.ask(what="cancel")
            elif failure == "kill source":
                here.kill()
            elif failure == "kill target":
                there.kill()
            elif failure == "cut":
                link.cut()
            found = await judge(here, there, link, failure)
            if found.startswith("runs") and failure != "full":
                await locked(disk)
            return found
    finally:
        await asyncio.gather(here.close(), there.close())
        if failure == "full":
            os.system(f"umount {folder / 'small'}")


async def locked(disk: Path) -> None:
    """The machine that runs has its disk, and nobody else gets it. Raises Broken."""
    try:
        async with vmm.run("echo", **TINY, disks=[vmm.Disk(path=disk, format="raw")]):
            raise Broken("the disk of the machine that runs is nobody's")
    except ConfigError as error:
        if "in use" not in str(error):
            raise


async def moment(chance: random.Random, link: SlowLink, most: int) -> None:
    """A random time, or until a random number of bytes went over the link."""
    if chance.random() < 0.4:
        await asyncio.sleep(chance.uniform(0.0, 0.6))
        return
    wanted = chance.choice((chance.randrange(most), most + chance.randrange(200_000)))
    deadline = time.monotonic() + 3.0
    while link.bytes < wanted and time.monotonic() < deadline:
        await asyncio.sleep(0)


async def judge(here: Side, there: Side, link: SlowLink, failure: str) -> str:
    """Raises Broken."""
    over = await here.ask(what="over") if not here.killed else {}
    mine = await here.ask(what="state") if not here.killed else {"state": "killed"}
    moved = not here.killed and mine["state"] == "gone"
    if failure == "certificate" and not over["error"]:
        raise Broken("a wrong certificate was taken")
    if not there.killed and (moved or here.killed or "paused" in str(mine["state"])):
        await there.ask(what="settle")
    theirs = await there.ask(what="state") if not there.killed else {"state": "killed"}
    deadline = time.monotonic() + PATIENCE
    if not here.killed and not there.killed and theirs["state"] == "running" and mine["state"] == "running":
        raise Broken("two machines run")
    if mine.get("recover") and not there.killed:  # post-copy, and both live: nothing is lost
        while theirs["state"] == "running" and time.monotonic() < deadline:
            await asyncio.sleep(0.02)  # the target has not heard of it yet
            theirs = await there.ask(what="state")
        if theirs["state"] != "paused" or "--recover" not in str(theirs["obstacle"]):
            raise Broken(f"the connection broke in post-copy, and the target says {theirs}")
        link.rate = link.delay = 0.0
        await here.ask(what="migrate", uri=f"unix:{link.path}", recover=True)
        if error := (await here.ask(what="over"))["error"]:
            raise Broken(f"it is not recovered: {error}")
        mine, theirs = await here.ask(what="state"), await there.ask(what="state")
        if (mine["state"], theirs["state"]) != ("gone", "running"):
            raise Broken(f"after it was recovered: {mine} {theirs}")
        return "recovered"
    running = [side for side, found in ((here, mine), (there, theirs)) if found["state"] == "running"]
    if len(running) == 1:
        return f"runs at the {running[0].name}"
    paused = [(side, found) for side, found in ((here, mine), (there, theirs)) if found["state"] == "paused"]
    for _, found in paused:
        if not found["obstacle"] or "vmm " not in found["obstacle"]:
            raise Broken(f"paused without a word how to go on: {found}")
    if any("--recover" in found["obstacle"] or "fetches memory" in found["obstacle"] for _, found in paused):
        if here.killed or there.killed:
            return "half of it was killed"
        raise Broken(f"{mine} {theirs}")
    if paused:
        side, found = paused[0]
        done = await side.ask(what="take up")
        if not done["ok"]:
            raise Broken(f"it cannot go on: {done} {found}")
        after = await side.ask(what="state")
        if after["state"] != "running":
            raise Broken(f"it was to go on: {after}")
        return f"paused, goes on at the {side.name}"
    if here.killed and theirs["state"] == "gone":
        return "went with its source"
    if there.killed and moved and not over["error"]:
        return "had moved, and went with its process"
    raise Broken(f"no machine: {mine} {theirs} {over}")


async def main(rounds: int, seed: int, forker: socket.socket) -> int:
    """Exit status."""
    chance = random.Random(seed)
    seen: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="lvm") as name:
        top = Path(name)
        for which in ("good", "bad"):
            pki.init(top / which, ["localhost", "127.0.0.1"], ["mover"])
        for number in range(rounds):
            part = random.Random(chance.randrange(1 << 62))
            failure, postcopy = FAILURES[number % len(FAILURES)], number // len(FAILURES) % 2 == 1
            if failure == "full" and os.geteuid():
                failure = "cut"
            folder = top / f"r{number}"
            folder.mkdir()
            what = f"{failure}, {'post' if postcopy else 'pre'}-copy"
            try:
                found = await one(folder, part, failure, forker, postcopy=postcopy)
            except Broken as error:
                sys.stdout.write(f"round {number}, seed {seed}, {what}: BROKEN: {error}\n")
                return 1
            seen[f"{what}: {found}"] = seen.get(f"{what}: {found}", 0) + 1
            sys.stdout.write(f"round {number}: {what}: {found}\n")
            sys.stdout.flush()
            await asyncio.to_thread(os.system, f"rm -rf {folder}")
    for line in sorted(seen):
        sys.stdout.write(f"{seen[line]:5} {line}\n")
    return 0


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory(prefix="lvr") as runtime:
        os.environ["XDG_RUNTIME_DIR"] = runtime
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        forking = os.fork()
        if not forking:
            ours.close()
            nursery(theirs)
            os._exit(0)
        theirs.close()
        status = asyncio.run(main(*[*numbers, *[500, random.randrange(1 << 32)][len(numbers) :]][:2], ours))
        ours.close()
        os.waitpid(forking, 0)
    sys.exit(status)
