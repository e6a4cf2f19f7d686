"""How libvirt names the limits of disks and interfaces, and how we do. Pure."""

from __future__ import annotations

IO_TUNE = {
    f"{which}_{unit}_sec{suffix}": f"{ours}{part}{burst}"
    for suffix, burst in (("", ""), ("_max", "_burst"))
    for unit, ours in (("bytes", "bps"), ("iops", "iops"))
    for which, part in (("total", ""), ("read", "_read"), ("write", "_write"))
}
"""libvirt's names of a disk's limits, and ours. A burst is what may come at once, which _max is of one second."""
BANDWIDTH = {"inbound.average": "bps_in", "inbound.burst": "bps_in_burst", "outbound.average": "bps_out",
             "outbound.burst": "bps_out_burst"}  # fmt: skip
"""The same of a card's, which libvirt counts in KiB (a second)."""
