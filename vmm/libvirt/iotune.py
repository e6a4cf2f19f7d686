"""How libvirt names the limits of disks and interfaces, and how we do. Pure."""

from __future__ import annotations

from vmm.config import Net
from vmm.convert import KIB

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

REFUSED_BANDWIDTH = {
    "peak": "what a burst holds passes at once, at no rate of its own; leave peak out",
    "floor": "nothing is promised to a card, for each has its own limits and no link is shared out; leave floor out",
}
"""What libvirt has beside these, and why it is not here."""


def says_bandwidth(net: Net) -> bool:
    """Whether <bandwidth> can say a card's limits: an average each way that has a burst, all in whole KiB."""
    if any(getattr(net, name) % KIB for name in BANDWIDTH.values()):
        return False
    return (net.bps_in > 0 or not net.bps_in_burst) and (net.bps_out > 0 or not net.bps_out_burst)
