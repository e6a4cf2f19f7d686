"""Saved states and snapshots of domains, made of the machine's own snapshots (vmm/state).

    STATE/saves/NAME/                what `managedsave` made: the next start goes on from it
    STATE/snapshots/NAME/SNAP/       info.json, domain.xml; state/ of a running machine; disks/TARGET it writes to
A saved state refers to the disks where they are; a snapshot has copies of those that the machine writes to, and
reverting puts them back. What takes long is done by threads and by the machine's own process. Loop thread.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import aiofiles

from vmm.config import Config
from vmm.errors import HostError, StateError, os_reason
from vmm.libvirt.domain import BOOTED, FROM_SNAPSHOT, RESTORED, Domain, DomainState
from vmm.libvirt.domains import Domains
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.format import domain_xml
from vmm.libvirt.machines import ask
from vmm.libvirt.spec import Spec, spec_of
from vmm.libvirt.store import Store
from vmm.libvirt.wire import SnapshotRef
from vmm.libvirt.xmltree import Reader, add, malformed, parse, serialise
from vmm.state.diskcopy import copy_sparse

SAVE_SECONDS = 3600.0
"""How long writing a large machine to a slow disk may take."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
MAX_SNAPSHOTS = 1000
INFO, XML, MACHINE, DISKS = "info.json", "domain.xml", "state", "disks"
_parts = itertools.count()


@dataclass(frozen=True)
class Info:
    """A snapshot of a domain."""

    name: str
    state: str
    """running, paused or shutoff: what the domain was."""
    created: int
    """Seconds since 1970."""
    description: str = ""
    parent: str | None = None
    sizes: tuple[tuple[str, int, int], ...] = ()
    """(target, bytes, mtime in ns) of the disks that were copied."""


class Saves:
    """All of them."""

    def __init__(self, store: Store, domains: Domains) -> None:
        self._store, self._domains = store, domains

    # Saved states.

    def managed(self, domain: Domain) -> Path:
        """Where a managed save is, if there is one."""
        return self._store.path / "saves" / domain.name

    def has_managed(self, domain: Domain) -> bool:
        return self.managed(domain).is_dir()

    async def save(self, domain: Domain, target: Path, *, paused: bool | None = None) -> None:
        """Write the machine into a directory and end it. `paused`: what it is when it is taken up; None: as it is now.
        Raises VmmError, and the machine runs on."""
        entry = domain.running_entry()
        assert domain.live is not None
        was_paused = domain.state == DomainState.PAUSED if paused is None else paused
        text = domain_xml(domain.live, self._domains.emulator)
        domain.extra["saved"] = True
        try:
            await ask(entry, "snapshot", SAVE_SECONDS, directory=str(target), disks="reference", stop=True)
        except BaseException:
            domain.extra.pop("saved", None)
            raise
        await self._domains.gone(domain)
        await _write(target / XML, text)
        await _write(target / INFO, json.dumps({"paused": was_paused}))

    async def restore(self, source: Path, *, paused: bool | None = None, domain: Domain | None = None) -> Domain:
        """Take up what `save` wrote. `domain`: whose it must be. Raises VmmError."""
        spec = await asyncio.to_thread(self.saved_spec, source)
        if domain is not None and spec.uuid != domain.uuid:
            raise StateError(f"{source}: saved of another domain, {spec.name}")
        was_paused = bool(_read_json(source / INFO).get("paused"))
        return await self._domains.create(
            spec, paused=was_paused if paused is None else paused, process=_restore(source, spec.name), how=RESTORED
        )

    async def start_managed(self, domain: Domain, *, paused: bool) -> None:
        """Start a domain from its managed save, which is used up then. Raises VmmError."""
        path = self.managed(domain)
        await self.restore(path, paused=True if paused else None, domain=domain)
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def drop_managed(self, domain: Domain) -> None:
        """Also if there is none."""
        await asyncio.to_thread(shutil.rmtree, self.managed(domain), ignore_errors=True)

    def saved_spec(self, source: Path) -> Spec:
        """The domain that a saved state is of; blocking. Raises VmmError."""
        from vmm.state.snapshot import Snapshot

        snapshot = Snapshot.open(source)
        try:
            config = snapshot.config({})
        finally:
            snapshot.close()
        try:
            return replace(self._domains.read((source / XML).read_text()), config=config)
        except OSError:
            return spec_of(config)  # `vmm snapshot` made it

    # Snapshots.

    def _folder(self, domain: Domain) -> Path:
        return self._store.path / "snapshots" / domain.name

    def all(self, domain: Domain) -> list[Info]:
        """By name."""
        folder = self._folder(domain)
        if not folder.is_dir():
            return []
        found = []
        for path in sorted(folder.iterdir()):
            values = _read_json(path / INFO)
            if NAME.fullmatch(path.name) and values.get("name") == path.name:
                sizes = tuple(tuple(item) for item in values.pop("sizes", ()))
                found.append(Info(**values, sizes=sizes))
        return found

    def named(self, domain: Domain, name: str) -> Info:
        """Raises LibvirtError."""
        for info in self.all(domain):
            if info.name == name:
                return info
        raise LibvirtError(Code.NO_DOMAIN_SNAPSHOT, f"no domain snapshot with matching name '{name}'", From.QEMU)

    def current(self, domain: Domain) -> Info | None:
        """The one that the domain goes on from."""
        name = _read_json(self._folder(domain) / "current.json").get("name")
        return next((info for info in self.all(domain) if info.name == name), None)

    async def _set_current(self, domain: Domain, name: str | None) -> None:
        await _write(self._folder(domain) / "current.json", json.dumps({"name": name}))

    async def create(self, domain: Domain, name: str, description: str) -> Info:
        """Take one; a running machine stands still while its disks are copied. Raises VmmError."""
        if not NAME.fullmatch(name):
            raise LibvirtError(Code.INVALID_ARG, f"{name!r} is no name for a snapshot", From.QEMU)
        async with domain.lock:
            known = self.all(domain)
            if any(info.name == name for info in known):
                raise LibvirtError(Code.OPERATION_INVALID, f"domain snapshot {name} already exists", From.QEMU)
            if len(known) >= MAX_SNAPSHOTS:
                raise LibvirtError(Code.OPERATION_FAILED, f"{MAX_SNAPSHOTS} snapshots are as many as a domain may have")
            for index, disk in enumerate(domain.spec.config.disks):
                if disk.path.is_block_device() and not disk.readonly and not disk.snapshot:
                    target = domain.spec.disks[index].target
                    raise LibvirtError(
                        Code.OPERATION_UNSUPPORTED, f"disk {target} is a device of the host, which is not copied"
                    )
            before = self.current(domain)
            folder = self._folder(domain) / f".{name}.part"
            shutil.rmtree(folder, ignore_errors=True)
            (folder / DISKS).mkdir(mode=0o700, parents=True)
            try:
                state = {DomainState.RUNNING: "running", DomainState.PAUSED: "paused"}.get(domain.state, "shutoff")
                sizes = await self._take(domain, folder, state)
                info = Info(name, state, int(time.time()), description, before.name if before else None, sizes)
                await _write(folder / XML, domain_xml(domain.spec, self._domains.emulator))
                await _write(folder / INFO, json.dumps(info.__dict__))
                folder.rename(self._folder(domain) / name)
            except OSError as error:
                raise HostError(f"{folder}: {os_reason(error)}") from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            await self._set_current(domain, name)
            return info

    async def _take(self, domain: Domain, folder: Path, state: str) -> tuple[tuple[str, int, int], ...]:
        if state == "shutoff":
            return await asyncio.to_thread(_copy_out, domain.spec, folder / DISKS)
        entry = domain.running_entry()
        if state == "running":
            await ask(entry, "pause")
        try:
            await ask(entry, "snapshot", SAVE_SECONDS, directory=str(folder / MACHINE), disks="reference")
            return await asyncio.to_thread(_copy_out, domain.spec, folder / DISKS)
        finally:
            if state == "running":
                await ask(entry, "resume")

    async def revert(self, domain: Domain, info: Info, *, running: bool, paused: bool) -> None:
        """Make the domain what it was, its disks included; `running` and `paused` say otherwise. Raises VmmError."""
        folder = self._folder(domain) / info.name
        try:
            async with aiofiles.open(folder / XML) as file:
                spec = self._domains.read(await file.read())
        except OSError as error:
            raise HostError(f"{folder}: {os_reason(error)}") from error
        if domain.active:
            domain.extra["reverted"] = True
            await self._domains.destroy(domain)
        await asyncio.to_thread(_copy_back, spec, folder / DISKS, info)
        await self._set_current(domain, info.name)
        if info.state != "shutoff":
            stopped = paused or (info.state == "paused" and not running)
            process = _restore(folder / MACHINE, domain.name)
            await self._domains.start(domain, spec, paused=stopped, process=process, how=FROM_SNAPSHOT)
        elif running or paused:
            await self._domains.start(domain, spec, paused=paused, how=BOOTED)

    async def delete(self, domain: Domain, info: Info, *, children: bool, itself: bool) -> None:
        """Delete this snapshot, or those that came after it, or both. Others get its parent. Raises VmmError."""
        doomed = self.descendants(domain, info) if children else []
        if itself:
            doomed.append(info)
        names = {one.name for one in doomed}
        now = self.current(domain)
        for one in self.all(domain):
            if one.name not in names and one.parent in names:
                changed = replace(one, parent=info.parent)
                await _write(self._folder(domain) / one.name / INFO, json.dumps(changed.__dict__))
        for one in doomed:
            await asyncio.to_thread(shutil.rmtree, self._folder(domain) / one.name, ignore_errors=True)
        if now is not None and now.name in names:
            await self._set_current(domain, info.parent if itself else info.name)

    def descendants(self, domain: Domain, info: Info) -> list[Info]:
        """All that came after it."""
        known = self.all(domain)
        found: list[Info] = []
        names = {info.name}
        while more := [one for one in known if one.parent in names and one not in found]:
            found += more
            names |= {one.name for one in more}
        return found

    async def forget(self, domain: Domain) -> None:
        """Everything of a domain that is undefined."""
        await self.drop_managed(domain)
        await asyncio.to_thread(shutil.rmtree, self._folder(domain), ignore_errors=True)

    def xml(self, domain: Domain, info: Info) -> str:
        """A snapshot's document."""
        root = Element("domainsnapshot")
        add(root, "name", info.name)
        if info.description:
            add(root, "description", info.description)
        add(root, "state", info.state)
        if info.parent is not None:
            add(add(root, "parent"), "name", info.parent)
        add(root, "creationTime", str(info.created))
        add(root, "memory", snapshot="no" if info.state == "shutoff" else "internal")
        disks = add(root, "disks")
        for target, _, _ in info.sizes:
            add(disks, "disk", name=target, snapshot="internal")
        try:
            root.append(parse((self._folder(domain) / info.name / XML).read_text(), "domain"))
        except OSError:
            pass
        return serialise(root)

    def ref(self, domain: Domain, info: Info) -> SnapshotRef:
        return SnapshotRef(info.name, domain.ref)


def read_snapshot(text: str) -> tuple[str, str]:
    """(name, description) of a snapshot that is to be taken. Raises LibvirtError."""
    root = Reader(parse(text, "domainsnapshot"))
    name, description = root.child("name"), root.child("description")
    found = name.text() if name is not None else str(int(time.time()))
    told = description.text() if description is not None else ""
    if memory := root.child("memory"):
        memory.choice("snapshot", ("internal",))
    if disks := root.child("disks"):
        for disk in disks.children("disk"):
            disk.choice("snapshot", ("internal",))
            disk.ignore("name")
    for tag in ("state", "creationTime", "parent", "domain"):
        if child := root.child(tag):
            child.take_all()
    root.done()
    if not found:
        raise malformed("<name> is empty")
    return found, told


def _restore(source: Path, name: str) -> Sequence[str]:
    return ["restore", str(source), "--name", name, "--console", "none", "--paused"]


def _written(config: Config) -> list[int]:
    """The places of the disks whose files the machine writes to."""
    return [index for index, disk in enumerate(config.disks) if not disk.readonly and not disk.snapshot]


def _copy_out(spec: Spec, folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Copy the disks that the machine writes to. Raises HostError."""
    sizes = []
    for index in _written(spec.config):
        path, target = spec.config.disks[index].path, spec.disks[index].target
        try:
            with path.open("rb") as old, (folder / target).open("xb") as new:
                status = os.fstat(old.fileno())
                copy_sparse(old.fileno(), new.fileno(), status.st_size)
                os.fsync(new.fileno())
        except OSError as error:
            raise HostError(f"{path}: {os_reason(error)}") from error
        sizes.append((target, status.st_size, status.st_mtime_ns))
    return tuple(sizes)


def _copy_back(spec: Spec, folder: Path, info: Info) -> None:
    """Put the disks back, with the times that they had, by which a machine's state knows them. Raises HostError."""
    known = {target: (size, mtime) for target, size, mtime in info.sizes}
    for index in _written(spec.config):
        path, target = spec.config.disks[index].path, spec.disks[index].target
        if target not in known:
            continue
        size, mtime = known[target]
        try:
            with (folder / target).open("rb") as old, path.open("r+b") as new:
                os.ftruncate(new.fileno(), 0)
                copy_sparse(old.fileno(), new.fileno(), size)
                os.fsync(new.fileno())
                os.utime(new.fileno(), ns=(mtime, mtime))
        except OSError as error:
            raise HostError(f"{path}: {os_reason(error)}") from error


async def _write(path: Path, text: str) -> None:
    """Whole or not at all, and durable, beside the loop. Raises HostError."""
    part = path.with_name(f".{path.name}.{next(_parts)}.new")  # of its own: two may be written at once
    try:
        async with aiofiles.open(part, "w") as file:
            await file.write(text)
            await file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        part.replace(path)
    except OSError as error:
        raise HostError(f"{path}: {os_reason(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
