"""Devices that come and go while the machine runs, and what its configuration is meanwhile.

The configuration that a machine was asked for is frozen; the present one (`present`) has what was attached and has not
what was detached, each device with its name and its place on the bus, so that a saved state fits a machine built of it.

A device is opened before the guest hears of it; a failure leaves nothing behind. It goes when the guest gives it up
(`_EJ0`), asked or not. One that is pulled goes in two steps: its file is closed and its requests fail at once, while
the guest is told to look at the bus; the function leaves the bus when its driver has let go of it, or after
PULL_SECONDS. Loop thread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cpu.values import dataclass
from virtio.constants import Status
from virtio.devices.blk import BlockDevice
from vmm.config import Config, Disk, Net, Share, check_directory, check_file
from vmm.errors import ConfigError, StateError, VmmError, core_errors
from vmm.events import Attached, Detached, DetachRefused
from vmm.lifecycle import State
from vmm.machine.builder import effective_cmdline

if TYPE_CHECKING:
    from virtio.device import Device
    from vmm.devices.virtio import VirtioDevices
    from vmm.devices.virtio.pool import Maker
    from vmm.machine.builder import Machine
    from vmm.pci.hotplug import PciHotplug
    from vmm.vm import VirtualMachine

DETACH_SECONDS = 30.0
"""How long a guest may take to give a device up."""
FORCE_SECONDS = 5.0
"""The same before its device is pulled."""
DRIVER_SECONDS = 10.0
"""How long `attach` waits for the guest's driver."""
PULL_SECONDS = 10.0
"""How long a device that was pulled stays for its driver, which would hang without its registers."""

LOOKED_SECONDS = 5.0
"""How long `attach` waits for the guest's first read of a disk that is driven."""


Part = Disk | Net | Share
"""What comes and goes."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """What `attach` made."""

    id: str
    """What `detach` calls it."""
    slot: int
    """Its device number on PCI bus 0."""
    driven: bool
    """The guest's driver has taken it."""
    note: str = ""
    """Of a share that was to be mounted: why the guest has not."""


class _Leaving:
    """A device that the guest was asked for, or that is being pulled."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """"": it is gone; else why it stays."""


class Hotplug:
    """The coming and going of one machine's devices, over its reboots."""

    def __init__(self, vm: VirtualMachine) -> None:
        self._vm = vm
        config = vm.config
        self._parts: dict[str, Part] = {}
        for index, disk in enumerate(config.disks):
            self._parts[disk.id or f"disk{index}"] = disk
        for index, net in enumerate(config.nets):
            self._parts[net.id or f"net{index}"] = net
        for index, share in enumerate(config.shares):
            self._parts[share.id or f"share{index}"] = share
        self._changed = False
        self._leaving: dict[str, _Leaving] = {}
        self._coming: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.lock = asyncio.Lock()
        """Held while a device comes to the bus or leaves it, and while the machine's state is taken."""

    # The present configuration.

    @property
    def present(self) -> Config:
        """The machine's configuration as it is now. Its paths are those of the images that are in use."""
        config = self._vm.config
        if not self._changed:
            return config
        virtio = self._virtio_or_none()
        named = {name: part.replace(id=name) for name, part in self._parts.items()}
        return config.replace(
            disks=[part for part in named.values() if isinstance(part, Disk)],
            nets=[part for part in named.values() if isinstance(part, Net)],
            shares=[part for part in named.values() if isinstance(part, Share)],
            slots=[{"id": name, "device": slot} for name, slot in (virtio.slots if virtio is not None else {}).items()],
        )

    def describe(self) -> list[dict[str, Any]]:
        """Disks, cards and shares for people, JSON-like: id, kind, slot (null: none), and what each is."""
        virtio = self._virtio_or_none()
        found: list[dict[str, Any]] = []
        for name, part in self._parts.items():
            kind = kind_of(part)
            slot = virtio.slots.get(name) if virtio is not None else None
            job = self._vm.disk_jobs.on(name)
            facts: dict[str, Any] = {"id": name, "kind": kind, "slot": slot, "leaving": name in self._leaving}
            if isinstance(part, Disk):
                facts |= {"path": str(part.path), "readonly": part.readonly, "chain": self._chain(name)}
                facts["job"] = job.describe() if job is not None else None
            elif isinstance(part, Share):
                facts |= {"path": str(part.path), "readonly": part.readonly, "mount": part.mount}
            else:
                facts |= {"network": f"{part.kind}={part.target}" if part.target else part.kind}
                if part.policed:
                    from vmm.policies import describe

                    facts["policy"] = describe(self._vm, name, part)
            found.append(facts)
        return found

    def _chain(self, name: str) -> list[str]:
        chain = getattr(getattr(self._vm.virtio_devices().get(name), "backend", None), "chain", None)
        return [] if chain is None else [layer.path for layer in chain.layers]

    def disk_part(self, name: str) -> Disk | None:
        """A disk of the present configuration."""
        part = self._parts.get(name)
        return part if isinstance(part, Disk) else None

    def disk_moved(self, name: str, **values: Any) -> None:
        """A disk has another image from now on: fields of its part of the configuration."""
        self._parts[name] = self._parts[name].replace(**values)
        self._changed = True

    def net_part(self, name: str) -> Net | None:
        """A network card of the present configuration."""
        part = self._parts.get(name)
        return part if isinstance(part, Net) else None

    def net_changed(self, name: str, part: Net) -> None:
        """A network card is this from now on: its part of the configuration."""
        self._parts[name] = part
        self._changed = True

    # From one boot to the next.

    def rebooted(self) -> None:
        """The machine is built again."""
        for leaving in self._leaving.values():
            if not leaving.answer.done():
                leaving.answer.set_result("it rebooted meanwhile")

    def _bus(self) -> tuple[VirtioDevices, PciHotplug]:
        """Where devices come to. StateError if this machine has no such place."""
        machine = self._vm.machine
        virtio, registers = machine.services.virtio, machine.services.pci_hotplug
        if virtio is None or registers is None:
            raise StateError("platform bare has no PCI bus that a device could come to; run it with --platform pc")
        if not registers.known:
            raise StateError(
                "this machine was booted by a program that had no hot plug, and its tables say so; reboot it first"
            )
        words = effective_cmdline(self._vm.config, machine.capabilities).split()
        if "acpi=off" in words:
            raise StateError("the guest's kernel was started with acpi=off and would not hear of it; leave that out")
        return virtio, registers

    def _virtio_or_none(self) -> VirtioDevices | None:
        with suppress(StateError):
            return self._vm.machine.services.virtio
        return None

    # Coming.

    async def attach(self, part: Part, *, timeout: float = DRIVER_SECONDS) -> Attachment:
        """vmm.vm.VirtualMachine.attach"""
        self._vm.check_alive()
        self._vm.check_settled()
        kind = kind_of(part)
        if part.transport != "pci":
            raise ConfigError(f"{kind}: transport=mmio: such devices are found at boot only; leave that out")
        self._bus()
        name = part.id or self._new_name(kind)
        if name in self._taken():
            raise ConfigError(f"{kind}: this machine has a device {name!r} already; give it another id")
        if isinstance(part, Disk):
            check_file("disk", part.path, writable=not (part.readonly or part.snapshot))
            self._check_other_disks(part)
        if isinstance(part, Share):
            check_directory("share", part.path)
        packed = not isinstance(part, Share) and part.packed
        self._coming.add(name)
        try:
            maker = self._maker(name, part)
            pool = self._vm.pool
            with core_errors():
                device = await pool.add(name, maker, packed)
            try:
                async with self.lock:
                    self._vm.check_alive()
                    self._vm.check_settled()
                    virtio, registers = self._bus()
                    if name not in virtio.slots:  # else it rebooted meanwhile, and has found the device
                        virtio.plug(name, registers.unsettled)
                    slot = virtio.slots[name]
                    self._parts[name] = part
                    self._changed = True
                    registers.inserted(slot)
            except BaseException:
                if pool.devices.get(name) is device:
                    pool.take(name)
                    await device.aclose()
                raise
        finally:
            self._coming.discard(name)
        self._vm.report(Attached(name, kind, slot))
        note = await self._mount(name, part, timeout) if isinstance(part, Share) else ""
        return Attachment(name, slot, await self._driven(virtio, name, 0 if note else timeout), note)

    async def _mount(self, name: str, share: Share, timeout: float) -> str:
        """Attachment.note. A driver of file systems comes with the first mount, which goes before waiting for it."""
        if self._vm.state is not State.RUNNING:
            return "the machine is paused" if share.mount else ""
        if not self._vm.config.agent:
            return "the guest runs no agent" if share.mount else ""
        from vmm.guest.mounts import mount

        return await mount(self._vm.agent.exec, name, share.mount, readonly=share.readonly, timeout=timeout)

    async def _unmount(self, name: str, *, force: bool, timeout: float) -> str:
        """A share that is to go is unmounted first, wherever the guest has it. "", or why it stays."""
        if not isinstance(self._parts[name], Share) or not self._vm.config.agent or self._vm.state is not State.RUNNING:
            return ""
        from vmm.guest.mounts import unmount

        return await unmount(self._vm.agent.exec, name, force=force, timeout=timeout)

    def _check_other_disks(self, part: Disk) -> None:
        """ConfigError if this machine itself has the image in a way that excludes this use of it."""
        shared = part.readonly or part.snapshot
        for name, other in self._parts.items():
            if isinstance(other, Disk) and not (shared and (other.readonly or other.snapshot)):
                with suppress(OSError):
                    if any(os.path.samefile(part.path, path) for path in self._chain(name)[:1]):
                        raise ConfigError(f"disk: {part.path}: is {name} of this machine already")

    def _taken(self) -> set[str]:
        return {*self._parts, *self._coming, *self._vm.pool.makers}

    def _new_name(self, kind: str) -> str:
        taken = self._taken()
        return next(name for name in (f"{kind}{index}" for index in range(len(taken) + 1)) if name not in taken)

    def _maker(self, name: str, part: Part) -> Maker:
        if isinstance(part, Disk):
            from vmm.devices.virtio.disk import DiskMaker

            return DiskMaker(part, name)
        if isinstance(part, Share):
            from vmm.devices.virtio.share import ShareMaker

            return ShareMaker(part.replace(id=name))
        from vmm.devices.virtio.net import NetMaker

        return NetMaker(part, self._vm.machine.resources.random, part.id or "net", self._vm.machine.resources.warn)

    async def _driven(self, virtio: VirtioDevices, name: str, timeout: float) -> bool:
        """Whether the guest's driver has taken the device within this time."""
        if self._vm.state is not State.RUNNING:
            timeout = 0
        driven = await self._status(virtio, name, lambda status: bool(status & Status.DRIVER_OK), timeout)
        device = self._vm.virtio_devices().get(name)
        if driven and isinstance(device, BlockDevice):
            # Linux looks for partitions right after it has made the disk's node: then programs can open it.
            with suppress(TimeoutError):
                async with asyncio.timeout(min(timeout, LOOKED_SECONDS)):
                    while device.is_active and not device.counters["reads"]:  # noqa: ASYNC110  # the engine tells nobody
                        await asyncio.sleep(0.005)
        return driven

    async def _status(
        self, virtio: VirtioDevices, name: str, wanted: Callable[[int], bool], timeout: float
    ) -> bool:
        """Wait until the device's status is as wanted; False if it is not within `timeout`, or the device went."""
        changed = asyncio.Event()
        transport = virtio.transports.get(name)
        if transport is None:
            return False
        transport.on_status = changed.set
        end = asyncio.ensure_future(self._vm.ended())
        try:
            async with asyncio.timeout(timeout):
                while virtio.transports.get(name) is transport and not wanted(int(transport.status)):
                    waiting = asyncio.ensure_future(changed.wait())
                    await asyncio.wait((waiting, end), return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
                    if end.done():
                        return False
                    changed.clear()
            return virtio.transports.get(name) is transport
        except TimeoutError:
            return False
        finally:
            end.cancel()
            transport.on_status = _nobody

    # Going.

    async def detach(self, name: str, *, force: bool = False, timeout: float | None = None) -> str:
        """vmm.vm.VirtualMachine.detach"""
        self._vm.check_alive()
        self._vm.check_settled()
        part = self._parts.get(name)
        if part is None:
            known = ", ".join(self._parts) or "none"
            if name in self._vm.pool.makers:
                raise ConfigError(f"{name}: stays as long as the machine; disks, cards and shares can go: {known}")
            raise ConfigError(f"{name}: there is no such device; disks, cards and shares are: {known}")
        if part.transport != "pci":
            raise ConfigError(f"{name}: is a virtio-mmio device, which stays as long as the machine")
        if name not in self._vm.virtio_devices():
            raise StateError(f"{name}: is not there; the host could not give it")
        virtio, registers = self._bus()
        if name in self._leaving:
            raise StateError(f"{name}: is being detached already")
        if not force and self._vm.state is State.PAUSED:
            raise StateError(f"{name}: the machine is paused and cannot give it up; resume it, or pull it with --force")
        job = self._vm.disk_jobs.on(name)
        if job is not None and not force:
            raise StateError(f"{name}: a {job.kind} is under way; cancel it first")
        if timeout is None:
            timeout = FORCE_SECONDS if force else DETACH_SECONDS
        leaving = self._leaving[name] = _Leaving()
        slot = virtio.slots[name]
        try:
            refusal = ""
            if self._vm.state is State.PAUSED:
                refusal = "the machine is paused"
            elif not force or timeout:
                refusal = await self._unmount(name, force=False, timeout=timeout)
                if not refusal:
                    registers.ask(slot)
                    refusal = await self._answer(leaving, timeout)
            if not refusal and (timeout or not force):
                return "guest"
            if not force:
                registers.withdraw(slot)
                self._vm.report(DetachRefused(name, refusal))
                raise StateError(f"{name}: the guest does not give it up: {refusal}; --force pulls it")
            await self._pull(name, virtio, registers)
            return "force"
        finally:
            if self._leaving.get(name) is leaving:
                del self._leaving[name]

    async def _answer(self, leaving: _Leaving, timeout: float) -> str:
        """What the guest says; "" if the device is gone."""
        end = asyncio.ensure_future(self._vm.ended())
        try:
            done, _ = await asyncio.wait((leaving.answer, end), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if leaving.answer in done:
                return leaving.answer.result()
            if end in done:
                raise StateError("the machine has ended meanwhile")
            return f"no answer within {timeout:g} s"
        finally:
            end.cancel()

    async def _pull(self, name: str, virtio: VirtioDevices, registers: PciHotplug) -> None:
        """The device goes, whatever the guest does."""
        device = self._vm.virtio_devices()[name]

        def there() -> bool:  # else the guest has given it up meanwhile
            return self._vm.virtio_devices().get(name) is device

        try:
            await self._end_job(name)
            if there() and isinstance(device, BlockDevice):
                with core_errors():
                    await device.withdraw()
            elif there():
                await self._unmount(name, force=True, timeout=FORCE_SECONDS)
        finally:
            if there() and name in virtio.slots and self._vm.state is State.RUNNING:
                virtio.hide(name)
                registers.pulled(virtio.slots[name])
                await self._let_go(virtio, name)
            gone = None
            async with self.lock:
                if there():
                    gone = self._remove(name)
            if gone is not None:
                await self._close(name, gone, "force")

    async def _let_go(self, virtio: VirtioDevices, name: str) -> None:
        """Until the driver, if there is one, has done with a device that was pulled. Linux resets it, reads its status
        once more, and then sets ACKNOWLEDGE as for a driver to come."""
        if virtio.transports[name].status:
            await self._status(virtio, name, lambda status: status == Status.ACKNOWLEDGE, PULL_SECONDS)

    def _remove(self, name: str) -> Device | None:
        """Off the bus, and out of the configuration. What was there, to be closed."""
        if name not in self._parts:
            return None
        virtio = self._virtio_or_none()
        if virtio is not None and name in virtio.slots:
            registers = self._vm.machine.services.pci_hotplug
            if registers is not None:
                registers.gone(virtio.slots[name])
            virtio.unplug(name)
        device = self._vm.pool.take(name)
        self._changed = True
        del self._parts[name]
        return device

    async def _end_job(self, name: str) -> None:
        job = self._vm.disk_jobs.on(name)
        if job is not None:
            await job.cancel()

    async def _close(self, name: str, device: Device, by: str) -> None:
        """Wait until it uses nothing any more, and close it. Raises HostError."""
        try:
            with core_errors():
                try:
                    await device.settle()
                finally:
                    await device.aclose()
        finally:
            self._vm.report(Detached(name, by))

    # The guest.

    def ejected(self, machine: Machine, slot: int) -> None:
        """The guest gave up the function in this slot, from within its access."""
        virtio = machine.services.virtio
        slots = virtio.slots if virtio is not None else {}
        name = next((name for name, number in slots.items() if number == slot), None)
        if name is None or name not in self._parts:
            return  # what may not go stays
        device = self._remove(name)
        if device is None:
            return
        task = asyncio.get_running_loop().create_task(self._finish_eject(name, device), name=f"detach {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish_eject(self, name: str, device: Device) -> None:
        try:
            await self._end_job(name)
            await self._close(name, device, "guest")
        except VmmError as error:
            self._vm.tell(f"{name}: {error}")
        finally:
            leaving = self._leaving.get(name)
            if leaving is not None and not leaving.answer.done():
                leaving.answer.set_result("")

    def refused(self, machine: Machine, slot: int, reason: str) -> None:
        """The guest says that the function in this slot stays."""
        virtio = machine.services.virtio
        for name, number in virtio.slots.items() if virtio is not None else ():
            leaving = self._leaving.get(name)
            if number == slot and leaving is not None and not leaving.answer.done():
                leaving.answer.set_result(reason)

    async def aclose(self) -> None:
        """Wait for the devices that are being closed. Idempotent."""
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)


def _nobody() -> None:
    """Nobody waits for a change of status."""


def kind_of(part: Part) -> str:
    """Its word in options, events and tables."""
    return "disk" if isinstance(part, Disk) else "net" if isinstance(part, Net) else "share"


def part_of(values: Mapping[str, Any]) -> Part:
    """The one part that a request names, as text or a table. Raises ConfigError."""
    given = [key for key in ("disk", "net", "share") if values.get(key) is not None]
    if len(given) != 1:
        raise ConfigError("attach: give one disk, one net or one share")
    key = given[0]
    config = Config.from_dict({f"{key}s": [values[key]]})
    if key == "share":
        return config.shares[0]
    return config.disks[0] if key == "disk" else config.nets[0]
