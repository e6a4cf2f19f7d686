"""With LOOPVISOR_DIRECT=on or auto, guests of tests run their programs natively wherever nothing stands in the way, and
several vCPUs in parallel, also where the configuration does not ask for it.

tests/conftest.py imports this module, and so does Python itself, by its name, in the processes that tests start, whose
PYTHONPATH has its folder. It imports nothing of the package before others do.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

HOW = os.environ.get("LOOPVISOR_DIRECT", "")
MODULE = "vmm.machine.hardware"


def change(hardware: ModuleType) -> None:
    """Its machines ask for direct execution."""
    from vmm.config import Config

    runs_directly, start_direct, in_parallel = hardware.runs_directly, hardware.start_direct, Config.runs_in_parallel

    def asks(config: Any, system: Any) -> bool:
        return bool(runs_directly(config.replace(direct="auto") if config.direct == "off" else config, system))

    def start(vm: Any, memory: Any, *, always: bool) -> None:
        start_direct(vm, memory, always=always or HOW == "on")

    def parallel(config: Any) -> bool:
        return bool(in_parallel.fget(config) or in_parallel.fget(config.replace(parallel="auto")))

    hardware.runs_directly, hardware.start_direct = asks, start
    Config.runs_in_parallel = property(parallel)


class Finder(MetaPathFinder):
    """Changes the module when it is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        loader = spec.loader

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # pytest's loader serves other modules, too
            loader.exec_module(module)
            change(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if HOW and MODULE in sys.modules:
    change(sys.modules[MODULE])
elif HOW:
    sys.meta_path.insert(0, Finder())
