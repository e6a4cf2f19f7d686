"""Standard streams that others share: nothing of theirs is changed, and nothing blocks."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import socket
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from vmm.console import descriptors, terminal
from vmm.console.descriptors import Input, Output
from vmm.console.hub import ConsoleHub
from vmm.console.terminal import StandardStreams
from vmm.lifecycle import Outcome

KINDS = ("pipe", "socket", "terminal", "foreign pipe")
BULK = bytes(range(256)) * 4096


class Pair:
    """(what we read from, its other end) and (what we write to, its other end)."""

    def __init__(self, kind: str) -> None:
        if kind == "socket":
            inner, outer = (side.detach() for side in socket.socketpair())
            self.read = self.write = inner
            self.feed = self.sink = outer
        elif kind == "terminal":
            outer, inner = pty.openpty()
            tty.setraw(inner)
            self.read = self.write = inner
            self.feed = self.sink = outer
        else:
            self.read, self.feed = os.pipe()
            self.sink, self.write = os.pipe()
        os.set_blocking(self.sink, False)

    @property
    def flags(self) -> tuple[int, int]:
        return fcntl.fcntl(self.read, fcntl.F_GETFL), fcntl.fcntl(self.write, fcntl.F_GETFL)

    def close(self) -> None:
        for descriptor in {self.read, self.write, self.feed, self.sink}:
            os.close(descriptor)


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    made = Pair(request.param)
    if request.param.startswith("foreign"):  # as after su: it cannot be opened again

        def refuse(*_: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(descriptors.os, "open", refuse)
    yield made
    monkeypatch.undo()
    made.close()


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_flags_of_shared_files_stay_and_both_ways_work(
    pair: Pair, new_loop: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "in_foreground", lambda descriptor: True)  # it is not this process's own
    before = pair.flags
    assert not before[0] & os.O_NONBLOCK
    ends: list[Outcome] = []

    async def main() -> None:
        hub = ConsoleHub()
        port = hub.port()
        arrived = asyncio.Event()
        port.set_receiver(arrived.set)
        streams = StandardStreams(hub, ends.append, input_descriptor=pair.read, output_descriptor=pair.write)
        await streams.start()
        assert pair.flags == before
        os.write(pair.feed, b"typed")
        await asyncio.wait_for(arrived.wait(), 10)
        assert port.read(100) == b"typed"
        port.write(BULK)  # more than any buffer takes
        assert pair.flags == before
        seen = bytearray()
        while len(seen) < len(BULK):
            try:
                seen += os.read(pair.sink, 1 << 16)
            except BlockingIOError:
                await asyncio.sleep(0)
        assert seen == BULK
        assert pair.flags == before
        await streams.aclose()

    with asyncio.Runner(loop_factory=new_loop) as runner:  # type: ignore[arg-type]
        runner.run(asyncio.wait_for(main(), 60))
    assert pair.flags == before
    assert not ends


def test_nothing_blocks(pair: Pair) -> None:
    with Input(pair.read) as source, Output(pair.write) as target:
        assert source.read(10) is None
        written = 0
        while (count := target.write(b"x" * 65536)) >= 0:
            written += count
        assert written
        os.write(pair.feed, b"abc")
        assert source.read(2) == b"ab"
        assert source.read(2) == b"c"
        assert source.read(2) is None


def test_the_end_of_input(pair: Pair) -> None:
    with Input(pair.read) as source:
        if pair.feed == pair.sink:
            os.dup2(os.open(os.devnull, os.O_RDWR), pair.feed)
        else:
            os.dup2(pair.sink, pair.feed)
        try:
            assert source.read(10) == b""
        except OSError:
            pass  # a terminal that was hung up


def test_a_regular_file_is_always_ready(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    descriptor = os.open(path, os.O_RDWR)
    with Input(descriptor) as source, Output(descriptor) as target:
        assert source.watched == target.watched == -1
        assert source.read(100) == b"content"
        assert source.read(100) == b""
        assert target.write(b"more") == 4
    os.close(descriptor)
