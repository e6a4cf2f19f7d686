"""Hostile sources against `vmm receive`'s target, and hostile targets against a source: damaged, reordered, cut and
made-up streams. Whatever comes, the receiver ends with one declared error or a machine that was whole, the source's
machine runs on, and nothing else happens.

    python -m tests.fuzz.migration_fuzz SECONDS [SEED]
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vmm
from vmm import _native
from vmm.errors import VmmError
from vmm.lifecycle import State
from vmm.migration import fetching, protocol
from vmm.migration import link as links
from vmm.migration.protocol import HEADER, Kind
from vmm.migration.target import Receiver

OPTIONS: dict[str, Any] = {"memory": "32M", "platform": "pc"}
Frame = tuple[Kind, int, bytes]
WORKERS = 6


def split(data: bytes) -> list[Frame]:
    """A recorded stream as frames."""
    frames, at = [], 0
    while at + HEADER.size <= len(data):
        kind, flags, length, _ = protocol.parse_header(data[at : at + HEADER.size])
        frames.append((kind, flags, data[at + HEADER.size : at + HEADER.size + length]))
        at += HEADER.size + length
    return frames


def whole(frame: Frame) -> bytes:
    """A frame with checksums that fit."""
    kind, flags, payload = frame
    return protocol.header(kind, len(payload), _native.crc32c(payload), flags) + payload


def _changed_json(chance: random.Random, payload: bytes) -> bytes:
    """One value somewhere in a message is another."""
    try:
        value = json.loads(payload)
    except ValueError:  # it was changed before
        return payload
    places: list[tuple[Any, Any]] = []

    def visit(inner: Any) -> None:
        items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, each in items:
            places.append((inner, key))
            visit(each)

    visit(value)
    if not places:
        return payload
    holder, key = chance.choice(places)
    strange = [None, -1, 0, 1, 2**31, 2**64, 2**70, "", "x" * 70000, [], {}, True, 1.5, "AAAA", [[]], {"kind": 1}]
    holder[key] = chance.choice(strange)
    return json.dumps(value).encode()


def hostile(chance: random.Random, frames: list[Frame]) -> bytes:
    """A stream made of a good one."""
    made = list(frames)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(made))
        kind, flags, payload = made[at]
        how = chance.randrange(8)
        if how == 0:
            del made[at]
        elif how == 1:
            made.insert(chance.randrange(len(made) + 1), made[at])
        elif how == 2 and payload:
            spot = chance.randrange(len(payload))
            made[at] = kind, flags, payload[:spot] + bytes([chance.randrange(256)]) + payload[spot + 1 :]
        elif how == 3:
            made[at] = chance.choice(list(Kind)), flags, payload[: protocol.LIMITS[kind]]
        elif how == 4 and payload:
            made[at] = kind, flags, payload[: chance.randrange(len(payload))]
        elif how == 5 and payload[:1] == b"{":
            made[at] = kind, flags, _changed_json(chance, payload)[: protocol.LIMITS[kind]]
        elif how == 6 and kind is Kind.PAGES and len(payload) > 32:
            head = bytes(chance.randrange(256) for _ in range(20))
            made[at] = kind, flags, head + payload[20:]
        else:
            made[at] = kind, chance.randrange(3), payload
        made = made or [(Kind.PING, 0, b"")]
    stream = b"".join(map(whole, made))
    if chance.random() < 0.3:
        spot = chance.randrange(len(stream))
        damaged = bytes([stream[spot] ^ 1 << chance.randrange(8)])
        stream = stream[:spot] + damaged + stream[spot + 1 :]
    if chance.random() < 0.3:
        stream = stream[: chance.randrange(len(stream))]
    return stream


async def record(folder: Path, *, postcopy: bool) -> list[Frame]:
    """What a source sends in a whole migration over its first connection, and after it, with post-copy, over the page
    link. The frames that a native thread sends there are made here: there is one for each page that follows."""
    sent: list[bytes] = []
    send = links.Link.send

    def keep(self: links.Link, kind: Kind, *parts: Any, flags: int = 0) -> None:
        if threading.current_thread().name.startswith("migration") and self.peer.startswith("unix:"):
            sent.append(whole((kind, flags, b"".join(map(bytes, parts)))))
        send(self, kind, *parts, flags=flags)

    links.Link.send = keep  # type: ignore[method-assign]
    try:
        async with vmm.run("echo", **OPTIONS) as vm:
            await vm.console.expect(rb"Ctrl-D ends\n", timeout=60)
            async with Receiver(f"unix:{folder / f'record{postcopy}'}", name="") as receiver:
                await vm.migrate(receiver.uri, postcopy="now" if postcopy else "")
                await (await receiver.arrive()).aclose()
    finally:
        links.Link.send = send  # type: ignore[method-assign]
    return split(b"".join(sent))


def page_link(chance: random.Random, frames: list[Frame]) -> tuple[list[Frame], list[Frame]]:
    """(first connection, page link) of a recorded migration by post-copy. After FETCH the page link's frames are every
    page that is missing, as zeroes or as data, in pieces."""
    first = [frame for frame in frames if frame[0] is not Kind.FETCH]
    second = _hello(frames)[:1] + [frame for frame in frames if frame[0] is Kind.FETCH]
    del first[[number for number, frame in enumerate(first) if frame[0] is Kind.HELLO][1]]  # the page link's
    for kind, _, payload in frames:
        if kind is Kind.MISSING:
            region, start, words = protocol.parse_missing(payload)
            for page, count in _native.runs(words):
                for at in range(page, page + count, 8):
                    part = min(8, page + count - at)
                    zero = chance.random() < 0.5
                    run = struct.pack("<II", 0, part | (0x80000000 if zero else 0))
                    data = b"" if zero else bytes(4096 * part)
                    second.append((Kind.PAGES, 0, protocol.PAGES.pack(region, start + at, 1) + run + data))
    return first, second


def _hello(frames: list[Frame]) -> list[Frame]:
    return [frame for frame in frames if frame[0] is Kind.HELLO]


async def attack(path: Path, stream: bytes, pages: bytes | None = None, head: int = 0) -> str:
    """Give a receiver at a socket this stream, and the other as its page link after `head` bytes of the first; how it
    ended."""
    async with _receiver(path) as receiver:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            await loop.sock_connect(client, str(path))

            async def read() -> None:
                with suppress(OSError):
                    while await loop.sock_recv(client, 1 << 16):
                        pass

            reading = asyncio.create_task(read())
            second = asyncio.create_task(_second(path, receiver, pages)) if pages is not None else None
            with suppress(OSError):
                async with asyncio.timeout(20):
                    await loop.sock_sendall(client, stream[:head])
                    if second is not None:
                        await _until(lambda: _joined(receiver) or reading.done())
                    await loop.sock_sendall(client, stream[head:])
                    if second is not None:
                        await _until(lambda: second.done() or reading.done())
                client.shutdown(socket.SHUT_WR)
            if second is not None:
                second.cancel()
                await asyncio.gather(second, return_exceptions=True)
            await _until(lambda: reading.done() or _awaits_its_source(receiver), seconds=20)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        session = receiver.session
        if session is None:
            return "refused"
        try:
            async with asyncio.timeout(20):
                vm = await receiver.arrive()
        except VmmError as error:
            assert "\n" not in str(error)
            return type(error).__name__
        end = "running" if vm.state is State.RUNNING else "waiting"
        await vm.aclose()
        return end


@asynccontextmanager
async def _receiver(path: Path) -> AsyncIterator[Receiver]:
    """A receiver at a socket. A machine that runs without all of its memory ends with the block, else the receiver
    would wait for the rest, which nobody sends."""
    async with Receiver(f"unix:{path}", name="") as receiver:
        try:
            yield receiver
        finally:
            session = receiver.session
            if session is not None and session.phase == "running":
                await session.vm.aclose()


def _joined(receiver: Receiver) -> bool:
    session = receiver.session
    return session is not None and session.fetching is not None and session.fetching.joined


def _awaits_its_source(receiver: Receiver) -> bool:
    """The machine runs here without all of its memory: it stands, and the first connection stays open, until its
    source has come back."""
    session = receiver.session
    return session is not None and session.phase == "running" and session.vm.obstacle is not None


async def _until(condition: Callable[[], bool], seconds: float = 1.0) -> None:
    """Wait for it, so many seconds at most."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.001)


async def _second(path: Path, receiver: Receiver, pages: bytes) -> None:
    """The page link, as soon as there is a session for it."""
    loop = asyncio.get_running_loop()
    while receiver.session is None or receiver.session.phase == "building":
        await asyncio.sleep(0.001)
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.setblocking(False)
        await loop.sock_connect(client, str(path))
        sending = asyncio.create_task(loop.sock_sendall(client, pages), name="pages")
        try:
            while await loop.sock_recv(client, 1 << 16):
                pass
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


@dataclass
class Recorded:
    """Good streams: a migration's, and one's by post-copy together with its page link's, which may join after `head`
    bytes of the first."""

    frames: list[Frame]
    main_link: list[Frame]
    pages: list[Frame]
    head: int


async def worker(
    path: Path, chance: random.Random, good: Recorded, deadline: float, ends: Counter[str], failures: list[Any]
) -> None:
    """One damaged stream after another. AssertionError, what came through, or one of the loop's `failures` ends all
    workers, each with its stream in files: whose stream it was need not be known."""
    whole_main, whole_pages = b"".join(map(whole, good.main_link)), b"".join(map(whole, good.pages))
    while time.monotonic() < deadline:
        how = chance.randrange(3)
        stream, second = hostile(chance, good.main_link if how else good.frames), None
        if how == 1:  # a good stream, and hostile pages
            stream, second = whole_main, hostile(chance, good.pages)
        elif how == 2:
            second = whole_pages
        try:
            ends[await attack(path, stream, second, good.head)] += 1
            assert not failures, failures
        except BaseException:
            Path(f"migration-fuzz-{path.name}.bin").write_bytes(stream)
            Path(f"migration-fuzz-{path.name}-pages.bin").write_bytes(second or b"")
            raise


async def main(seconds: float, seed: int) -> None:
    """Until the time is over, with several receivers at a time, since most of a stream's time is waiting."""
    chance = random.Random(seed)
    ends: Counter[str] = Counter()
    fetching.CONNECT_SECONDS = 1.0  # many streams never bring their page link
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frames = await record(folder, postcopy=False)
        main_link, pages = page_link(chance, await record(folder, postcopy=True))
        head = sum(len(whole(frame)) for frame in main_link[:2])
        good = Recorded(frames, main_link, pages, head)
        sys.stdout.write(f"seed {seed}: {len(frames)}, {len(main_link)}, {len(pages)} frames recorded\n")
        sys.stdout.flush()
        path = folder / "target"
        assert await attack(path, b"".join(map(whole, frames))) == "running"
        streams = b"".join(map(whole, main_link)), b"".join(map(whole, pages))
        assert await attack(path, *streams, head) == "running"
        await attack(path, hostile(chance, frames))
        loop = asyncio.get_running_loop()
        failures: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: failures.append(context))
        before, open_files = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(os.listdir("/proc/self/fd"))
        deadline = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(WORKERS):
                own = random.Random(seed * WORKERS + number)
                group.create_task(worker(folder / f"target{number}", own, good, deadline, ends, failures))
        assert not failures, failures
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        left = len(os.listdir("/proc/self/fd")) - open_files
        assert grown < 200 << 10 and left <= 2, f"{grown} KiB more memory, {left} more descriptors"
        kinds = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
        sys.stdout.write(f"{ends.total()} streams: {kinds}; {grown} KiB more memory, {left} more descriptors\n")


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)))
