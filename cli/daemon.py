"""`vmm daemon`: machines for virsh and whatever else speaks libvirt's protocol."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

from cli.errors import say
from vmm.libvirt.daemon import Daemon, Settings, default_state


def run_daemon(
    *, socket: Path | None, state: Path | None, group: str | None, listen_tls: str | None, tls: Path | None
) -> None:
    """Until SIGTERM or SIGINT. Raises VmmError."""
    import uvloop

    logging.basicConfig(format="vmm: daemon: %(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    settings = Settings(
        launcher=(sys.executable, "-c", "from cli.main import main; main()"),
        emulator=_own_path(),
        state=(state or default_state()).absolute(),
        socket=socket.absolute() if socket is not None else None,
        group=group,
        listen_tls=listen_tls,
        tls=tls.absolute() if tls is not None else None,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    async with Daemon(settings, _kinds()) as daemon:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, daemon.stop)
        loop.add_signal_handler(signal.SIGHUP, daemon.reload)
        if daemon.tls is not None:
            say(f"daemon: listening for TLS on port {daemon.tls.port}")
        say(f"daemon: virsh -c 'loopvisor+unix:///system?socket={daemon.socket}'")
        async with asyncio.TaskGroup() as group:
            starting = group.create_task(daemon.autostart())
            await daemon.serve()
            starting.cancel()


def _kinds() -> tuple[str, ...]:
    """The domain types that work here."""
    from vmm.cores import diagnose

    return ("kvm", "qemu") if diagnose().stock == "kvm" else ("qemu",)


def _own_path() -> str:
    """Of the command `vmm`."""
    beside = Path(sys.argv[0]).absolute()
    if beside.name == "vmm" and os.access(beside, os.X_OK):
        return str(beside)
    return shutil.which("vmm") or str(Path(sys.executable).with_name("vmm"))
