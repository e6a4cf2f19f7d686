"""`vmm console, ps, stop, kill, pause, resume`: the machines that this user runs, through their control sockets."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import Any

from cli.errors import say
from cli.table import lines, print_table
from vmm.convert import MIB
from vmm.errors import ConfigError, VmmError
from vmm.management.control import MAX_STOP_SECONDS, request
from vmm.management.registry import entries, find


def attach_console(name: str, *, follow: bool, linger: float) -> None:
    """By the machine's name, or a socket's path (anything with a slash, or an existing socket)."""
    if not 0 <= linger <= MAX_STOP_SECONDS:
        raise ConfigError(f"linger: {linger:g} is outside 0 to {MAX_STOP_SECONDS:g} seconds")
    from vmm.console.terminal import attach

    path = Path(name)
    if "/" not in name and not path.is_socket():
        path = find(name).console
    if sys.stdin.isatty():
        say(f"{name}: attached; Ctrl-] detaches")
    end = attach(path, name, follow=follow, quiet=linger)
    if sys.stdin.isatty():
        sys.stderr.write("\r\n")
    say(end)


def list_machines(*, json: bool, stats: bool, metrics: bool) -> None:
    """One machine a line; one that does not answer is listed all the same."""
    found: list[dict[str, Any]] = []
    samples: dict[str, None] = {}
    for entry in entries():
        try:
            status = request(entry, "status", 5.0)
            if stats:
                status |= request(entry, "stats", 5.0)
            if metrics:
                samples |= dict.fromkeys(request(entry, "metrics", 5.0)["metrics"].splitlines(keepends=True))
        except VmmError as error:
            if all(other.name != entry.name for other in entries()):
                continue  # it has ended meanwhile
            status = {"name": entry.name, "state": "unknown", "pid": entry.info.get("pid"), "error": str(error)}
        found.append(status)
    if metrics:
        sys.stdout.writelines(samples)  # HELP and TYPE stand once, however many machines there are
        return
    if json:
        _print_json(found)
        return
    rows: list[tuple[str, ...]] = [("NAME", "STATE", "CORE", "CPUS", "MEMORY", "UPTIME", "PID")]
    sources = [str(status.get("source") or "-") for status in found]
    for status in found:
        rows.append(
            (
                str(status["name"]),
                _state(status),
                str(status.get("core", "-")),
                str(status.get("cpus", "-")),
                f"{status['memory'] // MIB}M" if "memory" in status else "-",
                _duration(status["uptime"]) if "uptime" in status else "-",
                str(status.get("pid", "-")),
            )
        )
    if any(source != "-" for source in sources):  # of machines that did not all boot
        rows = [(*row, source) for row, source in zip(rows, ["FROM", *sources], strict=True)]
    if not stats:
        print_table(rows)
        return
    for index, line in enumerate(lines(rows)):
        sys.stdout.write(line + "\n")
        for key, value in sorted(found[index - 1].get("stats", {}).items()) if index else ():
            if value:
                sys.stdout.write(f"    {key:<28} {value:>12}\n")


def _state(status: dict[str, Any]) -> str:
    migration = status.get("migration")
    if (fetching := status.get("fetching")) and fetching["missing"]:
        broken = " broken" if fetching["state"] == "broken" else ""
        return f"{status['state']}, post-copy{broken}, {fetching['missing'] >> 20} MiB to come"
    if not migration:
        return "arriving" if "has not arrived" in str(status.get("obstacle")) else str(status["state"])
    total = migration["total"] + migration["disk_total"]
    left = migration["remaining"] + migration["disk_total"] - migration["disk_sent"]
    return f"{status['state']}, {migration['phase']} {100 * max(total - left, 0) // max(total, 1)}%"


def stop_machine(name: str, timeout: float, *, json: bool) -> None:
    if not 0 <= timeout <= MAX_STOP_SECONDS:
        raise ConfigError(f"timeout: {timeout:g} is outside 0 to {MAX_STOP_SECONDS:g} seconds")
    answer = request(find(name), "stop", timeout + 15.0, timeout=timeout)
    _ended(name, answer["outcome"], json=json)


def kill_machine(name: str, *, json: bool) -> None:
    _ended(name, request(find(name), "kill", 15.0)["outcome"], json=json)


def change_machine(name: str, command: str, *, json: bool) -> None:
    answer = request(find(name), command)
    if json:
        _print_json(answer)
    else:
        say(f"{name}: {answer['state']}")


def _ended(name: str, outcome: dict[str, Any], *, json: bool) -> None:
    if json:
        _print_json(outcome)
    else:
        detail = f": {outcome['detail']}" if outcome["detail"] else ""
        say(f"{name}: {outcome['reason']}{detail}")


def _print_json(value: Any) -> None:
    sys.stdout.write(json_text.dumps(value) + "\n")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
