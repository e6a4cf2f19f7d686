"""Procedures about the connection and the host: opening, versions, capabilities, statistics, features, keepalive."""

from __future__ import annotations

import platform
import socket

from cpu.contract import Capability
from vmm import __version__, cores
from vmm.config import MAX_CPUS
from vmm.libvirt import host
from vmm.libvirt.client import Call
from vmm.libvirt.cpusets import cpu_map
from vmm.libvirt.domain_xml import MACHINE
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.spec import CORE_OF_TYPE, CPU_MODELS
from vmm.libvirt.wire import Param, Stat, some
from vmm.libvirt.xmltree import unsupported

calls = Procedures()

SCHEMES = ("loopvisor", "qemu")
PATHS = ("/system", "/session", "/", "")
LIBVIRT_VERSION = 9_000_000
"""The libvirt whose protocol this is, as clients understand it: major × 1,000,000 + minor × 1,000 + release."""
AUTH_NONE = 0
READ_ONLY = 1
"""virConnectFlags."""
FEATURES = {
    4: "machines move from peer to peer",
    6: "machines move, in five steps",
    9: "typed parameters may be strings",
    10: "keepalive",
    13: "what a migration is asked for as parameters",
    14: "events by callback id",
    15: "the connection's end as an event",
    16: "a network's update says first what is done, then to what",
}
"""The features (VIR_DRV_FEATURE_…) that are here; of all others clients hear no."""
KEEPALIVE_FEATURE = 10
CONNECTION_CLOSED = 0


@calls.query(66, "auth_list", "", "types:int<20>")
async def auth_list(call: Call) -> list[int]:
    return [AUTH_NONE]


@calls.query(1, "connect_open", "name:string? flags:uint")
async def connect_open(call: Call, name: str | None, flags: int) -> None:
    client = call.client
    if client.uri is not None:
        raise LibvirtError(Code.INTERNAL_ERROR, "connection already open", From.RPC)
    name = name or "loopvisor:///system"
    scheme, _, rest = name.partition("://")
    host_name, slash, path = rest.partition("/")
    path = (slash + path).partition("?")[0]
    if scheme.partition("+")[0] not in SCHEMES or path not in PATHS or flags & ~READ_ONLY:
        raise LibvirtError(
            Code.INVALID_ARG, f"{name!r}: this daemon is loopvisor:///system, or qemu:///system to those who insist"
        )
    client.read_only = client.read_only or bool(flags & READ_ONLY)
    client.uri = f"{scheme.partition('+')[0]}://{path or '/'}"


@calls.query(2, "connect_close")
async def connect_close(call: Call) -> None:
    call.client.subscriptions.drop_all()


@calls.query(3, "connect_get_type", "", "type:string")
async def connect_get_type(call: Call) -> str:
    return "QEMU" if (call.client.uri or "").startswith("qemu:") else "loopvisor"


@calls.query(4, "connect_get_version", "", "version:uhyper")
async def connect_get_version(call: Call) -> int:
    major, minor, release = (int(part) for part in __version__.split(".")[:3])
    return major * 1_000_000 + minor * 1_000 + release


@calls.query(157, "connect_get_lib_version", "", "version:uhyper")
async def connect_get_lib_version(call: Call) -> int:
    return LIBVIRT_VERSION


@calls.query(59, "connect_get_hostname", "", "hostname:string")
async def connect_get_hostname(call: Call) -> str:
    return socket.gethostname()


@calls.query(110, "connect_get_uri", "", "uri:string")
async def connect_get_uri(call: Call) -> str:
    assert call.client.uri is not None
    return call.client.uri


@calls.query(60, "connect_supports_feature", "feature:int", "supported:int")
async def connect_supports_feature(call: Call, feature: int) -> int:
    if feature == KEEPALIVE_FEATURE:
        call.client.enable_keepalive()
    return int(feature in FEATURES)


@calls.query(149, "connect_is_secure", "", "secure:int")
async def connect_is_secure(call: Call) -> int:
    return int(call.client.secure)


@calls.query(360, "connect_register_close_callback")
async def connect_register_close_callback(call: Call) -> None:
    call.client.wants_close = True


@calls.query(361, "connect_unregister_close_callback")
async def connect_unregister_close_callback(call: Call) -> None:
    call.client.wants_close = False


@calls.query(419, "connect_set_identity", "params:param<20> flags:uint")
async def connect_set_identity(call: Call, params: list[Param], flags: int) -> None:
    raise LibvirtError(Code.OPERATION_DENIED, "who a client is, its socket or certificate says")


@calls.query(5, "connect_get_max_vcpus", "type:string?", "count:int")
async def connect_get_max_vcpus(call: Call, type: str | None) -> int:
    return MAX_CPUS


@calls.query(7, "connect_get_capabilities", "", "capabilities:string")
async def connect_get_capabilities(call: Call) -> str:
    return host.capabilities(call.daemon.emulator, call.daemon.kinds)


@calls.query(
    342,
    "connect_get_domain_capabilities",
    "emulator:string? arch:string? machine:string? virttype:string? flags:uint",
    "capabilities:string",
)
async def connect_get_domain_capabilities(
    call: Call, emulator: str | None, arch: str | None, machine: str | None, virttype: str | None, flags: int
) -> str:
    kind = virttype or call.daemon.kinds[0]
    if arch not in (None, "x86_64") or kind not in (*call.daemon.kinds, "loopvisor"):
        raise unsupported(f"{arch or 'x86_64'} domains of type {kind!r} do not run here")
    if machine is not None and machine != "bare" and not MACHINE.fullmatch(machine):
        raise LibvirtError(Code.INVALID_ARG, f"the machine {machine[:40]!r} is not known; here are pc, q35 and bare")
    stock = frozenset({Capability.STOCK_KERNELS}) if kind == "loopvisor" else frozenset()
    lacking = cores.models(CORE_OF_TYPE[kind], stock)
    return host.domain_capabilities(call.daemon.emulator, kind, "bare" if machine == "bare" else "pc", lacking)


@calls.query(
    6, "node_get_info", "", "model:model memory:uhyper cpus:int mhz:int nodes:int sockets:int cores:int threads:int"
)
async def node_get_info(call: Call) -> tuple[str, int, int, int, int, int, int, int]:
    found = host.topology()
    total = host.memory().get("MemTotal", 0)
    return platform.machine(), total, found.cpus, found.mhz, 1, found.sockets, found.cores, found.threads


@calls.query(102, "node_get_free_memory", "", "bytes:uhyper")
async def node_get_free_memory(call: Call) -> int:
    return host.memory().get("MemFree", 0) << 10


@calls.query(101, "node_get_cells_free_memory", "start:int max:int", "cells:uhyper<1024>")
async def node_get_cells_free_memory(call: Call, start: int, max: int) -> list[int]:
    if start != 0 or max < 1:
        raise LibvirtError(Code.INVALID_ARG, f"start cell {start} is out of range (0-0)")
    return [host.memory().get("MemFree", 0) << 10]


@calls.query(227, "node_get_cpu_stats", "cpu:int nparams:int flags:uint", "params:stat<16> nparams:int")
async def node_get_cpu_stats(call: Call, cpu: int, nparams: int, flags: int) -> tuple[list[Stat], int]:
    times = host.cpu_times(cpu)
    if times is None:
        raise LibvirtError(Code.INVALID_ARG, f"Invalid cpuNum in node_get_cpu_stats: {cpu}")
    return some([Stat(name, value) for name, value in times.items()], nparams)


@calls.query(228, "node_get_memory_stats", "nparams:int cell:int flags:uint", "params:stat<16> nparams:int")
async def node_get_memory_stats(call: Call, nparams: int, cell: int, flags: int) -> tuple[list[Stat], int]:
    if cell not in (-1, 0):
        raise LibvirtError(Code.INVALID_ARG, f"there is no cell {cell}; here is only cell 0")
    memory = host.memory()
    names = {"total": "MemTotal", "free": "MemFree", "buffers": "Buffers", "cached": "Cached"}
    return some([Stat(name, memory.get(key, 0)) for name, key in names.items()], nparams)


@calls.query(
    293, "node_get_cpu_map", "need_map:int need_online:int flags:uint", "map:opaque<2048> online:uint count:int"
)
async def node_get_cpu_map(call: Call, need_map: int, need_online: int, flags: int) -> tuple[bytes, int, int]:
    numbers = host.processor_numbers()
    return cpu_map(numbers) if need_map else b"", len(numbers), max(numbers) + 1


@calls.query(203, "connect_get_sysinfo", "flags:uint", "sysinfo:string")
async def connect_get_sysinfo(call: Call, flags: int) -> str:
    if flags:
        raise LibvirtError(Code.INVALID_ARG, f"unsupported flags (0x{flags:x})")
    told = host.system_information()
    if told is None:
        raise unsupported("this host tells nothing of its firmware and boards (no /sys/class/dmi/id)")
    return told


@calls.query(312, "connect_get_cpu_model_names", "arch:string need:int flags:uint", "models:string<8192> count:int")
async def connect_get_cpu_model_names(call: Call, arch: str, need: int, flags: int) -> tuple[list[str], int]:
    if arch != "x86_64":
        raise LibvirtError(Code.INVALID_ARG, f"Invalid architecture {arch!r}: here is only x86_64")
    return (list(CPU_MODELS.values()) if need else []), len(CPU_MODELS)


@calls.query(340, "node_get_free_pages", "pages:uint<1024> start:int cells:uint flags:uint", "counts:uhyper<1024>")
async def node_get_free_pages(call: Call, pages: list[int], start: int, cells: int, flags: int) -> list[int]:
    if start not in (-1, 0) or cells > 1:
        raise LibvirtError(Code.INVALID_ARG, "here is only cell 0")
    memory = host.memory()
    free = {4: memory.get("MemFree", 0) // 4, 2048: memory.get("HugePages_Free", 0)}
    for size in pages:
        if size not in free:
            raise LibvirtError(Code.INVALID_ARG, f"page size {size} KiB is not available")
    return [free[size] for size in pages]
