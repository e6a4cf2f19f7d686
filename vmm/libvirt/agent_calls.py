"""Procedures that ask the guest, by its agent; and those of libvirt's QEMU program."""

from __future__ import annotations

from vmm.libvirt import guest, host
from vmm.libvirt.client import Call
from vmm.libvirt.domain_calls import check_flags
from vmm.libvirt.domains import Domain
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.wire import Addresses, DomainRef, IpAddress, Param, int_param, string_param

calls = Procedures()
qemu = Procedures()

LEASE, AGENT, ARP = 0, 1, 2
"""virDomainInterfaceAddressesSource."""
OS, TIMEZONE, HOSTNAME = 2, 4, 8
"""virDomainGuestInfoTypes that are here."""
PREFIXES = {OS: "os.", TIMEZONE: "timezone.", HOSTNAME: "hostname"}


@calls.change(337, "domain_get_time", "dom:domain flags:uint", "seconds:hyper nanoseconds:uint")
async def domain_get_time(call: Call, dom: DomainRef, flags: int) -> tuple[int, int]:
    check_flags(flags, 0)
    return await guest.clock(call.daemon.domains.of(dom)), 0


@calls.change(353, "domain_interface_addresses", "dom:domain source:uint flags:uint", "ifaces:addresses<2048>")
async def domain_interface_addresses(call: Call, dom: DomainRef, source: int, flags: int) -> list[Addresses]:
    check_flags(flags, 0)
    domain = call.daemon.domains.of(dom)
    domain.running_entry()
    if source == AGENT:
        return await guest.addresses(domain)
    if source == LEASE:
        return leased(call, domain)
    if source == ARP:
        return resolved(domain)
    raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, f"addresses from source {source}; here are 0 to 2")


def leased(call: Call, domain: Domain) -> list[Addresses]:
    """What networks of this daemon gave to a domain's cards; user networking keeps no leases."""
    found = []
    for net in domain.spec.config.nets:
        for network, lease in call.daemon.networks.lease_of(net.mac or ""):
            prefix = network.spec.address.network.prefixlen if network.spec.address is not None else 32
            found.append(Addresses(net.target or network.spec.bridge, lease.mac, [IpAddress(0, lease.address, prefix)]))
    return found


def resolved(domain: Domain) -> list[Addresses]:
    """What the host's own table of neighbours knows of a domain's cards."""
    macs = {(net.mac or "").lower(): net.target for net in domain.spec.config.nets if net.mac}
    found = []
    for address, mac in host.neighbours():
        if mac in macs:
            found.append(Addresses(macs[mac] or mac, mac, [IpAddress(0, address, 0)]))
    return found


@calls.change(418, "domain_get_guest_info", "dom:domain types:uint flags:uint", "params:param<2048>")
async def domain_get_guest_info(call: Call, dom: DomainRef, types: int, flags: int) -> list[Param]:
    check_flags(flags, 0)
    if types & ~(OS | TIMEZONE | HOSTNAME):
        raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, "the agent tells os, timezone and hostname")
    wanted = tuple(prefix for bit, prefix in PREFIXES.items() if not types or types & bit)
    found = await guest.facts(call.daemon.domains.of(dom))
    return [
        int_param(key, int(value)) if key == "timezone.offset" else string_param(key, value)
        for key, value in found.items()
        if key.startswith(wanted)
    ]


@qemu.change(1, "domain_monitor_command", "dom:domain command:string flags:uint", "result:string")
async def domain_monitor_command(call: Call, dom: DomainRef, command: str, flags: int) -> str:
    call.daemon.domains.of(dom).running_entry()
    raise LibvirtError(Code.OPERATION_UNSUPPORTED, "the machine is no QEMU and has no monitor of its kind")


@qemu.change(3, "domain_agent_command", "dom:domain command:string timeout:int flags:uint", "result:string?")
async def domain_agent_command(call: Call, dom: DomainRef, command: str, timeout: int, flags: int) -> str:
    check_flags(flags, 0)
    domain = call.daemon.domains.of(dom)
    return await guest.agent_command(domain, command, float(timeout) if timeout > 0 else None)
