"""QEMU's monitor protocol, as far as clients of libvirt ask it: what the machine is and how it does, and its life.

Programs that know QEMU (exporters, backup tools, scripts around `virsh qemu-monitor-command`) ask a few queries. These
are answered in QEMU's form (its QMP reference) by what the machine itself says. A member that nobody counts here is
left out, and every other command is answered as QEMU answers one that it does not know. Loop thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

from vmm import __version__
from vmm.errors import VmmError
from vmm.libvirt import live, pinning
from vmm.libvirt.domain import Domain, DomainState
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.machines import ask
from vmm.libvirt.spec import disk_ids
from vmm.libvirt.statistics import devices, disk_sizes

HMP = 1
"""virDomainQemuMonitorCommandFlags."""


class MonitorRefusal(Exception):
    """An answer of the kind error. `kind`: QEMU's class of it."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


async def execute(domain: Domain, text: str) -> str:
    """The answer to one command. Raises LibvirtError for what is no command, and if the domain does not run."""
    domain.running_entry()
    try:
        request = json.loads(text)
        name, arguments = request["execute"], request.get("arguments", {})
        if not isinstance(arguments, dict) or not isinstance(name, str):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise LibvirtError(Code.INVALID_ARG, "a command is {'execute': NAME, 'arguments': {…}}") from None
    answer: dict[str, Any]
    try:
        answer = {"return": await _answer(domain, name, arguments)}
    except MonitorRefusal as refused:
        answer = {"error": {"class": refused.kind, "desc": str(refused)}}
    except VmmError as error:
        answer = {"error": {"class": "GenericError", "desc": " ".join(str(error).split())}}
    if "id" in request:
        answer["id"] = request["id"]
    return json.dumps(answer)


async def _answer(domain: Domain, name: str, arguments: dict[str, Any]) -> Any:
    if name == "human-monitor-command":
        line = arguments.get("command-line")
        if not isinstance(line, str):
            raise MonitorRefusal("GenericError", "Parameter 'command-line' is missing")
        return await execute_text(domain, line)
    command = COMMANDS.get(name)
    if command is None:
        raise MonitorRefusal("CommandNotFound", f"The command {name[:80]} has not been found")
    for extra in arguments:
        raise MonitorRefusal("GenericError", f"Parameter '{extra[:80]}' is unexpected")
    return await command(domain)


async def execute_text(domain: Domain, line: str) -> str:
    """A line of QEMU's monitor for people. Raises LibvirtError if the domain does not run."""
    domain.running_entry()
    words = line.split()
    if words[:1] == ["info"] and len(words) == 2:
        match words[1]:
            case "status":
                return f"VM status: {(await _status(domain))['status']}\r\n"
            case "name":
                return f"{domain.name}\r\n"
            case "uuid":
                return f"{domain.uuid}\r\n"
            case "version":
                return f"loopvisor {__version__}\r\n"
            case "kvm":
                found = await _kvm(domain)
                return f"kvm support: {'enabled' if found['enabled'] else 'disabled'}\r\n"
            case "balloon":
                try:
                    return f"balloon: actual={(await _balloon(domain))['actual'] >> 20}\r\n"
                except MonitorRefusal as refused:
                    return f"Error: {refused}\r\n"
    elif len(words) == 1 and (command := LIFE.get(words[0])):
        await command(domain)
        return ""
    known = f"info status, name, uuid, version, kvm, balloon, and {', '.join(LIFE)}"
    return f"unknown command: '{line[:80]}'; here are {known}\r\n"


async def _capabilities(domain: Domain) -> dict[str, Any]:
    return {}


async def _commands(domain: Domain) -> list[dict[str, Any]]:
    return [{"name": name} for name in (*COMMANDS, "human-monitor-command")]


async def _version(domain: Domain) -> dict[str, Any]:
    major, minor, micro = (int(part) for part in __version__.split(".")[:3])
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": "loopvisor"}


async def _status(domain: Domain) -> dict[str, Any]:
    running = domain.state == DomainState.RUNNING
    names = {DomainState.RUNNING: "running", DomainState.PAUSED: "paused"}
    return {"status": names.get(domain.state, "shutdown"), "running": running}


async def _name(domain: Domain) -> dict[str, Any]:
    return {"name": domain.name}


async def _uuid(domain: Domain) -> dict[str, Any]:
    return {"UUID": str(domain.uuid)}


async def _kvm(domain: Domain) -> dict[str, Any]:
    return {"enabled": domain.core == "kvm", "present": os.path.exists("/dev/kvm")}


async def _target(domain: Domain) -> dict[str, Any]:
    return {"arch": "x86_64"}


async def _cpus(domain: Domain) -> list[dict[str, Any]]:
    threads = pinning.threads_of(domain.pid)
    found = []
    for number in range(domain.spec.config.cpus):
        thread = threads.of(number)
        found.append({"cpu-index": number, "target": "x86_64", **({"thread-id": thread} if thread else {})})
    return found


async def _memory(domain: Domain) -> dict[str, Any]:
    return {"base-memory": domain.spec.config.memory}


async def _balloon(domain: Domain) -> dict[str, Any]:
    found = await live.balloon_of(domain)
    if found is None:
        raise MonitorRefusal("DeviceNotActive", "No balloon device has been activated")
    return {"actual": int(found["actual"])}


async def _block(domain: Domain) -> list[dict[str, Any]]:
    counted = (await devices(domain))["disks"]
    found = []
    for index, disk in enumerate(domain.spec.config.disks):
        capacity = (counted[index] or {}).get("capacity")
        sizes = disk_sizes(disk.path, capacity)
        format = "raw" if disk.format == "auto" else disk.format
        image = {"filename": str(disk.path), "format": format, "virtual-size": sizes.capacity,
                 "actual-size": sizes.allocation}  # fmt: skip
        limits = {
            "bps": disk.bps, "bps_rd": disk.bps_read, "bps_wr": disk.bps_write,
            "iops": disk.iops, "iops_rd": disk.iops_read, "iops_wr": disk.iops_write,
        }  # fmt: skip
        inserted = {
            "file": str(disk.path),
            "ro": disk.readonly,
            "drv": format,
            "cache": {"writeback": disk.cache != "writethrough", "direct": disk.cache == "none", "no-flush": False},
            "image": image,
            **limits,
        }
        found.append(
            {
                "device": f"drive-{_alias(index)}",
                "qdev": _alias(index),
                "type": "unknown",
                "removable": False,
                "locked": False,
                "inserted": inserted,
            }
        )
    return found


def _alias(index: int) -> str:
    return f"virtio-disk{index}"


async def _block_statistics(domain: Domain) -> list[dict[str, Any]]:
    names = {"rd_bytes": "bytes_read", "wr_bytes": "bytes_written", "rd_operations": "reads", "wr_operations": "writes",
             "flush_operations": "flushes"}  # fmt: skip
    return [
        {
            "device": f"drive-{_alias(index)}",
            "qdev": _alias(index),
            "stats": {name: counters[ours] for name, ours in names.items()},
        }
        for index, counters in enumerate((await devices(domain))["disks"])
        if counters is not None
    ]


async def _block_jobs(domain: Domain) -> list[dict[str, Any]]:
    told = await ask(domain.running_entry(), "block", action="list")
    ids = disk_ids(domain.spec.config)
    return [
        {
            "type": job["kind"],
            "device": f"drive-{_alias(ids.index(disk['id']))}",
            "len": job["total"],
            "offset": job["done"],
            "busy": job["state"] == "running",
            "paused": False,
            "speed": job["speed"],
            "ready": job["state"] == "ready",
            "status": job["state"],
        }
        for disk in told["disks"]
        if (job := disk["job"]) and disk["id"] in ids
    ]


def _machine(command: str) -> Callable[[Domain], Awaitable[dict[str, Any]]]:
    async def run(domain: Domain) -> dict[str, Any]:
        await ask(domain.running_entry(), command)
        return {}

    return run


async def _stop(domain: Domain) -> dict[str, Any]:
    if domain.state == DomainState.RUNNING:
        await ask(domain.running_entry(), "pause")
    return {}


async def _go_on(domain: Domain) -> dict[str, Any]:
    if domain.state == DomainState.PAUSED:
        await ask(domain.running_entry(), "resume")
    return {}


LIFE: dict[str, Callable[[Domain], Awaitable[dict[str, Any]]]] = {
    "stop": _stop,
    "cont": _go_on,
    "system_powerdown": _machine("shutdown"),
    "system_reset": _machine("reset"),
    "quit": _machine("kill"),
}
COMMANDS: dict[str, Callable[[Domain], Awaitable[Any]]] = {
    "qmp_capabilities": _capabilities,
    "query-commands": _commands,
    "query-version": _version,
    "query-status": _status,
    "query-name": _name,
    "query-uuid": _uuid,
    "query-kvm": _kvm,
    "query-target": _target,
    "query-cpus-fast": _cpus,
    "query-memory-size-summary": _memory,
    "query-balloon": _balloon,
    "query-block": _block,
    "query-blockstats": _block_statistics,
    "query-block-jobs": _block_jobs,
    "inject-nmi": _machine("nmi"),
    **LIFE,
}
