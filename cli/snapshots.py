"""`vmm snapshot, restore, snapshot-info, fork`: machines put down, taken up, and copied."""

from __future__ import annotations

import json as json_text
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cli.errors import say
from cli.options import RunArguments
from vmm.convert import format_size
from vmm.errors import ConfigError, HostError, VmmError
from vmm.management.control import request
from vmm.management.registry import entries, find

MAX_COPIES = 1000
START_SECONDS = 60.0
PATIENCE = 3600.0
"""Seconds: writing a large machine to a slow disk takes its time."""


def save_machine(
    name: str, directory: Path, *, base: Path | None, compress: str | None, disks: str, stop: bool, json: bool
) -> None:
    """Raises VmmError."""
    answer = request(
        find(name),
        "snapshot",
        PATIENCE,
        directory=str(directory.absolute()),
        base=None if base is None else str(base.absolute()),
        compress=compress,
        disks=disks,
        stop=stop,
    )
    if json:
        sys.stdout.write(json_text.dumps({"directory": str(directory), **answer}) + "\n")
        return
    still, took, stored = answer["stood_still_ns"] / 1e6, answer["seconds"], _size(answer["stored"])
    say(f"{name}: saved to {directory} in {took:.1f} s, {stored}; the machine stood still for {still:.0f} ms")


def restore_machine(
    directory: Path,
    command: list[str],
    *,
    name: str | None,
    core: str | None,
    console: str | None,
    paused: bool,
    trust: bool,
    as_copy: bool,
    json: bool,
) -> int:
    """Run it in the foreground; its exit status. Raises VmmError."""
    from cli.foreground import run
    from vmm.machine.hardware import HeadStart
    from vmm.state.snapshot import Snapshot
    from vmm.timeline import now

    begin = now()
    arguments = RunArguments(command=command)
    arguments.paused, arguments.json = paused, json
    snapshot = Snapshot.open(directory)
    try:
        stem = "".join(char for char in snapshot.path.name if char.isalnum() or char in "-_").lstrip("-_")
        changes: dict[str, Any] = {
            "name": name or f"{(stem or 'vm')[:40]}-{os.getpid()}",
            "console": console or ("none" if command else "stdio"),
        }
        if core is not None:
            changes["core"] = core
        config, saved = snapshot.prepare(changes, trusted=trust, as_copy=as_copy)
        configured = now()
        head_start = HeadStart(config, saved.origin)
        try:
            return run(config, arguments, head_start, begin=begin, configured=configured, saved=saved)
        finally:
            head_start.close()
    finally:
        snapshot.close()


def fork_machine(name: str, count: int, pattern: str | None) -> None:
    """Start copies of a running machine, each as a process of its own. Raises VmmError."""
    pattern = pattern or f"{name}-%d"
    if not 1 <= count <= MAX_COPIES:
        raise ConfigError(f"count: {count}; 1 to {MAX_COPIES} are possible")
    if pattern.count("%d") != 1 and (count > 1 or "%" in pattern):
        raise ConfigError(f"as: {pattern}: write %d once, where the number of the copy goes")
    names = [pattern.replace("%d", str(number)) for number in range(1, count + 1)]
    taken = {entry.name for entry in entries()} & set(names)
    if taken:
        raise ConfigError(f"as: a machine {sorted(taken)[0]} runs already")
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="loopvisor-", dir=shared if shared.is_dir() else None) as folder:
        directory = Path(folder) / "fork"
        answer = request(find(name), "snapshot", PATIENCE, directory=str(directory))
        with ExitStack() as stack:
            children = [(copy, stack.enter_context(_start_copy(directory, copy))) for copy in names]
            for copy, child in children:
                _wait_running(copy, child)
    still = answer["stood_still_ns"] / 1e6
    say(f"{name}: {', '.join(names)} run; {name} stood still for {still:.0f} ms")


@contextmanager
def _start_copy(directory: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a copy. If we fail, it ends."""
    words = [sys.executable, "-c", "from cli.main import main; main()", "restore", str(directory)]
    words += ["--name", name, "--console", "none", "--as-copy"]
    child = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    assert child.stderr is not None
    try:
        yield child
    except BaseException:
        child.kill()
        child.wait()
        raise
    finally:
        child.stderr.close()


def _wait_running(name: str, child: subprocess.Popen[bytes]) -> None:
    assert child.stderr is not None
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            last = child.stderr.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise HostError(f"{name} does not start: {last[0].removeprefix('vmm: ')}")
        with suppress(VmmError):
            if request(find(name), "status", 5.0)["state"] == "running":
                return
        time.sleep(0.01)
    raise HostError(f"{name} does not start within {START_SECONDS:g} s")


def show_info(directory: Path, *, verify: bool, json: bool) -> None:
    """What a snapshot is; with `verify` every byte of it is checked. Raises VmmError."""
    from vmm.state.snapshot import Snapshot

    snapshot = Snapshot.open(directory)
    try:
        snapshot.state()
        snapshot.disks()
        if verify:
            snapshot.verify()
        manifest = snapshot.manifest
        facts: dict[str, Any] = {
            "directory": str(snapshot.path),
            "identity": manifest.identity,
            "machine": manifest.name,
            "taken": datetime.fromtimestamp(manifest.created_ns / 1e9, UTC).isoformat(timespec="seconds"),
            "program": manifest.program,
            "core": manifest.core,
            "memory": manifest.memory.size,
            "stored": manifest.memory.stored,
            "compressed": manifest.memory.compressed,
            "base": None if manifest.base is None else manifest.base.path,
            "disks": {name: entry.how for name, entry in manifest.disks.items()},
            "verified": verify,
        }
    finally:
        snapshot.close()
    if json:
        sys.stdout.write(json_text.dumps(facts) + "\n")
        return
    for key in ("memory", "stored"):
        facts[key] = _size(facts[key])
    facts["disks"] = ", ".join(f"{name} ({how})" for name, how in facts["disks"].items()) or "none"
    for key, value in facts.items():
        sys.stdout.write(f"{key:<11} {value if value is not None else '-'}\n")


def _size(count: int) -> str:
    """Bytes for people: the next smaller unit that keeps it short."""
    return format_size(count >> 20 << 20) if count >= 1 << 20 else format_size(count)
