"""The other side of GDB's remote protocol, as plainly as it can be: for tests of the stub without GDB."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import pytest

from tests.support.patience import PATIENCE

DEADLINE_S = 60.0 * PATIENCE


class GdbClient:
    """One connection. Every wait has a deadline."""

    def __init__(self, target: str) -> None:
        """`target`: HOST:PORT or a UNIX socket's path."""
        self._target = target
        self.output = ""
        """What the stub printed (O packets)."""

    async def __aenter__(self) -> Self:
        if "/" in self._target:
            self.reader, self.writer = await asyncio.open_unix_connection(self._target)
        else:
            host, _, port = self._target.rpartition(":")
            self.reader, self.writer = await asyncio.open_connection(host, int(port))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass

    def send(self, data: bytes) -> None:
        """A packet; the answer is not waited for."""
        self.writer.write(b"$%b#%02x" % (data, sum(data) & 0xFF))

    async def receive(self) -> bytes:
        """The next packet that is no output, acknowledged; b"" as well for an unknown packet. EOFError at the end."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                byte = await self.reader.read(1)
                if not byte:
                    raise EOFError
                if byte != b"$":
                    continue
                data = (await self.reader.readuntil(b"#"))[:-1]
                checksum = await self.reader.readexactly(2)
                assert int(checksum, 16) == sum(data) & 0xFF
                self.writer.write(b"+")
                if data[:1] == b"O" and data != b"OK":
                    self.output += bytes.fromhex(data[1:].decode()).decode()
                    continue
                plain, rest = bytearray(), iter(data)
                for value in rest:
                    plain.append(next(rest) ^ 0x20 if value == ord("}") else value)
                return bytes(plain)

    async def ask(self, data: str | bytes) -> str:
        """Send a packet, wait for its answer."""
        self.send(data.encode() if isinstance(data, str) else data)
        return (await self.receive()).decode("latin-1")

    async def monitor(self, command: str) -> str:
        """A `monitor` command's output."""
        self.output = ""
        assert await self.ask(f"qRcmd,{command.encode().hex()}") == "OK"
        return self.output


def require_gdb() -> str:
    """GDB's path; else the test is skipped with the reason."""
    path = shutil.which("gdb")
    if path is None:
        pytest.skip("gdb is not installed")
    return path


async def run_gdb(target: str, commands: Sequence[str], symbols: str = "") -> str:
    """What GDB prints for the commands, on a stub at `target`."""
    first = ["set pagination off", "set confirm off", "set width 0", f"set remotetimeout {DEADLINE_S:.0f}"]
    first += [f"file {symbols}"] if symbols else []
    words = [word for command in [*first, f"target remote {target}", *commands] for word in ("-ex", command)]
    process = await asyncio.create_subprocess_exec(
        require_gdb(), "-q", "-nx", "-batch", *words,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(2 * DEADLINE_S):
            output, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.communicate()
        raise
    return output.decode("utf-8", "replace")
