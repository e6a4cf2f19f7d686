"""A guest's TCP connections through user networking after a restore and in a copy: real passt, Debian's kernel. Each of
them hears a reset; new ones work, and the original's go on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmm
from tests.support import netns, passt
from tests.support.debian import PATIENCE
from tests.support.netns import Namespace
from vmm.config import Net

SECONDS = 60.0 * PATIENCE
NEAR, FAR = ("10.214.8.1", "fd00:214:8::1"), ("10.214.8.3", "fd00:214:8::3")
"""passt's own host and one beyond it, of both versions of IP."""


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    """A host beyond passt's; passt is the first in PATH, and runs in a namespace of its own."""
    passt.need()
    netns.need("passt", "socat")
    program = shutil.which("passt")
    with netns.namespaces("passt", "far") as (near, beyond):
        netns.cable(near, beyond)
        for space, pair, gateway in ((near, NEAR, "2"), (beyond, FAR, "")):
            space.ip("addr", "add", f"{pair[0]}/24", "dev", "eth0")
            space.ip("-6", "addr", "add", f"{pair[1]}/64", "dev", "eth0", "nodad")
            if gateway:
                space.ip("route", "add", "default", "via", "10.214.8.2")
                space.ip("-6", "route", "add", "default", "via", "fd00:214:8::2")
        for address, flag in (("10.214.8.2/24", ""), ("fd00:214:8::2/64", "nodad")):
            beyond.ip("addr", "add", address, "dev", "eth0", *filter(None, [flag]))
        wrapper = tmp_path / "bin" / "passt"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {" ".join(near.command(str(program)))} "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)
        yield beyond


async def sh(vm: vmm.VirtualMachine, script: str) -> str:
    return (await vm.exec("sh", "-c", script, timeout=SECONDS, check=True)).text


OWN_IPV6 = "until ip -6 addr show eth0 | grep global | grep -qv tentative; do sleep 0.1; done"
"""Waits for an address that may be used: a guest whose link came back looks first whether another host has it. A
connection begun before comes from its link-local address, from which passt passes nothing on."""
OPEN = (
    "mkfifo /tmp/in.{name}; (sleep 100000 >/tmp/in.{name} &) ;"
    "(nc {how} </tmp/in.{name} >/tmp/out.{name} 2>&1; echo $? >/tmp/end.{name}) >/dev/null 2>&1 &"
)
"""A connection whose program sends nothing by itself; what it hears is in out.NAME, and end.NAME says that it ended."""


async def arrives(vm: vmm.VirtualMachine, path: str) -> None:
    await sh(vm, f"until [ -s {path} ]; do sleep 0.05; done")


@pytest.mark.root
async def test_every_connection_hears_of_its_end(stock_core: str, far: Namespace, tmp_path: Path) -> None:
    """One silent, one that sends; begun by the guest and by others; IPv4 and IPv6. In a copy, while the original's go
    on, and after a restore."""
    await far.listen(7000, "socat", "TCP6-LISTEN:7000,ipv6only=0,fork,reuseaddr", "SYSTEM:echo hello; cat")
    net = Net(kind="user", forward="7001:7001")
    async with vmm.run("linux", core=stock_core, nets=(net,), timeout=SECONDS) as vm:
        await sh(vm, "until ip route | grep -q default; do sleep 0.1; done")
        await sh(vm, OWN_IPV6)
        for name, address in (("four", FAR[0]), ("six", FAR[1])):
            await sh(vm, OPEN.format(name=name, how=f"{address} 7000"))
            await arrives(vm, f"/tmp/out.{name}")
        await sh(vm, OPEN.format(name="inward", how="-l -p 7001"))
        await sh(vm, "until netstat -ltn | grep -q :7001; do sleep 0.05; done")
        far.start("sh", "-c", f"echo hi | socat STDIO,ignoreeof TCP:{NEAR[0]}:7001")
        await arrives(vm, "/tmp/out.inward")
        (copy,) = await vm.fork()
        for name in ("four", "six", "inward"):
            await arrives(copy, f"/tmp/end.{name}")
        await sh(copy, OPEN.format(name="fresh", how=f"{FAR[0]} 7000"))
        await arrives(copy, "/tmp/out.fresh")
        await copy.aclose()
        for name in ("four", "six"):
            await sh(vm, f"echo again >/tmp/in.{name}; until grep -q again /tmp/out.{name}; do sleep 0.05; done")
        assert (await sh(vm, "ls /tmp/end.* 2>/dev/null | wc -l")).strip() == "0"
        await vm.snapshot(tmp_path / "saved")
    async with vmm.restore(tmp_path / "saved", timeout=SECONDS) as vm:
        for name in ("four", "six", "inward"):
            await arrives(vm, f"/tmp/end.{name}")
        await sh(vm, OWN_IPV6)
        await sh(vm, OPEN.format(name="fresh", how=f"{FAR[1]} 7000"))
        await arrives(vm, "/tmp/out.fresh")
