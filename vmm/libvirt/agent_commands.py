"""The commands of QEMU's guest agent, as far as clients send them, answered by our agent in the guest (guest.py).

A command is JSON, in the form of QEMU's guest agent's protocol reference, and so is the answer. Loop thread.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from dataclasses import dataclass
from typing import Any

from vmm.libvirt import guest
from vmm.libvirt.domain import Domain
from vmm.libvirt.errors import Code, LibvirtError

MAX_PROGRAMS = 64
"""Programs of guest-exec whose results are kept for one domain."""
MAX_FILES = 64
MAX_PIECE = 48 << 10
"""Bytes of a file that one command reads; a client asks again for more."""


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
    await guest.run(domain, "true", seconds=seconds or guest.ANSWER_SECONDS)
    return {}


async def _info(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    listed = [{"name": name, "enabled": True, "success-response": True} for name in COMMANDS]
    return {"version": "loopvisor", "supported_commands": listed}


async def _time(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return await guest.clock(domain) * 10**9


async def _set_time(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    when = arguments.get("time")
    if when is not None and (isinstance(when, bool) or not isinstance(when, int) or when < 0):
        raise LibvirtError(Code.INVALID_ARG, "guest-set-time: time is nanoseconds since 1970")
    await guest.set_clock(domain, None if when is None else when // 10**9)
    return {}


async def _fs_info(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return [
        {"name": one.device.removeprefix("/dev/"), "mountpoint": one.point, "type": one.kind, "disk": []}
        for one in await guest.mounts(domain)
    ]


async def _fs_status(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return "frozen" if domain.extra.get("frozen") else "thawed"


async def _fs_freeze(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    points = arguments.get("mountpoints", [])
    if not isinstance(points, list) or not all(isinstance(point, str) for point in points):
        raise LibvirtError(Code.INVALID_ARG, "mountpoints is a list of strings")
    return await guest.freeze(domain, points)


async def _fs_thaw(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return await guest.thaw(domain)


async def _fs_trim(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    minimum = arguments.get("minimum", 0)
    if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 0:
        raise LibvirtError(Code.INVALID_ARG, "guest-fstrim: minimum is a number of bytes")
    return {
        "paths": [{"path": at, "trimmed": count} for at, count in (await guest.trim(domain, None, minimum)).items()]
    }


async def _password(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    user, crypted = arguments.get("username"), arguments.get("crypted", False)
    try:
        password = base64.b64decode(arguments.get("password", ""), validate=True).decode()
    except (ValueError, TypeError):
        raise LibvirtError(Code.INVALID_ARG, "guest-set-user-password: password is base64") from None
    if not isinstance(user, str) or not isinstance(crypted, bool):
        raise LibvirtError(Code.INVALID_ARG, "guest-set-user-password: username is text, crypted true or false")
    await guest.set_password(domain, user, password, crypted=crypted)
    return {}


async def _host_name(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return {"host-name": (await guest.facts(domain)).get("hostname", "")}


async def _osinfo(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return {
        key.removeprefix("os."): value for key, value in (await guest.facts(domain)).items() if key.startswith("os.")
    }


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
        for one in await guest.addresses(domain)
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
    work = asyncio.create_task(guest.execute(domain, [path, *words], data, None), name=f"guest-exec in {domain.name}")
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
                answer[key] = base64.b64encode(data).decode()
        return answer
    return {"exited": True, "signal": 9}


async def _sync(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    number = arguments.get("id")
    if isinstance(number, bool) or not isinstance(number, int):
        raise LibvirtError(Code.INVALID_ARG, "guest-sync: id is a number")
    await guest.run(domain, "true", seconds=seconds or guest.ANSWER_SECONDS)
    return number


async def _timezone(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    found = await guest.facts(domain)
    return {"zone": found.get("timezone.name", ""), "offset": int(found.get("timezone.offset", "0"))}


async def _vcpus(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return [
        {"logical-id": cpu.number, "online": cpu.online, "can-offline": not cpu.stays}
        for cpu in await guest.cpus(domain)
    ]


async def _set_vcpus(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    wanted = arguments.get("vcpus")
    if not isinstance(wanted, list):
        raise LibvirtError(Code.INVALID_ARG, "guest-set-vcpus: vcpus is a list of {logical-id, online}")
    known = {cpu.number: cpu for cpu in await guest.cpus(domain)}
    for one in wanted:
        number, online = (one.get("logical-id"), one.get("online")) if isinstance(one, dict) else (None, None)
        if not isinstance(number, int) or number not in known or not isinstance(online, bool):
            raise LibvirtError(Code.INVALID_ARG, f"guest-set-vcpus: the guest has no processor {number!r:.40}")
        if known[number].online != online:
            await guest.set_cpu(domain, number, online=online)
    return len(wanted)


async def _shutdown(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    mode = arguments.get("mode", "powerdown")
    program = {"powerdown": "poweroff", "reboot": "reboot", "halt": "halt"}.get(mode) if isinstance(mode, str) else None
    if program is None:
        raise LibvirtError(Code.INVALID_ARG, f"guest-shutdown: mode {mode!r:.40}; here is powerdown, reboot or halt")
    await guest.power(domain, program)
    return {}


async def _keys(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    return {"keys": await guest.ssh_keys(domain, _user(arguments))}


async def _add_keys(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    user, keys = _user(arguments), _key_list(arguments)
    await (guest.set_ssh_lines if arguments.get("reset") is True else guest.add_ssh_lines)(domain, user, keys)
    return {}


async def _remove_keys(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    await guest.remove_ssh_lines(domain, _user(arguments), _key_list(arguments))
    return {}


def _user(arguments: dict[str, Any]) -> str:
    user = arguments.get("username")
    if not isinstance(user, str):
        raise LibvirtError(Code.INVALID_ARG, "username is text")
    return user


def _key_list(arguments: dict[str, Any]) -> list[str]:
    keys = arguments.get("keys")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise LibvirtError(Code.INVALID_ARG, "keys is a list of strings")
    return keys


@dataclass
class GuestFile:
    """A file of the guest that a client has open: each command reads or writes a piece of it by its name."""

    path: str
    mode: str
    at: int = 0


async def _file_open(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    path, mode = arguments.get("path"), arguments.get("mode", "r")
    if not isinstance(path, str) or not path or "\0" in path or not isinstance(mode, str):
        raise LibvirtError(Code.INVALID_ARG, "guest-file-open: path and mode are text")
    kind = mode.replace("b", "")
    if kind not in ("r", "r+", "w", "w+", "a", "a+"):
        raise LibvirtError(Code.INVALID_ARG, f"guest-file-open: mode {mode!r:.20}; here is r, w or a, and + with each")
    files: dict[int, GuestFile] = domain.extra.setdefault("files", {})
    if len(files) >= MAX_FILES:
        raise LibvirtError(Code.OPERATION_FAILED, f"{MAX_FILES} files are open; close some")
    script = {"r": ': <"$1"', "w": ': >"$1"', "a": ': >>"$1"; wc -c <"$1"'}[kind[0]]
    told = await guest.run(domain, "sh", "-c", script, "sh", path)
    number = max(files, default=0) + 1
    size = told.strip()
    files[number] = GuestFile(path, kind, int(size) if kind[0] == "a" and size.isdecimal() else 0)
    return number


def _file(domain: Domain, arguments: dict[str, Any], *, writing: bool | None = None) -> GuestFile:
    handle = arguments.get("handle")
    file = domain.extra.get("files", {}).get(handle) if isinstance(handle, int) else None
    if file is None:
        raise LibvirtError(Code.INVALID_ARG, f"handle {handle!r:.40} is not open")
    assert isinstance(file, GuestFile)
    if writing is True and file.mode == "r" or writing is False and file.mode in ("w", "a"):
        raise LibvirtError(Code.INVALID_ARG, f"{file.path}: is open for {'reading' if writing else 'writing'} only")
    return file


async def _file_read(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    file, count = _file(domain, arguments, writing=False), arguments.get("count", 4096)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise LibvirtError(Code.INVALID_ARG, "guest-file-read: count is a number of bytes")
    script = 'tail -c +"$2" "$1" | head -c "$3"'
    words = ["sh", "-c", script, "sh", file.path, str(file.at + 1), str(min(count, MAX_PIECE))]
    result = await guest.execute(domain, words, None, guest.ANSWER_SECONDS)
    data: bytes = result.stdout[:MAX_PIECE]
    if result.status or (not data and result.stderr):
        raise LibvirtError(
            Code.OPERATION_FAILED, f"{file.path}: {result.stderr[:200].decode(errors='replace').strip()}"
        )
    file.at += len(data)
    return {"count": len(data), "buf-b64": base64.b64encode(data).decode(), "eof": not data and count > 0}


async def _file_write(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    file = _file(domain, arguments, writing=True)
    try:
        data = base64.b64decode(arguments.get("buf-b64", ""), validate=True)
    except (ValueError, TypeError):
        raise LibvirtError(Code.INVALID_ARG, "guest-file-write: buf-b64 is base64") from None
    count = arguments.get("count", len(data))
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(data):
        raise LibvirtError(Code.INVALID_ARG, f"guest-file-write: count is 0 to {len(data)}")
    if count:
        where = ("dd", f"of={file.path}", "bs=1", f"seek={file.at}", "conv=notrunc")
        await guest.run(domain, *where, data=data[:count], seconds=guest.FREEZE_SECONDS)
        file.at += count
    return {"count": count, "eof": False}


async def _file_seek(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    file, offset, whence = _file(domain, arguments), arguments.get("offset"), arguments.get("whence", "set")
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise LibvirtError(Code.INVALID_ARG, "guest-file-seek: offset is a number")
    if whence in ("end", 2):
        size = (await guest.run(domain, "sh", "-c", 'wc -c <"$1"', "sh", file.path)).strip()
        base = int(size) if size.isdecimal() and len(size) < 19 else 0
    elif whence in ("set", 0, "cur", 1) and not isinstance(whence, bool):
        base = file.at if whence in ("cur", 1) else 0
    else:
        raise LibvirtError(Code.INVALID_ARG, "guest-file-seek: whence is set, cur or end")
    if not 0 <= base + offset < 1 << 62:
        raise LibvirtError(Code.INVALID_ARG, f"guest-file-seek: {base + offset} is no place in a file")
    file.at = base + offset
    return {"position": file.at, "eof": False}


async def _file_flush(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    _file(domain, arguments)
    await guest.run(domain, "sync", seconds=guest.FREEZE_SECONDS)
    return {}


async def _file_close(domain: Domain, arguments: dict[str, Any], seconds: float | None) -> Any:
    _file(domain, arguments)
    del domain.extra["files"][arguments["handle"]]
    return {}


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
    "guest-sync": _sync,
    "guest-sync-delimited": _sync,
    "guest-get-timezone": _timezone,
    "guest-get-vcpus": _vcpus,
    "guest-set-vcpus": _set_vcpus,
    "guest-shutdown": _shutdown,
    "guest-ssh-get-authorized-keys": _keys,
    "guest-ssh-add-authorized-keys": _add_keys,
    "guest-ssh-remove-authorized-keys": _remove_keys,
    "guest-file-open": _file_open,
    "guest-file-read": _file_read,
    "guest-file-write": _file_write,
    "guest-file-seek": _file_seek,
    "guest-file-flush": _file_flush,
    "guest-file-close": _file_close,
}
