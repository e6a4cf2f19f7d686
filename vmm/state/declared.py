"""Every declared state of the packages, for documentation and tests. Imports every module of cpu, virtio and vmm."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

PACKAGES = ("cpu", "virtio", "vmm")


def state_types() -> list[Any]:
    """Every state that components give now, by kind: dataclasses that declare a kind and a version. Previous versions,
    which are only read, are left out: the newest version's `previous` names them."""
    found: dict[tuple[str, str, str], Any] = {}
    for name in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
            if module.name.rpartition(".")[2].startswith("_") or module.name.endswith("pytest_plugin"):
                continue  # native modules declare none, and the plugin is pytest's to import
            for value in vars(importlib.import_module(module.name)).values():
                declared = isinstance(value, type) and dataclasses.is_dataclass(value)
                if declared and isinstance(value.__dict__.get("kind"), str) and hasattr(value, "version"):
                    found[value.kind, value.__module__, value.__name__] = value
    previous = {getattr(value, "previous", None) for value in found.values()}
    return [found[key] for key in sorted(found) if found[key] not in previous]
