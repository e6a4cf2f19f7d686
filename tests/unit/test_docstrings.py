"""What the API reference shows says what it is: every public name of its modules, and every method of their classes."""

from __future__ import annotations

import importlib
import inspect
import runpy
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vmm.config
from vmm.convert import Checked

MODULES = runpy.run_path(str(Path(__file__).resolve().parents[2] / "docs" / "api.py"))["MODULES"]

OURS = ("vmm", "virtio", "cpu", "images")


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """(name, value) of what a module offers: its __all__, or the classes and functions that are made in it."""
    for name in getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]:
        value = getattr(module, name)
        ours = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.split(".")[0] in OURS
        if ours and (hasattr(module, "__all__") or value.__module__ == module.__name__):
            yield name, value


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """(name, function) of the public methods and properties that a class defines itself."""
    for name, value in vars(kind).items():
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod)):
            yield name, getattr(kind, name) if not isinstance(value, property) else value


def undocumented(module: ModuleType) -> list[str]:
    missing = [] if inspect.getdoc(module) else [module.__name__]
    for name, value in public(module):
        where = f"{module.__name__}.{name}"
        if not inspect.getdoc(value) or (inspect.isclass(value) and not value.__doc__):
            missing.append(where)
        if inspect.isclass(value):
            # A method that does what its base says needs no words of its own; getdoc() finds the base's.
            missing += [f"{where}.{method}" for method, function in methods(value) if not inspect.getdoc(function)]
    return missing


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_described(name: str) -> None:
    assert undocumented(importlib.import_module(name)) == []


def test_every_name_of_vmm_is_in_the_reference() -> None:
    for name in vmm.__all__:
        assert inspect.getdoc(getattr(vmm, name)) or name == "Event", name
        home = getattr(getattr(vmm, name), "__module__", "vmm.events")
        assert home in MODULES or home == "types", f"{name} of {home} is not in docs/api.py"


@pytest.mark.parametrize("part", Checked.__subclasses__(), ids=lambda part: part.__name__)
def test_every_option_is_in_the_reference_with_its_default_and_meaning(part: type[Checked]) -> None:
    doc = pytest.importorskip("pdoc.doc")
    page = doc.Module(importlib.import_module(part.__module__)).get(part.__name__)
    for field in fields(part):  # type: ignore[arg-type]
        shown = page.get(field.name)
        assert shown is not None and shown.docstring, field.name
        assert shown.annotation_str.startswith(": "), field.name
        assert shown.default_value_str == ("" if field.default is MISSING else repr(field.default)), field.name
