"""The networks: `default`, which is user networking and always there, and those that clients define.

    STATE/networks/NAME.xml        what is defined
    STATE/networks/NAME.autostart  started with the daemon
    STATE/networks/NAME.live       what a network that is active was started with
    STATE/networks/NAME.serve, .leases, .lock  of the process that serves it (vmm/network/server.py)

A network's bridge, its rules and its server are the host's: they outlive the daemon, and the next one puts right what a
kill left half done. Loop thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vmm.errors import HostError, VmmError
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.events import NETWORK_LIFECYCLE, Hub
from vmm.libvirt.machines import Process, last_words
from vmm.libvirt.network_xml import NetworkSpec, read_network, updated
from vmm.libvirt.spec import Spec
from vmm.libvirt.store import Store
from vmm.libvirt.wire import NetworkRef
from vmm.network import bridge as host
from vmm.network.dhcp import Lease, plan_values
from vmm.network.server import READY, holder, read_leases

DEFAULT = NetworkSpec("default", uuid.uuid5(uuid.NAMESPACE_URL, "loopvisor:network:default"), mode="nat")
FOLDER = "networks"
MAX_NETWORKS = 1000
SERVER_SECONDS = 20.0
DEFINED, UNDEFINED, STARTED, STOPPED = range(4)
"""virNetworkEventLifecycleType."""
log = logging.getLogger(__name__)


class BridgePort(NamedTuple):
    """An interface of the host that belongs into a bridge. `mtu`: 0 for the bridge's own."""

    tap: str
    bridge: str
    mtu: int


class Network:
    """One network: what is defined, what it was started with, or both."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.persistent: NetworkSpec | None = None
        self.live: NetworkSpec | None = None
        self.coming: NetworkSpec | None = None
        """What it is being started with for the first time."""
        self.lock = asyncio.Lock()
        """Held by whoever starts or ends it."""

    @property
    def active(self) -> bool:
        return self.live is not None

    @property
    def spec(self) -> NetworkSpec:
        """What it runs with, else what is defined."""
        found = self.live or self.persistent or self.coming
        assert found is not None
        return found

    @property
    def ref(self) -> NetworkRef:
        return self.spec.ref


class Networks:
    """All of them."""

    def __init__(self, store: Store, events: Hub) -> None:
        self._store, self._events = store, events
        built_in = Network(DEFAULT.name)
        built_in.persistent = built_in.live = DEFAULT
        self._networks: dict[str, Network] = {DEFAULT.name: built_in}
        self._servers: dict[str, Process] = {}

    def close(self) -> None:
        """The daemon ends; networks do not."""
        for process in self._servers.values():
            process.forget()

    # Looking.

    def all(self) -> list[Network]:
        """By name."""
        return [self._networks[name] for name in sorted(self._networks)]

    def named(self, name: str) -> Network:
        """Raises LibvirtError."""
        if name not in self._networks:
            raise LibvirtError(Code.NO_NETWORK, f"no network with matching name '{name}'", From.NETWORK)
        return self._networks[name]

    def with_uuid(self, identity: bytes, name: str = "") -> Network:
        """Raises LibvirtError."""
        for network in self._networks.values():
            if network.ref.uuid == identity:
                return network
        text = f"no network with matching uuid '{uuid.UUID(bytes=identity)}'" + (f" ({name})" if name else "")
        raise LibvirtError(Code.NO_NETWORK, text, From.NETWORK)

    def of(self, ref: NetworkRef) -> Network:
        """The network that a client means. Raises LibvirtError."""
        return self.with_uuid(ref.uuid, ref.name)

    def autostart(self, network: Network) -> bool:
        return network.persistent is DEFAULT or self._store.exists(FOLDER, f"{network.name}.autostart")

    def leases(self, network: Network) -> list[Lease]:
        """Those that hold now, by address."""
        found = read_leases(self._file(network.name, "leases")) if network.active else []
        return sorted((lease for lease in found if lease.expires > time.time()), key=lambda lease: lease.address)

    def lease_of(self, mac: str) -> list[tuple[Network, Lease]]:
        """What a card was given, by its address."""
        return [
            (network, lease)
            for network in self.all()
            if network.active and network.spec is not DEFAULT
            for lease in self.leases(network)
            if lease.mac == mac.lower()
        ]

    # Definitions.

    def load(self) -> None:
        """What is stored, when the daemon starts; what cannot be read is told and left where it is."""
        for suffix in ("xml", "live"):
            for name in self._store.names(FOLDER, f".{suffix}"):
                try:
                    spec = read_network(self._store.read(FOLDER, f"{name}.{suffix}") or "")
                except LibvirtError as error:
                    log.error("networks/%s.%s: %s", name, suffix, error)
                    continue
                network = self._networks.setdefault(name, Network(name))
                if suffix == "xml":
                    network.persistent = spec
                else:
                    network.live = spec

    async def resume(self) -> None:
        """Networks that were active when the last daemon ended are put right; those that the host has lost since, as
        by a new start of it, are not active any more; then those that start by themselves are started."""
        for network in self.all():
            live = network.live
            if live is None or live is DEFAULT:
                continue
            if host.is_bridge(live.bridge):
                try:
                    await self._bring_up(live)
                except VmmError as error:
                    log.error("network %s: %s", network.name, error)
            else:
                self._over(network)
        for network in self.all():
            if network.persistent is not None and not network.active and self.autostart(network):
                try:
                    await self.start(network)
                except VmmError as error:
                    log.error("network %s: not started: %s", network.name, error)

    def define(self, spec: NetworkSpec) -> Network:
        """Add a definition, or replace a network's. Raises LibvirtError, HostError."""
        network = self._claim(spec)
        spec = self._named_bridge(spec)
        self._store.write(FOLDER, f"{spec.name}.xml", spec.xml())
        network.persistent = spec
        self._networks[spec.name] = network
        self._tell(spec, DEFINED)
        return network

    def undefine(self, network: Network) -> None:
        """Raises LibvirtError, HostError."""
        self._ours(network)
        if network.persistent is None:
            raise LibvirtError(Code.OPERATION_INVALID, "can't undefine transient network", From.NETWORK)
        spec = network.persistent
        self._store.remove(FOLDER, f"{network.name}.xml")
        self._store.remove(FOLDER, f"{network.name}.autostart")
        network.persistent = None
        if not network.active:
            self._forget(network)
        self._tell(spec, UNDEFINED)

    def set_autostart(self, network: Network, *, on: bool) -> None:
        """Raises LibvirtError, HostError."""
        if network.persistent is DEFAULT:
            if not on:
                self._ours(network)
            return
        if network.persistent is None:
            raise LibvirtError(Code.OPERATION_INVALID, "cannot set autostart for transient network", From.NETWORK)
        if on:
            self._store.write(FOLDER, f"{network.name}.autostart", "")
        else:
            self._store.remove(FOLDER, f"{network.name}.autostart")

    def update(self, network: Network, command: int, section: int, text: str, *, live: bool, config: bool) -> None:
        """Change one part. Raises LibvirtError, HostError."""
        self._ours(network)
        if live and network.live is None:
            raise LibvirtError(Code.OPERATION_INVALID, "network is not running", From.NETWORK)
        if config and network.persistent is None:
            raise LibvirtError(Code.OPERATION_INVALID, "can't change a transient network's definition", From.NETWORK)
        if live and network.live is not None and not network.live.dhcp:
            text = f"network '{network.name}' was started without <dhcp>: nobody gives addresses in it; use --config"
            raise LibvirtError(Code.OPERATION_INVALID, text, From.NETWORK)
        defined = updated(network.persistent, command, section, text) if config and network.persistent else None
        running = updated(network.live, command, section, text) if live and network.live else None
        if defined is not None:
            self._store.write(FOLDER, f"{network.name}.xml", defined.xml())
            network.persistent = defined
        if running is not None:
            self._store.write(FOLDER, f"{network.name}.live", running.xml())
            network.live = running
            self._write_plan(running)
            self._signal(network.name, signal.SIGHUP)

    # Life.

    async def create(self, spec: NetworkSpec) -> Network:
        """Start a transient network. Raises VmmError."""
        network = self._claim(spec)
        if network.active:
            raise LibvirtError(Code.OPERATION_INVALID, f"network is already active as '{spec.name}'", From.NETWORK)
        network.coming = spec = self._named_bridge(spec)
        self._networks[spec.name] = network
        try:
            await self._start(network, spec)
        finally:
            if not network.active and network.persistent is None:
                self._forget(network)
        return network

    async def start(self, network: Network) -> None:
        """A defined one. Raises VmmError."""
        if network.active or network.persistent is None:
            raise LibvirtError(Code.OPERATION_INVALID, "network is already active", From.NETWORK)
        await self._start(network, network.persistent)

    async def _start(self, network: Network, spec: NetworkSpec) -> None:
        async with network.lock:
            if network.active:
                raise LibvirtError(Code.OPERATION_INVALID, "network is already active", From.NETWORK)
            if spec.mode == "bridge" and not host.is_bridge(spec.bridge):
                raise HostError(f"{spec.bridge}: there is no such bridge on this host")
            if spec.mode != "bridge" and (host.NET / spec.bridge).exists():
                raise HostError(f"{spec.bridge}: the host has an interface of that name already")
            # First that it is being started: a daemon that is killed now leaves a bridge that the next one knows.
            self._store.write(FOLDER, f"{network.name}.live", spec.xml())
            try:
                await self._bring_up(spec)
            except BaseException:
                await self._take_down(spec)
                self._store.remove(FOLDER, f"{network.name}.live")
                raise
            network.live = spec
        self._tell(spec, STARTED)

    async def destroy(self, network: Network) -> None:
        """Raises VmmError."""
        self._ours(network)
        async with network.lock:
            spec = network.live
            if spec is None:
                raise _inactive(network.name)
            await self._take_down(spec)
            self._over(network)
        self._tell(spec, STOPPED)

    # Machines' interfaces.

    def check(self, spec: Spec) -> None:
        """Before a machine starts. Raises LibvirtError if a network of its is not active."""
        for name in spec.nets:
            if name.network:
                self._running(name.network)

    async def plug(self, spec: Spec) -> None:
        """Put the interfaces of a machine that is there into their bridges. Raises VmmError."""
        for port in self._ports(spec):
            await host.plug(port.tap, port.bridge, port.mtu)

    def uses(self, spec: Spec, network: Network) -> int:
        """How many interfaces of a machine are in it."""
        return sum(name.network == network.name for name in spec.nets)

    def _ports(self, spec: Spec) -> list[BridgePort]:
        found = []
        for net, name in zip(spec.config.nets, spec.nets, strict=True):
            if net.kind != "tap" or not (name.network or name.bridge):
                continue
            if name.network:
                live = self._running(name.network)
                found.append(BridgePort(net.target, live.bridge, live.mtu))
            else:
                found.append(BridgePort(net.target, name.bridge, 0))
        return found

    def _running(self, name: str) -> NetworkSpec:
        """What a network was started with. Raises LibvirtError if it is not active."""
        live = self.named(name).live
        if live is None:
            raise _inactive(name)
        return live

    # Inside.

    async def _bring_up(self, spec: NetworkSpec) -> None:
        bridge = spec.host_bridge
        if bridge is None:
            return
        await host.up(bridge)
        if spec.plan() is not None:
            self._write_plan(spec)
            await self._serve(spec.name)

    async def _take_down(self, spec: NetworkSpec) -> None:
        await self._stop_serving(spec.name)
        bridge = spec.host_bridge
        if bridge is not None:
            await host.down(bridge)

    def _write_plan(self, spec: NetworkSpec) -> None:
        plan = spec.plan()
        if plan is not None:
            values = {"bridge": spec.bridge, "dhcp": spec.dhcp, "plan": plan_values(plan)}
            self._store.write(FOLDER, f"{spec.name}.serve", json.dumps(values))

    def _server(self, name: str) -> int:
        """The process that serves a network; 0: none does."""
        return holder(self._file(name, "lock"))

    async def _serve(self, name: str) -> None:
        """Raises HostError."""
        if self._server(name):
            self._signal(name, signal.SIGHUP)
            return
        log_file = self._store.file("log", f"network {name}.log")
        command = (sys.executable, "-P", "-m", "vmm.network.server", str(self._file(name, "serve")))
        process = self._servers[name] = Process.start(command, log_file)
        deadline = asyncio.get_running_loop().time() + SERVER_SECONDS
        while (said := await last_words(log_file)) != READY:
            if process.ended.is_set() or asyncio.get_running_loop().time() > deadline:
                process.kill()
                raise HostError(f"{name}: {said or 'its server did not begin'}")
            with suppress(TimeoutError):
                await asyncio.wait_for(process.ended.wait(), 0.02)

    async def _stop_serving(self, name: str) -> None:
        process = self._servers.pop(name, None)
        self._signal(name, signal.SIGTERM)
        if process is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(process.ended.wait(), SERVER_SECONDS)
        deadline = asyncio.get_running_loop().time() + SERVER_SECONDS
        while self._server(name) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - another daemon's
            await asyncio.sleep(0.02)
        for suffix in ("serve", "leases", "lock"):
            self._store.remove(FOLDER, f"{name}.{suffix}")

    def _signal(self, name: str, number: signal.Signals) -> None:
        if pid := self._server(name):
            with suppress(OSError):
                os.kill(pid, number)

    def _file(self, name: str, suffix: str) -> Path:
        return self._store.file(FOLDER, f"{name}.{suffix}")

    def _claim(self, spec: NetworkSpec) -> Network:
        """The network that a definition is for. Raises LibvirtError if name and UUID are two's."""
        there = self._networks.get(spec.name)
        if there is not None:
            self._ours(there)
        for other in self._networks.values():
            if other is not there and other.spec.uuid == spec.uuid:
                text = f"network '{other.name}' already exists with uuid {other.spec.uuid}"
                raise LibvirtError(Code.OPERATION_FAILED, text, From.NETWORK)
        if there is not None and there.spec.uuid != spec.uuid:
            text = f"network '{there.name}' already exists with uuid {there.spec.uuid}"
            raise LibvirtError(Code.OPERATION_FAILED, text, From.NETWORK)
        if there is None and len(self._networks) >= MAX_NETWORKS:
            raise LibvirtError(Code.OPERATION_FAILED, f"{MAX_NETWORKS} networks are as many as this daemon takes")
        if spec.mode != "bridge" and spec.bridge:
            for other in self._networks.values():
                for known in (other.persistent, other.spec):
                    if other is not there and known is not None and known.bridge == spec.bridge:
                        text = f"bridge name '{spec.bridge}' already in use."
                        raise LibvirtError(Code.INTERNAL_ERROR, text, From.NETWORK)
        return there or Network(spec.name)

    def _named_bridge(self, spec: NetworkSpec) -> NetworkSpec:
        if spec.bridge:
            return spec
        old = self._networks.get(spec.name)
        if old is not None and old.spec.bridge and old.spec.mode != "bridge":
            return replace(spec, bridge=old.spec.bridge)
        known = {one.bridge for network in self.all() for one in (network.persistent, network.spec) if one is not None}
        number = 0
        while (name := f"virbr{number}") in known or (host.NET / name).exists():
            number += 1
        return replace(spec, bridge=name)

    def _ours(self, network: Network) -> None:
        if network.persistent is DEFAULT:
            text = "the network 'default' is user networking, which is always there; define another for a bridge"
            raise LibvirtError(Code.OPERATION_UNSUPPORTED, text, From.NETWORK)

    def _over(self, network: Network) -> None:
        """It is not active any more."""
        self._store.remove(FOLDER, f"{network.name}.live")
        network.live = None
        if network.persistent is None:
            self._forget(network)

    def _forget(self, network: Network) -> None:
        if self._networks.get(network.name) is network:
            del self._networks[network.name]

    def _tell(self, spec: NetworkSpec, event: int) -> None:
        self._events.other(NETWORK_LIFECYCLE, spec.ref, event, 0)


def _inactive(name: str) -> LibvirtError:
    return LibvirtError(Code.OPERATION_INVALID, f"network '{name}' is not active", From.NETWORK)
