"""Network cards: which backend a configured one gets, and its address. Loop thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from virtio.backends.net import NetBackend, PcapNet
from virtio.backends.sockets import UserNet
from virtio.backends.sockets import connect as connect_socket
from virtio.backends.tap import TapNet
from virtio.device import Device
from virtio.devices.net import NetDevice, parse_mac, random_mac
from virtio.protocols import RandomSource
from vmm.config import Net, limit_names
from vmm.devices.virtio.pool import Maker, TransportKind

if TYPE_CHECKING:
    from virtio.backends.policed import PolicedNet, Resolve
    from virtio.backends.rules import Egress

POLICED = ["--no-map-gw", "-D", "198.18.0.53"]
"""passt(1), behind a policy: the gateway's address does not mean this host, and the guest is told a name server,
whatever the host has (of RFC 2544's addresses, which nobody has): questions to it are answered by the policy."""
ONCE_POLICED = ["--dns-forward", "198.18.0.53"]
"""passt(1), for a guest that may have been behind a policy before, and goes on asking the name server of then."""


def policy_of(net: Net) -> tuple[Egress, Resolve | None]:
    """The policy that a card asks for, and who resolves its guest's names; None: this host."""
    from virtio.backends import rules
    from virtio.backends.ownaddresses import is_own
    from virtio.backends.policed import no_names
    from virtio.backends.resolver import NONE, Resolver, parse_servers

    policy = rules.Egress(rules.parse(net.allow), rules.parse(net.deny), is_own)
    if not net.dns:
        return policy, None
    return policy, no_names if net.dns == NONE else Resolver(parse_servers(net.dns))


def policed(device: NetDevice) -> PolicedNet | None:
    """The policy that stands before a card's network, if it has one."""
    from virtio.backends.policed import PolicedNet

    backend = device.backend
    if isinstance(backend, PcapNet):
        backend = backend.inner
    return backend if isinstance(backend, PolicedNet) else None


async def user_net(net: Net, mac: bytes, tell: Callable[[str], None], *, used: bool, wait: bool) -> NetBackend:
    """User networking by a new passt, behind the card's policy if it has one. `tell` hears what that refuses. `used`:
    the guest has used the card before. `wait`: UserNet.start. ConfigError, HostError."""
    ports = ["-t", net.forward.replace("+", ",")] if net.forward else []
    if not net.policed:
        return await UserNet.start(ports + (ONCE_POLICED if used else []), wait=wait)
    from virtio.backends.policed import PolicedNet

    policy, resolve = policy_of(net)
    return PolicedNet(await UserNet.start(ports + POLICED, wait=wait), mac, policy, tell, resolve)


class NetMaker(Maker):
    """One network card of the configuration."""

    slow = True  # passt takes its time

    def __init__(
        self,
        net: Net,
        random: RandomSource,
        name: str = "net",
        warn: Callable[[str], None] = lambda text: None,
        *,
        restored: bool = False,
    ) -> None:
        """`restored`: the guest has used the card before, and runs on without waiting for the network. `warn` hears
        what the policy of the card of this name refuses."""
        self._tell = lambda text: warn(f"{name}: {text}")
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
            backend = await user_net(net, self.mac, self._tell, used=self._restored, wait=not self._restored)
        elif net.kind == "tap":
            backend = TapNet(net.target, queues=net.queues)
        elif net.kind == "switch":
            from vmm.network.switch import connect as connect_switch

            backend = await connect_switch(net.target)
            if wire := net.impaired:
                from virtio.backends.impaired import ImpairedNet, Impairment

                backend = ImpairedNet(backend, Impairment(**wire))
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
