"""The schema of the configuration file accepts what Config accepts; every field of Config can be given in Python, in a
file and on the command line. Both tests are made from Config's fields, so a new field is tested by being there."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.options import RUN_OPTIONS, parse_run
from cli.run import configure
from tests.support.command import vmm
from vmm import convert
from vmm.config import (
    WIRE,
    Config,
    ConsoleConfig,
    Disk,
    FlatImage,
    FwCfgItem,
    GdbConfig,
    Net,
    PciSlot,
    PortConfig,
    RootDirectory,
    Share,
    Variable,
    limit_names,
)
from vmm.convert import Checked, format_size
from vmm.errors import ConfigError
from vmm.schema import descriptions, schema

SCHEMA = schema()
VALID = jsonschema.Draft7Validator(SCHEMA)

# What each kind of converter accepts, other than any default.
SAMPLES: dict[Any, Any] = {
    convert.to_rules: lambda: ["example.org+10.0.0.0/8:22"],
    convert.to_servers: lambda: ["10.0.0.53+[2001:db8::1]:5353"],
    convert.numbered: lambda low, high: [low, high / 2],
    convert.to_words: lambda: ["sh -c 'exit 3'"],
    convert.to_text: lambda: ["some text"],
    convert.to_path: lambda: ["/some/file"],
    convert.to_name: lambda: ["a-name"],
    convert.to_mac: lambda: ["52:54:00:12:34:56"],
    convert.to_mount: lambda: ["/mnt/x"],
    convert.to_uuid: lambda: ["0e7d2a52-0b3c-4a36-9f3c-6a5f1f0b8f60"],
    convert.to_forwards: lambda: ["8080:80+2222:22"],
    convert.to_boolean: lambda: [True, False],
    convert.to_seconds: lambda: [2.5],
    convert.in_range: lambda low, high: [low, high],
    convert.sized: lambda low, high, multiple: [low, low + multiple],
    convert.one_of: lambda choices: list(choices),
    convert.part: lambda kind: tables(kind),
    convert.parts: lambda kind: [[], *([table] for table in tables(kind))],
}
# The values that a sample needs beside itself, by rules between keys.
NEEDS: dict[tuple[type, str], dict[str, Any]] = {
    (Config, "initrd"): {"kernel": "/k"},
    (Net, "target"): {"kind": "unix"},
    **{(Net, name): {"kind": "switch", "target": "lan"} for name in WIRE},
    (Net, "queues"): {"kind": "tap", "target": "tap0"},
    (Config, "entrypoint"): {"agent": True}, (Config, "command"): {"agent": True},
    (Share, "gid"): {"uid": 7}, (RootDirectory, "gid"): {"uid": 7},
    (ConsoleConfig, "path"): {"kind": "socket"}, (Config, "hugepages"): {"memory": 64 << 20},
    **{(kind, name): {name.removesuffix("_burst"): 1}
       for kind in (Disk, Net) for name in limit_names(kind) if name.endswith("_burst")},
}
# How a part begins on the command line: what stands before the first comma.
HEADS: dict[type, Any] = {
    FlatImage: lambda part: str(part.pop("path")), Disk: lambda part: str(part.pop("path")),
    Net: lambda part: f"{part.pop('kind')}={part.pop('target', '')}".rstrip("="),
    ConsoleConfig: lambda part: f"{part.pop('kind', 'none')}={part.pop('path', '')}".rstrip("="),
    PortConfig: lambda part: f"{part.pop('name')}={part.pop('path')}",
    Variable: lambda part: f"{part.pop('name')}={part.pop('value', '')}",
    FwCfgItem: lambda part: f"name={part.pop('name')}",
    PciSlot: lambda part: f"{part.pop('id')}={part.pop('device')}",
    Share: lambda part: ":".join(filter(None, (str(part.pop("path")), part.pop("mount", None)))),
    RootDirectory: lambda part: str(part.pop("path")),
    GdbConfig: lambda part: part.pop("address"),
}  # fmt: skip


def samples(kind: type[Checked], name: str) -> list[Any]:
    what, arguments = convert.takes(kind._converters[name])
    found: list[Any] = SAMPLES[what](*arguments)
    return found


def tables(kind: type[Checked]) -> list[dict[str, Any]]:
    """Tables of a part that together give every field every sample, and are right as a whole."""
    needed: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.default is MISSING:
            needed[field.name] = samples(kind, field.name)[0]
    found = []
    for field in fields(kind):  # type: ignore[arg-type]
        for value in samples(kind, field.name):
            table = {**needed, **NEEDS.get((kind, field.name), {}), field.name: value}
            if kind is FwCfgItem and not table.keys() & {"file", "string"}:
                table["string"] = "some text"
            if (kind, table.get("kind")) == (ConsoleConfig, "socket"):
                table.setdefault("path", "/s")
            if kind is Net and table["kind"] != "user":
                table.setdefault("target", "t")
            found.append(table)
    return found


CASES = tables(Config)


def text(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def spell(kind: type[Checked], name: str, value: Any) -> list[str]:
    """A field of Config as words of a command line."""
    (option,) = [option for option in RUN_OPTIONS if option.field == name and option.of == "config"]
    what, arguments = convert.takes(kind._converters[name])
    if option.kind == "switch":
        return [option.flag if value else option.opposite]
    words = []
    for item in value if option.kind == "list" else [value]:
        if what in (convert.part, convert.parts):
            rest = dict(item)
            head = HEADS[arguments[0]](rest)
            item = ",".join([head, *(f"{key}={text(one)}" for key, one in rest.items())])
        words += [option.flag, text(item)]
    return words


@pytest.mark.parametrize("values", CASES, ids=lambda values: " ".join(f"{k}={v}" for k, v in values.items())[:60])
def test_every_field_in_python_in_a_file_and_on_the_command_line(values: dict[str, Any], tmp_path: Path) -> None:
    values = {"name": "n", "console": {"kind": "none"}, "kernel": "/k", **values}
    if "flat" in values:
        del values["kernel"]
    python = Config(**values)
    path = tmp_path / "machine.toml"
    path.write_text(python.to_toml())
    words = [word for name, value in values.items() for word in spell(Config, name, value)]
    parsed = parse_run(words)
    assert parsed is not None, words
    assert python == Config.load(path) == configure(parsed)
    VALID.validate(python.to_dict())
    VALID.validate(values)


@pytest.mark.parametrize(("name", "flag"), [("nets", "--net"), ("disks", "--disk"), ("ports", "--port")])
def test_none_takes_away_what_the_file_has(name: str, flag: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text('kernel = "/k"\nnets = ["user"]\ndisks = ["/d"]\nports = ["a=/p"]\n')
    for words, count in (([], 1), ([flag, "none"], 0)):
        parsed = parse_run(["--config", str(path), *words])
        assert parsed is not None
        assert len(getattr(configure(parsed), name)) == count


def test_every_field_is_described() -> None:
    for kind in (Config, Disk, Net, ConsoleConfig, PortConfig, FlatImage, FwCfgItem, Variable):
        assert set(descriptions(kind)) >= {field.name for field in fields(kind)}  # type: ignore[arg-type]


def test_a_printed_configuration_is_valid_and_the_schema_is_one(tmp_path: Path) -> None:
    import tomllib

    printed = vmm(tmp_path, "run", "--print-schema")
    described = json.loads(printed.stdout)
    assert described == SCHEMA
    jsonschema.Draft7Validator.check_schema(described)
    options = ["--disk", "/d,ro,id=root", "--net", "tap=tap0,pcap=/p", "--memory", "1G", "--no-rng", "--port", "a=/b"]
    config = vmm(tmp_path, "run", "--kernel", "/k", *options, "--print-config")
    jsonschema.validate(tomllib.loads(config.stdout), described)


@pytest.mark.parametrize(
    "values",
    [
        {"memroy": "1G"},
        {"disks": [{"path": "/d", "colour": "red"}]},
        {"console": {"kind": "stdio", "sound": "loud"}},
        {"cpus": 0},
        {"cpus": 1.5},
        {"memory": "lots"},
        {"memory": 4097},
        {"core": "xen"},
        {"nets": ["user", 7]},
        {"disks": [{"readonly": True}]},
        {"nets": [{"kind": "tap", "target": "t", "mac": "x"}]},
        {"rng": "perhaps"},
    ],
)
def test_mistakes_are_refused_by_schema_and_configuration(values: dict[str, Any]) -> None:
    assert not VALID.is_valid(values)
    with pytest.raises(ConfigError):
        Config.from_dict(values)


TEXT = st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=12)
VALUES = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT, st.lists(TEXT, max_size=2),
    st.sampled_from(["2", "0x10", "on", "OFF", "64M", "user", "/a,ro", "virtual", "52:54:00:00:00:01"]),
    st.integers(1, 64).map(lambda mib: format_size(mib << 20)),
    st.dictionaries(st.sampled_from(["path", "kind", "id", "load", "readonly", "log_limit", "x"]), TEXT, max_size=2),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([*(field.name for field in fields(Config)), "other"]), VALUES, max_size=4))
def test_the_schema_refuses_nothing_that_is_right(values: dict[str, Any]) -> None:
    try:
        Config.from_dict(values)
    except ConfigError:
        return
    VALID.validate(values)
