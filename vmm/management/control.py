"""The control interface of one machine: requests and answers as JSON lines on its control socket.

    {"command": "status"}                       -> {"ok": true, "state": "running", …}
    {"command": "stop", "timeout": 30}          -> {"ok": true, "outcome": …} when it has ended
    {"command": "events"}                       -> {"ok": true, …status}, then a line for each event, to the end
    {"command": "agent", "version": 2}          -> {"ok": true, "ready": true} with a descriptor (SCM_RIGHTS): a
                                                   connection to the guest's agent, which speaks that version of its
                                                   protocol; the last request of its connection. "ready": false if the
                                                   guest's agent does not listen within READY_SECONDS: ask again
    {"command": "snapshot", "directory": "/…"}  -> {"ok": true, "identity": …} when it is whole
    attach, detach                              -> vmm/management/hotplug.py
    gdb, registers, trace                       -> vmm/management/debugging.py
    nmi, dump; link                             -> vmm/management/dumping.py; vmm/management/linking.py
    migrate, migrate-cancel, migrate-set, …     -> vmm/management/migrating.py
    block                                       -> vmm/management/block.py
    pause, resume, kill, shutdown, reboot, reset, stats, devices, config, metrics -> see COMMANDS
    anything else                               -> {"ok": false, "kind": "ConfigError", "error": "…"}

The server side is `Registration`: the machine's place in the registry with its control and console sockets. The
client side is `request`. Loop thread; a client that sends garbage or never reads harms only itself.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import select
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from vmm.console.hub import ConsoleHub
from vmm.console.server import ConsoleServer
from vmm.errors import ConfigError, HostError, StateError, VmmError, error_from, fault_of, os_reason
from vmm.events import (
    Attached,
    Detached,
    DetachRefused,
    DiskJobChanged,
    Ended,
    Event,
    EventStream,
    Migrating,
    Rebooted,
    StateChanged,
    Warned,
)
from vmm.lifecycle import Outcome, State
from vmm.management.registry import CONSOLE, CONTROL, HeldName, RegistryEntry, find
from vmm.management.sockets import listen

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

LINE_LIMIT = 64 << 10
CLIENTS_MAX = 256
"""Connections at a time; one beyond gets an answer that says so."""
ANSWER_SECONDS = 1.0
"""How long the machine's end waits for clients that are being answered."""
STARTING_SECONDS = 2.0
"""How long a client waits for a machine that has its name and does not listen yet."""
MAX_STOP_SECONDS = 86_400.0
LEFT_SECONDS = 0.5
"""How often it is looked whether a client that asks nothing more still listens."""
STATISTICS_SECONDS = 0.25
"""How long a status waits for the guest's newest statistics of its memory."""
READY_SECONDS = 5.0
"""How long one request waits for the guest's agent to listen."""


def _dumps(value: Any) -> str:
    import json  # when a client asks: most machines start and end without one

    return json.dumps(value)


def _loads(line: bytes | str) -> Any:
    import json

    return json.loads(line)


def outcome_dict(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON."""
    return {"reason": outcome.reason.value, "detail": outcome.detail, "status": outcome.status}


def metrics(name: str, stats: dict[str, int]) -> str:
    """Counters as Prometheus text (exposition format 0.0.4)."""
    lines = [
        "# HELP loopvisor_events_total What the machine's vCPUs asked for, by kind.",
        "# TYPE loopvisor_events_total counter",
    ]
    lines += [f'loopvisor_events_total{{machine="{name}",kind="{key}"}} {stats[key]}' for key in sorted(stats)]
    return "\n".join(lines) + "\n"


class Registration:
    """A named machine's sockets and its entry in the registry."""

    def __init__(self, vm: VirtualMachine, hub: ConsoleHub) -> None:
        self._vm = vm
        self._held = HeldName(vm.config.name)
        self._console = ConsoleServer(hub, self._held.path / CONSOLE)
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._busy: set[asyncio.Task[None]] = set()
        self._closing = False
        self._started = time.time()

    async def start(self) -> None:
        """Listen on both sockets, then be listed. Raises ConfigError, HostError."""
        try:
            await self._console.start()
            listener = listen(self._held.path / CONTROL, "control socket")
            try:
                self._server = await asyncio.start_unix_server(self._client, sock=listener, limit=LINE_LIMIT)
            except BaseException:
                listener.close()
                raise
            self._held.write_info({"pid": os.getpid(), "started": self._started, "command": sys.argv[:32]})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """At once. Idempotent."""
        self._stop_serving()
        self._abort_clients()
        self._console.close()
        self._held.release()

    async def aclose(self) -> None:
        """Clients that wait for an answer get it; the others are sent away."""
        try:
            self._stop_serving()
            await self._console.aclose()
            if self._busy:
                await asyncio.wait(self._busy, timeout=ANSWER_SECONDS)
            # Not cancelled: asyncio takes a cancelled client of a server for an error, and tells it (Python 3.11).
            clients = tuple(self._clients)
            self._abort_clients()
            if clients:
                _, stuck = await asyncio.wait(clients, timeout=ANSWER_SECONDS)
                for client in stuck:
                    client.cancel()
                await asyncio.gather(*stuck, return_exceptions=True)
        finally:
            self.close()

    def _abort_clients(self) -> None:
        for writer in self._clients.values():
            writer.transport.abort()

    def _stop_serving(self) -> None:
        self._closing = True
        if self._server is not None:
            server, self._server = self._server, None
            server.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._clients) >= CLIENTS_MAX:
            error = f"{CLIENTS_MAX} clients are connected to this machine already; end some of them"
            writer.write(_dumps({"ok": False, "kind": "HostError", "error": error}).encode() + b"\n")
            writer.close()
            return
        self._clients[task] = writer
        try:
            while not self._closing and (line := await reader.readline()):
                self._busy.add(task)
                try:
                    answer = await self._answer(line)
                    events, streams = answer.pop("events", None), answer.pop("streams", None)
                    if streams is not None:
                        _hand_over(writer, _dumps(answer).encode() + b"\n", streams[1])
                        break
                    writer.write(_dumps(answer).encode() + b"\n")
                    await writer.drain()
                    await asyncio.sleep(0)  # a client that has sent many requests at once must not keep the loop
                    if events is not None:
                        await _send_events(events, reader, writer)
                        break
                finally:
                    self._busy.discard(task)
        except (ValueError, OSError, asyncio.IncompleteReadError):
            pass  # a line beyond LINE_LIMIT, or a client that went away
        finally:
            del self._clients[task]
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            try:
                request = _loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"not JSON: {error}") from error
            if not isinstance(request, dict):
                raise ConfigError("a request is an object with a command")
            command = COMMANDS.get(str(request.get("command")))
            if command is None:
                raise ConfigError(f"unknown command {request.get('command')!r}; known are {', '.join(COMMANDS)}")
            return {"ok": True, **await command(self, request)}
        except VmmError as error:
            return {"ok": False, "kind": fault_of(error), "error": str(error)}

    async def _status(self, _request: dict[str, Any]) -> dict[str, Any]:
        vm, config = self._vm, self._vm.config
        return {
            "name": config.name,
            "state": vm.state.value,
            "core": vm.core,
            "finished": vm.stats().get("finished", 0),
            "cpus": vm.present_cpus,
            "max_cpus": config.most_cpus,
            "memory": config.memory,
            "pid": os.getpid(),
            "source": vm.source,
            "started": self._started,
            "uptime": time.time() - self._started,
            **await self._present(),
            "devices": self._vm.attached(),
            "migration": None if vm.migration is None else vm.migration.progress.as_dict(),
            "fetching": None if vm.fetching is None else vm.fetching.as_dict(),
            "obstacle": None if vm.obstacle is None else vm.obstacle.text,
        }

    async def _present(self) -> dict[str, Any]:
        from vmm.changes import memory_statistics, present

        if self._vm.config.balloon and self._vm.state is State.RUNNING:
            await memory_statistics(self._vm, STATISTICS_SECONDS)
        return present(self._vm)

    async def _set(self, request: dict[str, Any]) -> dict[str, Any]:
        from vmm.management.setting import set_machine

        return await set_machine(self._vm, request)

    async def _events(self, request: dict[str, Any]) -> dict[str, Any]:
        # The stream first: what happens from here on is told as an event, what was before is in the status.
        return {"events": self._vm.events(), **await self._status(request)}

    async def _agent(self, request: dict[str, Any]) -> dict[str, Any]:
        from vmm.guest.frames import VERSION

        if request.get("version") != VERSION:
            raise ConfigError(f"this machine's vmm speaks version {VERSION} of the agent's protocol; use the same vmm")
        if self._vm.state is State.PAUSED:
            raise StateError(f"is paused; run on with: vmm resume {self._vm.config.name}")
        agent = self._vm.agent
        try:
            async with asyncio.timeout(READY_SECONDS):
                await agent.wait_ready()
        except TimeoutError:
            return {"ready": False}
        return {"ready": True, "streams": await agent.dial()}

    async def _stats(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"stats": self._vm.stats()}

    async def _devices(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Disks and cards in the present configuration's order, each with its id and counters; null for one that could
        not be had."""
        config = self._vm.present
        disks = [disk.id or f"disk{index}" for index, disk in enumerate(config.disks)]
        nets = [net.id or f"net{index}" for index, net in enumerate(config.nets)]
        return {
            "disks": [
                disk and {"id": name, **disk.counters, "capacity": disk.backend.capacity}
                for name in disks
                for disk in [self._device(name)]
            ],
            "nets": [
                net and {"id": name, **net.counters, "mac": net.mac.hex(":"), "link": net.link}
                for name in nets
                for net in [self._device(name)]
            ],
        }

    def _device(self, name: str) -> Any:
        try:
            return self._vm.device(name)
        except StateError:
            return None

    async def _metrics(self, _request: dict[str, Any]) -> dict[str, Any]:
        text = metrics(self._vm.config.name, self._vm.stats())
        if balloon := (await self._present()).get("balloon"):
            from vmm.management.setting import balloon_metrics

            text += balloon_metrics(self._vm.config.name, balloon)
        return {"metrics": text}

    async def _config(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"config": self._vm.present.to_dict()}

    async def _attach(self, request: dict[str, Any]) -> dict[str, Any]:
        from vmm.management.hotplug import attach

        return await attach(self._vm, request)

    async def _detach(self, request: dict[str, Any]) -> dict[str, Any]:
        from vmm.management.hotplug import detach

        return await detach(self._vm, request)

    async def _block(self, request: dict[str, Any]) -> dict[str, Any]:
        from vmm.management.block import block

        return await block(self._vm, request)

    async def _pause(self, request: dict[str, Any]) -> dict[str, Any]:
        await self._vm.pause()
        return await self._status(request)

    async def _resume(self, request: dict[str, Any]) -> dict[str, Any]:
        await self._vm.take_up()
        return await self._status(request)

    async def _shutdown(self, request: dict[str, Any]) -> dict[str, Any]:
        self._vm.press_power_button()
        return await self._status(request)

    async def _reboot(self, request: dict[str, Any]) -> dict[str, Any]:
        self._vm.press_power_button(reboot=True)
        return await self._status(request)

    async def _reset(self, request: dict[str, Any]) -> dict[str, Any]:
        self._vm.reset()
        return await self._status(request)

    async def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        timeout = request.get("timeout", 30.0)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout <= MAX_STOP_SECONDS:
            raise ConfigError(f"timeout: {timeout!r} is not a number of seconds")
        return {"outcome": outcome_dict(await self._vm.ask_to_stop(timeout))}

    async def _kill(self, _request: dict[str, Any]) -> dict[str, Any]:
        self._vm.kill()
        return {"outcome": outcome_dict(await self._vm.ended())}

    async def _snapshot(self, request: dict[str, Any]) -> dict[str, Any]:
        from vmm.state.taking import SnapshotProgress, options_from

        target, options = options_from(request)
        progress = SnapshotProgress()
        manifest = await self._vm.snapshot(target, progress=progress, **options)
        return {
            "identity": manifest.identity,
            "stored": manifest.memory.stored,
            "stood_still_ns": progress.stood_still_ns,
            "seconds": progress.seconds,
        }


def _of(module: str, name: str) -> Callable[[Registration, dict[str, Any]], Awaitable[dict[str, Any]]]:
    """A command of vmm.management.MODULE, which is imported when somebody asks: async name(vm, request)."""

    async def command(self: Registration, request: dict[str, Any]) -> dict[str, Any]:
        function = getattr(importlib.import_module(f"vmm.management.{module}"), name)
        answer: dict[str, Any] = await function(self._vm, request)
        return answer

    return command


COMMANDS: dict[str, Callable[[Registration, dict[str, Any]], Awaitable[dict[str, Any]]]] = {
    "status": Registration._status,
    "events": Registration._events,
    "agent": Registration._agent,
    "stats": Registration._stats,
    "metrics": Registration._metrics,
    "devices": Registration._devices,
    "config": Registration._config,
    "attach": Registration._attach,
    "detach": Registration._detach,
    "block": Registration._block,
    "pause": Registration._pause,
    "resume": Registration._resume,
    "stop": Registration._stop,
    "kill": Registration._kill,
    "shutdown": Registration._shutdown,
    "reboot": Registration._reboot,
    "reset": Registration._reset,
    "snapshot": Registration._snapshot,
    "set": Registration._set,
    "gdb": _of("debugging", "gdb"),
    "registers": _of("debugging", "registers"),
    "trace": _of("debugging", "trace"),
    "nmi": _of("dumping", "nmi"),
    "dump": _of("dumping", "dump"),
    "link": _of("linking", "link"),
    "migrate": _of("migrating", "migrate"),
    "migrate-cancel": _of("migrating", "cancel"),
    "migrate-set": _of("migrating", "change"),
    "migrate-postcopy": _of("migrating", "start_postcopy"),
    "receive-recover": _of("migrating", "listen_again"),
}


def _hand_over(writer: asyncio.StreamWriter, line: bytes, given: asyncio.StreamWriter) -> None:
    """Send a line with a connection that is the client's from now on. OSError if the client does not read."""
    try:
        given.transport.pause_reading()  # type: ignore[attr-defined]
        with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as client:
            sent = socket.send_fds(client, [line], [given.get_extra_info("socket").fileno()], socket.MSG_DONTWAIT)
            if sent < len(line):
                raise BlockingIOError
    finally:
        given.close()


async def _send_events(events: EventStream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One line each, to the machine's end or until the client leaves; a client that does not read waits in the
    stream's bounded queue."""

    async def send() -> None:
        async for event in events:
            writer.write(_dumps(event_dict(event)).encode() + b"\n")
            await writer.drain()

    async def left() -> None:
        while await reader.read(4096):  # nothing is asked on this connection any more
            pass
        # A client that only ends what it asks, as a pipe into nc does, still listens.
        hung_up = select.poll()
        hung_up.register(writer.get_extra_info("socket").fileno(), 0)
        while True:
            if hung_up.poll(0):
                return
            await asyncio.sleep(LEFT_SECONDS)

    tasks = [asyncio.ensure_future(send()), asyncio.ensure_future(left())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def event_dict(event: Event) -> dict[str, Any]:
    """An event as JSON: "event" says which."""
    match event:
        case StateChanged(state):
            return {"event": "state", "state": state.value}
        case Rebooted(detail):
            return {"event": "rebooted", "detail": detail}
        case Warned(text):
            return {"event": "warning", "text": text}
        case Migrating():
            from vmm.migration.precopy import as_dict

            return {"event": "migration", **as_dict(event)}
        case Ended(outcome):
            return {"event": "ended", "outcome": outcome_dict(outcome)}
        case Attached(name, kind, slot):
            return {"event": "attached", "id": name, "kind": kind, "slot": slot}
        case Detached(name, by):
            return {"event": "detached", "id": name, "by": by}
        case DetachRefused(name, reason):
            return {"event": "detach-refused", "id": name, "reason": reason}
        case DiskJobChanged():
            return {
                "event": "disk-job",
                **{name: getattr(event, name) for name in ("disk", "kind", "state", "done", "total", "detail")},
            }
        case _:
            return {"event": "break"}


def request(entry: RegistryEntry, command: str, patience: float = 10.0, **values: Any) -> dict[str, Any]:
    """Ask a machine, wait up to `patience` seconds (blocking). Raises what it answers, HostError if it does not,
    ConfigError if it has ended."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(patience)
            _connect(client, entry)
            client.sendall(_dumps({"command": command, **values}).encode() + b"\n")
            answer = bytearray()
            while not answer.endswith(b"\n"):
                data = client.recv(1 << 16)
                if not data:
                    break
                answer += data
    except TimeoutError as error:
        owner = f"; if its process hangs, end it with: kill -9 {entry.info['pid']}" if "pid" in entry.info else ""
        raise HostError(f"{entry.name}: no answer within {patience:g} s{owner}") from error
    except OSError as error:
        raise HostError(f"{entry.name}: {os_reason(error)}") from error
    return answered(entry, bytes(answer))


def answered(entry: RegistryEntry, line: bytes) -> dict[str, Any]:
    """A machine's answer; raises what it says, or HostError if it is none."""
    try:
        values = _loads(line)
    except ValueError:
        raise HostError(f"{entry.name}: the machine ended before it answered") from None
    if not isinstance(values, dict):
        raise HostError(f"{entry.name}: answers something else than asked for")
    if not values.pop("ok", False):
        raise error_from(values.get("kind"), f"{entry.name}: {values.get('error')}")
    return values


def _connect(client: socket.socket, entry: RegistryEntry) -> None:
    """Waits for a machine that only starts, and as long as the socket's timeout for one whose queue is full."""
    deadline = time.monotonic() + STARTING_SECONDS
    patience = time.monotonic() + (client.gettimeout() or 0.0)
    while True:
        try:
            client.connect(str(entry.control))
            return
        except (FileNotFoundError, ConnectionRefusedError):
            find(entry.name)
            if time.monotonic() > deadline:
                raise
        except BlockingIOError:
            if time.monotonic() > patience:
                raise TimeoutError from None
        time.sleep(0.01)
