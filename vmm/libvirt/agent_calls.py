"""Procedures that ask the guest, by its agent; and those of libvirt's QEMU program."""

from __future__ import annotations

from vmm.libvirt import agent_commands, guest, host, monitor
from vmm.libvirt.client import Call
from vmm.libvirt.cpusets import cpu_set, cpu_text
from vmm.libvirt.domain import Domain
from vmm.libvirt.domain_calls import check_flags
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.wire import Addresses, DomainRef, FileSystem, IpAddress, Param, int_param, string_param

calls = Procedures()
qemu = Procedures()

LEASE, AGENT, ARP = 0, 1, 2
"""virDomainInterfaceAddressesSource."""
TIME_SYNC, PASSWORD_CRYPTED = 1, 1
KEYS_APPEND, KEYS_REMOVE = 1, 2
OS, TIMEZONE, HOSTNAME = 2, 4, 8
"""virDomainGuestInfoTypes that are here."""
PREFIXES = {OS: "os.", TIMEZONE: "timezone.", HOSTNAME: "hostname"}


@calls.change(337, "domain_get_time", "dom:domain flags:uint", "seconds:hyper nanoseconds:uint")
async def domain_get_time(call: Call, dom: DomainRef, flags: int) -> tuple[int, int]:
    check_flags(flags, 0)
    return await guest.clock(call.daemon.domains.of(dom)), 0


@calls.change(338, "domain_set_time", "dom:domain seconds:hyper nanoseconds:uint flags:uint")
async def domain_set_time(call: Call, dom: DomainRef, seconds: int, nanoseconds: int, flags: int) -> None:
    check_flags(flags, TIME_SYNC)
    if not 0 <= seconds < 1 << 40:
        raise LibvirtError(Code.INVALID_ARG, f"time {seconds}: seconds since 1970 are expected")
    await guest.set_clock(call.daemon.domains.of(dom), None if flags & TIME_SYNC else seconds)


@calls.change(277, "domain_get_hostname", "dom:domain flags:uint", "hostname:string")
async def domain_get_hostname(call: Call, dom: DomainRef, flags: int) -> str:
    check_flags(flags, 1 | 2)  # by lease, by agent
    domain = call.daemon.domains.of(dom)
    if flags & 1:
        domain.running_entry()
        for net in domain.spec.config.nets:
            for _, lease in call.daemon.networks.lease_of(net.mac or ""):
                if lease.hostname:
                    return lease.hostname
        raise LibvirtError(Code.OPERATION_FAILED, f"no hostname found for domain {domain.name}")
    return (await guest.facts(domain)).get("hostname", "")


@calls.change(335, "domain_fsfreeze", "dom:domain mountpoints:string<256> flags:uint", "filesystems:int")
async def domain_fsfreeze(call: Call, dom: DomainRef, mountpoints: list[str], flags: int) -> int:
    check_flags(flags, 0)
    return await guest.freeze(call.daemon.domains.of(dom), mountpoints)


@calls.change(336, "domain_fsthaw", "dom:domain mountpoints:string<256> flags:uint", "filesystems:int")
async def domain_fsthaw(call: Call, dom: DomainRef, mountpoints: list[str], flags: int) -> int:
    check_flags(flags, 0)
    return await guest.thaw(call.daemon.domains.of(dom))


@calls.change(294, "domain_fstrim", "dom:domain mountpoint:string? minimum:uhyper flags:uint")
async def domain_fstrim(call: Call, dom: DomainRef, mountpoint: str | None, minimum: int, flags: int) -> None:
    check_flags(flags, 0)
    await guest.trim(call.daemon.domains.of(dom), mountpoint, minimum)


@calls.change(349, "domain_get_fsinfo", "dom:domain flags:uint", "filesystems:filesystem<256> count:uint")
async def domain_get_fsinfo(call: Call, dom: DomainRef, flags: int) -> tuple[list[FileSystem], int]:
    check_flags(flags, 0)
    domain = call.daemon.domains.of(dom)
    names = {f"/dev/{name.target}": name.target for name in domain.spec.disks}
    found = [
        FileSystem(one.point, one.device.removeprefix("/dev/"), one.kind, [names[one.device]] * (one.device in names))
        for one in await guest.mounts(domain)
    ][:256]
    return found, len(found)


@calls.change(357, "domain_set_user_password", "dom:domain user:string? password:string? flags:uint")
async def domain_set_user_password(
    call: Call, dom: DomainRef, user: str | None, password: str | None, flags: int
) -> None:
    check_flags(flags, PASSWORD_CRYPTED)
    crypted = bool(flags & PASSWORD_CRYPTED)
    await guest.set_password(call.daemon.domains.of(dom), user or "", password or "", crypted=crypted)


@calls.change(420, "domain_agent_set_response_timeout", "dom:domain timeout:int flags:uint", "result:int")
async def domain_agent_set_response_timeout(call: Call, dom: DomainRef, timeout: int, flags: int) -> int:
    check_flags(flags, 0)
    if timeout < -2:
        raise LibvirtError(Code.INVALID_ARG, f"guest agent timeout '{timeout}' is less than the minimum '-2'")
    domain = call.daemon.domains.of(dom)
    domain.running_entry()
    # Without an end, by default, not at all, or so many seconds.
    domain.extra["agent seconds"] = {-2: 86_400, -1: guest.ANSWER_SECONDS, 0: 0.1}.get(timeout, timeout)
    return 0


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


@calls.change(371, "domain_get_guest_vcpus", "dom:domain flags:uint", "params:param<64>")
async def domain_get_guest_vcpus(call: Call, dom: DomainRef, flags: int) -> list[Param]:
    check_flags(flags, 0)
    found = await guest.cpus(call.daemon.domains.of(dom))
    sets = {
        "vcpus": [cpu.number for cpu in found],
        "online": [cpu.number for cpu in found if cpu.online],
        "offlinable": [cpu.number for cpu in found if not cpu.stays],
    }
    return [string_param(name, cpu_text(numbers)) for name, numbers in sets.items()]


@calls.change(372, "domain_set_guest_vcpus", "dom:domain cpumap:string state:int flags:uint")
async def domain_set_guest_vcpus(call: Call, dom: DomainRef, cpumap: str, state: int, flags: int) -> None:
    check_flags(flags, 0)
    domain = call.daemon.domains.of(dom)
    wanted, known = cpu_set(cpumap), {cpu.number for cpu in await guest.cpus(domain)}
    for missing in sorted(wanted - known):
        raise LibvirtError(Code.INVALID_ARG, f"the guest has no processor {missing}")
    for number in sorted(wanted):
        await guest.set_cpu(domain, number, online=bool(state))


@calls.change(424, "domain_authorized_ssh_keys_get", "dom:domain user:string flags:uint", "keys:string<2048>")
async def domain_authorized_ssh_keys_get(call: Call, dom: DomainRef, user: str, flags: int) -> list[str]:
    check_flags(flags, 0)
    return await guest.ssh_keys(call.daemon.domains.of(dom), user)


@calls.change(425, "domain_authorized_ssh_keys_set", "dom:domain user:string keys:string<2048> flags:uint")
async def domain_authorized_ssh_keys_set(call: Call, dom: DomainRef, user: str, keys: list[str], flags: int) -> None:
    check_flags(flags, KEYS_APPEND | KEYS_REMOVE)
    domain = call.daemon.domains.of(dom)
    if flags & KEYS_REMOVE:
        await guest.remove_ssh_lines(domain, user, keys)
    elif flags & KEYS_APPEND:
        await guest.add_ssh_lines(domain, user, keys)
    else:
        await guest.set_ssh_lines(domain, user, keys)


@qemu.change(1, "domain_monitor_command", "dom:domain command:string flags:uint", "result:string")
async def domain_monitor_command(call: Call, dom: DomainRef, command: str, flags: int) -> str:
    check_flags(flags, monitor.HMP)
    domain = call.daemon.domains.of(dom)
    return await (monitor.execute_text if flags & monitor.HMP else monitor.execute)(domain, command)


@qemu.change(3, "domain_agent_command", "dom:domain command:string timeout:int flags:uint", "result:string?")
async def domain_agent_command(call: Call, dom: DomainRef, command: str, timeout: int, flags: int) -> str:
    check_flags(flags, 0)
    domain = call.daemon.domains.of(dom)
    return await agent_commands.agent_command(domain, command, float(timeout) if timeout > 0 else None)
