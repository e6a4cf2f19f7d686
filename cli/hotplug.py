"""`vmm attach, detach`: devices that come to a running machine, and go."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import Any

from cli.errors import say
from vmm.config import Disk, Net, Share
from vmm.convert import plain
from vmm.errors import ConfigError
from vmm.management.control import request
from vmm.management.hotplug import MAX_SECONDS
from vmm.management.registry import find

OPENING_SECONDS = 120.0
"""How long opening a file or a network may take, beside the guest's time."""


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def attach_device(
    name: str, disks: list[str], nets: list[str], shares: list[str], timeout: float, *, json: bool
) -> None:
    """Attach one after the other. Raises VmmError."""
    if not disks and not nets and not shares:
        raise ConfigError("attach: give a device: --disk FILE, --net user or --share DIR:/PLACE")
    _check(timeout)
    wanted: list[tuple[str, dict[str, Any]]] = []
    # The machine may run in another directory.
    for text in disks:
        disk = Disk.parse(text)
        wanted.append(("disk", plain(disk.replace(path=_absolute(disk.path), data=_absolute(disk.data)))))
    for text in nets:
        net = Net.parse(text)
        target = str(Path(net.target).absolute()) if net.kind == "unix" else net.target
        wanted.append(("net", plain(net.replace(target=target, pcap=_absolute(net.pcap)))))
    for text in shares:
        share = Share.parse(text)
        wanted.append(("share", plain(share.replace(path=_absolute(share.path)))))
    entry = find(name)
    answers = []
    try:
        for kind, values in wanted:
            answer = request(entry, "attach", OPENING_SECONDS + timeout, timeout=timeout, **{kind: values})
            answers.append(answer)
            if not json:
                state = "" if answer["driven"] else "; the guest has not taken it yet"
                say(f"{name}: attached {answer['id']} in slot {answer['slot']}{state}")
                if kind == "share" and (answer["note"] or not values.get("mount")):
                    why = f"not mounted: {answer['note']}; " if answer["note"] else ""
                    place = values.get("mount") or "/PLACE"
                    say(f"{name}: {why}in the guest: mount -t virtiofs {answer['id']} {place}")
    finally:
        if json:
            sys.stdout.write(json_text.dumps(answers) + "\n")


def detach_device(name: str, device: str, timeout: float | None, *, force: bool, json: bool) -> None:
    """Raises VmmError."""
    from vmm.hotplug import DETACH_SECONDS

    if timeout is not None:
        _check(timeout)
    patience = OPENING_SECONDS + (DETACH_SECONDS if timeout is None else timeout)
    answer = request(find(name), "detach", patience, id=device, force=force, timeout=timeout)
    if json:
        sys.stdout.write(json_text.dumps(answer) + "\n")
        return
    say(f"{name}: {'detached' if answer['by'] == 'guest' else 'pulled'} {device}")


def _check(timeout: float) -> None:
    if not 0 <= timeout <= MAX_SECONDS:
        raise ConfigError(f"timeout: {timeout:g} is outside 0 to {MAX_SECONDS:g} seconds")
