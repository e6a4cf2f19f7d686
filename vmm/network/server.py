"""The process that serves one network: it gives addresses to the guests of a bridge and asks for names in their place.

    python -m vmm.network.server DIRECTORY/NAME.serve

It outlives the daemon that started it. The file says what to serve; SIGHUP reads it anew. Leases are in NAME.leases
beside it: a list, and behind it a line for each change, until the list is written anew. NAME.lock is held while it runs
and has its process's number in it. It ends at SIGTERM, and when the bridge has gone.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vmm.errors import ConfigError, HostError, VmmError, os_reason
from vmm.network.dhcp import DhcpServer, Lease, plan_from

SERVER_PORT, CLIENT_PORT, NAME_PORT = 67, 68, 53
LOOK_SECONDS = 2.0
"""How often it is looked whether the bridge is there."""
MAX_DATAGRAM = 4096
MAX_QUERIES = 64
"""Questions for names that are under way at a time; what comes then is dropped, and asked again by its guest."""
QUERY_SECONDS = 5.0
READY = "ready"
RESOLVERS = Path("/etc/resolv.conf")
log = logging.getLogger(__name__)


def read_leases(path: Path) -> list[Lease]:
    """What a server wrote, with what is over; nothing if there is no such file. A line that is not whole, for it is
    being written or was when the host stopped, is left out."""
    found: dict[str, Lease] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError):
        return []
    for line in lines:
        with suppress(ValueError, TypeError):
            told = json.loads(line)
            for item in told if isinstance(told, list) else [told]:
                lease = Lease(**item)
                found[lease.mac] = lease
    return list(found.values())


class LeaseFile:
    """The file of one server's leases. A change costs one line; the whole is written again when there are more lines
    than leases, and no sooner than after SHORTEST of them."""

    SHORTEST = 256

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: int | None = None
        """Behind the list; None: the list must be written first."""
        self._listed = 0

    def record(self, changes: list[Lease], leases: Callable[[], list[Lease]]) -> None:
        """Note changes; `leases`: all that hold. Raises HostError."""
        if not changes:
            return
        lines, self._lines = self._lines, None
        if lines is None or lines + len(changes) > max(self.SHORTEST, self._listed):
            listed = leases()
            write_whole(self._path, json.dumps([asdict(lease) for lease in listed]) + "\n")
            self._lines, self._listed = 0, len(listed)
            return
        try:
            with self._path.open("a") as file:
                file.write("".join(json.dumps(asdict(lease)) + "\n" for lease in changes))
        except OSError as error:
            raise HostError(f"{self._path}: {os_reason(error)}") from error
        self._lines = lines + len(changes)


def write_whole(path: Path, text: str) -> None:
    """Replace a file. Raises HostError."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        raise HostError(f"{path}: {os_reason(error)}") from error


def resolvers() -> list[str]:
    """The host's name servers."""
    found = []
    with suppress(OSError):
        for line in RESOLVERS.read_text().splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] == "nameserver":
                found.append(words[1])
    return found[:3]


def bound(bridge: str, address: str, port: int) -> socket.socket:
    """A UDP socket for what comes by that bridge only. Raises HostError."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, bridge.encode())
        made.bind((address, port))
    except OSError as error:
        made.close()
        raise HostError(f"{bridge}, port {port}: {os_reason(error)}") from error
    return made


class NetworkServer:
    """One network's."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError, HostError."""
        self._path = path
        self._leases = LeaseFile(path.with_suffix(".leases"))
        values = self._values()
        self.bridge = str(values["bridge"])
        plan = plan_from(values["plan"])
        self._dhcp = DhcpServer(plan, read_leases(path.with_suffix(".leases"))) if values["dhcp"] else None
        self._sockets: list[socket.socket] = []
        try:
            if self._dhcp is not None:
                self._sockets.append(bound(self.bridge, "", SERVER_PORT))
            self._names: socket.socket | None = None
            if plan.name_server:
                self._names = bound(self.bridge, str(plan.address.ip), NAME_PORT)
                self._sockets.append(self._names)
        except BaseException:
            self.close()
            raise
        self._queries: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Idempotent."""
        for made in self._sockets:
            made.close()
        self._sockets.clear()

    def reload(self) -> None:
        """Other hosts, another range. A file that cannot be read changes nothing, and is told on stderr."""
        try:
            if self._dhcp is not None:
                self._dhcp.replan(plan_from(self._values()["plan"]))
        except VmmError as error:
            log.error("network: not read anew: %s", error)

    async def serve(self) -> None:
        """Until it is cancelled, or the bridge has gone."""
        loop = asyncio.get_running_loop()
        if self._dhcp is not None:
            loop.add_reader(self._sockets[0], self._dhcp_ready, self._sockets[0], self._dhcp)
        if self._names is not None:
            loop.add_reader(self._names, self._names_ready, self._names)
        try:
            while Path(f"/sys/class/net/{self.bridge}").exists():  # noqa: ASYNC110 - the kernel tells it nobody
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for made in self._sockets:
                loop.remove_reader(made)
            queries = tuple(self._queries)
            for query in queries:
                query.cancel()
            await asyncio.gather(*queries, return_exceptions=True)

    # Inside.

    def _values(self) -> dict[str, Any]:
        try:
            values = json.loads(self._path.read_text())
            if not isinstance(values, dict) or not {"bridge", "plan", "dhcp"} <= values.keys():
                raise ConfigError(f"{self._path}: it says not what to serve")
            return values
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._path}: {error}") from error

    def _dhcp_ready(self, made: socket.socket, server: DhcpServer) -> None:
        with suppress(OSError):
            data = made.recv(MAX_DATAGRAM)
            now = time.time()
            reply = server.answer(data, now)
            try:
                self._leases.record(server.take_changes(), lambda: server.leases(now))
            except HostError as error:
                log.error("network: %s", error)
                return  # a guest must not have an address that would be forgotten
            if reply is not None:
                made.sendto(reply, ("255.255.255.255", CLIENT_PORT))

    def _names_ready(self, made: socket.socket) -> None:
        with suppress(OSError):
            data, client = made.recvfrom(MAX_DATAGRAM)
            if len(self._queries) < MAX_QUERIES and len(data) > 12:
                task = asyncio.create_task(self._ask(made, data, client), name=f"name for {client[0]}")
                self._queries.add(task)
                task.add_done_callback(self._queries.discard)

    async def _ask(self, made: socket.socket, query: bytes, client: tuple[str, int]) -> None:
        """Ask the host's name servers, one after the other, what a guest asked."""
        loop = asyncio.get_running_loop()
        for resolver in resolvers():
            family = socket.AF_INET6 if ":" in resolver else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as upstream, suppress(OSError, TimeoutError):
                upstream.setblocking(False)
                upstream.connect((resolver, NAME_PORT))
                async with asyncio.timeout(QUERY_SECONDS):
                    await loop.sock_sendall(upstream, query)
                    answer = await loop.sock_recv(upstream, MAX_DATAGRAM)
                if answer[:2] == query[:2]:
                    made.sendto(answer, client)
                    return


def hold(path: Path) -> int:
    """The descriptor of the lock that says that this process serves; -1 if another does. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return -1
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def holder(path: Path) -> int:
    """The number of the process that holds that lock; 0: none does. Only looks: the file never has the number of
    one who asked. Raises OSError."""
    with suppress(FileNotFoundError, ValueError), path.open() as lock:  # ValueError: the holder has not yet written
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(lock.read())
    return 0


async def _main(path: Path, ready: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    server = NetworkServer(path)
    try:
        serving = asyncio.create_task(server.serve(), name=f"serve {server.bridge}")
        loop.add_signal_handler(signal.SIGHUP, server.reload)
        loop.add_signal_handler(signal.SIGTERM, serving.cancel)
        ready()
        await asyncio.gather(serving, return_exceptions=True)
    finally:
        server.close()


def _say_ready() -> None:
    sys.stderr.write(f"{READY}\n")
    sys.stderr.flush()


def main() -> None:
    """The process. READY on stderr when it serves; status 1 with a line there if it cannot."""
    path = Path(sys.argv[1])
    try:
        lock = hold(path.with_suffix(".lock"))
        if lock < 0:
            raise ConfigError(f"{path}: another process serves this network")
        asyncio.run(_main(path, _say_ready))
    except (VmmError, OSError) as error:
        raise SystemExit(f"network: {error}") from None


if __name__ == "__main__":
    main()
