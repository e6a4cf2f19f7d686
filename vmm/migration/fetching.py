"""The target's part of post-copy: the machine runs here, and what is left of its memory comes.

vmm.machine.absent has the pages; this module has the connection over which they come (a page link), tells devices when
pages came that they waited for, pauses the machine when the link breaks, and goes on over the next. Loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmm.errors import HostError, StateError, VmmError
from vmm.lifecycle import State
from vmm.machine.memory import Anonymous
from vmm.migration.link import CONNECT_SECONDS, SILENCE, Link
from vmm.migration.postcopy import missing_frames
from vmm.migration.protocol import Kind, Recovered
from vmm.vm import Obstacle

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine


class Fetching:
    """Of one machine."""

    def __init__(self, vm: VirtualMachine, listen: Callable[[str, Path | None], Awaitable[str]]) -> None:
        """`listen`: vmm.migration.target.Receiver.also. Raises HostError if this host cannot do it."""
        self.listen = listen
        memory = vm.machine.memory
        if not isinstance(memory.source, Anonymous) or memory.source.hugepages:
            raise HostError("post-copy: only memory of the process itself can follow; leave hugepages and direct out")
        self.absent = memory.expect(kernel=vm.core == "kvm")
        self.needed = False
        """The machine cannot do without its source."""
        self._vm = vm
        self._link: Link | None = None
        self._joined = asyncio.Event()
        self._changed = asyncio.Event()
        self._paused_here = False
        vm.fetching = self

    @property
    def joined(self) -> bool:
        """The page link is there."""
        return self._link is not None

    def join(self, link: Link) -> bool:
        """The page link; False: there is one."""
        if self._link is not None or link.version < 3:
            return False
        self._link = link
        self._joined.set()
        return True

    async def begin(self, at_once: Sequence[tuple[int, int]]) -> None:
        """All that is missing is known: (gpa, length) `at_once` is fetched now. Nothing of the machine runs. Raises
        StateError, HostError."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._joined.wait()  # the source has connected it already, but its handshake may still go on
        except TimeoutError:
            raise StateError("pages are missing, and there is no connection for them") from None
        assert self._link is not None
        await asyncio.to_thread(self.absent.begin)
        self.needed = True
        self.absent.listen(self._told)
        self.absent.attach(self._link.fileno())
        try:
            async with asyncio.timeout(SILENCE):
                await self.absent.fetch(at_once)
        except TimeoutError:
            raise HostError(f"{self._link.peer}: pages have not come within {SILENCE:g} s") from None
        self._check_given_up()

    def _check_given_up(self) -> None:
        found = self.absent.status()
        if found.state == "given up":
            raise HostError(f"pages of memory: {found.why}")

    def commit(self) -> None:
        """The machine runs from now on. Raises HostError if its memory was lost meanwhile."""
        self._check_given_up()
        self.absent.commit()
        self._check_given_up()

    def _told(self) -> None:
        for device in self._vm.virtio_devices().values():
            device.memory_came()
        self._changed.set()

    async def run(self, messages: asyncio.Queue[Any]) -> bool:
        """Until nothing is missing, or the machine has ended. `messages` are the main connection's: with its end the
        page link is left, too. Whether it is there at the end."""
        vm = self._vm
        ended = asyncio.create_task(vm.ended(), name="post-copy: end")
        main = asyncio.create_task(messages.get(), name="post-copy: main connection")
        with_main = True
        try:
            while not ended.done():
                found = self.absent.status()
                if found.state in ("whole", "given up"):
                    break
                if found.state == "broken" and not self._paused_here:
                    self._interrupt(found.why, found.left)
                elif found.state == "live" and self._paused_here:
                    self._go_on()
                self._changed.clear()
                changed = asyncio.create_task(self._changed.wait(), name="post-copy: change")
                waits = {changed, ended, *(() if main.done() else (main,))}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if main.done() and isinstance(main.result(), BaseException):
                    self.absent.detach()
                    with_main = False
                    main = asyncio.create_task(_never(), name="post-copy: no main connection")
        finally:
            ended.cancel()
            main.cancel()
            if main.done() and not main.cancelled():
                messages.put_nowait(main.result())
        self.needed = False
        if self._paused_here and not vm.ending:
            self._go_on()
        self.absent.forget()
        await asyncio.to_thread(self.absent.close)
        if vm.ending and self._link is not None:
            with contextlib.suppress(VmmError):  # the source need not keep anything
                await asyncio.to_thread(self._link.send_message, Kind.DONE)
        vm.fetching = None
        return with_main

    def _interrupt(self, why: str, left: int) -> None:
        """The machine waits for the next connection."""
        name = self._vm.config.name or "NAME"
        text = (
            f"{left * 4096 >> 20} MiB of the machine's memory are still at its source, and {why}; there, vmm migrate "
            f"--recover {name} URI goes on, with another URI after vmm receive --recover {name} URI here"
        )
        self._paused_here = True
        self._was_running = self._vm.state is State.RUNNING
        self._vm.halt_for(Obstacle(text))
        self._vm.tell(text)

    def _go_on(self) -> None:
        self._paused_here = False
        self._vm.obstacle = None
        if self._was_running and self._vm.state is State.PAUSED:
            self._vm.resume()

    async def recover(self, link: Link) -> bool:
        """A source has come back: its connection is the page link from now on. False: nothing is missing any more.
        Raises VmmError if it breaks at once."""
        if not self.needed or not self.absent.active:
            return False
        self.absent.detach()
        frames = list(missing_frames(self.absent.bitmaps))
        if not frames:
            return False

        def answer() -> None:
            link.send_message(Kind.RECOVERED, Recovered("waiting", len(frames)))
            for payload in frames:
                link.send(Kind.MISSING, payload)

        await asyncio.to_thread(answer)
        if not self.absent.active:
            return False
        old, self._link = self._link, link
        self.absent.attach(link.fileno())
        if old is not None:
            old.abort()
            await asyncio.to_thread(old.close)
        return True

    def as_dict(self) -> dict[str, Any]:
        """For the control socket: bytes, pages, seconds."""
        found = self.absent.status()
        return {
            "state": found.state, "why": found.why, "missing": found.left * 4096, "faults": found.faults,
            "slowest": found.slowest_ns / 1e9, "waited": found.waited_ns / 1e9, "pages": found.pages,
            "zero_pages": found.zero,
        }  # fmt: skip

    async def aclose(self) -> None:
        """Leave the connection. Idempotent."""
        link, self._link = self._link, None
        if link is not None:
            link.abort()
            await asyncio.to_thread(link.close)


async def _never() -> None:
    await asyncio.get_running_loop().create_future()
