"""What the host gave one machine: its core, its virtio devices with files, taps, sockets and processes, its chance.

Everything is opened before the first instruction and stays until the machine is closed, over all reboots. What the
guest sees (vCPUs, buses, interrupt lines, clocks, legacy devices) is made anew at each boot by vmm/machine/builder.py:
a new core VM and new memory take 0.3 to 20 ms, and are as new in every bit. Loop thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cpu.contract import System
from vmm.config import Config
from vmm.errors import ConfigError
from vmm.machine.chance import Chance
from vmm.machine.origin import ArrivingDisk, SavedDisk

if TYPE_CHECKING:
    from vmm.devices.virtio.pool import DevicePool
    from vmm.guest.agent import Agent
    from vmm.machine.peripheral import OwnDevices


class Resources:
    """Made once for a VirtualMachine."""

    def __init__(
        self,
        config: Config,
        system: System,
        *,
        devices: Mapping[str, Callable[[], Any]] | None = None,
        warn: Callable[[str], None] = lambda text: None,
        mark: Callable[[str], None] = lambda name: None,
        saved_disks: Mapping[str, SavedDisk | ArrivingDisk] | None = None,
    ) -> None:
        """`devices`: the embedder's own, by name. `saved_disks`: overlays of disks by name; None for a machine that
        boots. Raises ConfigError; nothing is opened yet."""
        self.config = config
        self.system = system
        """The execution core; it is closed by whoever opened it."""
        self.present_cpus = set(range(config.cpus))
        """The processors that the guest has now."""
        self.random = Chance(config.seed, "devices")
        self.warn = warn
        self.own: OwnDevices | None = None
        """The embedder's own devices, if there are any."""
        if devices:
            from vmm.machine.peripheral import OwnDevices

            self.own = OwnDevices(devices)
        self._pool: DevicePool | None = None
        virtio = self.own.virtio if self.own is not None else {}
        if config.platform != "bare":
            from vmm.devices.virtio.pool import DevicePool

            self._pool = DevicePool(config, self.random, virtio, warn, mark, saved_disks)
        elif virtio:
            raise ConfigError(f"devices: {next(iter(virtio))!r}: platform bare has no virtio devices; use pc")

    @property
    def pool(self) -> DevicePool:
        """The virtio devices; a bare platform has none."""
        assert self._pool is not None
        return self._pool

    @property
    def agent(self) -> Agent | None:
        """The way to the guest's agent, if the configuration asks for one."""
        return None if self._pool is None else self._pool.agent

    @property
    def devices(self) -> Mapping[str, Any]:
        """The virtio devices by name."""
        return {} if self._pool is None else self._pool.devices

    def device(self, name: str) -> Any:
        """A virtio device, or one of the embedder's. Raises KeyError."""
        if self.own is not None and name in self.own.peripherals:
            return self.own.peripherals[name]
        if self._pool is None:
            raise KeyError(name)
        return self._pool[name]

    def restarted(self) -> None:
        """The guest boots again."""
        if self._pool is not None:
            self._pool.restarted()

    async def aclose(self) -> None:
        """Give everything back. Raises HostError for the first that cannot be. Idempotent."""
        pooled = list(self.devices.values())
        try:
            if self._pool is not None:
                await self._pool.aclose()
        finally:
            if self.own is not None:
                await self.own.aclose(pooled)
