"""`vmm gdb, registers, trace, symbols`: looking into a machine that runs, through its control socket."""

from __future__ import annotations

import json as json_text
import os
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.errors import say
from vmm.debug import inspect
from vmm.debug.symbols import Names, Symbol, is_elf, move, offset, parse_map, read_symbols, write_elf
from vmm.errors import ConfigError, HostError, StateError, VmmError, os_reason
from vmm.management.control import request
from vmm.management.registry import RegistryEntry, find

CHUNK = 1 << 16
MAX_KALLSYMS = 256 << 20
GUEST_SECONDS = 30.0
ANSWER_S = 60
"""How long GDB waits for an answer."""


def debug_machine(
    name: str,
    address: str | None,
    *,
    symbols: Path | None,
    execute: Path | None,
    stdio: bool,
    close: bool,
    architecture: str,
) -> int:
    """`vmm gdb`. Raises VmmError."""
    entry = find(name)
    if sum((address is not None, stdio, close)) > 1:
        raise ConfigError("gdb: an address, --stdio and --close exclude each other")
    if close:
        closed = request(entry, "gdb", close=True)["closed"]
        say(f"{name}: {closed} {'stub listens' if closed == 1 else 'stubs listen'} no more")
        return 0
    if address is not None:
        target = request(entry, "gdb", address=_absolute(address), architecture=architecture)["target"]
        sys.stdout.write(f"target remote {target}\n")
        return 0
    if stdio:
        from vmm.management.handover import take_connection

        with take_connection(entry, "gdb", architecture=architecture) as connection:
            _copy(connection)
        return 0
    return _run_gdb(entry, symbols, execute, architecture)


def _absolute(address: str) -> str:
    """A socket's path as the machine's process has to take it, which runs elsewhere."""
    return f"unix:{Path(address[5:]).absolute()}" if address.startswith("unix:") and address[5:] else address


def _run_gdb(entry: RegistryEntry, symbols: Path | None, execute: Path | None, architecture: str) -> int:
    """GDB in this terminal; the machine runs on when it ends."""
    gdb = shutil.which("gdb")
    if gdb is None:
        raise HostError("gdb: is not installed (apt install gdb); or give an address for one elsewhere")
    with tempfile.TemporaryDirectory(prefix="vmm-gdb-") as folder:
        # By default GDB gives up after 2 s, which the program between it and the machine may take to start.
        commands = ["set confirm off", f"set remotetimeout {ANSWER_S}", *_symbol_commands(entry, symbols, Path(folder))]
        vmm = shlex.join([sys.executable, "-c", "from cli.main import main; main()"])
        commands.append(
            f"target remote | {vmm} gdb {shlex.quote(entry.name)} --stdio --arch {shlex.quote(architecture)}"
        )
        words = [gdb, "-q", *(word for command in commands for word in ("-ex", command))]
        if execute is not None:
            words += ["-batch", "-x", str(execute)]
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is GDB's
        try:
            return subprocess.run(words, check=False, preexec_fn=_default_interrupt).returncode
        finally:
            signal.signal(signal.SIGINT, before)


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _symbol_commands(entry: RegistryEntry, symbols: Path | None, folder: Path) -> list[str]:
    """What GDB has to be told to know the guest's kernel; nothing, with a reason on stderr, if that cannot be."""
    try:
        if symbols is None:
            found, moved = guest_symbols(entry), 0
        else:
            found = read_symbols(symbols)
            moved = kernel_offset(entry, found)
    except VmmError as error:
        if symbols is not None:
            raise
        say(f"{entry.name}: no symbols: {error}")
        return []
    if symbols is not None and is_elf(symbols.read_bytes()[:16]):  # which may have types and lines as well
        return [f"symbol-file -o {moved:#x} {shlex.quote(str(symbols))}"]
    file = folder / "kernel.sym"
    file.write_bytes(write_elf(move(found, moved)))
    return [f"file {file}"]


def guest_symbols(entry: RegistryEntry) -> list[Symbol]:
    """What the kernel of a guest with the agent tells root of itself, where it runs now. Raises VmmError."""
    import asyncio

    from vmm.management.agentlink import agent_of

    async def ask() -> str:
        try:
            async with asyncio.timeout(GUEST_SECONDS):
                result = await agent_of(entry).exec("cat", "/proc/kallsyms")
        except TimeoutError:
            raise HostError(f"the guest's agent did not answer within {GUEST_SECONDS:g} s") from None
        if result.status or len(result.stdout) > MAX_KALLSYMS:
            raise StateError("the guest does not show /proc/kallsyms")
        return result.text

    if not request(entry, "config")["config"].get("agent"):
        raise StateError("the guest has no agent; give --symbols FILE")
    return parse_map(asyncio.run(ask()), f"{entry.name}: /proc/kallsyms")


def kernel_offset(entry: RegistryEntry, symbols: list[Symbol]) -> int:
    """By how much the kernel in a machine was moved (KASLR). Raises VmmError."""
    last: VmmError | None = None
    for cpu in request(entry, "registers")["cpus"]:
        try:
            return offset(symbols, cpu)
        except StateError as error:
            last = error
    raise last or StateError("the machine has no vCPUs")


def _copy(connection: socket.socket) -> None:
    """Between standard input and output and a connection, until one of them ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                try:
                    if key.fd == 0:
                        data = os.read(0, CHUNK)
                        connection.sendall(data)
                    else:
                        data = connection.recv(CHUNK)
                        view = memoryview(data)
                        while view:
                            view = view[os.write(1, view) :]
                except OSError:
                    return
                if not data:
                    return


def show_registers(name: str, *, cpu: int | None, json: bool) -> None:
    """`vmm registers`"""
    cpus = request(find(name), "registers", **_only(cpu))["cpus"]
    if json:
        _print_json(cpus)
        return
    for found in cpus:
        sys.stdout.write(inspect.text(found))


def show_trace(name: str, *, cpu: int | None, seconds: float, symbols: Path | None, json: bool) -> None:
    """`vmm trace`"""
    entry = find(name)
    answer = request(entry, "trace", 10.0 + 2 * seconds, seconds=seconds, **_only(cpu))
    if json:
        _print_json({"cpus": answer["cpus"], "stats": answer["stats"]})
        return
    known: Callable[[int], str] = lambda _address: ""  # noqa: E731
    if symbols is not None:
        found = read_symbols(symbols)
        known = Names(move(found, kernel_offset(entry, found)))
    for each in answer["cpus"]:
        sys.stdout.write(inspect.exits_text(each))
        sys.stdout.write(inspect.trace_text(each, known))
    counters = {key: value for key, value in sorted(answer["stats"].items()) if value}
    sys.stdout.write("".join(f"  {key:<28} {value:>14}\n" for key, value in counters.items()))


def _only(cpu: int | None) -> dict[str, Any]:
    return {} if cpu is None else {"cpu": cpu}


def make_symbols(source: str, *, machine: str | None, output: Path | None) -> None:
    """`vmm symbols`"""
    if Path(source).is_file():
        symbols = read_symbols(Path(source))
        if machine is not None:
            symbols = move(symbols, kernel_offset(find(machine), symbols))
    elif machine is not None:
        raise ConfigError(f"symbols: {source}: no such file")
    else:
        symbols = guest_symbols(find(source))
    data = write_elf(symbols)
    if output is None:
        if os.isatty(1):
            raise ConfigError("symbols: an ELF file does not belong on a terminal; write: vmm symbols … > kernel.sym")
        sys.stdout.buffer.write(data)
        return
    try:
        output.write_bytes(data)
    except OSError as error:
        raise HostError(f"symbols: {output}: {os_reason(error)}") from error
    say(f"{output}: {len(symbols)} symbols")


def _print_json(value: Any) -> None:
    sys.stdout.write(json_text.dumps(value) + "\n")
