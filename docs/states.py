"""The table of states in docs/state.md, made from the declarations: `python docs/states.py` writes it there.

tests/unit/test_state_docs.py holds the two equal.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- states -->\n", "<!-- end of states -->\n"
PAGE = Path(__file__).resolve().parent / "state.md"


def state_types() -> list[Any]:
    """Every dataclass of the packages that declares a kind, by kind."""
    found: dict[str, Any] = {}
    for name in ("cpu", "virtio", "vmm"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if module.name.rpartition(".")[2].startswith("_") or module.name.endswith("pytest_plugin"):
                continue
            for value in vars(importlib.import_module(module.name)).values():
                declared = isinstance(value, type) and dataclasses.is_dataclass(value)
                if declared and isinstance(value.__dict__.get("kind"), str) and hasattr(value, "version"):
                    found[value.kind] = value
    return [found[kind] for kind in sorted(found)]


def table() -> str:
    """The table's text."""
    from vmm.state.payload import describe

    lines = ["| kind | version | declared in | fields |", "|---|---|---|---|"]
    for state_type in state_types():
        fields = "; ".join(f"`{field}`: {text}" for field, text in describe(state_type)) or "none"
        where = state_type.__module__.replace(".", "/")
        lines.append(f"| {state_type.kind} | {state_type.version} | `{where}` | {fields.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/state.md as it should be."""
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page())
