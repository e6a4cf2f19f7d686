"""The sandboxes of a server: made of templates, found by id, ended when their time is over, kept while they are paused.
Knows no HTTP. Loop thread.

Running sandboxes live in this process and end with it, however it ends. Paused ones are folders of the state
directory, in which the next server finds them; a folder that holds no whole one is removed then.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu.values import dataclass
from vmm.errors import ConfigError, HostError, StateError, VmmError, os_reason
from vmm.guest.tools import GuestFileError, GuestTools
from vmm.sandboxes.serve.hosted import Hosted, Sheet, quietly, read_sheet
from vmm.sandboxes.serve.tokens import Tenant

if TYPE_CHECKING:
    from vmm.image import ImageLike
    from vmm.vm import VirtualMachine

STARTING = 8
"""Machines that are made at once; more wait."""
IMAGE_SECONDS = 60.0
"""For so long a template's image is not looked for again."""
MAX_TEMPLATES = 64
SHELL, PLAIN_SHELL = "/bin/bash", "/bin/sh"
"""What clients run commands with, and what is taken where an image has no such thing."""
_ID = re.compile(r"[a-z0-9]{20}")
_REGISTRY = re.compile(r"oci:(?![./~])[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,300}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class LimitReached(StateError):
    """More than this tenant may have, or than the server takes now."""


class NotThere(StateError):
    """No such sandbox, or none of this tenant's."""


class WrongPhase(StateError):
    """It is paused, or runs, already."""


class Draining(StateError):
    """The server is about to end."""


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """What a fleet is made with."""

    state: Path
    templates: Mapping[str, str]
    """Names for images, "base" among them."""
    internet: bool = False
    """Sandboxes that ask for the internet have it."""
    options: Mapping[str, Any] | None = None
    """Fields of Config for every machine."""
    warm: bool = True
    only_named: bool = False
    """No other templates than those with a name here."""
    sandboxes: int = 200
    """At most, of all tenants."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A sandbox that somebody wants."""

    template: str
    lifetime: float
    metadata: Mapping[str, str]
    env: Mapping[str, str]
    pauses: bool = False
    resumes: bool = False
    internet: bool | None = None
    allow: tuple[str, ...] = ()
    """Where it may connect to, as Net.allow has it; empty: everywhere, if it has the internet."""


class Fleet:
    """Use in `async with`. Raises ConfigError, HostError for a state directory that cannot be used."""

    def __init__(self, settings: FleetSettings) -> None:
        self._settings = settings
        self._hosted: dict[str, Hosted] = {}
        self._images: dict[str, tuple[float, ImageLike]] = {}
        self._known: dict[str, tuple[str, int]] = {}
        """What images have: the shell, and bytes of the root file system."""
        self._starting = asyncio.Semaphore(STARTING)
        self._first: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wanted = 0
        self._lock = -1
        self.draining = False

    async def __aenter__(self) -> Fleet:
        await asyncio.to_thread(self._open)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _open(self) -> None:
        state = self._settings.state
        try:
            state.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(state / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HostError(f"{state}: another server keeps its sandboxes there; give another --state") from None
        except OSError as error:
            raise HostError(f"{state}: {os_reason(error)}") from error
        for folder in state.iterdir():
            if not _ID.fullmatch(folder.name):
                continue
            sheet = read_sheet(folder)
            if sheet is None:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                self._hosted[sheet.id] = Hosted(sheet, folder, self._forget)

    async def aclose(self) -> None:
        """End what runs; what is paused stays."""
        self.draining = True
        await asyncio.gather(*(hosted.close() for hosted in self._hosted.values()), return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for hosted in list(self._hosted.values()):
            if hosted.phase == "running":
                hosted.finish()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    async def pause_all(self) -> None:
        """Put down whatever runs, for the next server; what cannot be is ended by aclose()."""
        self.draining = True
        await asyncio.gather(*(quietly(self.pause(hosted)) for hosted in self.list() if hosted.phase == "running"))

    # Finding.

    def list(self, tenant: Tenant | None = None) -> list[Hosted]:
        """A tenant's, or all."""
        return [one for one in self._hosted.values() if tenant is None or one.sheet.tenant == tenant.name]

    def find(self, id: str, tenant: Tenant | None = None) -> Hosted:  # noqa: A002 - the API's word
        """Raises NotThere."""
        hosted = self._hosted.get(id)
        if hosted is None or (tenant is not None and hosted.sheet.tenant != tenant.name):
            raise NotThere(f"sandbox {id[:40]} was not found")
        return hosted

    def _forget(self, hosted: Hosted) -> None:
        self._hosted.pop(hosted.sheet.id, None)

    # Making.

    async def create(self, wish: Wish, tenant: Tenant) -> Hosted:
        """A running sandbox. Raises LimitReached, Draining, ConfigError, HostError, StateError, GuestError."""
        self._check_open()
        lifetime = self._lifetime(wish.lifetime, tenant)
        if len(self.list(tenant)) + self._wanted >= tenant.sandboxes:
            raise LimitReached(f"{tenant.name} has {tenant.sandboxes} sandboxes; end one first")
        if len(self._hosted) + self._wanted >= self._settings.sandboxes:
            raise LimitReached(f"the server has {self._settings.sandboxes} sandboxes, and takes no more now")
        name = self._image_name(wish.template)
        self._wanted += 1
        try:
            image = await self._image(name)
            options = self._options(wish)
            async with self._first.setdefault(name, asyncio.Lock()) if name not in self._known else self._starting:
                hosted = await self._start(wish, tenant, name, image, options)
        finally:
            self._wanted -= 1
        hosted.live_until(time.time() + lifetime, partial(self._time_is_over, hosted))
        return hosted

    async def _start(
        self, wish: Wish, tenant: Tenant, name: str, image: ImageLike, options: dict[str, Any]
    ) -> Hosted:
        now = time.time()
        sheet = Sheet(
            id="".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(20)),
            template=wish.template,
            tenant=tenant.name,
            access_token=secrets.token_urlsafe(24),
            metadata=dict(wish.metadata),
            env=dict(wish.env),
            started_at=now,
            end_at=now,
            pauses=wish.pauses,
            resumes=wish.resumes,
            internet=wish.internet,
        )
        hosted = Hosted(sheet, self._settings.state / sheet.id, self._forget)
        await hosted.open(partial(self._machine, image, options))
        try:
            sheet.cpus, sheet.memory = hosted.vm.config.cpus, hosted.vm.config.memory
            if name not in self._known:
                self._known[name] = await _look(hosted.vm)
            sheet.shell, sheet.disk = self._known[name]
            await hosted.vm.agent.identify()
        except BaseException:
            await hosted.close()
            raise
        self._hosted[sheet.id] = hosted
        return hosted

    def _machine(self, image: ImageLike, options: dict[str, Any]) -> AbstractAsyncContextManager[VirtualMachine]:
        from vmm.launch import run

        return run(image, warm=self._settings.warm, **options)

    def _options(self, wish: Wish) -> dict[str, Any]:
        from vmm.config import Net

        options: dict[str, Any] = dict(self._settings.options or {})
        options["env"] = [{"name": name, "value": value} for name, value in wish.env.items()]
        options["nets"] = ()
        if self._settings.internet and wish.internet is not False:
            # With a policy, be it that all is allowed, the gateway's address does not lead to services of this host.
            options["nets"] = (Net(kind="user", allow="+".join(wish.allow) or "*"),)
        return options

    def _image_name(self, template: str) -> str:
        """The image that a template means: one with a name here, or one of a registry; no file of the host's. Raises
        ConfigError."""
        name = self._settings.templates.get(template)
        if name is not None:
            return name
        if self._settings.only_named:
            known = ", ".join(sorted(self._settings.templates))
            raise ConfigError(f"template {template[:100]!r}: this server has {known}")
        if _REGISTRY.fullmatch(template) and not _is_file(template[4:]):
            return template
        if _NAME.fullmatch(template):
            return template
        raise ConfigError(f"template {template[:100]!r}: give the name of an image, or oci: and a registry's NAME:TAG")

    async def _image(self, name: str) -> ImageLike:
        from vmm.launch import find_image

        now = time.monotonic()
        found = self._images.get(name)
        if found is None or now - found[0] > IMAGE_SECONDS:
            found = now, await asyncio.to_thread(find_image, name)
            while len(self._images) >= MAX_TEMPLATES:
                self._images.pop(next(iter(self._images)))
            self._images[name] = found
        return found[1]

    async def prepare(self, tell: Callable[[str], None]) -> None:
        """Make ready what has a name, one after another, so that its first sandbox does not wait for an image to be
        made, or a boot. `tell` hears what takes long, and what fails."""
        from vmm.image import config_for
        from vmm.state import warm

        for template, name in sorted(self._settings.templates.items()):
            wish = Wish(template, 0.0, {}, {}, internet=False)
            try:
                image = await self._image(name)
                options = self._options(wish)
                path = await asyncio.to_thread(warm.folder, config_for(image, **options))
                if not self._settings.warm or warm.is_there(path):
                    continue
                tell(f"the template {template} ({name}) boots once, and is kept")
                async with self._first.setdefault(name, asyncio.Lock()), self._machine(image, options) as vm:
                    self._known[name] = await _look(vm)
            except VmmError as error:
                tell(f"the template {template} ({name}): {error}")

    # Times and ends.

    def _check_open(self) -> None:
        if self.draining:
            raise Draining("the server is about to end, and takes nothing on")

    def _lifetime(self, seconds: float, tenant: Tenant) -> float:
        if not 0 <= seconds <= tenant.lifetime:
            raise ConfigError(f"timeout: {seconds:g} s; 0 to {tenant.lifetime} are possible")
        return seconds

    def set_timeout(self, hosted: Hosted, seconds: float, tenant: Tenant, *, longer: bool = False) -> None:
        """From now on; with `longer` only if it is later than what stands. Raises ConfigError."""
        end = time.time() + self._lifetime(seconds, tenant)
        if longer and end < hosted.sheet.end_at:
            return
        hosted.live_until(end, partial(self._time_is_over, hosted))

    def _time_is_over(self, hosted: Hosted) -> None:
        work = self._pause_or_end(hosted) if hosted.sheet.pauses else self.kill(hosted)
        task = asyncio.create_task(work, name=f"end of {hosted.sheet.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pause_or_end(self, hosted: Hosted) -> None:
        try:
            await self.pause(hosted)
        except VmmError:
            await self.kill(hosted)

    async def kill(self, hosted: Hosted) -> None:
        """End it, running or paused."""
        async with hosted.lock:
            await hosted.end()

    async def pause(self, hosted: Hosted) -> None:
        """StateError if it is paused already; VmmError: it runs on."""
        async with hosted.lock:
            if hosted.phase != "running":
                raise WrongPhase(f"the sandbox {hosted.sheet.id} is {hosted.phase}")
            await hosted.pause()

    async def resume(self, hosted: Hosted, seconds: float, tenant: Tenant) -> bool:
        """Take it up if it is paused, and have it live for so long, or as long as it has. Whether it was paused."""
        self._check_open()
        lifetime = self._lifetime(seconds, tenant)
        async with hosted.lock:
            if hosted.phase == "ended":
                raise NotThere(f"sandbox {hosted.sheet.id} was not found")
            was_paused = hosted.phase == "paused"
            if was_paused:
                async with self._starting:
                    await hosted.resume()
        if was_paused:
            hosted.live_until(time.time() + lifetime, partial(self._time_is_over, hosted))
        else:
            self.set_timeout(hosted, seconds, tenant, longer=True)
        return was_paused


def _is_file(text: str) -> bool:
    """`oci:NAME` would mean a file or directory of the server's if it is there."""
    return os.path.lexists(text) or os.path.lexists(text.rpartition(":")[0] or text)


async def _look(vm: VirtualMachine) -> tuple[str, int]:
    tools = GuestTools(vm.agent)
    disk = (await tools.measure()).disk_total
    try:
        await tools.stat(SHELL)
    except GuestFileError:
        return PLAIN_SHELL, disk
    return SHELL, disk


def matching(found: Iterable[Hosted], keep: Callable[[Hosted], bool]) -> list[Hosted]:
    """Those to be kept, the ones that started last first."""
    return sorted(filter(keep, found), key=lambda hosted: (hosted.sheet.started_at, hosted.sheet.id), reverse=True)
