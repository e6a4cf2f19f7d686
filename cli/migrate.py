"""`vmm migrate, receive`: machines that move to another host while they run."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json as json_text
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cli.errors import say
from cli.progress import ProgressLine
from vmm.convert import parse_size
from vmm.errors import ConfigError, VmmError
from vmm.lifecycle import Outcome, Reason
from vmm.management.control import request
from vmm.management.registry import RegistryEntry, find

PATIENCE = 7 * 86_400.0
"""Seconds: a large machine over a slow link takes its time."""
LOOK_SECONDS = 0.5


def migrate_machine(
    name: str,
    uri: str | None,
    *,
    cancel: bool,
    bandwidth: str | None,
    downtime: float | None,
    tls: Path | None,
    json: bool,
    recover: bool,
    **options: Any,
) -> None:
    """To its end, or change, cancel or recover one that is under way. Raises VmmError."""
    entry = find(name)
    values: dict[str, Any] = {key: value for key, value in options.items() if value not in (None, False)}
    if bandwidth is not None:
        values["bandwidth"] = parse_size("bandwidth", bandwidth)
    if downtime is not None:
        values["downtime"] = downtime / 1000
    if cancel:
        request(entry, "migrate-cancel")
        say(f"{name}: the migration is cancelled")
        return
    if recover:
        if uri is None:
            raise ConfigError("migrate: give the address where the machine waits for its memory, as tcp:HOST:PORT")
        values = {"recover": True}
    if uri is None:
        if values.pop("postcopy", None) == "now":
            request(entry, "migrate-postcopy")
            if not values:
                return
        if not values:
            raise ConfigError("migrate: give the address where vmm receive waits, as tcp:HOST:PORT")
        request(entry, "migrate-set", **values)
        return
    with _shown(entry), _cancelled_by_us(entry) if not recover else contextlib.nullcontext():
        answer = request(
            entry, "migrate", PATIENCE, uri=uri, tls=None if tls is None else str(tls.absolute()), **values
        )
    done = answer["migration"]
    if json:
        sys.stdout.write(json_text.dumps(done) + "\n")
        return
    say(
        f"{name}: runs at {uri} after {done['seconds']:.1f} s, {done['sent'] / 1e6:.0f} MB in {done['rounds']} rounds; "
        f"it stood still for {done['downtime'] * 1000:.0f} ms"
    )


@contextmanager
def _cancelled_by_us(entry: RegistryEntry) -> Iterator[None]:
    """Ctrl-C cancels the migration and nothing else."""
    try:
        yield
    except KeyboardInterrupt:
        try:
            request(entry, "migrate-cancel")
            say(f"{entry.name}: the migration is cancelled; the machine runs on here")
        except VmmError as error:
            say(f"{entry.name}: {error}")
        raise


@contextmanager
def _shown(entry: RegistryEntry) -> Iterator[None]:
    """A bar on a terminal meanwhile."""
    if not sys.stderr.isatty():
        yield
        return
    over, line = threading.Event(), ProgressLine()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            with contextlib.suppress(VmmError):
                found = request(entry, "status", 5.0).get("migration")
                if found:
                    total = found["total"] + found["disk_total"]
                    left = found["remaining"] + found["disk_total"] - found["disk_sent"]
                    what = f"{found['phase']}, round {found['rounds'] + 1}, {found['rate'] / 1e6:.0f} MB/s, "
                    what += f"guest writes {found['dirty_rate'] / 1e6:.0f} MB/s"
                    line(what, max(total - left, 0), total)

    watcher = threading.Thread(target=look, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        line.clear()


def receive_again(name: str, uri: str, *, tls: Path | None) -> None:
    """A machine whose source was lost in post-copy waits for it at one more address. Raises VmmError."""
    answer = request(find(name), "receive-recover", uri=uri, tls=None if tls is None else str(tls.absolute()))
    say(f"{name}: waiting at {answer['uri']}")


def receive_machine(
    uri: str,
    *,
    name: str | None,
    tls: Path | None,
    core: str | None,
    console: str | None,
    trust: bool,
    disks: list[str],
    json: bool,
) -> int:
    """Wait for a machine, run it in the foreground; its exit status. Raises VmmError."""
    import uvloop

    changes: dict[str, Any] = {"console": console or "stdio"}
    if name is not None:
        changes["name"] = name
    if core is not None:
        changes["core"] = core
    files: dict[str, Path] = {}
    for text in disks:
        disk, equals, path = text.partition("=")
        if not equals or not disk or not path:
            raise ConfigError(f"disk: {text!r} is not NAME=FILE, as disk0=/srv/root.img")
        files[disk] = Path(path)
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signals = [number for number in endings if signal.getsignal(number) is not signal.SIG_IGN]
    if signal.SIGINT in signals:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(_receive(uri, tls, trust, files, changes, signals))
    if outcome is None:
        return 0
    config_name = changes.get("name") or "machine"
    if json:
        report = {"reason": outcome.reason.value, "detail": outcome.detail, "status": outcome.status}
        sys.stderr.write(json_text.dumps(report) + "\n")
    elif outcome.reason not in (Reason.SHUTDOWN, Reason.RESET, Reason.EXIT):
        say(f"{config_name}: {outcome}")
    return outcome.status


async def _receive(
    uri: str,
    tls: Path | None,
    trust: bool,
    disks: dict[str, Path],
    changes: dict[str, Any],
    signals: list[signal.Signals],
) -> Outcome | None:
    from cli.foreground import _tell_warnings
    from vmm.migration.target import Receiver, preload

    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    ended_by: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        ended_by.append(number)
        session = receiver.session
        if session is not None and session.phase == "running":
            session.vm.end(Outcome(Reason.SIGNAL, number.name, code=number))
        else:
            task.cancel()

    helpers: list[asyncio.Task[None]] = []
    receiver = Receiver(uri, tls=tls, trust=trust, disks=disks, **changes)
    async with receiver:
        try:
            for number in signals:
                loop.add_signal_handler(number, end, number)
            preload()  # now, while no guest waits for it
            gc.collect()
            gc.freeze()  # imports are there to stay, and are not looked through while a guest stands still
            say(f"waiting at {receiver.uri}")
            vm = await receiver.arrive()
            helpers.append(asyncio.create_task(_tell_warnings(vm.events(), vm.config.name), name="warnings"))
            if vm.obstacle is not None:
                say(vm.obstacle.text)
            try:
                return await vm.wait()
            finally:
                await vm.aclose()
        except asyncio.CancelledError:
            if ended_by:
                return Outcome(Reason.SIGNAL, ended_by[0].name, code=ended_by[0])
            raise
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            for number in signals:
                loop.remove_signal_handler(number)
