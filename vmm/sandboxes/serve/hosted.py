"""One sandbox of a server: its machine, what is known of it, and its being put down and taken up. Loop thread.

A machine is entered, and left, by one task, the keeper, whoever asks for it. What a paused sandbox is stands in a
folder: sandbox.json and a snapshot; what goes on from that removes the snapshot, whose files live on as long as they
are mapped.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vmm.errors import StateError, VmmError
from vmm.sandboxes.serve.programs import Programs

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

Phase = Literal["running", "paused", "ended"]
Opening = Callable[[], AbstractAsyncContextManager["VirtualMachine"]]
SHEET, SNAPSHOT = "sandbox.json", "snapshot"


@dataclass(slots=True)
class Sheet:
    """What is known of a sandbox, and kept while it is paused."""

    id: str
    template: str
    tenant: str
    access_token: str
    """What its own surface asks for."""
    metadata: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    started_at: float = 0.0
    """Seconds since 1970, as all times here."""
    end_at: float = 0.0
    pauses: bool = False
    """At its end it is paused, and not ended."""
    resumes: bool = False
    """A request to a paused one takes it up."""
    internet: bool | None = None
    """What was asked for; None: nothing."""
    shell: str = "/bin/bash"
    """What stands for clients' /bin/bash."""
    cpus: int = 1
    memory: int = 0
    """Bytes."""
    disk: int = 0
    programs: list[dict[str, Any]] = field(default_factory=list)
    """Those that run while it is paused."""


class Hosted:
    """A sandbox. `on_end` is called once when it has ended for good."""

    def __init__(self, sheet: Sheet, folder: Path, on_end: Callable[[Hosted], None]) -> None:
        self.sheet = sheet
        self.phase: Phase = "paused"
        self.programs = Programs()
        self.watchers: dict[str, Any] = {}
        """Directories that are watched for clients that ask now and then, by name: they have aclose()."""
        self.ticks: tuple[int, ...] = ()
        """The guest's processor times when they were asked for last."""
        self.lock = asyncio.Lock()
        """Held while it is taken up, put down or ended."""
        self._folder = folder
        self._on_end = on_end
        self._vm: VirtualMachine | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._leave = asyncio.Event()
        self._stays = False
        self._timer: asyncio.TimerHandle | None = None
        self._at_end: Callable[[], None] | None = None

    @property
    def vm(self) -> VirtualMachine:
        """Its machine. StateError if it does not run."""
        if self._vm is None:
            raise StateError(f"the sandbox {self.sheet.id} was not found: it does not run")
        return self._vm

    async def open(self, opening: Opening) -> None:
        """Enter the machine. Raises what that raises."""
        entered: asyncio.Future[VirtualMachine] = asyncio.get_running_loop().create_future()
        self._leave.clear()
        self._stays = False
        self._keeper = asyncio.create_task(self._keep(opening, entered), name=f"sandbox {self.sheet.id}")
        try:
            self._vm = await asyncio.shield(entered)
        except BaseException:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            raise
        self.phase = "running"
        self.programs.attach(self._vm)

    async def _keep(self, opening: Opening, entered: asyncio.Future[VirtualMachine]) -> None:
        try:
            async with opening() as vm:
                if entered.cancelled():
                    return
                entered.set_result(vm)
                leaving = asyncio.create_task(self._leave.wait(), name="leave")
                ended = asyncio.create_task(vm.ended(), name="ended")
                try:
                    await asyncio.wait({leaving, ended}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    leaving.cancel()
                    ended.cancel()
                    self._vm = None
                    await self.programs.aclose()
                    await self._end_watchers()
        except Exception as error:
            if not entered.done():
                entered.set_exception(error)
                return
        finally:
            self._vm = None
        if not (self._leave.is_set() or self._stays):  # it ended by itself
            self.finish()

    async def _end_watchers(self) -> None:
        watchers, self.watchers = list(self.watchers.values()), {}
        for watcher in watchers:
            await watcher.aclose()

    async def close(self) -> None:
        """Leave the machine, and wait until everything of it is gone."""
        self._leave.set()
        if self._keeper is not None:
            await asyncio.gather(self._keeper, return_exceptions=True)

    # Times.

    def live_until(self, end_at: float, at_end: Callable[[], None]) -> None:
        """`at_end` is called at that time, unless another is set before."""
        self.sheet.end_at = end_at
        self._at_end = at_end
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, end_at - time.time()), at_end)

    def finish(self) -> None:
        """It is over: whoever keeps the list learns of it. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        if self.phase != "ended":
            self.phase = "ended"
            self._on_end(self)

    # Putting down.

    async def pause(self) -> None:
        """Into the folder. Raises VmmError; then it runs on. The caller holds the lock."""
        vm = self.vm
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True, mode=0o700)
        self.sheet.programs = self.programs.describe()
        self._stays = True  # that the machine ends is no end of the sandbox
        try:
            await vm.snapshot(self._folder / SNAPSHOT, stop=True)
        except BaseException:
            self._stays = False
            await asyncio.to_thread(shutil.rmtree, self._folder, True)
            if vm.ending:
                self.finish()
            elif self._at_end is not None:
                self.live_until(self.sheet.end_at, self._at_end)
            raise
        await self.close()
        await asyncio.to_thread(write_sheet, self._folder, self.sheet)
        self.phase = "paused"

    async def resume(self) -> None:
        """From the folder. Raises VmmError; then it stays paused. The caller holds the lock."""
        from vmm.launch import restore

        await self.open(lambda: restore(self._folder / SNAPSHOT))
        await self.programs.rejoin(self.sheet.programs)
        self.sheet.programs = []
        await asyncio.to_thread(shutil.rmtree, self._folder, True)

    async def end(self) -> None:
        """For good. The caller holds the lock."""
        await self.close()
        await asyncio.to_thread(shutil.rmtree, self._folder, True)
        self.finish()


def write_sheet(folder: Path, sheet: Sheet) -> None:
    """Blocks. The file is whole or is not there."""
    part = folder / f".{SHEET}.part"
    part.write_text(json.dumps(asdict(sheet)))
    part.chmod(0o600)
    part.replace(folder / SHEET)


def read_sheet(folder: Path) -> Sheet | None:
    """The sheet of a paused sandbox; None if that is no whole one. Blocks."""
    with suppress(OSError, ValueError, TypeError):
        sheet = Sheet(**json.loads((folder / SHEET).read_text()))
        if sheet.id == folder.name and (folder / SNAPSHOT / "manifest.json").exists():
            return sheet
    return None


async def quietly(work: Any) -> None:
    """Await it; a VmmError of it is nothing that could still be told anybody."""
    with suppress(VmmError):
        await work
