"""What libvirt's clients ask of a guest, by our agent in it: its clock, its addresses, what it is, programs.

The agent only runs programs, so questions are answered by the guest's own (`date`, `ip`, `uname`); a guest that lacks
one has no answer. Everything that comes from the guest is hostile: it is bounded and checked. Loop thread.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, NamedTuple

from vmm.errors import VmmError
from vmm.libvirt.domain import Domain
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.wire import Addresses, IpAddress
from vmm.management.agentlink import agent_of

ANSWER_SECONDS = 5.0
MAX_OUTPUT = 64 << 10
MAX_KEPT = 1 << 20
"""Bytes of a program's output, and of its errors, that are kept; the guest may send any number."""
MAX_LISTED = 1000
"""File systems, or processors, of a guest; what it lists beyond them is left out."""
FREEZE_SECONDS = 60.0
"""How long file systems may take to write out what they have."""
MAX_KEYS = 2048
FACTS = (
    "cat /etc/os-release; echo; echo _host=$(hostname); echo _zone=$(date +%Z); echo _offset=$(date +%z); uname -srvm"
)


async def run(domain: Domain, *arguments: str, data: bytes | None = None, seconds: float | None = None) -> str:
    """A program's output; `data`: its input; `seconds`: how long it may take, else what a client said or
    ANSWER_SECONDS. Raises LibvirtError."""
    patience = seconds if seconds is not None else float(domain.extra.get("agent seconds", ANSWER_SECONDS))
    result = await execute(domain, list(arguments), data, patience)
    if result.status:
        told = (result.stderr or result.stdout)[:200].decode(errors="replace").strip()
        raise LibvirtError(Code.OPERATION_FAILED, f"{arguments[0]} in the guest: status {result.status} {told}".strip())
    return str(result.stdout[:MAX_OUTPUT].decode(errors="replace"))


async def execute(domain: Domain, arguments: list[str], data: bytes | None, seconds: float | None) -> Any:
    """A program's result, whatever its status; no `seconds`: however long it takes. Raises LibvirtError."""
    entry = domain.running_entry()
    if not domain.spec.config.agent:
        raise LibvirtError(
            Code.ARGUMENT_UNSUPPORTED, "the domain has no guest agent (agent='on' in <loopvisor:machine>)"
        )
    try:
        return await agent_of(entry).exec(*arguments, input=data, timeout=seconds, limit=MAX_KEPT)
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
    for line in (await run(domain, "cat", "/proc/self/mounts")).splitlines()[:MAX_LISTED]:
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


class GuestCpu(NamedTuple):
    """A processor as the guest's kernel has it."""

    number: int
    online: bool
    stays: bool
    """It cannot be taken offline."""


CPUS = "for at in /sys/devices/system/cpu/cpu[0-9]*; do echo ${at##*cpu} $(cat $at/online 2>/dev/null || echo -); done"


async def cpus(domain: Domain) -> list[GuestCpu]:
    """The guest's processors. Raises LibvirtError."""
    told = re.findall(r"^(\d{1,5}) ([01-])$", await run(domain, "sh", "-c", CPUS), re.MULTILINE)[:MAX_LISTED]
    return sorted(GuestCpu(int(number), state != "0", state == "-") for number, state in told)


async def set_cpu(domain: Domain, number: int, *, online: bool) -> None:
    """Have the guest use a processor, or not. Raises LibvirtError."""
    path = f"/sys/devices/system/cpu/cpu{number}/online"
    await run(domain, "sh", "-c", 'echo "$1" >"$2"', "sh", str(int(online)), path)


async def power(domain: Domain, program: str) -> None:
    """Have the guest run `poweroff`, `reboot` or `halt` in a moment, so that it can still answer. Raises
    LibvirtError."""
    later = f"command -v {program} >/dev/null || exit 127; (sleep 1; exec {program}) </dev/null >/dev/null 2>&1 &"
    await run(domain, "sh", "-c", later)


KEYS = """home=
while IFS=: read -r name x uid gid gecos place shell; do [ "$name" = "$1" ] && home=$place; done </etc/passwd
[ -n "$home" ] || { echo "no user $1" >&2; exit 1; }
at=$home/.ssh; file=$at/authorized_keys"""
SHOW = f"""[ -f "$file" ] || exit 0
[ "$(wc -c <"$file")" -lt {MAX_OUTPUT} ] || {{ echo "$file has {MAX_OUTPUT} bytes or more" >&2; exit 1; }}
cat "$file" """
# The directory is the user's, who may have put links there to what only root may write.
KEEP = """[ ! -L "$at" ] || { echo "$at is a link" >&2; exit 1; }
mkdir -p "$at" && chmod 700 "$at" && rm -f "$file.new" && cat >"$file.new" && chmod 600 "$file.new" &&
chown -h "$(stat -c %u:%g "$home")" "$at" "$file.new" && mv "$file.new" "$file" """


async def ssh_lines(domain: Domain, user: str) -> list[str]:
    """What stands in the file of keys with which a user of the guest is let in by SSH, comments too. Raises
    LibvirtError."""
    _check_user(user)
    told = await run(domain, "sh", "-c", f"{KEYS}\n{SHOW}", "sh", user)
    return [line.strip() for line in told.splitlines() if line.strip()]


async def ssh_keys(domain: Domain, user: str) -> list[str]:
    """The keys alone. Raises LibvirtError."""
    return [line for line in await ssh_lines(domain, user) if not line.startswith("#")][:MAX_KEYS]


async def set_ssh_lines(domain: Domain, user: str, lines: list[str]) -> None:
    """Exactly these. Raises LibvirtError."""
    _check_user(user)
    for line in lines:
        if "\n" in line or "\0" in line:
            raise LibvirtError(Code.INVALID_ARG, "a key is one line")
    text = "".join(f"{line.strip()}\n" for line in dict.fromkeys(lines) if line.strip())
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise LibvirtError(Code.INVALID_ARG, "a key is text in UTF-8") from None
    await run(domain, "sh", "-c", f"{KEYS}\n{KEEP}", "sh", user, data=data)


async def add_ssh_lines(domain: Domain, user: str, lines: list[str]) -> None:
    """These after those that stand there. Raises LibvirtError."""
    await set_ssh_lines(domain, user, [*await ssh_lines(domain, user), *lines])


async def remove_ssh_lines(domain: Domain, user: str, lines: list[str]) -> None:
    """All but these. Raises LibvirtError."""
    removed = {line.strip() for line in lines}
    kept = [line for line in await ssh_lines(domain, user) if line not in removed]
    await set_ssh_lines(domain, user, kept)


def _check_user(user: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}", user):
        raise LibvirtError(Code.INVALID_ARG, f"{user[:40]!r} is no user's name")
