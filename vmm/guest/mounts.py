"""Shared directories that come and go: mounted and unmounted in the guest by its own programs, which the agent starts.

A guest without an agent, or without a shell, mounts them itself. Loop thread.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from vmm.errors import VmmError
from vmm.guest.process import ExecResult

SPARE = 30.0
"""Seconds that programs may take to start, beyond the time that a guest has."""

Execute = Callable[..., Awaitable[ExecResult]]
"""vmm.guest.agent.Agent.exec"""

# The device may be a moment away still. A kernel without the file system says so at once.
_MOUNT = """
grep -q virtiofs /proc/filesystems || modprobe virtiofs || { echo "the guest's kernel has no virtiofs" >&2; exit 1; }
[ "$2" ] || exit 0
mkdir -p "$2" || exit 1
until told=$(mount -t virtiofs -o "$3" "$1" "$2" 2>&1); do
    [ "$4" -gt 0 ] || { echo "$told" >&2; exit 1; }
    set -- "$1" "$2" "$3" $(($4 - 1)); sleep 0.1
done
"""
# /proc/mounts writes spaces and the like as octal numbers, which printf's %b makes characters again.
_UNMOUNT = """
while read -r tag place type rest; do
    if [ "$type" = virtiofs ] && [ "$tag" = "$1" ]; then umount $2 "$(printf %b "$place")" || exit 1; fi
done </proc/mounts
"""


async def mount(execute: Execute, tag: str, place: str, *, readonly: bool, timeout: float) -> str:
    """Mount the share `tag` at `place`, which is made; "": only see to the driver. "", or why it is not mounted, in a
    line."""
    tries = str(int(timeout * 10))
    return await _run(execute, _MOUNT, tag, place, "ro" if readonly else "rw", tries, timeout=timeout + SPARE)


async def unmount(execute: Execute, tag: str, *, force: bool, timeout: float) -> str:
    """Unmount the share `tag` wherever it is; with `force` also where it is in use. "", or why it stays."""
    return await _run(execute, _UNMOUNT, tag, "-l" if force else "", timeout=timeout + SPARE)


async def _run(execute: Execute, script: str, *words: str, timeout: float) -> str:
    try:
        result = await execute("sh", "-c", script, "sh", *words, timeout=timeout, cwd="/")
    except VmmError as error:
        return str(error)
    except TimeoutError:
        return f"no answer within {timeout:g} s"
    if not result.status:
        return ""
    told = result.stderr.decode(errors="replace").strip().splitlines()
    return told[-1] if told else f"status {result.status}"
