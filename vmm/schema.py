"""JSON Schema (draft 7) of the configuration file, for editors. Made from vmm/config.py's fields: their converters say
what is accepted, the strings below them say what they mean. Knows no particular option.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from vmm import convert
from vmm.config import Config
from vmm.convert import Checked, Converter

Schema = dict[str, Any]

_WHOLE = r"^[+-]?(0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|[0-9_]+)$"
_SIZE = r"^\s*[0-9]+\s*[kKmMgGtT]?([iI]?[bB])?\s*$"


def _text(**more: Any) -> Schema:
    return {"type": "string", **more}


def _integer(low: int, high: int) -> Schema:
    return {"anyOf": [{"type": "integer", "minimum": low, "maximum": high}, _text(pattern=_WHOLE)]}


def _size(low: int, high: int, multiple: int) -> Schema:
    number = {"type": "integer", "minimum": low, "maximum": high, "multipleOf": multiple}
    return {"anyOf": [number, _text(pattern=_SIZE)]}


def _boolean() -> Schema:
    words = "|".join("".join(f"[{letter}{letter.upper()}]" for letter in word) for word in convert.TRUE + convert.FALSE)
    return {"anyOf": [{"type": "boolean"}, _text(pattern=f"^({words})$")]}


def _part(kind: type[Checked]) -> Schema:
    syntax = inspect.getdoc(kind.parse)  # type: ignore[attr-defined]
    return {"anyOf": [_table(kind), _text(description=syntax)]}


_SCHEMAS: dict[Callable[..., Any], Callable[..., Schema]] = {
    convert.to_text: _text,
    convert.to_words: _text,
    convert.to_rules: _text,
    convert.to_servers: _text,
    convert.to_path: lambda: _text(minLength=1),
    convert.to_name: lambda: _text(pattern=f"^({convert.NAME.pattern})?$"),
    convert.to_mac: lambda: _text(pattern=f"^{convert.MAC.pattern}$"),
    convert.to_mount: lambda: _text(pattern=f"^({convert.MOUNT.pattern})?$"),
    convert.to_uuid: lambda: _text(pattern=f"^{convert.UUID.pattern}$"),
    convert.to_forwards: lambda: _text(pattern=rf"^({convert.FORWARD.pattern}(\+{convert.FORWARD.pattern})*)?$"),
    convert.to_boolean: _boolean,
    convert.to_seconds: lambda: {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, _text()]},
    convert.numbered: lambda low, high: {"anyOf": [{"type": "number", "minimum": low, "maximum": high}, _text()]},
    convert.in_range: _integer,
    convert.sized: _size,
    convert.one_of: lambda choices: {"enum": list(choices)},
    convert.part: _part,
    convert.parts: lambda kind: {"type": "array", "items": _part(kind)},
}


def _of(converter: Converter) -> Schema:
    what, arguments = convert.takes(converter)
    return _SCHEMAS[what](*arguments)


def descriptions(kind: type) -> dict[str, str]:
    """The strings below a class's fields, in one line each."""
    found = {}
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found


def _table(kind: type[Checked]) -> Schema:
    said = descriptions(kind)
    properties: Schema = {}
    required = []
    for field in fields(kind):  # type: ignore[arg-type]
        properties[field.name] = {"description": said[field.name], **_of(kind._converters[field.name])}
        if field.default is MISSING:
            required.append(field.name)
        elif isinstance(plain := convert.plain(field.default), str | int | float):
            properties[field.name]["default"] = plain
    table = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**table, "required": required} if required else table


def schema() -> Schema:
    """What `Config.load` accepts, except for rules between keys."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "loopvisor machine",
        "description": inspect.getdoc(Config),
        **_table(Config),
    }
