"""Which program a machine is for, and what programs in its guest get unless the caller says otherwise: entrypoint,
command, env, user and workdir of the configuration. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from vmm.guest.frames import Environment, encode


def words(values: Mapping[str, Any], given: Sequence[str]) -> list[str]:
    """The program and its arguments: the entrypoint, then what was given, or else the command. `values`: plain ones of
    a configuration. Empty: the machine is for no program."""
    return [*shlex.split(values.get("entrypoint", "")), *(given or shlex.split(values.get("command", "")))]


def defaults(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` of Agent.start_process, completed with what plain values of a configuration say."""
    found = dict(options)
    env: Environment = options.get("env") or {}
    if values.get("env"):
        own = {encode(item["name"]): encode(item.get("value", "")) for item in values["env"]}
        found["env"] = own | {encode(name): encode(value) for name, value in env.items()}
    if not options.get("cwd"):
        found["cwd"] = values.get("workdir", "")
    if not options.get("user"):
        found["user"] = values.get("user", "")
    return found
