"""Damaged snapshots: `python -m tests.fuzz.state_fuzz SECONDS [SEED]`.

Each round takes a good snapshot of a tiny guest and damages it: bits, cuts, parts swapped with another snapshot's,
values in the JSON, also with checksums that are right for it, so that what is behind them is reached. It is then
restored. What may come: a machine that runs, or one line that says what is wrong, and nothing left open. Anything else
is printed with its seed, and ends the campaign with status 1.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import vmm
from vmm.errors import ConfigError, GuestError, HostError, StateError
from vmm.image import config_for
from vmm.launch import find_image
from vmm.lifecycle import Reason
from vmm.state.manifest import MANIFEST

ROUND_SECONDS = 30.0
CORE_GIVES_UP = ("internal error", "the core cannot execute the instruction")
"""How a machine may end whose registers are allowed but senseless: KVM cannot go on with every one of them."""
SMALL = ("manifest.json", "state.json", "memory.sums")
JUNK: tuple[Any, ...] = (None, True, -1, 0, 1, 255, 1 << 32, 1 << 63, 1 << 70, "", "x", "AAAA", [], {}, [0], 1.5)


async def _make(folder: Path) -> None:
    """Two snapshots of different guests."""
    for name in ("echo", "hello"):
        image = await asyncio.to_thread(find_image, name)
        async with vmm.VirtualMachine(config_for(image, memory="16M")) as vm:
            if name == "echo":  # the other one has not begun: it would end at once
                vm.resume()
                await vm.console.expect(rb"Ctrl-D ends\n", timeout=30)
            await vm.snapshot(folder / name)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _places(item, (*path, key))
    return found


def _damage_value(source: random.Random, value: Any) -> Any:
    """Replace, remove or change one value of a JSON document."""
    path = source.choice(_places(value)[1:])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    old = parent[path[-1]]
    if source.random() < 0.15:
        del parent[path[-1]]
    elif isinstance(old, int) and not isinstance(old, bool) and source.random() < 0.6:
        parent[path[-1]] = old ^ 1 << source.randrange(64)
    else:
        parent[path[-1]] = source.choice(JUNK)
    return value


def _seal(folder: Path, text: str) -> None:
    """Write a manifest with the checksum that it should have."""
    (folder / MANIFEST).write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")


def _damage(source: random.Random, folder: Path, other: Path) -> None:
    text = (folder / MANIFEST).read_text().rstrip("\n").rpartition("\n")[0]
    match source.randrange(6):
        case 0:  # bits
            path = folder / source.choice((*SMALL, "memory"))
            data = bytearray(path.read_bytes())
            for _ in range(source.randrange(1, 9)):
                data[source.randrange(len(data))] ^= 1 << source.randrange(8)
            path.write_bytes(data)
        case 1:  # cut, or longer
            path = folder / source.choice((*SMALL, "memory"))
            os.truncate(path, source.randrange(path.stat().st_size * 2))
        case 2:  # another's part
            name = source.choice((*SMALL, "memory"))
            shutil.copy(other / name, folder / name)
        case 3:  # a part that is missing, or no file
            path = folder / source.choice((*SMALL, "memory"))
            path.unlink()
            if source.random() < 0.5:
                source.choice((path.mkdir, lambda: path.symlink_to("/etc/passwd"), lambda: os.mkfifo(path)))()
        case 4:  # the manifest's values
            _seal(folder, json.dumps(_damage_value(source, json.loads(text))))
        case _:  # the state's values, with the right checksum
            state = _damage_value(source, json.loads((folder / "state.json").read_text()))
            data = json.dumps(state).encode()
            (folder / "state.json").write_bytes(data)
            manifest = json.loads(text)
            manifest["fields"]["files"]["state.json"] = hashlib.sha256(data).hexdigest()
            _seal(folder, json.dumps(manifest))


async def _round(source: random.Random, good: Path, other: Path, folder: Path) -> str:
    """What became of it."""
    shutil.copytree(good, folder)
    _damage(source, folder, other)
    try:
        async with vmm.restore(folder, trust=True, timeout=2.0) as vm:
            await vm.console.write(b"x\x04")
            outcome = await vm.wait()
            if outcome.reason is Reason.HOST_ERROR and not any(each in outcome.detail for each in CORE_GIVES_UP):
                raise AssertionError(f"a host error: {outcome.detail}")
            return "ran"
    except (StateError, ConfigError, HostError, GuestError) as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            raise AssertionError(f"no one line: {error}") from error
        return "refused"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _campaign(seconds: float, seed: int) -> int:
    counts = {"ran": 0, "refused": 0}
    with tempfile.TemporaryDirectory(prefix="loopvisor-fuzz-") as name:
        folder = Path(name)
        await _make(folder)
        descriptors = len(os.listdir("/proc/self/fd"))
        end, number = time.monotonic() + seconds, seed
        while time.monotonic() < end:
            source = random.Random(number)
            pair = ("echo", "hello") if source.random() < 0.5 else ("hello", "echo")
            try:
                async with asyncio.timeout(ROUND_SECONDS):
                    became = await _round(source, folder / pair[0], folder / pair[1], folder / "damaged")
                counts[became] += 1
            except Exception:
                sys.stdout.write(f"seed {number}:\n{traceback.format_exc()}")
                return 1
            if len(os.listdir("/proc/self/fd")) > descriptors + 8:
                sys.stdout.write(f"seed {number}: descriptors stay open\n")
                return 1
            number += 1
    sys.stdout.write(f"{counts['refused']} refused, {counts['ran']} ran, from seed {seed}: nothing found\n")
    return 0


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() & 0xFFFFFFFF
    with tempfile.TemporaryDirectory(prefix="loopvisor-cache-") as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # what is trusted and verified is this campaign's alone
        return asyncio.run(_campaign(seconds, seed))


if __name__ == "__main__":
    sys.exit(main())
