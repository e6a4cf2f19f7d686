"""The domains: what is defined, what runs, and how each got there. Every change tells its event, in order.

A domain is persistent (it has a definition that outlives it), or transient (it is there while it runs), or both at
once: running with one definition while the next start will use another. Machines that somebody started with `vmm run
--name` are transient domains as well; they are looked for when clients ask for domains, and every second. Loop thread.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmm.config import Config
from vmm.errors import ConfigError, HostError, StateError, VmmError
from vmm.libvirt import host, jobs, live, pinning
from vmm.libvirt.domain import (
    BOOTED,
    ENDS,
    FAILED,
    GUEST_SHUTDOWN,
    STARTED_MIGRATED,
    Domain,
    DomainReason,
    DomainState,
    How,
)
from vmm.libvirt.domain_xml import read_domain
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.events import DomainEvent, Hub, LifecycleEvent
from vmm.libvirt.format import domain_xml
from vmm.libvirt.machines import START_SECONDS, ControlClient, Process, ask, end_waiting, last_words, waiting
from vmm.libvirt.networks import Networks
from vmm.libvirt.spec import Pins, Spec, described, spec_of
from vmm.libvirt.store import Store
from vmm.libvirt.wire import DomainRef
from vmm.management.registry import RegistryEntry, entries

MAX_DOMAINS = 10_000
SCAN_SECONDS = 1.0
SETTLE_SECONDS = 30.0
log = logging.getLogger(__name__)


class Domains:
    """All of them."""

    def __init__(self, store: Store, events: Hub, launcher: Sequence[str], emulator: str, networks: Networks) -> None:
        """`launcher`: the command that `run` and its options are appended to."""
        self.networks = networks
        self._store, self._events = store, events
        self._launcher, self.emulator = tuple(launcher), emulator
        self._by_name: dict[str, Domain] = {}
        self._ids = itertools.count(1)
        self._processes: dict[str, Process] = {}
        self._scanning = asyncio.Lock()

    # Looking.

    def all(self) -> list[Domain]:
        """By name."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def named(self, name: str) -> Domain:
        """Raises LibvirtError."""
        domain = self._by_name.get(name)
        if domain is None:
            raise LibvirtError(Code.NO_DOMAIN, f"no domain with matching name '{name}'")
        return domain

    def with_uuid(self, identity: bytes, name: str = "") -> Domain:
        """Raises LibvirtError."""
        for domain in self._by_name.values():
            if domain.uuid.bytes == identity:
                return domain
        text = f"no domain with matching uuid '{uuid.UUID(bytes=identity)}'" + (f" ({name})" if name else "")
        raise LibvirtError(Code.NO_DOMAIN, text)

    def with_id(self, number: int) -> Domain:
        """Raises LibvirtError."""
        for domain in self._by_name.values():
            if domain.id == number and domain.active:
                return domain
        raise LibvirtError(Code.NO_DOMAIN, f"no domain with matching id {number}")

    def of(self, ref: DomainRef) -> Domain:
        """The domain that a client means. Raises LibvirtError."""
        return self.with_uuid(ref.uuid, ref.name)

    # Definitions.

    def load(self) -> None:
        """What is stored, when the daemon starts. What cannot be read is told and left where it is."""
        for name in self._store.names("domains", ".xml"):
            text = self._store.read("domains", f"{name}.xml")
            try:
                spec = self.read(text or "")
                if spec.name != name:
                    raise ConfigError(f"the file defines {spec.name}")
            except VmmError as error:
                log.error("domains/%s.xml: %s", name, error)
                continue
            domain = self._by_name[name] = Domain(name, spec.uuid)
            domain.persistent = spec

    def read(self, text: str) -> Spec:
        """A definition from XML. Raises LibvirtError, ConfigError."""
        return read_domain(text, self._channel)

    def define(self, spec: Spec) -> Domain:
        """Add a definition, or replace a domain's. Raises LibvirtError, HostError."""
        domain = self._claim(spec)
        new = domain is None
        if domain is None:
            domain = Domain(spec.name, spec.uuid)
        self._store.write("domains", f"{spec.name}.xml", domain_xml(spec, self.emulator))
        was_persistent = domain.persistent is not None
        domain.persistent = spec
        domain.updated = domain.active
        self._by_name[spec.name] = domain
        self._events.lifecycle(domain.ref, LifecycleEvent.DEFINED, 0 if new or not was_persistent else 1)
        return domain

    def undefine(self, domain: Domain) -> None:
        """Raises LibvirtError, HostError."""
        if domain.persistent is None:
            raise LibvirtError(Code.OPERATION_INVALID, "cannot undefine transient domain")
        self._store.remove("domains", f"{domain.name}.xml")
        self._store.remove("autostart", domain.name)
        domain.persistent = None
        if not domain.active:
            self._forget(domain)
        self._events.lifecycle(domain.ref, LifecycleEvent.UNDEFINED, 0)

    def rename(self, domain: Domain, name: str) -> None:
        """Raises LibvirtError, HostError, ConfigError."""
        if domain.active:
            raise LibvirtError(Code.OPERATION_INVALID, "cannot rename active domain")
        assert domain.persistent is not None
        spec = domain.persistent.with_config(name=name, uuid=str(domain.uuid))
        if name in self._by_name:
            raise LibvirtError(Code.OPERATION_INVALID, f"domain with name '{name}' already exists")
        autostart = self.autostart(domain)
        self._store.write("domains", f"{name}.xml", domain_xml(spec, self.emulator))
        self._store.remove("domains", f"{domain.name}.xml")
        self._events.lifecycle(domain.ref, LifecycleEvent.UNDEFINED, 1)
        del self._by_name[domain.name]
        self._store.remove("autostart", domain.name)
        domain.name, domain.persistent = name, spec
        self._by_name[name] = domain
        if autostart:
            self.set_autostart(domain, on=True)
        self._events.lifecycle(domain.ref, LifecycleEvent.DEFINED, 2)

    def autostart(self, domain: Domain) -> bool:
        return self._store.exists("autostart", domain.name)

    def set_autostart(self, domain: Domain, *, on: bool) -> None:
        """Raises LibvirtError, HostError."""
        if domain.persistent is None:
            raise LibvirtError(Code.OPERATION_INVALID, "cannot set autostart for transient domain")
        if on:
            self._store.write("autostart", domain.name, "")
        else:
            self._store.remove("autostart", domain.name)

    def set_live(self, domain: Domain, spec: Spec) -> None:
        """The running machine is described otherwise from now on (title, metadata). Raises HostError."""
        domain.live = spec
        self._remember(domain)

    def replace_definition(self, domain: Domain, spec: Spec) -> None:
        """A definition with some of its values changed; not an event of its own. Raises HostError."""
        self._store.write("domains", f"{spec.name}.xml", domain_xml(spec, self.emulator))
        domain.persistent = spec

    # Life.

    async def create(
        self, spec: Spec, *, paused: bool, process: Sequence[str] | None = None, how: How = BOOTED
    ) -> Domain:
        """Start a transient domain, or a persistent one with another definition for this run. Raises VmmError."""
        domain = self._claim(spec)
        if domain is not None and domain.active:
            raise LibvirtError(Code.OPERATION_INVALID, f"domain '{spec.name}' is already active")
        if domain is None:
            domain = self._by_name[spec.name] = Domain(spec.name, spec.uuid)
        try:
            await self.start(domain, spec, paused=paused, process=process, how=how)
        finally:
            if not domain.active and domain.persistent is None:
                self._forget(domain)
        return domain

    async def start(
        self,
        domain: Domain,
        spec: Spec | None = None,
        *,
        paused: bool,
        process: Sequence[str] | None = None,
        how: How = BOOTED,
    ) -> None:
        """Start it and wait until it runs, or stands ready. `process`: what to run instead of `run` with the
        configuration. Raises VmmError."""
        async with domain.lock:
            if domain.active:
                raise LibvirtError(Code.OPERATION_INVALID, "domain is already running")
            spec = spec or domain.persistent
            if spec is None:
                raise LibvirtError(Code.NO_DOMAIN, f"no domain with matching name '{domain.name}'")
            spec = spec.with_config(uuid=str(domain.uuid))
            self._prepare(spec)
            arguments = list(process) if process is not None else self._run_arguments(spec)
            domain.end = None
            started = Process.start([*self._launcher, *arguments], self._store.file("log", f"{spec.name}.log"))
            self._processes[spec.name] = started
            try:
                async with asyncio.timeout(START_SECONDS):
                    await self._started(domain, spec, started, paused=paused, how=how)
            except TimeoutError:
                started.kill()
                raise HostError(f"{spec.name}: the machine was not ready within {START_SECONDS:g} s") from None
            except asyncio.CancelledError:
                started.kill()  # the client that asked for it went away before it was there
                raise
            finally:
                if not domain.active:
                    self._processes.pop(spec.name, None)

    async def destroy(self, domain: Domain) -> None:
        """End it at once; it is gone when this returns. Raises VmmError."""
        entry = domain.running_entry()
        process = self._processes.get(domain.name)
        try:
            await ask(entry, "kill")
        except VmmError:
            if process is None:
                raise
            process.kill()
        await self.gone(domain)

    async def gone(self, domain: Domain) -> None:
        """Until a machine that ends has ended. Raises HostError."""
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                await domain.ended.wait()
        except TimeoutError:
            raise HostError(f"{domain.name}: the machine does not end") from None

    async def aclose(self) -> None:
        """The daemon ends; the machines do not."""
        followers = [domain.follower for domain in self._by_name.values() if domain.follower is not None]
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        for process in self._processes.values():
            process.forget()

    # Machines that are there.

    async def scan(self) -> None:
        """Take up machines that run and that no domain follows."""
        async with self._scanning:
            for entry in entries():
                domain = self._by_name.get(entry.name)
                if domain is not None and (domain.active or domain.lock.locked()):
                    continue
                if entry.info.get("pid") is None:
                    continue  # it is about to begin
                with suppress(OSError, VmmError):
                    await self._adopt(entry, domain)

    def keep_pinned(self, only: Domain | None = None) -> None:
        """Have threads of machines run where they are to; of one, or of all. What cannot be is logged once, and holds
        up no other machine."""
        present: frozenset[int] = frozenset()
        for domain in [only] if only is not None else self.all():
            if domain.live is None or domain.live.pins == Pins():
                continue
            present = present or host.processor_numbers()
            try:
                pinning.apply(domain.pid, domain.live.pins, present)
                domain.extra.pop("pins refused", None)
            except HostError as error:
                if domain.extra.get("pins refused") != str(error):
                    log.warning("%s: %s", domain.name, error)
                domain.extra["pins refused"] = str(error)

    async def _adopt(self, entry: RegistryEntry, domain: Domain | None) -> None:
        control = await ControlClient.connect(entry)
        try:
            status = await control.ask("events")
            if status["state"] in ("created", "stopped"):
                raise StateError(f"{entry.name}: {status['state']}")
            config = Config.from_dict((await ask(entry, "config"))["config"])
            remembered = self._store.read_json("live", f"{entry.name}.json")
            spec = spec_of(config)
            number = None
            if remembered.get("pid") == status["pid"] and (text := self._store.read("live", f"{entry.name}.xml")):
                with suppress(VmmError):
                    spec = described(self.read(text), config)
                    number = remembered.get("id")
            if domain is None:
                domain = self._by_name.get(entry.name)
            if domain is None:
                domain = self._by_name[entry.name] = Domain(entry.name, spec.uuid)
            elif domain.active or domain.lock.locked():
                raise StateError(f"{entry.name}: taken up already")
        except BaseException:
            control.close()
            raise
        if isinstance(number, int) and all(other.id != number for other in self._by_name.values()):
            self._ids = itertools.count(max(number + 1, next(self._ids)))
            domain.id = number
        self._activate(domain, spec, entry, status)
        paused = status["state"] == "paused"
        domain.state = DomainState.PAUSED if paused else DomainState.RUNNING
        domain.reason = DomainReason.UNKNOWN
        if number is None:
            self._remember(domain)
            arrives = remembered.get("pid") == status["pid"] and remembered.get("expected") is True
            domain.extra["arrives"] = arrives and paused  # until it runs
            self._events.lifecycle(domain.ref, LifecycleEvent.STARTED, STARTED_MIGRATED if arrives else 0)
        self._follow(domain, control)

    def expect(self, spec: Spec, pid: int) -> None:
        """A process waits for this machine. Whoever finds it later, perhaps another daemon, knows what it is. Raises
        HostError."""
        self._store.write("live", f"{spec.name}.xml", domain_xml(spec, self.emulator))
        self._store.write("live", f"{spec.name}.json", json.dumps({"pid": pid, "expected": True}))

    def unexpect(self, name: str) -> None:
        """It does not come. Raises HostError."""
        domain = self._by_name.get(name)
        if domain is None or not domain.active:
            for suffix in ("xml", "json"):
                self._store.remove("live", f"{name}.{suffix}")

    def end_expecting(self) -> None:
        """End processes that a daemon before this one let wait for machines, and to which none has come."""
        there = {entry.info.get("pid") for entry in entries()}
        noted: set[int] = set()
        for name in self._store.names("live", ".json"):
            remembered = self._store.read_json("live", f"{name}.json")
            pid = remembered.get("pid")
            if not isinstance(pid, int):
                continue
            noted.add(pid)
            if remembered.get("expected") and pid not in there:
                end_waiting(pid, name)
                self.unexpect(name)
        # One without a note: the daemon was killed before it wrote it, and has told no source where the process waits.
        for pid, name in waiting(self._store.file("log", "")):
            if pid not in there and pid not in noted:
                end_waiting(pid, name)

    async def received(self, domain: Domain, spec: Spec, process: Process) -> None:
        """A machine arrived from another host, in a process of this daemon: it is what was described there. Raises
        HostError."""
        self._processes[domain.name] = process
        if domain.live is not None:
            self.set_live(domain, described(spec, domain.live.config))
            await self._replug(domain)
        if domain.state == DomainState.RUNNING:
            domain.extra.pop("arrives", None)
        domain.reason = DomainReason.FROM_ANOTHER_HOST
        self._events.lifecycle(domain.ref, LifecycleEvent.RESUMED, 1)

    # Inside.

    def _claim(self, spec: Spec) -> Domain | None:
        """The domain that a definition is for, None for a new one. Raises LibvirtError if name and UUID are two's."""
        domain = self._by_name.get(spec.name)
        for other in self._by_name.values():
            if other is not domain and other.uuid == spec.uuid:
                raise LibvirtError(
                    Code.OPERATION_FAILED, f"domain '{other.name}' already exists with uuid {other.uuid}", From.QEMU
                )
        if domain is not None and domain.uuid != spec.uuid:
            raise LibvirtError(
                Code.OPERATION_FAILED, f"domain '{domain.name}' already exists with uuid {domain.uuid}", From.QEMU
            )
        if domain is None and len(self._by_name) >= MAX_DOMAINS:
            raise LibvirtError(Code.OPERATION_FAILED, f"{MAX_DOMAINS} domains are as many as this daemon takes")
        return domain

    def _channel(self, name: str, channel: str) -> Path:
        return self._store.file("channel", name) / channel

    def _prepare(self, spec: Spec) -> None:
        """Files and directories of a start. Raises VmmError."""
        self.networks.check(spec)
        spec.config.check_host()
        for path in [port.path for port in spec.config.ports] + ([spec.config.vsock] if spec.config.vsock else []):
            if path.is_relative_to(self._store.path / "channel"):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
        self._store.write("config", f"{spec.name}.toml", spec.config.to_toml())

    def _run_arguments(self, spec: Spec) -> list[str]:
        return ["run", "--config", str(self._store.file("config", f"{spec.name}.toml")), "--paused"]

    async def _started(self, domain: Domain, spec: Spec, process: Process, *, paused: bool, how: How) -> None:
        """Until the machine that a process runs is there, and runs unless it is to stay paused. Every machine begins
        paused, so that nothing it does goes unheard. Raises HostError with what the process said."""
        control = await self._reach(spec, process)
        try:
            status = await control.ask("events")
            while status["state"] != "paused":
                if (event := await control.next_event()) is None:
                    raise await self._failure(spec, process)
                status |= {"state": event.get("state", status["state"])}
        except BaseException as error:
            control.close()
            if isinstance(error, HostError):
                raise await self._failure(spec, process) from error
            raise
        entry = next((entry for entry in entries() if entry.name == spec.name), None)
        if entry is None:
            control.close()
            raise await self._failure(spec, process)
        try:
            await self.networks.plug(spec)
            await live.set_cables(spec, entry)
        except BaseException:
            control.close()
            process.kill()
            raise
        self._activate(domain, spec, entry, status)
        domain.state = DomainState.PAUSED if paused else DomainState.RUNNING
        domain.reason = DomainReason.STARTING_UP if paused else how.reason
        self._remember(domain)
        self._events.lifecycle(domain.ref, LifecycleEvent.STARTED, how.detail)
        if paused:
            self._events.lifecycle(domain.ref, LifecycleEvent.SUSPENDED, 0)
        self._follow(domain, control)
        if not paused:
            with suppress(VmmError):  # it may have ended before it answers, which its events tell
                await ask(entry, "resume")
        self.keep_pinned(domain)

    async def _reach(self, spec: Spec, process: Process) -> ControlClient:
        """A connection to the machine's control socket, as soon as it listens."""
        while not process.ended.is_set():
            for entry in entries():
                if entry.name == spec.name and entry.info.get("pid") == process.pid:
                    with suppress(OSError):
                        return await ControlClient.connect(entry)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.ended.wait(), 0.01)
        raise await self._failure(spec, process)

    async def _failure(self, spec: Spec, process: Process) -> HostError:
        with suppress(TimeoutError):
            await asyncio.wait_for(process.ended.wait(), 5.0)
        said = await last_words(self._store.file("log", f"{spec.name}.log"))
        return HostError(f"{spec.name}: {said or 'the machine ended at once'}")

    def _activate(self, domain: Domain, spec: Spec, entry: RegistryEntry, status: dict[str, Any]) -> None:
        domain.live, domain.entry = spec, entry
        domain.core, domain.pid = str(status.get("core", "")), int(status["pid"])
        if domain.id < 0:
            domain.id = next(self._ids)
        domain.updated = False
        domain.ended.clear()
        domain.extra.clear()

    def _remember(self, domain: Domain) -> None:
        assert domain.live is not None
        self._store.write("live", f"{domain.name}.xml", domain_xml(domain.live, self.emulator))
        self._store.write("live", f"{domain.name}.json", json.dumps({"id": domain.id, "pid": domain.pid}))

    def _follow(self, domain: Domain, control: ControlClient) -> None:
        domain.follower = asyncio.create_task(self._hear(domain, control), name=f"follow {domain.name}")

    async def _hear(self, domain: Domain, control: ControlClient) -> None:
        """The machine's events, to its end."""
        outcome = None
        try:
            while (event := await control.next_event()) is not None:
                match event.get("event"):
                    case "state":
                        self._state_changed(domain, str(event.get("state")))
                    case "attached" | "detached":
                        await self._refresh(domain)
                    case "detach-refused":
                        self._events.domain(DomainEvent.DEVICE_REMOVAL_FAILED, domain.ref, str(event.get("id")))
                    case "disk-job":
                        if event.get("state") == "done":  # the disk may be in another file
                            await self._refresh(domain)
                        live.job_told(self._events, domain, event)
                    case "migration":
                        jobs.told(self._events, domain, event)
                    case "rebooted":
                        await self._replug(domain)
                        self._events.domain(DomainEvent.REBOOT, domain.ref)
                    case "ended":
                        outcome = event.get("outcome")
        finally:
            control.close()
        await self._ended(domain, outcome if isinstance(outcome, dict) else None)

    async def _replug(self, domain: Domain) -> None:
        """Its interfaces may be new ones."""
        if domain.live is not None:
            with suppress(VmmError):
                await self.networks.plug(domain.live)
                if domain.entry is not None:
                    await live.set_cables(domain.live, domain.entry)

    async def _refresh(self, domain: Domain) -> None:
        with suppress(VmmError):  # it may be about to end
            await live.refresh(self, self._events, domain)

    def _state_changed(self, domain: Domain, state: str) -> None:
        if state == "paused" and domain.state != DomainState.PAUSED:
            domain.state, domain.reason = DomainState.PAUSED, DomainReason.BY_USER
            self._events.lifecycle(domain.ref, LifecycleEvent.SUSPENDED, 0)
        elif state == "running" and domain.state != DomainState.RUNNING:
            domain.state, domain.reason = DomainState.RUNNING, DomainReason.UNPAUSED
            if domain.extra.pop("arrives", False):
                domain.reason = DomainReason.FROM_ANOTHER_HOST
                return  # received() tells, if the client is still there to ask for it
            self._events.lifecycle(domain.ref, LifecycleEvent.RESUMED, 0)

    async def _ended(self, domain: Domain, outcome: dict[str, Any] | None) -> None:
        process = self._processes.pop(domain.name, None)
        if process is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(process.ended.wait(), SETTLE_SECONDS)
        else:
            await self._released(domain)
        why = str(outcome.get("reason")) if outcome is not None else ""
        reason, detail = ENDS.get(why, FAILED)
        if domain.extra.get("saved"):
            reason, detail = DomainReason.WAS_SAVED, 4
        elif domain.extra.get("reverted"):
            reason, detail = DomainReason.WAS_FROM_SNAPSHOT, 6
        ref = domain.ref
        domain.state, domain.reason = DomainState.SHUTOFF, reason
        domain.live = domain.entry = domain.follower = None
        domain.id, domain.pid, domain.updated = -1, 0, False
        said = (why, str(outcome.get("detail") or "")) if outcome is not None else ("its process ended unexpectedly",)
        domain.end = ": ".join(word for word in said if word)
        for name in (f"{domain.name}.xml", f"{domain.name}.json"):
            with suppress(HostError):
                self._store.remove("live", name)
        if domain.persistent is None:
            self._forget(domain)
        if reason == DomainReason.WAS_SHUTDOWN:
            self._events.lifecycle(ref, LifecycleEvent.SHUTDOWN, GUEST_SHUTDOWN)
        self._events.lifecycle(ref._replace(id=-1), LifecycleEvent.STOPPED, detail)
        domain.ended.set()

    async def _released(self, domain: Domain) -> None:
        """Until the name of a machine that this daemon did not start is free."""
        deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
        while any(entry.name == domain.name and entry.info.get("pid") == domain.pid for entry in entries()):
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(0.02)

    def _forget(self, domain: Domain) -> None:
        if self._by_name.get(domain.name) is domain:
            del self._by_name[domain.name]
