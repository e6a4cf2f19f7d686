"""`vmm run --warm`. What it imports is a good part of the time that it takes (tests.bench state)."""

from __future__ import annotations

from cli.errors import say
from cli.lean import import_asyncio
from cli.options import RunArguments
from vmm.config import Config
from vmm.machine.hardware import HeadStart
from vmm.machine.origin import BOOT, Origin
from vmm.state import warm
from vmm.timeline import now


def run_warm(config: Config, arguments: RunArguments, begin: tuple[int, int]) -> int:
    """From the kept machine, or by a boot after which it is kept; exit status. Raises VmmError."""
    warm.check(config)
    config.check_host()
    snapshot, text = warm.find(config)
    if text:
        say(text)
    saved = None
    origin: Origin = BOOT
    try:
        if snapshot is not None:
            config, saved = snapshot.prepare(warm.changes(config))
            origin = saved.origin
        head_start = HeadStart(config, origin)
        configured = now()
        try:
            import_asyncio()
            from cli.foreground import run

            return run(config, arguments, head_start, begin=begin, configured=configured, saved=saved)
        finally:
            head_start.close()
    finally:
        if snapshot is not None:
            snapshot.close()
