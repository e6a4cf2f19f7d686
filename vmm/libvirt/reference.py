"""What of libvirt's remote protocol is answered, and why the rest is not: the tables of docs/management.md.

python -m vmm.libvirt.reference docs/management.md     writes them between the marks there
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from vmm.libvirt import daemon, rpc
from vmm.libvirt.names import NAMES, api_name

BEGIN, END = "<!-- procedures: generated -->", "<!-- procedures: end -->"
TITLES = {
    "connect_calls": "The connection and the host",
    "domain_calls": "Domains",
    "pinning_calls": "Processors of the host that a domain runs on",
    "device_calls": "Devices of definitions and of running machines",
    "dump_calls": "Core files and interrupts",
    "block_calls": "Disks' jobs, and limits",
    "migrate_calls": "Live migration",
    "event_calls": "Registering for events",
    "network_calls": "Networks",
    "hostdevice_calls": "The host's interfaces and devices, filters, secrets",
    "snapshot_calls": "Saved states and snapshots",
    "statistics_calls": "Statistics and limits",
    "storage_calls": "Storage pools and volumes",
    "stream_calls": "Consoles and channels",
    "agent_calls": "The guest, by its agent",
}
REASONS = (
    (r".*_event_(?!.*register).*", "are events that the daemon sends, not calls"),
    (r"auth_(sasl|polkit).*", "a UNIX socket's client is known by its user, TLS's by its certificate"),
    (r"domain_migrate.*|domain_(start_dirty|get_.*dirty).*", "machines move by version 3, by parameters"),
    (r"domain_(screenshot|send_key|send_process_signal|pm_.*|graphics.*)",
     "the machine has no display, keyboard or sleep, and knows nothing of its guest's processes"),
    (r"domain_(backup|set_block_threshold|.*throttle).*", "disks have neither backups nor thresholds"),
    (r"domain_(pin_iothread|set_(scheduler|memory_param|blkio|numa|interface_param|block_io|vcpu$|iothread|perf)|"
     r"add_iothread|del_iothread).*",
     "a machine is an ordinary process: the host's own means (cgroups, taskset) limit it"),
    (r"domain_(detach_device_alias|fd_associate|create_.*with_files)", "descriptors and aliases do not come along"),
    (r".*(secret|nwfilter|node_device|interface|network|node_)_?.*",
     "the host's interfaces, devices and memory are looked at only; there are no filters and secrets"),
    (r"domain_checkpoint.*|domain_list_all_checkpoints|domain_backup.*", "there are no checkpoints"),
    (r".*cpu.*|.*sev.*|.*launch.*", "the guest's processor is what the execution core offers"),
    (r".*", "no client needed it so far"),
)  # fmt: skip


def tables() -> str:
    """Markdown: what is answered by area, and what is refused by reason."""
    lines = ["| area | answered to everybody | answered to clients that may change things |", "|---|---|---|"]
    answered: set[int] = set()
    for module in daemon.MODULES:
        procedures = [procedure for _, procedure in sorted(module.calls.known.items())]
        answered |= set(module.calls.known)
        looks = ", ".join(f"`{_short(one.number)}`" for one in procedures if one.read_only)
        changes = ", ".join(f"`{_short(one.number)}`" for one in procedures if not one.read_only)
        lines.append(f"| {TITLES[module.__name__.rpartition('.')[2]]} | {looks} | {changes} |")
    total = len(NAMES) - 1
    refused: dict[str, list[str]] = {}
    for number in range(1, total + 1):
        if number not in answered:
            reason = next(text for pattern, text in REASONS if re.fullmatch(pattern, NAMES[number]))
            refused.setdefault(reason, []).append(f"`{_short(number)}`")
    events = refused.pop(REASONS[0][1])
    count = len(daemon.PROGRAMS[rpc.REMOTE])
    lines += [
        "",
        f"Of libvirt's {total} procedures {count} are answered; {len(events)} are events, which go the other way. The",
        "others are refused with `VIR_ERR_NO_SUPPORT` and their name:",
        "",
        "| why | procedures |",
        "|---|---|",
        *(f"| {reason} | {', '.join(names)} |" for reason, names in refused.items()),
    ]
    return "\n".join(lines) + "\n"


def _short(number: int) -> str:
    return api_name(number).removeprefix("vir")


def renewed(text: str) -> str:
    """A document with the tables between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renewed(path.read_text()))
