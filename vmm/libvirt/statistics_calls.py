"""Procedures about what domains use and how they are limited. Nothing is limited here, which is what they say."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from vmm.convert import KIB
from vmm.libvirt import host, iotune, jobs
from vmm.libvirt.client import Call
from vmm.libvirt.domain import Domain
from vmm.libvirt.domain_calls import check_flags, listed, spec_for
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.live import balloon_of
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.statistics import (
    KNOWN,
    bulk,
    devices,
    disk_sizes,
    find_disk,
    find_interface,
    interface_counters,
)
from vmm.libvirt.wire import (
    DomainRef,
    Param,
    Stat,
    StatsRecord,
    boolean_param,
    int_param,
    llong_param,
    some,
    string_param,
    uint_param,
    ullong_param,
)

calls = Procedures()

ACTUAL_BALLOON, RSS = 6, 7
MEMORY_STATS = {
    "swap_in": (0, KIB), "swap_out": (1, KIB), "major_faults": (2, 1), "minor_faults": (3, 1), "free": (4, KIB),
    "total": (5, KIB), "available": (8, KIB), "caches": (10, KIB), "hugetlb_allocations": (11, 1),
    "hugetlb_failures": (12, 1),
}  # fmt: skip
"""What a guest's driver tells, by virDomainMemoryStatTags and in libvirt's unit."""
QUOTAS = ("vcpu_quota", "emulator_quota", "global_quota")
"""Scheduler parameters; -1 is no limit."""
UNLIMITED = 9007199254740991
"""VIR_DOMAIN_MEMORY_PARAM_UNLIMITED."""
STATS_BACKING, STATS_NOWAIT, STATS_ENFORCE = 1 << 30, 1 << 29, 1 << 31
JOB_STATS_COMPLETED, JOB_STATS_KEEP = 1, 2
STATS_AT_ONCE = 64
"""Machines that are asked beside each other."""
IO_TUNE = [
    f"{which}_{unit}_sec{suffix}"
    for suffix in ("", "_max", "_max_length")
    for unit in ("bytes", "iops")
    for which in ("total", "read", "write")
]
NUMA_STRICT = 0
"""VIR_DOMAIN_NUMATUNE_MEM_STRICT: what libvirt says of domains that are bound to no node."""
PERF_EVENTS = (
    "cmt", "mbmt", "mbml", "cpu_cycles", "instructions", "cache_references", "cache_misses", "branch_instructions",
    "branch_misses", "bus_cycles", "stalled_cycles_frontend", "stalled_cycles_backend", "ref_cpu_cycles", "cpu_clock",
    "task_clock", "page_faults", "context_switches", "cpu_migrations", "page_faults_min", "page_faults_maj",
    "alignment_faults", "emulation_faults",
)  # fmt: skip
"""VIR_PERF_PARAM_*; none is ever enabled."""
KSM = Path("/sys/kernel/mm/ksm")
SAME_PAGES = {
    "shm_pages_to_scan": ("pages_to_scan", uint_param), "shm_sleep_millisecs": ("sleep_millisecs", uint_param),
    "shm_pages_shared": ("pages_shared", ullong_param), "shm_pages_sharing": ("pages_sharing", ullong_param),
    "shm_pages_unshared": ("pages_unshared", ullong_param), "shm_pages_volatile": ("pages_volatile", ullong_param),
    "shm_full_scans": ("full_scans", ullong_param), "shm_merge_across_nodes": ("merge_across_nodes", uint_param),
}  # fmt: skip
"""VIR_NODE_MEMORY_SHARED_* and the kernel's file of each."""
BANDWIDTH = [f"{way}.{what}" for way in ("inbound", "outbound") for what in ("average", "peak", "burst")]


@calls.query(159, "domain_memory_stats", "dom:domain max:uint flags:uint", "stats:memorystat<1024>")
async def domain_memory_stats(call: Call, dom: DomainRef, max: int, flags: int) -> list[Stat]:
    check_flags(flags, 0)
    domain = call.daemon.domains.of(dom)
    domain.running_entry()
    balloon = await balloon_of(domain)
    actual = domain.spec.config.memory if balloon is None else int(balloon["actual"])
    found = [Stat(ACTUAL_BALLOON, actual // KIB), Stat(RSS, host.resident(domain.pid))]
    told = balloon["statistics"] if balloon is not None else {}
    found += [Stat(tag, told[name] // unit) for name, (tag, unit) in MEMORY_STATS.items() if name in told]
    return found[:max]


@calls.query(
    64,
    "domain_block_stats",
    "dom:domain path:string",
    "rd_req:hyper rd_bytes:hyper wr_req:hyper wr_bytes:hyper errs:hyper",
)
async def domain_block_stats(call: Call, dom: DomainRef, path: str) -> tuple[int, ...]:
    found = await _disk_counters(call, dom, path)
    return tuple(found[name] for name in ("reads", "bytes_read", "writes", "bytes_written", "failures"))


async def _disk_counters(call: Call, dom: DomainRef, path: str) -> dict[str, Any]:
    """Of one disk; of all together for no path. Raises VmmError."""
    domain = call.daemon.domains.of(dom)
    domain.running_entry()
    index = find_disk(domain, path) if path else None
    told = [found or {} for found in (await devices(domain))["disks"]]
    chosen = told if index is None else [told[index]]
    names = ("reads", "bytes_read", "writes", "bytes_written", "flushes", "failures")
    return {name: sum(found.get(name, 0) for found in chosen) for name in names}


@calls.query(
    243, "domain_block_stats_flags", "dom:domain path:string nparams:int flags:uint", "params:param<16> nparams:int"
)
async def domain_block_stats_flags(
    call: Call, dom: DomainRef, path: str, nparams: int, flags: int
) -> tuple[list[Param], int]:
    found = await _disk_counters(call, dom, path)
    names = {"rd_bytes": "bytes_read", "rd_operations": "reads", "wr_bytes": "bytes_written", "wr_operations": "writes",
             "flush_operations": "flushes", "errs": "failures"}  # fmt: skip
    return some([llong_param(name, found[key]) for name, key in names.items()], nparams)


@calls.query(
    65,
    "domain_interface_stats",
    "dom:domain device:string",
    "rx_bytes:hyper rx_packets:hyper rx_errs:hyper rx_drop:hyper"
    " tx_bytes:hyper tx_packets:hyper tx_errs:hyper tx_drop:hyper",
)
async def domain_interface_stats(call: Call, dom: DomainRef, device: str) -> tuple[int, ...]:
    domain = call.daemon.domains.of(dom)
    domain.running_entry()
    nets = (await devices(domain))["nets"]
    return tuple(interface_counters(nets[find_interface(domain, device, nets)] or {}).values())


@calls.query(
    194,
    "domain_get_block_info",
    "dom:domain path:string flags:uint",
    "allocation:uhyper capacity:uhyper physical:uhyper",
)
async def domain_get_block_info(call: Call, dom: DomainRef, path: str, flags: int) -> tuple[int, ...]:
    check_flags(flags, 0)
    domain = call.daemon.domains.of(dom)
    try:
        index = find_disk(domain, path)
    except LibvirtError:
        raise LibvirtError(Code.INVALID_ARG, f"invalid path {path} not assigned to domain") from None
    told = (await devices(domain))["disks"][index] if domain.active else None
    return tuple(disk_sizes(domain.spec.config.disks[index].path, told["capacity"] if told else None))


@calls.query(
    262,
    "domain_get_cpu_stats",
    "dom:domain nparams:uint start:int ncpus:uint flags:uint",
    "params:param<2048> nparams:int",
)
async def domain_get_cpu_stats(
    call: Call, dom: DomainRef, nparams: int, start: int, ncpus: int, flags: int
) -> tuple[list[Param], int]:
    domain = call.daemon.domains.of(dom)
    domain.running_entry()
    if start != -1:
        # How many processors the host has; for one process it does not count by processor.
        return [], 0 if ncpus else max(host.processor_numbers()) + 1
    user, system = host.process_times(domain.pid)
    times = {"cpu_time": user + system, "user_time": user, "system_time": system}
    return some([ullong_param(name, value) for name, value in times.items()], nparams)


@calls.query(
    344, "connect_get_all_domain_stats", "doms:domain<16384> stats:uint flags:uint", "records:statsrecord<16384>"
)
async def connect_get_all_domain_stats(call: Call, doms: list[DomainRef], stats: int, flags: int) -> list[StatsRecord]:
    if flags & STATS_ENFORCE and stats & ~KNOWN:
        raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, f"Stats types bits 0x{stats & ~KNOWN:x} are not supported here")
    domains = call.daemon.domains
    if doms:
        chosen = [domains.of(ref) for ref in doms]
    else:
        await domains.scan()
        wanted = flags & ~(STATS_BACKING | STATS_NOWAIT | STATS_ENFORCE)
        chosen = [domain for domain in domains.all() if listed(call, domain, wanted)]
    slots = asyncio.Semaphore(STATS_AT_ONCE)

    async def one(domain: Domain) -> StatsRecord | None:
        async with slots:
            try:
                return StatsRecord(domain.ref, await bulk(domain, stats or KNOWN))
            except LibvirtError as error:
                if error.code != Code.NO_DOMAIN:
                    raise
                return None  # It ended while the others were asked, and clients expect the others.

    return [record for record in await asyncio.gather(*map(one, chosen)) if record is not None]


# Limits.


@calls.query(56, "domain_get_scheduler_type", "dom:domain", "type:string nparams:int")
async def domain_get_scheduler_type(call: Call, dom: DomainRef) -> tuple[str, int]:
    call.daemon.domains.of(dom)
    return "posix", len(QUOTAS)


@calls.query(57, "domain_get_scheduler_parameters", "dom:domain nparams:int", "params:param<16>")
async def domain_get_scheduler_parameters(call: Call, dom: DomainRef, nparams: int) -> list[Param]:
    call.daemon.domains.of(dom)
    return some(_quotas(), nparams)[0]


@calls.query(223, "domain_get_scheduler_parameters_flags", "dom:domain nparams:int flags:uint", "params:param<16>")
async def domain_get_scheduler_parameters_flags(call: Call, dom: DomainRef, nparams: int, flags: int) -> list[Param]:
    spec_for(call, call.daemon.domains.of(dom), flags & 3)
    return some(_quotas(), nparams)[0]


def _quotas() -> list[Param]:
    return [llong_param(name, -1) for name in QUOTAS]


@calls.query(198, "domain_get_memory_parameters", "dom:domain nparams:int flags:uint", "params:param<16> nparams:int")
async def domain_get_memory_parameters(call: Call, dom: DomainRef, nparams: int, flags: int) -> tuple[list[Param], int]:
    spec_for(call, call.daemon.domains.of(dom), flags & 3)
    names = ("hard_limit", "soft_limit", "swap_hard_limit")
    return some([ullong_param(name, UNLIMITED) for name in names], nparams)


@calls.query(206, "domain_get_blkio_parameters", "dom:domain nparams:int flags:uint", "params:param<16> nparams:int")
async def domain_get_blkio_parameters(call: Call, dom: DomainRef, nparams: int, flags: int) -> tuple[list[Param], int]:
    spec_for(call, call.daemon.domains.of(dom), flags & 3)
    return [], 0


@calls.query(255, "domain_get_numa_parameters", "dom:domain nparams:int flags:uint", "params:param<16> nparams:int")
async def domain_get_numa_parameters(call: Call, dom: DomainRef, nparams: int, flags: int) -> tuple[list[Param], int]:
    spec_for(call, call.daemon.domains.of(dom), flags & 3)
    return some([int_param("numa_mode", NUMA_STRICT), string_param("numa_nodeset", "")], nparams)


@calls.query(
    253, "domain_get_block_io_tune", "dom:domain disk:string? nparams:int flags:uint", "params:param<32> nparams:int"
)
async def domain_get_block_io_tune(
    call: Call, dom: DomainRef, disk: str | None, nparams: int, flags: int
) -> tuple[list[Param], int]:
    domain = call.daemon.domains.of(dom)
    spec = spec_for(call, domain, flags & 3)
    part = spec.config.disks[find_disk(domain, disk)] if disk is not None else None
    limits = {name: getattr(part, ours, None) or 0 for name, ours in iotune.IO_TUNE.items()}
    return some([ullong_param(name, limits.get(name, 0)) for name in (*IO_TUNE, "size_iops_sec")], nparams)


@calls.query(
    257,
    "domain_get_interface_parameters",
    "dom:domain device:string nparams:int flags:uint",
    "params:param<16> nparams:int",
)
async def domain_get_interface_parameters(
    call: Call, dom: DomainRef, device: str, nparams: int, flags: int
) -> tuple[list[Param], int]:
    domain = call.daemon.domains.of(dom)
    spec = spec_for(call, domain, flags & 3)
    part = spec.config.nets[find_interface(domain, device, (await devices(domain))["nets"] if domain.active else [])]
    limits = {name: (getattr(part, ours) or 0) // KIB for name, ours in iotune.BANDWIDTH.items()}
    return some([uint_param(name, limits.get(name, 0)) for name in BANDWIDTH], nparams)


# What there is never any of.


@calls.query(
    163,
    "domain_get_job_info",
    "dom:domain",
    "type:int elapsed:uhyper remaining:uhyper data_total:uhyper data_processed:uhyper data_remaining:uhyper"
    " mem_total:uhyper mem_processed:uhyper mem_remaining:uhyper file_total:uhyper file_processed:uhyper"
    " file_remaining:uhyper",
)
async def domain_get_job_info(call: Call, dom: DomainRef) -> tuple[int, ...]:
    domain = call.daemon.domains.of(dom)
    domain.running_entry()
    job = jobs.job_of(domain)
    return (0,) * 12 if job is None else jobs.job_numbers(job)


@calls.query(298, "domain_get_job_stats", "dom:domain flags:uint", "type:int params:param<64>")
async def domain_get_job_stats(call: Call, dom: DomainRef, flags: int) -> tuple[int, list[Param]]:
    domain = call.daemon.domains.of(dom)
    check_flags(flags, JOB_STATS_COMPLETED | JOB_STATS_KEEP)
    if flags & JOB_STATS_COMPLETED:
        job, kind = jobs.completed(domain, keep=bool(flags & JOB_STATS_KEEP)), jobs.JOB_COMPLETED
    else:
        domain.running_entry()
        job, kind = jobs.job_of(domain), jobs.JOB_UNBOUNDED
    return (jobs.JOB_NONE, []) if job is None else (kind, jobs.job_params(job))


@calls.query(263, "domain_get_disk_errors", "dom:domain max:uint flags:uint", "errors:diskerror<256> count:int")
async def domain_get_disk_errors(call: Call, dom: DomainRef, max: int, flags: int) -> tuple[list[Stat], int]:
    call.daemon.domains.of(dom).running_entry()
    return [], 0


@calls.query(351, "domain_get_iothread_info", "dom:domain flags:uint", "info:int<16384> count:uint")
async def domain_get_iothread_info(call: Call, dom: DomainRef, flags: int) -> tuple[list[int], int]:
    spec_for(call, call.daemon.domains.of(dom), flags & 3)
    return [], 0


@calls.query(365, "domain_get_perf_events", "dom:domain flags:uint", "params:param<64>")
async def domain_get_perf_events(call: Call, dom: DomainRef, flags: int) -> list[Param]:
    spec_for(call, call.daemon.domains.of(dom), flags & 3)
    return [boolean_param(name, False) for name in PERF_EVENTS]


@calls.query(396, "domain_get_launch_security_info", "dom:domain flags:uint", "params:param<64>")
async def domain_get_launch_security_info(call: Call, dom: DomainRef, flags: int) -> list[Param]:
    call.daemon.domains.of(dom)
    return []


@calls.query(121, "domain_get_security_label", "dom:domain", "label:int<4097> enforcing:int")
async def domain_get_security_label(call: Call, dom: DomainRef) -> tuple[list[int], int]:
    call.daemon.domains.of(dom)
    return [0], 0


@calls.query(289, "node_get_memory_parameters", "nparams:int flags:uint", "params:param<64> nparams:int")
async def node_get_memory_parameters(call: Call, nparams: int, flags: int) -> tuple[list[Param], int]:
    """Of the host's kernel, which merges equal pages if it is told to; looked at only."""
    return some(await asyncio.to_thread(_same_pages), nparams)


def _same_pages() -> list[Param]:
    params = []
    for name, (file, make) in SAME_PAGES.items():
        try:
            params.append(make(name, int((KSM / file).read_text())))
        except (OSError, ValueError):
            continue  # a kernel without it, or without this
    return params


@calls.query(122, "node_get_security_model", "", "model:int<257> doi:int<257>")
async def node_get_security_model(call: Call) -> tuple[list[int], list[int]]:
    return list(b"none\0"), list(b"0\0")
