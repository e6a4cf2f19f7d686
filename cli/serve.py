"""`vmm serve`: sandboxes over HTTP, for clients of E2B's API."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from cli.errors import say
from vmm.errors import ConfigError

HOST, PORT = "127.0.0.1", 3000


def run_serve(
    *,
    listen: str,
    token_file: Path | None,
    state: Path | None,
    templates: list[str],
    only_templates: bool,
    domain: str,
    internet: bool,
    memory: str,
    core: str,
    drain: float,
) -> None:
    """Until SIGTERM or SIGINT. Raises VmmError."""
    try:
        import uvloop

        from vmm.sandboxes.serve.fleet import FleetSettings
        from vmm.sandboxes.serve.server import ServerSettings
        from vmm.sandboxes.serve.tokens import Tokens
    except ImportError as error:
        raise ConfigError(f"serve needs {error.name}; run: pip install 'loopvisor[serve]'") from error
    host, port = _address(listen)
    options: dict[str, object] = {name: value for name, value in (("memory", memory), ("core", core)) if value}
    settings = ServerSettings(
        fleet=FleetSettings(
            state=(state or _default_state()).absolute(),
            templates={"base": "linux", **dict(map(_template, templates))},
            only_named=only_templates,
            internet=internet,
            options=options,
        ),
        host=host,
        port=port,
        tokens=Tokens.read(token_file) if token_file is not None else None,
        domain=domain,
        drain=drain,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: object) -> None:
    from vmm.sandboxes.serve.server import SandboxServer

    loop = asyncio.get_running_loop()
    async with SandboxServer(settings) as server:  # type: ignore[arg-type]
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        url = f"http://{_shown(server.host)}:{server.port}"
        say(f"serve: E2B_API_URL={url} E2B_SANDBOX_URL={url} E2B_API_KEY={'…' if server.asks_tokens else 'any'}")
        paused = [box for box in server.fleet.list() if box.phase == "paused"]
        if paused:
            say(f"serve: {len(paused)} paused sandbox{'es' if len(paused) > 1 else ''} found")
        preparing = asyncio.create_task(server.fleet.prepare(lambda text: say(f"serve: {text}")), name="prepare")
        try:
            await server.serve()
        finally:
            preparing.cancel()
            await asyncio.gather(preparing, return_exceptions=True)
        kept = [box for box in server.fleet.list() if box.phase == "paused"]
        if kept:
            say(f"serve: {len(kept)} sandbox{'es' if len(kept) > 1 else ''} paused, for the next server")


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]") or HOST
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--listen {listen}: write HOST:PORT, as {HOST}:{PORT}")
    return host, int(port)


def _template(text: str) -> tuple[str, str]:
    name, equals, image = text.partition("=")
    if not equals or not name or not image:
        raise ConfigError(f"--template {text}: write NAME=IMAGE, as base=oci:python:3.12")
    return name, image


def _default_state() -> Path:
    own = os.environ.get("XDG_STATE_HOME")
    return (Path(own) if own else Path.home() / ".local" / "state") / "loopvisor" / "serve"


