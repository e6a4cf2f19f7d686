"""The API reference, made from docstrings: `python docs/api.py [FOLDER]` (default build/docs). Warnings are errors."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

MODULES = (
    "vmm",
    "vmm.vm",
    "vmm.image",
    "vmm.launch",
    "vmm.sandboxes.box",
    "vmm.migration.target",
    "vmm.network.switch",
    "vmm.migration.source",
    "vmm.migration.precopy",
    "vmm.config",
    "vmm.changes",
    "vmm.console.hub",
    "vmm.debug.server",
    "vmm.guest.agent",
    "vmm.guest.process",
    "vmm.events",
    "vmm.lifecycle",
    "vmm.machine.bus",
    "vmm.machine.peripheral",
    "vmm.timeline",
    "vmm.timelineview",
    "vmm.disks",
    "vmm.live",
    "vmm.hotplug",
    "vmm.errors",
    "vmm.management.registry",
    "vmm.management.control",
    "vmm.pytest_plugin",
    "vmm.machine.interfaces",
    "virtio.device",
    "virtio.queue",
    "virtio.chain",
    "virtio.errors",
    "virtio.protocols",
    "virtio.backends.block",
    "virtio.backends.char",
    "virtio.backends.image",
    "virtio.backends.live",
    "virtio.backends.mirror",
    "virtio.backends.net",
    "virtio.backends.rules",
    "virtio.backends.vsock",
    "virtio.devices.balloon",
    "virtio.devices.blk",
    "virtio.devices.console",
    "virtio.devices.fs",
    "virtio.devices.net",
    "virtio.devices.rng",
    "virtio.devices.vsock",
    "cpu.contract",
    "cpu.exits",
    "cpu.errors",
    "cpu.scripted",
    "images.builder",
    "images.built",
    "images.catalog",
    "images.errors",
)
"""What embedding programs and writers of devices, cores and image providers use."""


def main() -> None:
    """Write one page for each module, and an index with a search."""
    import pdoc

    import vmm

    vars(vmm).update({name: getattr(vmm, name) for name in vmm.__all__})  # they are imported when first used
    warnings.simplefilter("error")
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")
    pdoc.render.configure(docformat="markdown", footer_text="loopvisor", search=True)
    pdoc.pdoc(*MODULES, output_directory=target)
    sys.stdout.write(f"{target}/index.html\n")


if __name__ == "__main__":
    main()
