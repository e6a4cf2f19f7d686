"""Shared directories in real Linux guests: file work, changes, saved and copied machines, a root over a share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support.command import VMM, environment
from vmm.config import Config, Share
from vmm.errors import ConfigError, StateError

OPTIONS: dict[str, Any] = {"nets": [], "memory": "128M"}


async def text(vm: vmm.VirtualMachine, script: str) -> str:
    result = await vm.exec("sh", "-c", script, timeout=100, check=True)
    return result.text


def shared(path: Path, **options: Any) -> dict[str, Any]:
    return {**OPTIONS, "shares": [Share(path=path, mount="/work", **options)]}


WORK = """
set -e
cd /work
mkdir -p a/b; echo text >a/b/file; ln a/b/file a/hard; ln -s b/file a/soft
[ "$(cat a/soft)" = text ]; [ "$(stat -c %h a/b/file)" = 2 ]
chmod 4711 a/b/file; [ "$(stat -c %a a/hard)" = 4711 ]
mv a/hard a/moved; rm a/b/file; [ "$(cat a/moved)" = text ]
dd if=/dev/urandom of=random bs=64k count=32 2>/dev/null
cp random copy; cmp random copy; sum=$(sha256sum <random)
exec 3<random; rm random; [ "$(sha256sum <&3)" = "$sum" ]; exec 3<&-
dd if=/dev/zero of=sparse bs=1 count=1 seek=1099511627775 2>/dev/null
[ "$(stat -c %s sparse)" = 1099511627776 ]; [ "$(stat -c %b sparse)" -lt 100 ]; rm sparse
truncate -s 5000 copy; [ "$(stat -c %s copy)" = 5000 ]
echo 1 >>log; echo 2 >>log; [ "$(cat log | tr '\\n' ' ')" = "1 2 " ]
touch -d '2001-02-03 04:05:06' log; [ "$(stat -c %Y log)" = 981173106 ]
mkfifo pipe; (echo through >pipe) & [ "$(cat pipe)" = through ]; wait; rm pipe
for i in $(seq 1 300); do : >"n$i"; done; [ "$(ls | grep -c '^n')" = 300 ]; rm n*
! mkdir a/b/c/d 2>/dev/null; ! rmdir a 2>/dev/null; rmdir a/b
tar cf - a | tar xf - -C /tmp; [ -f /tmp/a/moved ]
sync
"""


async def test_file_work(linux: Any, tmp_path: Path) -> None:
    async with vmm.run("linux", **shared(tmp_path)) as vm:
        await text(vm, WORK)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "copy", "log"]
        assert os.readlink(tmp_path / "a/soft") == "b/file"
        # What the host changes is seen within the stated second.
        (tmp_path / "from-host").write_text("1")
        assert await text(vm, "cat /work/from-host") == "1"
        (tmp_path / "from-host").write_text("22")
        (tmp_path / "log").unlink()
        await text(vm, 'while [ -e /work/log ] || [ "$(cat /work/from-host)" != 22 ]; do sleep 0.1; done')
        device = vm.device("share0")
        assert device.counters["requests"] > 300 and device.counters["bytes_written"] > 2 << 20
        assert "WARN" not in await text(vm, "dmesg")


async def test_the_guest_cannot_leave(linux: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/up").symlink_to("..")
    (tmp_path / "work/abs").symlink_to(tmp_path / "secret")
    async with vmm.run("linux", **shared(tmp_path / "work", readonly=True)) as vm:
        assert (await vm.exec("cat", "/work/up/secret")).status
        assert (await vm.exec("cat", "/work/abs")).status
        assert await text(vm, "ls /work") == "abs\nup"
        refused = await vm.exec("touch", "/work/new")
        assert refused.status and b"Read-only" in refused.stderr
        assert (await vm.exec("mknod", "/work/device", "c", "1", "3")).status


async def test_a_program_goes_on_with_its_files_where_it_is_restored(linux: Any, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    async with vmm.run("linux", **shared(tmp_path / "work")) as vm:
        count = "exec 3>>/work/count; n=0; while :; do echo $n >&3; n=$((n+1)); sleep 0.02; done"
        await text(vm, f"sh -c '{count}' >/dev/null 2>&1 & sleep 0.5")
        await vm.snapshot(tmp_path / "saved")
    before = len((tmp_path / "work/count").read_text().splitlines())
    assert before
    async with vmm.restore(tmp_path / "saved") as vm:
        await text(vm, f"while [ $(wc -l </work/count) -le {before} ]; do sleep 0.05; done")
        assert await text(vm, "echo new >/work/new; cat /work/new") == "new"
    shutil.move(tmp_path / "work", tmp_path / "elsewhere")
    with pytest.raises((StateError, ConfigError, vmm.HostError), match="work"):
        async with vmm.restore(tmp_path / "saved"):
            pass


async def test_copies_of_a_machine_share_the_directory(linux: Any, tmp_path: Path) -> None:
    async with vmm.run("linux", **shared(tmp_path)) as vm:
        await text(vm, "echo parent >/work/parent")
        copies = await vm.fork(2)
        try:
            for number, copy in enumerate(copies):
                assert await text(copy, f"echo {number} >/work/copy{number}; cat /work/parent") == "parent"
            assert await text(vm, "sleep 1.2; cat /work/copy0 /work/copy1") == "0\n1"
        finally:
            for copy in copies:
                await copy.aclose()


def test_a_directory_as_root_file_system(linux: Any, tmp_path: Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox-static is not installed")
    for name in ("bin", "dev", "proc", "sys", "root"):
        (tmp_path / name).mkdir()
    shutil.copy(busybox, tmp_path / "bin/busybox")
    (tmp_path / "bin/sh").symlink_to("busybox")
    (tmp_path / "init.sh").write_text("#!/bin/sh\n/bin/busybox mount >/root/mounts\n/bin/busybox poweroff -f\n")
    (tmp_path / "init.sh").chmod(0o755)
    command = [*VMM, "run", "linux", "--root", str(tmp_path), "--append", "init=/init.sh", "--no-agent"]
    settings = environment(tmp_path)
    done = subprocess.run(command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"root on / type virtiofs (rw" in (tmp_path / "root/mounts").read_bytes()


def test_the_configuration_is_checked(tmp_path: Path) -> None:
    share = Share.parse(f"{tmp_path}:/mnt/x,ro,uid=1000,cache=always,id=src")
    assert (share.path, share.mount, share.readonly, share.uid, share.id) == (tmp_path, "/mnt/x", True, 1000, "src")
    assert Share.parse(f"{tmp_path}").mount == ""
    config = Config.from_dict(
        {"kernel": "/k", "shares": [f"{tmp_path}:/a", f"{tmp_path}:/b"], "root": f"{tmp_path},ro"}
    )
    assert [one.id for one in config.all_shares] == ["root", "share0", "share1"]
    assert config.share_words.endswith("loopvisor.share.share1=/b root=root rootfstype=virtiofs ro")
    assert (
        Config.from_dict(config.to_dict()) == config
        and Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    )
    for text, what in (
        (f"{tmp_path}:/a b", "plain characters"),
        (f"{tmp_path}:/../x", "absolute path"),
        (f"{tmp_path}:/{'x' * 255}", "at most 255"),
        (f"{tmp_path},gid=5", "gid needs uid"),
        (f"{tmp_path},cache=maybe", "cache"),
    ):
        with pytest.raises(ConfigError, match=what):
            Share.parse(text)
    with pytest.raises(ConfigError, match="two devices"):
        Config.from_dict({"shares": [f"{tmp_path},id=x", f"{tmp_path},id=x"]})
    with pytest.raises(ConfigError, match="no such file"):
        Config.from_dict({"shares": [f"{tmp_path}/missing"]}).check_host()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no directory"):
        Config.from_dict({"shares": [f"{tmp_path}/file"]}).check_host()
