"""The configuration: the same from Python, TOML and the command line; every mistake is one line with the cure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.options import parse_run
from vmm.config import Config, ConsoleConfig, Disk, FlatImage, Net
from vmm.convert import format_size, parse_size
from vmm.errors import ConfigError
from vmm.schema import schema


def load(text: str, folder: Path) -> Config:
    path = folder / "machine.toml"
    path.write_text(text)
    return Config.load(path)


def test_python_toml_and_command_line_agree(tmp_path: Path) -> None:
    python = Config(
        name="web",
        cpus=2,
        memory=512 << 20,
        kernel=Path("/boot/vmlinuz"),
        disks=(Disk(path=Path("/srv/root.img"), id="root"), Disk(path=Path("/srv/cd.iso"), readonly=True)),
        nets=(Net(kind="tap", target="tap0", mac="52:54:00:00:00:01"),),
        console=ConsoleConfig(kind="socket", path=Path("/run/c.sock"), log=Path("/tmp/log"), log_limit=1 << 20),
        timeout=2.5,
        seed=7,
    )
    strings = Config.from_dict(
        {
            "name": "web",
            "cpus": "2",
            "memory": "512M",
            "kernel": "/boot/vmlinuz",
            "disks": ["/srv/root.img,id=root", "/srv/cd.iso,ro"],
            "nets": ["tap=tap0,mac=52:54:00:00:00:01"],
            "console": "socket=/run/c.sock,log=/tmp/log,log_limit=1M",
            "timeout": "2.5",
            "seed": "7",
        }
    )
    toml = """
        name = "web"
        cpus = 2
        memory = "512M"
        kernel = "/boot/vmlinuz"
        timeout = 2.5
        seed = 7
        nets = ["tap=tap0,mac=52:54:00:00:00:01"]
        [[disks]]
        path = "/srv/root.img"
        id = "root"
        [[disks]]
        path = "/srv/cd.iso"
        readonly = true
        [console]
        kind = "socket"
        path = "/run/c.sock"
        log = "/tmp/log"
        log_limit = "1M"
    """
    assert python == strings == load(toml, tmp_path)
    assert load(python.to_toml(), tmp_path) == python
    assert Config.from_dict(python.to_dict()) == python


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    config = load('kernel = "vmlinuz"\n[[disks]]\npath = "d.img"\n', tmp_path)
    assert config.kernel == tmp_path / "vmlinuz"
    assert config.disks[0].path == tmp_path / "d.img"


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


@given(cmdline=TEXT, name=st.from_regex(r"[a-z][a-z0-9_.-]{0,20}", fullmatch=True), memory=st.integers(256, 1 << 24))
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, cmdline: str, name: str, memory: int) -> None:
    config = Config(name=name, cmdline=cmdline, memory=memory * 4096, kernel=Path("/k"))
    assert load(config.to_toml(), tmp_path_factory.getbasetemp()) == config


@given(st.integers(0, 1 << 50))
def test_sizes_round_trip(size: int) -> None:
    assert parse_size("size", format_size(size)) == size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memroy": "1G"}, "unknown key 'memroy'; known are "),
        ({"memory": "lots"}, "memory: 'lots' is not a size; write for instance 256M or 2G"),
        ({"memory": "256"}, "memory: 256 is less than 1M; write 256M for MiB"),
        ({"memory": "1000001K"}, "memory: 1000001K is not a multiple of 4K"),
        ({"memory": True}, "memory: True is not a size"),
        ({"cpus": 0}, "cpus: 0 is outside 1 to 64"),
        ({"cpus": "many"}, "cpus: 'many' is not a whole number"),
        ({"core": "xen"}, "core: 'xen' is none of auto, kvm, soft"),
        ({"name": "a/b"}, "name: 'a/b' is no name"),
        ({"timeout": 0}, "timeout: 0 seconds is not a time limit"),
        ({"timeout": "nan"}, "timeout: nan seconds is not a time limit"),
        ({"disks": ["/d,rw,frobnicate"]}, "disk: 'frobnicate' in '/d,rw,frobnicate' is not understood"),
        ({"disks": ["/d,colour=red"]}, "disk: unknown key 'colour'"),
        ({"disks": "/d"}, "disks: '/d' is not a list"),
        ({"disks": ["/a,id=x", "/b,id=x"]}, "id: 'x' is given to two devices"),
        ({"nets": ["tap"]}, "net: tap needs a target; write tap="),
        ({"nets": ["user=1"]}, "net: user networking takes no target"),
        ({"nets": ["tap=averyveryverylongname"]}, "net: 'averyveryverylongname' is longer than the 15 bytes"),
        ({"nets": ["user,mac=01:00:00:00:00:00"]}, "net.mac: '01:00:00:00:00:00' is no unicast MAC address"),
        ({"console": "socket"}, "console: a path belongs to kind socket"),
        ({"console": "window"}, "console.kind: 'window' is none of stdio, socket, none"),
        ({"kernel": "/k", "flat": "/f"}, "flat and kernel exclude each other"),
        ({"initrd": "/i"}, "initrd: without a kernel"),
        ({"kernel": "/k", "cmdline": "x" * 3000}, "cmdline: 3001 bytes; a kernel takes 2047"),
        ({"kernel": "/k", "cmdline": "a\0b"}, "cmdline: a zero byte is not allowed"),
        ({"flat": "/f,mode=virtual"}, "flat.mode: 'virtual' is none of real, protected, long"),
    ],
)
def test_mistakes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_dict(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@given(st.dictionaries(st.sampled_from(sorted(Config.__dataclass_fields__)), st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.lists(TEXT, max_size=2),
    st.dictionaries(TEXT, TEXT, max_size=2),
), max_size=4))
def test_any_input_is_accepted_or_a_config_error(values: dict[str, Any]) -> None:
    try:
        config = Config.from_dict(values)
    except ConfigError:
        return
    assert Config.from_dict(config.to_dict()) == config


def test_host_checks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kernel: .*/none: no such file or directory"):
        Config(kernel=tmp_path / "none").check_host()
    with pytest.raises(ConfigError, match=r"disk: .*: is a directory"):
        Config(disks=(Disk(path=tmp_path),)).check_host()
    with pytest.raises(ConfigError, match=r"memory: 3T is more than this host's \d+M; ask for less"):
        Config(memory=3 << 40).check_host()


def test_a_path_that_no_file_can_hold() -> None:
    """It can be run, and not written down."""
    config = Config(kernel="/k\udcff")
    assert os.fsencode(config.kernel or "") == b"/k\xff"
    with pytest.raises(ConfigError, match=r"'/k\\udcff' is not UTF-8, which a file must be"):
        config.to_toml()


def test_not_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"machine.toml: not TOML: "):
        load("= = =", tmp_path)
    with pytest.raises(ConfigError, match=r"absent.toml: no such file"):
        Config.load(tmp_path / "absent.toml")


def test_flat_image_from_text() -> None:
    assert Config(flat="/b,load=0x100000,mode=long").flat == FlatImage(  # type: ignore[arg-type]
        path=Path("/b"), load=0x100000, mode="long"
    )


def test_a_tilde_and_no_user_is_a_name() -> None:
    assert Config(kernel="~no-such-user/k").kernel == Path("~no-such-user/k")


def test_packed_rings_are_asked_for_by_disk_by_net_and_by_machine(tmp_path: Path) -> None:
    config = Config(disks=("a,packed", "b"), nets=("user,packed", "user"), packed=True)
    assert [disk.packed for disk in config.disks] == [True, False]
    assert [net.packed for net in config.nets] == [True, False]
    (tmp_path / "machine.toml").write_text(config.to_toml())
    assert Config.load(tmp_path / "machine.toml").packed
    assert parse_run(["--packed"]).config == {"packed": True}  # type: ignore[union-attr]
    assert parse_run(["--no-packed"]).config == {"packed": False}  # type: ignore[union-attr]
    properties = schema()["properties"]
    assert "boolean" in str(properties["packed"])
    assert "packed" in str(properties["disks"]) and "packed" in str(properties["nets"])
