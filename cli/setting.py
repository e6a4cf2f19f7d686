"""`vmm set`: change a running machine through its control socket."""

from __future__ import annotations

import json as json_text
import sys
from typing import Any

from cli.errors import say
from vmm.changes import parse
from vmm.config import POLICY, Disk, Net
from vmm.convert import format_size
from vmm.errors import ConfigError
from vmm.management.control import request
from vmm.management.registry import find

PATIENCE = 90.0
"""Seconds: a guest may take its time to give up a processor."""


def set_machine(
    name: str, *, cpus: int | None, memory: str | None, disks: list[str], nets: list[str], json: bool
) -> None:
    """Change what was named, all or nothing, and say what holds now."""
    given = {"cpus": cpus, "memory": memory}
    wanted: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key, kind, texts in (("disks", Disk, disks), ("nets", Net, nets)):
        for text in texts:
            device, limits = parse(kind, text)
            wanted.setdefault(key, {}).setdefault(device, {}).update(limits)
    if not wanted:
        raise ConfigError("set: nothing to change; give --cpus, --memory, --disk or --net")
    answer = request(find(name), "set", PATIENCE, **wanted)
    if json:
        sys.stdout.write(json_text.dumps(answer) + "\n")
        return
    for device, limits in answer["limits"].items():
        say(f"{device}: {', '.join(f'{key}={value}' for key, value in limits.items())}")
    if cpus is not None:
        say(f"{name}: {answer['cpus']} of {answer['max_cpus']} processors")
    policies = answer.get("policies", {})
    for device, policy in policies.items():
        say(f"{device}: {', '.join(f'{key}={policy[key]}' for key in POLICY if policy[key])}")
    changed = {**wanted.get("disks", {}), **wanted.get("nets", {})}
    for device, values in changed.items():
        if device not in policies and not set(POLICY).isdisjoint(values):
            say(f"{device}: no policy")
    if not answer["limits"] and any(set(values) - set(POLICY) for values in changed.values()):
        say(f"{name}: no limits")
    if memory is not None:
        say(f"{name}: keeps {format_size(answer['balloon']['target'])}, as soon as it has given up the rest")
