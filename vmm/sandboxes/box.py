"""Somebody's program in a machine of its own: `async with vmm.sandbox("oci:python:3.12") as box: await box.run(…)`.

A machine with a time to live, a network that leads nowhere unless it is said where, and limits whose ends are values,
not exceptions. `Sandbox` is the asynchronous one; `SyncSandbox` is the same for code without a loop, notebooks among
them: it has a loop of its own in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from vmm.errors import ConfigError, GuestError, StateError
from vmm.guest.frames import Environment, RunLimits, Text

if TYPE_CHECKING:
    from vmm.config import Net
    from vmm.guest.process import GuestProcess, GuestStream
    from vmm.vm import VirtualMachine

OUTPUT_LIMIT = 16 << 20
"""Bytes of each of a program's outputs that are kept unless it is said otherwise."""
ENDING_SECONDS = 5.0
T = TypeVar("T")
RunEnd = Literal["exited", "timeout", "output", "memory", "processes", "disk", "machine"]
_HITS: tuple[RunEnd, ...] = ("exited", "memory", "processes", "disk")
"""By what vmm.guest.process.RunUse calls them."""
LAST_SECONDS = 2.0
"""How long a guest may take to say what a program used that was ended from outside."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a program ended and what it took."""

    end: RunEnd
    """exited: by itself, or by a signal of the guest's; timeout: it ran too long; output, memory, processes, disk: it
    wrote or took more than it may; machine: the whole machine ended, of which `detail` says how."""
    status: int
    """Its exit status, or 128 + the signal that ended it; -1 where it was ended from outside."""
    stdout: bytes
    stderr: bytes
    seconds: float
    """From its start to its end, as this host's clock has it."""
    cpu_seconds: float
    """User and system time in the guest, with that of all that it started."""
    memory_peak: int
    """Bytes of the guest's memory that it, or a child that it waited for, had at most."""
    network_sent: int = 0
    """Bytes that left the machine meanwhile, as Ethernet frames, also for programs that ran beside it."""
    network_received: int = 0
    """Bytes that came to the machine meanwhile."""
    disk_read: int = 0
    """Bytes that came from the machine's disks for it and all that it started."""
    disk_written: int = 0
    """Bytes that went to the machine's disks for it so far; a file system in memory is none."""
    disk_used: int = 0
    """Bytes that the guest's root file system holds more than before."""
    detail: str = ""

    @property
    def ok(self) -> bool:
        """It ended by itself, with status 0."""
        return self.end == "exited" and self.status == 0

    @property
    def text(self) -> str:
        """Standard output, decoded, without trailing white space."""
        return self.stdout.decode(errors="replace").rstrip()

    def check(self) -> Self:
        """Itself if it is ok; else GuestError with what was wrong and the last line of standard error."""
        if not self.ok:
            last = self.stderr.decode(errors="replace").strip().splitlines()[-1:]
            what = f"status {self.status}" if self.end == "exited" else self.detail or self.end
            raise GuestError(f"the program in the sandbox ended with {what}{': ' + last[0] if last else ''}")
        return self


class Sandbox:
    """A machine for programs that nobody vouches for. Made by vmm.sandbox()."""

    def __init__(self, vm: VirtualMachine) -> None:
        self.vm = vm
        """The machine itself, with everything that it can."""

    async def run(
        self,
        *arguments: Text,
        input: bytes | None = None,  # noqa: A002 - subprocess's name
        env: Environment | None = None,
        cwd: Text = "",
        user: Text = "",
        timeout: float | None = None,
        output_limit: int = OUTPUT_LIMIT,
        memory: int = 0,
        disk: int = 0,
        processes: int = 0,
    ) -> RunResult:
        """Run a program to its end; without arguments the image's own. After `timeout` seconds, or when it has written
        more than `output_limit` bytes to either output, it is killed with all that it started; so it is when that
        takes more than `memory` bytes, has more than `processes` processes at once, or makes the root file system hold
        more than `disk` bytes more; 0: as much as the machine has. Looked at every 20 ms but for memory, which the
        guest's kernel keeps. ConfigError for what cannot be started; whatever the guest does is a result."""
        limits = RunLimits(memory, disk, processes)
        run = _Run(self.vm, output_limit)
        try:
            async with asyncio.timeout(timeout):
                options = {"env": env or {}, "cwd": cwd, "user": user, "limits": limits}
                run.process = await self.vm.start_process(*arguments, **options)
                async with run.process as process:
                    feeding = asyncio.create_task(_feed(process, input), name="sandbox-stdin")
                    try:
                        await _read(process, run.out, run.error)
                        if run.out.full or run.error.full:
                            await _end(process)
                            return run.result("output", detail=f"more than {output_limit} bytes of output")
                        return run.exited(await process.wait())
                    except asyncio.CancelledError:
                        await _end(process)
                        raise
                    finally:
                        feeding.cancel()
                        await asyncio.gather(feeding, return_exceptions=True)
        except TimeoutError:
            return run.result("timeout", detail=f"no end within {timeout:g} s")
        except (GuestError, StateError) as failure:
            # A machine that ends takes its agent along first.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ENDING_SECONDS):
                    outcome = await self.vm.ended()
                    return run.result("machine", detail=f"the end of its machine: {outcome}")
            return run.result("machine", detail=str(failure))


class _Run:
    """One run, and what it has used so far."""

    def __init__(self, vm: VirtualMachine, output_limit: int) -> None:
        self.out, self.error = _Kept(output_limit), _Kept(output_limit)
        self.process: GuestProcess | None = None
        self._vm = vm
        self._begin = time.monotonic()
        self._network = _network(vm)

    def exited(self, status: int) -> RunResult:
        """The program has ended by itself, or because of a limit that the guest keeps."""
        hit = self.process.use.hit if self.process is not None and self.process.use is not None else 0
        end = _HITS[hit] if hit < len(_HITS) else "exited"
        if end != "exited":
            return self.result(end, detail=f"more {end} than allowed")
        return self.result(end, status)

    def result(self, end: RunEnd, status: int = -1, detail: str = "") -> RunResult:
        """What there is to say now."""
        process = self.process
        use = process.use if process is not None else None
        network = _network(self._vm)
        return RunResult(
            end,
            status,
            bytes(self.out.data),
            bytes(self.error.data),
            time.monotonic() - self._begin,
            use.cpu_us / 1e6 if use is not None else process.cpu_seconds if process is not None else 0.0,
            process.memory_peak if process is not None else 0,
            max(0, network[0] - self._network[0]),
            max(0, network[1] - self._network[1]),
            *((use.disk_read, use.disk_written, use.disk_used) if use is not None else (0, 0, 0)),
            detail=detail,
        )


def _network(vm: VirtualMachine) -> tuple[int, int]:
    """Bytes that the machine's cards have sent and received."""
    counters = [device.counters for device in vm.nets().values()]
    return sum(each["bytes_sent"] for each in counters), sum(each["bytes_received"] for each in counters)


async def _end(process: GuestProcess) -> None:
    """Kill it with all that it started, and wait a moment for the guest to say what it used."""
    with contextlib.suppress(TimeoutError, GuestError):
        async with asyncio.timeout(LAST_SECONDS):
            await process.send_signal(signal.SIGKILL)
            # What it has written meanwhile must be read, for its end comes behind that.
            await asyncio.gather(_drain(process.stdout), _drain(process.stderr), process.wait())


async def _drain(stream: GuestStream) -> None:
    async for _ in stream:
        pass


class _Kept:
    """The first bytes of an output."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.full = False
        self._limit = limit

    async def take(self, stream: GuestStream) -> None:
        """Until the stream's end, or until there is more than the limit."""
        async for part in stream:
            room = self._limit - len(self.data)
            self.data += part[:room]
            if len(part) > room:
                self.full = True
                return


async def _read(process: GuestProcess, out: _Kept, error: _Kept) -> None:
    """Both outputs to their ends, or until one has more than it may."""
    tasks = {
        asyncio.create_task(out.take(process.stdout), name="sandbox-stdout"),
        asyncio.create_task(error.take(process.stderr), name="sandbox-stderr"),
    }
    try:
        while tasks and not (out.full or error.full):
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(process: GuestProcess, data: bytes | None) -> None:
    if data:
        await process.write(data)
    await process.close_stdin()


@asynccontextmanager
async def sandbox(
    image: str,
    *,
    allow: str | Sequence[str] | None = None,
    network: bool = False,
    share: str | Sequence[str] = (),
    lifetime: float | None = None,
    warm: bool = True,
    **options: Any,
) -> AsyncIterator[Sandbox]:
    """A running sandbox; ends with the block. `image` as for `vmm run`, most often oci:NAME.

    allow: what it may reach, as ["example.org:443", "10.0.0.0/8"]; without it there is no network at all, with
    `network=True` an open one. share: directories of this host, as HOST:GUEST[,ro]. lifetime: seconds after which the
    whole machine is ended. warm: go on from a machine of this kind that was booted before. `options`: fields of Config
    (memory, cpus, env, user, workdir). Raises ConfigError, HostError."""
    from vmm.launch import run

    if "nets" in options:
        raise ConfigError("nets: a sandbox has allow or network instead")
    shares = [share] if isinstance(share, str) else list(share)
    if shares:
        options["shares"] = [*options.get("shares", ()), *shares]
        warm = False  # what is shared is another each time
    if lifetime is not None:
        options["timeout"] = lifetime
    async with run(image, warm=warm, nets=_nets(allow, network), **options) as vm:
        yield Sandbox(vm)


def _nets(allow: str | Sequence[str] | None, network: bool) -> tuple[Net, ...]:
    from vmm.config import Net

    if allow is None:
        return (Net(kind="user"),) if network else ()
    text = allow if isinstance(allow, str) else "+".join(allow)
    if not text:
        raise ConfigError("allow: nothing is in it; leave it out for no network")
    return (Net(kind="user", allow=text),)


class SyncSandbox:
    """A sandbox for code without a loop: `with vmm.SyncSandbox("oci:…") as box: box.run(…)`, or start() and close(), as
    in the cells of a notebook. Everything it does happens on a loop of its own in a thread, so it works where another
    loop runs already. *any thread*"""

    def __init__(self, image: str, **options: Any) -> None:
        """As sandbox()."""
        self._made = sandbox(image, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._box: Sandbox | None = None
        self._used = False

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *failure: Any) -> None:
        self.close()

    def start(self) -> Self:
        """Start the machine. Once; StateError after that, and what sandbox() raises."""
        if self._used:
            raise StateError("this sandbox was started before: make another")
        self._used = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox", daemon=True)
        self._thread.start()
        try:
            self._box = self._await(self._made.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def close(self) -> None:
        """End the machine. Idempotent; a sandbox that nobody closes ends with the process."""
        if self._loop is None:
            return
        try:
            self._await(self._made.__aexit__(None, None, None))
        finally:
            self._stop()

    def run(self, *arguments: Text, **options: Any) -> RunResult:
        """As Sandbox.run, to its end. StateError outside of the block, or of start() and close()."""
        if self._box is None or self._loop is None:
            raise StateError("the sandbox is not running: use it in its with block, or start() it")
        return self._await(self._box.run(*arguments, **options))

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _stop(self) -> None:
        assert self._loop is not None and self._thread is not None
        self._box = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = None
