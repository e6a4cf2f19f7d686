"""What libvirt's clients ask of a guest, by our agent in it: its clock, its addresses, what it is, programs.

The agent only runs programs, so questions are answered by the guest's own (`date`, `ip`, `uname`); a guest that lacks
one has no answer. Everything that comes from the guest is hostile: it is bounded and checked. Loop thread.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
from typing import Any, NamedTuple

from vmm.errors import VmmError
from vmm.libvirt.domain import Domain
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.wire import Addresses, IpAddress
from vmm.management.agentlink import agent_of

ANSWER_SECONDS = 5.0
MAX_OUTPUT = 64 << 10
MAX_MOUNTS = 1000
FREEZE_SECONDS = 60.0
"""How long file systems may take to write out what they have."""
MAX_PROGRAMS = 64
"""Programs of guest-exec whose results are kept for one domain."""
FACTS = (
    "cat /etc/os-release; echo; echo _host=$(hostname); echo _zone=$(date +%Z); echo _offset=$(date +%z); uname -srvm"
)


async def run(domain: Domain, *arguments: str, data: bytes | None = None, seconds: float | None = None) -> str:
    """A program's output; `data`: its input; `seconds`: how long it may take, else what a client said or
    ANSWER_SECONDS. Raises LibvirtError."""
    patience = seconds if seconds is not None else float(domain.extra.get("agent seconds", ANSWER_SECONDS))
    result = await _exec(domain, list(arguments), data, patience)
    if result.status:
        told = (result.stderr or result.stdout)[:200].decode(errors="replace").strip()
        raise LibvirtError(Code.OPERATION_FAILED, f"{arguments[0]} in the guest: status {result.status} {told}".strip())
    return str(result.stdout[:MAX_OUTPUT].decode(errors="replace"))


async def _exec(domain: Domain, arguments: list[str], data: bytes | None, seconds: float | None) -> Any:
    entry = domain.running_entry()
    if not domain.spec.config.agent:
        raise LibvirtError(
            Code.ARGUMENT_UNSUPPORTED, "the domain has no guest agent (agent='on' in <loopvisor:machine>)"
        )
    try:
        return await agent_of(entry).exec(*arguments, input=data, timeout=seconds)
    except TimeoutError:
        raise LibvirtError(Code.AGENT_UNRESPONSIVE, f"no answer within {seconds:g} s") from None
    except VmmError as error:
        raise LibvirtError(Code.AGENT_UNRESPONSIVE, str(error)) from error


async def clock(domain: Domain) -> int:
    """The guest's wall clock, seconds since 1970. Raises LibvirtError."""
    text = (await run(domain, "date", "+%s")).strip()
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise LibvirtError(Code.OPERATION_FAILED, f"date in the guest: {text[:40]!r}")
    return int(text)


async def addresses(domain: Domain) -> list[Addresses]:
    """The guest's interfaces. Raises LibvirtError."""
    macs: dict[str, str] = {}
    for name, rest in re.findall(
        r"^\d+: ([^:@\s]{1,32})[^:]*:(.*)$", await run(domain, "ip", "-o", "link"), re.MULTILINE
    ):
        mac = re.search(r"link/\w+ ([0-9a-f]{2}(?::[0-9a-f]{2}){5})", rest)
        macs[name] = mac[1] if mac else ""
    found: dict[str, list[IpAddress]] = {name: [] for name in macs}
    for line in (await run(domain, "ip", "-o", "addr")).splitlines()[:2000]:
        match = re.match(r"\d+: (\S{1,32})\s+(inet6?) ([0-9a-fA-F.:]{2,45})/(\d{1,3})\b", line)
        if match and match[1] in found:
            found[match[1]].append(IpAddress(int(match[2] == "inet6"), match[3], int(match[4])))
    return [Addresses(name, macs[name] or None, listed) for name, listed in found.items()]


async def set_clock(domain: Domain, seconds: int | None) -> None:
    """Set the guest's clock, to its hardware's if None. Raises LibvirtError."""
    if seconds is None:
        await run(domain, "hwclock", "-s", "-u")
    else:
        await run(domain, "date", "-s", f"@{seconds}")


class Mounted(NamedTuple):
    """A file system of the guest that is on a disk."""

    point: str
    device: str
    kind: str


async def mounts(domain: Domain) -> list[Mounted]:
    """The guest's file systems that are on disks and may be written, in the order of mounting. Raises LibvirtError."""
    found: list[Mounted] = []
    for line in (await run(domain, "cat", "/proc/self/mounts")).splitlines()[:MAX_MOUNTS]:
        words = line.split()
        if len(words) >= 4 and words[0].startswith("/dev/") and "rw" in words[3].split(","):
            point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[1])
            if all(point != one.point and words[0] != one.device for one in found):
                found.append(Mounted(point, words[0], words[2]))
    return found


async def freeze(domain: Domain, wanted: list[str]) -> int:
    """Have file systems write out what they have and stand still, all or those wanted; how many. If one will not, none
    does. Raises LibvirtError."""
    frozen: list[str] = domain.extra.setdefault("frozen", [])
    if frozen:
        raise LibvirtError(Code.OPERATION_FAILED, "the guest's file systems are frozen already; thaw them first")
    chosen = [one.point for one in await mounts(domain) if not wanted or one.point in wanted]
    for missing in sorted(set(wanted) - set(chosen)):
        raise LibvirtError(Code.INVALID_ARG, f"{missing}: no file system on a disk is mounted there")
    try:
        for point in reversed(chosen):  # what is mounted in another comes first
            frozen.append(point)
            await run(domain, "fsfreeze", "--freeze", point, seconds=FREEZE_SECONDS)
    except BaseException:
        with contextlib.suppress(LibvirtError):
            await thaw(domain)
        raise
    return len(chosen)


async def thaw(domain: Domain) -> int:
    """Let them go on; how many. Raises LibvirtError if one does not."""
    frozen: list[str] = domain.extra.get("frozen", [])
    count, error = 0, None
    while frozen:
        try:
            await run(domain, "fsfreeze", "--unfreeze", frozen[-1], seconds=FREEZE_SECONDS)
            count += 1
        except LibvirtError as failed:
            error = error or failed
        frozen.pop()
    if error is not None and not count:
        raise error
    return count


async def trim(domain: Domain, point: str | None, minimum: int) -> dict[str, int]:
    """Have a file system, or all, tell their disk which blocks are free; bytes by mount point. Raises LibvirtError."""
    found = {}
    for one in await mounts(domain):
        if point in (None, one.point):
            said = await run(domain, "fstrim", "-v", "-m", str(minimum), one.point, seconds=FREEZE_SECONDS)
            match = re.search(r"(\d{1,18}) bytes", said)
            found[one.point] = int(match[1]) if match else 0
    if point is not None and not found:
        raise LibvirtError(Code.INVALID_ARG, f"{point}: no file system on a disk is mounted there")
    return found


async def set_password(domain: Domain, user: str, password: str, *, crypted: bool) -> None:
    """Raises LibvirtError."""
    if not re.fullmatch(r"[^:\n\0/]{1,256}", user) or "\n" in password or "\0" in password:
        raise LibvirtError(Code.INVALID_ARG, "a user's name has no colon, and a password is one line")
    command = ["chpasswd", "-e"] if crypted else ["chpasswd"]
    await run(domain, *command, data=f"{user}:{password}\n".encode())


async def facts(domain: Domain) -> dict[str, str]:
    """What the guest says it is, by libvirt's names. Raises LibvirtError."""
    found: dict[str, str] = {}
    names = {"ID": "os.id", "NAME": "os.name", "PRETTY_NAME": "os.pretty-name", "VERSION": "os.version",
             "VERSION_ID": "os.version-id", "_host": "hostname", "_zone": "timezone.name"}  # fmt: skip
    lines = (await run(domain, "sh", "-c", FACTS)).splitlines()
    for line in lines:
        key, equals, value = line.partition("=")
        if equals and key in names:
            found[names[key]] = value.strip().strip("\"'")[:256]
        elif key == "_offset" and (match := re.fullmatch(r"([+-])(\d\d)(\d\d)", value)):
            found["timezone.offset"] = match[1] + str(int(match[2]) * 3600 + int(match[3]) * 60)
    words = lines[-1].split() if lines else []
    if len(words) >= 4:
        found["os.kernel-release"], found["os.machine"] = words[1][:256], words[-1][:64]
        found["os.kernel-version"] = " ".join(words[2:-1])[:256]
    return found


async def agent_command(domain: Domain, text: str, seconds: float | None) -> str:
    """The common ones of QEMU's guest agent. Raises LibvirtError."""
    try:
        command = json.loads(text)
        name, arguments = command["execute"], command.get("arguments", {})
        if not isinstance(arguments, dict):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise LibvirtError(Code.INVALID_ARG, "a command is {'execute': NAME, 'arguments': {…}}") from None
    answer = COMMANDS.get(name) if isinstance(name, str) else None
    if answer is None:
        raise LibvirtError(Code.OPERATION_UNSUPPORTED, f"{name!r:.80}: the agent has {', '.join(COMMANDS)}")
    return json.dumps({"return": await answer(domain, arguments, seconds)})


async def _ping(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    await run(domain, "true", seconds=seconds or ANSWER_SECONDS)
    return {}


async def _info(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    listed = [{"name": name, "enabled": True, "success-response": True} for name in COMMANDS]
    return {"version": "loopvisor", "supported_commands": listed}


async def _time(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return await clock(domain) * 10**9


async def _set_time(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    when = arguments.get("time")
    if when is not None and (isinstance(when, bool) or not isinstance(when, int) or when < 0):
        raise LibvirtError(Code.INVALID_ARG, "guest-set-time: time is nanoseconds since 1970")
    await set_clock(domain, None if when is None else when // 10**9)
    return {}


async def _fs_info(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return [
        {"name": one.device.removeprefix("/dev/"), "mountpoint": one.point, "type": one.kind, "disk": []}
        for one in await mounts(domain)
    ]


async def _fs_status(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return "frozen" if domain.extra.get("frozen") else "thawed"


async def _fs_freeze(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    points = arguments.get("mountpoints", [])
    if not isinstance(points, list) or not all(isinstance(point, str) for point in points):
        raise LibvirtError(Code.INVALID_ARG, "mountpoints is a list of strings")
    return await freeze(domain, points)


async def _fs_thaw(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return await thaw(domain)


async def _fs_trim(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    minimum = arguments.get("minimum", 0)
    if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 0:
        raise LibvirtError(Code.INVALID_ARG, "guest-fstrim: minimum is a number of bytes")
    return {"paths": [{"path": at, "trimmed": count} for at, count in (await trim(domain, None, minimum)).items()]}


async def _password(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    user, crypted = arguments.get("username"), arguments.get("crypted", False)
    try:
        password = base64.b64decode(arguments.get("password", ""), validate=True).decode()
    except (ValueError, TypeError):
        raise LibvirtError(Code.INVALID_ARG, "guest-set-user-password: password is base64") from None
    if not isinstance(user, str) or not isinstance(crypted, bool):
        raise LibvirtError(Code.INVALID_ARG, "guest-set-user-password: username is text, crypted true or false")
    await set_password(domain, user, password, crypted=crypted)
    return {}


async def _host_name(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return {"host-name": (await facts(domain)).get("hostname", "")}


async def _osinfo(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return {key.removeprefix("os."): value for key, value in (await facts(domain)).items() if key.startswith("os.")}


async def _interfaces(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return [
        {
            "name": one.name,
            **({"hardware-address": one.mac} if one.mac else {}),
            "ip-addresses": [
                {
                    "ip-address-type": f"ipv{6 if address.type else 4}",
                    "ip-address": address.address,
                    "prefix": address.prefix,
                }
                for address in one.addresses
            ],
        }
        for one in await addresses(domain)
    ]


async def _guest_exec(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    path, words = arguments.get("path"), arguments.get("arg", [])
    if not isinstance(path, str) or not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise LibvirtError(Code.INVALID_ARG, "guest-exec needs a path, and arg as a list of strings")
    try:
        data = base64.b64decode(arguments.get("input-data", ""), validate=True) or None
    except (ValueError, TypeError):
        raise LibvirtError(Code.INVALID_ARG, "guest-exec: input-data is base64") from None
    programs: dict[int, asyncio.Task[Any]] = domain.extra.setdefault("programs", {})
    if len(programs) >= MAX_PROGRAMS:
        raise LibvirtError(Code.OPERATION_FAILED, f"{MAX_PROGRAMS} programs' results wait for guest-exec-status")
    number = max(programs, default=0) + 1
    work = asyncio.create_task(_exec(domain, [path, *words], data, None), name=f"guest-exec in {domain.name}")
    work.add_done_callback(lambda task: None if task.cancelled() else task.exception())  # nobody may ever ask
    programs[number] = work
    return {"pid": number}


async def _exec_status(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    programs: dict[int, asyncio.Task[Any]] = domain.extra.get("programs", {})
    number = arguments.get("pid")
    if not isinstance(number, int) or number not in programs:
        raise LibvirtError(Code.INVALID_ARG, f"guest-exec-status: there is no program {number!r:.40}")
    task = programs[number]
    if not task.done():
        return {"exited": False}
    del programs[number]
    with contextlib.suppress(asyncio.CancelledError):
        result = task.result()
        answer: dict[str, Any] = {"exited": True, "exitcode": result.status}
        for key, data in (("out-data", result.stdout), ("err-data", result.stderr)):
            if data:
                answer[key] = base64.b64encode(data[: 1 << 20]).decode()
        return answer
    return {"exited": True, "signal": 9}


COMMANDS = {
    "guest-ping": _ping,
    "guest-info": _info,
    "guest-get-time": _time,
    "guest-set-time": _set_time,
    "guest-get-fsinfo": _fs_info,
    "guest-fsfreeze-status": _fs_status,
    "guest-fsfreeze-freeze": _fs_freeze,
    "guest-fsfreeze-freeze-list": _fs_freeze,
    "guest-fsfreeze-thaw": _fs_thaw,
    "guest-fstrim": _fs_trim,
    "guest-set-user-password": _password,
    "guest-get-host-name": _host_name,
    "guest-get-osinfo": _osinfo,
    "guest-network-get-interfaces": _interfaces,
    "guest-exec": _guest_exec,
    "guest-exec-status": _exec_status,
}
