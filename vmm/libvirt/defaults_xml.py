"""What virt-install and virt-manager write into a definition unasked: a display, and what comes with one.

Such a definition has a display whose port the host chooses, a video card and a USB tablet, often a sound card and
SPICE's channels; and where the client does not know the guest's system, IDE disks and e1000 cards, which most systems
can drive. Nobody wished for these: they are taken, the guest gets what this machine has, and a note says what became of
each. One of these alone, or a display at a given address, is somebody's wish, and is refused by its name.
"""

from __future__ import annotations

from xml.etree.ElementTree import Element

from vmm.libvirt.errors import LibvirtError
from vmm.libvirt.xmltree import Reader, unsupported

OLD_BUSES = {"ide": "hd", "sata": "sd"}
"""And what disks on them are called."""
OLD_CARDS = ("e1000", "e1000e", "rtl8139")
LOCAL = (None, "127.0.0.1", "localhost", "::1")


def is_default(devices: Element) -> bool:
    """Whether a client wrote these devices unasked."""
    graphics = devices.findall("graphics")
    tablets = [item for item in devices.findall("input") if item.get("type") == "tablet"]
    return bool(graphics and tablets and devices.find("video/model") is not None) and all(map(_is_anywhere, graphics))


def _is_anywhere(graphics: Element) -> bool:
    """A display that no one has said where to find."""
    listens = [graphics, *graphics.findall("listen")]
    return (
        graphics.get("type") in ("spice", "vnc")
        and (graphics.get("port") == "-1" or graphics.get("autoport") == "yes")
        and graphics.get("passwd") is None
        and all(item.get("listen") in LOCAL and item.get("address") in LOCAL for item in listens)
    )


def take(item: Reader, default: bool, notes: list[str]) -> None:
    """A device for a display that is not there. Raises LibvirtError unless it is a client's default."""
    kind = item.element.get("type") or item.element.get("model") or ""
    if (model := item.element.find("model")) is not None:
        kind = kind or model.get("type") or ""
    if not default:
        raise no_display(item.element.tag, kind)
    item.take_all()
    notes.append(f"{item.element.tag} {kind}: this machine has no display; its console is text")


def no_display(tag: str, kind: str) -> LibvirtError:
    """For who wants one."""
    return unsupported(
        f"<{tag} {kind}>: this machine has no display; leave it out, as virt-install --graphics none does"
    )
