"""Network cards: which backend a configured one gets, and its address. Loop thread."""

from __future__ import annotations

from virtio.backends.net import NetBackend, PcapNet
from virtio.backends.sockets import UserNet
from virtio.backends.sockets import connect as connect_socket
from virtio.backends.tap import TapNet
from virtio.device import Device
from virtio.devices.net import NetDevice, parse_mac, random_mac
from virtio.protocols import RandomSource
from vmm.config import Net, limit_names
from vmm.devices.virtio.pool import Maker, TransportKind


class NetMaker(Maker):
    """One network card of the configuration."""

    slow = True  # passt takes its time

    def __init__(self, net: Net, random: RandomSource, *, restored: bool = False) -> None:
        """`restored`: the guest has used the card before, and runs on without waiting for the network."""
        self.transport: TransportKind = net.transport
        self.optional = not net.required
        self._net = net
        self._restored = restored
        # Now, so that with a seed it does not depend on when other devices ask for chance.
        self.mac = parse_mac(net.mac) if net.mac else random_mac(random)

    async def make(self) -> Device:
        net = self._net
        backend: NetBackend
        if net.kind == "user":
            ports = ["-t", net.forward.replace("+", ",")] if net.forward else []
            backend = await UserNet.start(ports, wait=not self._restored)
        elif net.kind == "tap":
            backend = TapNet(net.target, queues=net.queues)
        else:
            backend = await connect_socket(net.target)
        if net.pcap is not None:
            try:
                backend = PcapNet(backend, net.pcap)
            except BaseException:
                await backend.aclose()
                raise
        device = NetDevice(backend, self.mac)
        device.set_limits({name: getattr(net, name) for name in limit_names(Net)})
        return device
