"""Procedures that say and tell on which of the host's processors a domain's threads run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from vmm.libvirt import host, pinning
from vmm.libvirt.client import Call
from vmm.libvirt.cpusets import cpu_map, cpu_text, from_map
from vmm.libvirt.domain import Domain
from vmm.libvirt.domain_calls import AFFECT_CONFIG, AFFECT_LIVE, at_least_zero, check_flags, spec_for, wants
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.spec import EMULATOR
from vmm.libvirt.wire import DomainRef, VcpuInfo

calls = Procedures()


def _map(cpus: frozenset[int], length: int) -> bytes:
    if not 0 <= length <= 2048:
        raise LibvirtError(Code.INVALID_ARG, f"a map of {length} bytes")
    return cpu_map(cpus)[:length].ljust(length, b"\0")


def _maps(call: Call, domain: Domain, numbers: Iterable[int], length: int, flags: int) -> bytes:
    """Where these vCPUs, or the EMULATOR, run, or are to run by the definition: a map of `length` bytes for each. What
    has no thread yet runs where it is to."""
    spec, there = spec_for(call, domain, flags), host.processor_numbers()
    pinned = dict(spec.pins.vcpus)
    threads = pinning.threads_of(domain.pid) if spec is domain.live else None
    maps = []
    for number in numbers:
        asked = spec.pins.emulator if number == EMULATOR else pinned.get(number)
        thread = 0
        if threads is not None:
            thread = domain.pid if number == EMULATOR else threads.of(number)
        found = pinning.affinity(thread) if thread else None
        maps.append(_map(found or asked or there, length))
    return b"".join(maps)


@calls.query(20, "domain_get_vcpus", "dom:domain maxinfo:int maplen:int", "info:vcpuinfo<16384> maps:opaque<8388608>")
async def domain_get_vcpus(call: Call, dom: DomainRef, maxinfo: int, maplen: int) -> tuple[list[VcpuInfo], bytes]:
    domain = call.daemon.domains.of(dom)
    domain.running_entry()
    count = min(at_least_zero(maxinfo), domain.spec.config.cpus)
    threads = pinning.threads_of(domain.pid)
    infos = []
    for number in range(count):
        thread = threads.of(number)
        time, cpu = host.thread_time(domain.pid, thread) if thread else (0, -1)
        # One thread may run several vCPUs, so its time is theirs in equal parts.
        share = time if number in threads.vcpus else time // domain.spec.config.cpus
        infos.append(VcpuInfo(number, 1, share, cpu))
    return infos, _maps(call, domain, range(count), maplen, AFFECT_LIVE)


@calls.query(
    230, "domain_get_vcpu_pin_info", "dom:domain count:int maplen:int flags:uint", "maps:opaque<8388608> count:int"
)
async def domain_get_vcpu_pin_info(
    call: Call, dom: DomainRef, count: int, maplen: int, flags: int
) -> tuple[bytes, int]:
    domain = call.daemon.domains.of(dom)
    wanted = min(at_least_zero(count), spec_for(call, domain, flags & 3).config.most_cpus)
    return _maps(call, domain, range(wanted), maplen, flags & 3), wanted


@calls.query(280, "domain_get_emulator_pin_info", "dom:domain maplen:int flags:uint", "maps:opaque<2048> count:int")
async def domain_get_emulator_pin_info(call: Call, dom: DomainRef, maplen: int, flags: int) -> tuple[bytes, int]:
    return _maps(call, call.daemon.domains.of(dom), [EMULATOR], maplen, flags & 3), 1


@calls.change(26, "domain_pin_vcpu", "dom:domain vcpu:uint map:opaque<2048>")
async def domain_pin_vcpu(call: Call, dom: DomainRef, vcpu: int, map: bytes) -> None:
    await domain_pin_vcpu_flags(call, dom, vcpu, map, AFFECT_LIVE)


@calls.change(225, "domain_pin_vcpu_flags", "dom:domain vcpu:uint map:opaque<2048> flags:uint")
async def domain_pin_vcpu_flags(call: Call, dom: DomainRef, vcpu: int, map: bytes, flags: int) -> None:
    _pin(call, call.daemon.domains.of(dom), vcpu, map, flags)


@calls.change(279, "domain_pin_emulator", "dom:domain map:opaque<2048> flags:uint")
async def domain_pin_emulator(call: Call, dom: DomainRef, map: bytes, flags: int) -> None:
    _pin(call, call.daemon.domains.of(dom), EMULATOR, map, flags)


def _pin(call: Call, domain: Domain, which: int, data: bytes, flags: int) -> None:
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG)
    running, config = wants(call, domain, flags)
    cpus, there = from_map(data), host.processor_numbers()
    if not cpus & there:
        raise LibvirtError(Code.INVALID_ARG, f"processors {cpu_text(cpus)}: this host has none of them")
    chosen = None if there <= cpus else cpus & there
    for spec in [domain.live] * running + [domain.persistent] * config:
        if spec is not None and which >= spec.config.most_cpus:
            raise LibvirtError(
                Code.INVALID_ARG, f"vcpu {which} is out of range: the domain has {spec.config.most_cpus}"
            )
    if running and domain.live is not None:
        spec = replace(domain.live, pins=domain.live.pins.changed(which, chosen))
        pinning.check(domain, spec.pins)
        wanted = spec.pins
        if which == EMULATOR and chosen is None:
            # apply() does not move the threads of an emulator without pins: they get what this daemon has.
            wanted = replace(wanted, emulator=frozenset(os.sched_getaffinity(0)))
        pinning.apply(domain.pid, wanted, there)
        call.daemon.domains.set_live(domain, spec)
    if config and domain.persistent is not None:
        changed = replace(domain.persistent, pins=domain.persistent.pins.changed(which, chosen))
        call.daemon.domains.replace_definition(domain, changed)
