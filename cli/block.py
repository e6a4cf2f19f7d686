"""`vmm block`: the disks of a machine that runs: snapshots, size, and moving what they hold between images.

Exit statuses: 0; 2: what was asked for cannot be; 4: the host failed; 130: Ctrl-C, which cancels the job.
"""

from __future__ import annotations

import json as json_text
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.progress import ProgressLine
from cli.table import print_table

app = typer.Typer(help="Change the disks of a machine that runs.", no_args_is_help=True)

POLL_SECONDS = 0.1
PATIENCE = 3600.0
"""Seconds: an internal snapshot of a large image takes its time."""
Name = Annotated[str, typer.Argument(metavar="NAME", help="A running machine.")]
Disk = Annotated[str, typer.Argument(metavar="DISK", help="A disk's id, or vda, vdb … as Linux calls it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Detach = Annotated[bool, typer.Option("--detach", help="Return at once; the job goes on.")]


def _ask(machine: str, action: str, /, **values: Any) -> dict[str, Any]:
    from vmm.management.control import request
    from vmm.management.registry import find

    return request(find(machine), "block", PATIENCE, action=action, **values)


def _say(text: str) -> None:
    from cli.errors import say

    say(text)


def _follow(name: str, disk: str, answer: dict[str, Any], *, detach: bool, until: tuple[str, ...] = ()) -> None:
    """Show how far a job is until it ends, or has one of the states `until`. Raises VmmError if it failed."""
    from vmm.errors import ConfigError, HostError, StateError

    job = answer["job"]
    if detach:
        _say(f"{name}: {job['kind']} of {job['disk']} goes on; see vmm block ls {name}")
        return
    line = ProgressLine()
    try:
        while job["state"] in ("running", "ready") and job["state"] not in until:
            if job["total"]:
                line(f"{job['kind']} of {job['disk']}", min(job["done"], job["total"] - 1), job["total"])
            time.sleep(POLL_SECONDS)
            job = _ask(name, "job", disk=disk)["job"]
    except KeyboardInterrupt:
        with suppress(Exception):
            _ask(name, "cancel", disk=disk)
        raise
    finally:
        line.clear()
    if job["state"] == "failed":
        kinds = {kind.__name__: kind for kind in (ConfigError, StateError)}
        raise kinds.get(job["error"], HostError)(f"{name}: {job['detail']}")
    if job["state"] == "cancelled":
        raise StateError(f"{name}: the {job['kind']} of {job['disk']} was cancelled")


@app.command()
def ls(name: Name, json: Json = False) -> None:
    """List the disks, with the images that each consists of and the job that is at work on it."""
    disks = _ask(name, "list")["disks"]
    if json:
        sys.stdout.write(json_text.dumps(disks) + "\n")
        return
    rows: list[tuple[str, ...]] = [("DISK", "SIZE", "IMAGES", "JOB")]
    for disk in disks:
        job = disk["job"]
        share = f" {100 * job['done'] // job['total']} %" if job and job["total"] else ""
        rows.append(
            (
                disk["id"],
                f"{disk['size'] / (1 << 20):g}M",
                " over ".join(disk["chain"]) or "-",
                f"{job['kind']} {job['state']}{share}" if job else "-",
            )
        )
    print_table(rows)


@app.command()
def snapshot(
    name: Name,
    disk: Disk,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The new image.")] = None,
    internal: Annotated[str | None, typer.Option(metavar="NAME", help="Keep it in the qcow2 image itself.")] = None,
    delete: Annotated[str | None, typer.Option(metavar="NAME", help="Forget an internal one.")] = None,
) -> None:
    """Keep the disk as it is now: the guest writes into the new image FILE from here on, over the present one."""
    from vmm.errors import ConfigError

    if [file, internal, delete].count(None) != 2:
        raise ConfigError("snapshot: give the new image's FILE, --internal NAME or --delete NAME")
    if file is not None:
        _ask(name, "snapshot", disk=disk, path=str(file.absolute()))
        _say(f"{name}: {disk} is written to {file}; start the machine with that image from now on")
    elif internal is not None:
        _ask(name, "snapshot-internal", disk=disk, name=internal)
    else:
        _ask(name, "delete-internal", disk=disk, name=delete)


@app.command()
def commit(
    name: Name,
    disk: Disk,
    keep: Annotated[bool, typer.Option("--keep", help="Go on writing to the upper image.")] = False,
    detach: Detach = False,
) -> None:
    """Move what the upper image holds into its backing file, and go on with that alone."""
    _follow(name, disk, _ask(name, "commit", disk=disk, keep=keep), detach=detach)
    _told(name, disk, detach)


@app.command()
def stream(name: Name, disk: Disk, detach: Detach = False) -> None:
    """Copy what the upper image reads from its backing files into it; it needs none any more."""
    _follow(name, disk, _ask(name, "stream", disk=disk), detach=detach)
    _told(name, disk, detach)


@app.command()
def mirror(
    name: Name,
    disk: Disk,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new image.")],
    format: Annotated[str, typer.Option(metavar="raw|qcow2", help="Of the new image.")] = "qcow2",
    follow: Annotated[
        bool, typer.Option("--follow", help="Have it follow what the guest writes until vmm block finish.")
    ] = False,
    detach: Detach = False,
) -> None:
    """Copy the disk into a new image while the guest works, and go over to that image."""
    values = {"path": str(file.absolute()), "format": format, "follow": follow}
    _follow(name, disk, _ask(name, "mirror", disk=disk, **values), detach=detach, until=("ready",) if follow else ())
    if follow and not detach:
        _say(f"{name}: {file} follows {disk}; go over to it with: vmm block finish {name} {disk}")
    else:
        _told(name, disk, detach)


@app.command()
def finish(name: Name, disk: Disk) -> None:
    """Have a mirror that follows go over to its new image."""
    _follow(name, disk, _ask(name, "finish", disk=disk), detach=False)
    _told(name, disk, False)


@app.command()
def cancel(name: Name, disk: Disk) -> None:
    """End the job that is at work on a disk."""
    job = _ask(name, "cancel", disk=disk)["job"]
    _say(f"{name}: {job['kind']} of {job['disk']}: {job['state']}")


@app.command()
def resize(
    name: Name,
    disk: Disk,
    size: Annotated[str, typer.Argument(metavar="SIZE|+SIZE", help="The new size, or by how much it grows.")],
) -> None:
    """Make the disk larger; the guest sees it at once."""
    from vmm.convert import parse_size

    wanted = parse_size("size", size.removeprefix("+"))
    if size.startswith("+"):
        wanted += int(_ask(name, "look", disk=disk)["size"])
    _ask(name, "resize", disk=disk, size=-(-wanted // 512) * 512)


def _told(name: str, disk: str, detach: bool) -> None:
    if not detach:
        chain = _ask(name, "look", disk=disk)["chain"]
        _say(f"{name}: {disk} is {' over '.join(chain)}")
