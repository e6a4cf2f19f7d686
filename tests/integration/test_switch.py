"""Machines on one private switch, as Debian's kernel sees it: in one program, between processes, and of copies."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import vmm
from tests.support import linuximage
from tests.support.debian import PATIENCE

pytestmark = [pytest.mark.debian]
SECONDS = 240 * PATIENCE
sh = functools.partial(linuximage.sh, seconds=SECONDS)
SETTLE = (
    "for i in $(seq 100); do pidof udhcpc >/dev/null && break; sleep 0.1; done; "
    "while pidof udhcpc >/dev/null; do killall -9 udhcpc; sleep 0.1; done; "
    "ip addr flush dev eth0; ip addr add {}/24 dev eth0; ip link set eth0 up"
)
"""Take this address; the image asks for one by itself, and nobody answers here."""
LISTENS = "until grep -q ':0050 [0-9A-F:]* 0A' /proc/net/tcp /proc/net/tcp6; do sleep 0.05; done"


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    linuximage.need()


async def test_two_guests_and_a_copy(stock_core: str, tmp_path: Path) -> None:
    """ping and a transfer, over a wire that loses frames too; a copy has an address of its own on the same switch."""
    async with AsyncExitStack() as stack:
        lan = await stack.enter_async_context(vmm.Switch("lan"))
        nets = ["switch=lan", "switch=lan,delay=0.002,loss=0.02,duplicate=0.02,reorder=0.02,seed=5"]
        running = [vmm.run("linux", core=stock_core, nets=[net], timeout=SECONDS) for net in nets]
        one, two = [await stack.enter_async_context(vm) for vm in running]
        await asyncio.gather(sh(one, SETTLE.format("10.0.0.1")), sh(two, SETTLE.format("10.0.0.2")))
        assert lan.ports == 2
        await sh(one, "until ping -c 1 -W 2 10.0.0.2; do :; done")
        body = os.urandom(1 << 20)
        (tmp_path / "body").write_bytes(body)
        await sh(one, "mkdir -p /tmp/www")
        await one.copy_in(tmp_path / "body", "/tmp/www/body")
        await sh(one, f"httpd -p 80 -h /tmp/www; {LISTENS}")
        found = await sh(two, "wget -q -O - http://10.0.0.1/body | md5sum")
        assert found.split()[0] == hashlib.md5(body).hexdigest()
        lan.cut()
        await sh(two, "ping -c 1 -W 1 10.0.0.1; [ $? -ne 0 ]")
        lan.cut(False)
        (copy,) = await one.fork()
        stack.push_async_callback(copy.aclose)
        await sh(copy, "ip addr flush dev eth0; ip addr add 10.0.0.3/24 dev eth0; ip link set eth0 up")
        assert lan.ports == 3
        addresses = [await sh(vm, "cat /sys/class/net/eth0/address") for vm in (one, two, copy)]
        assert len(set(addresses)) == 3, addresses
        await sh(two, "until ping -c 1 -W 2 10.0.0.3; do :; done; until ping -c 1 -W 2 10.0.0.1; do :; done")
        await sh(copy, "until ping -c 1 -W 2 10.0.0.1; do :; done")


async def test_two_terminals(stock_core: str, tmp_path: Path) -> None:
    """`vmm run --net switch=lan` twice: the first one begins the switch, and its end does not end it."""
    vmm_run = [sys.executable, "-c", "from cli.main import main; main()", "run", "linux", "--net", "switch=lan"]
    command = [*vmm_run, "--core", stock_core, "--", "sh", "-c"]
    serve = f"{SETTLE.format('10.0.0.1')}; echo hello >/tmp/index.html; httpd -f -p 80 -h /tmp"
    ask = f"{SETTLE.format('10.0.0.2')}; until timeout 5 wget -q -O - http://10.0.0.1/index.html; do sleep 0.2; done"
    first = await asyncio.create_subprocess_exec(*command, serve, stdout=asyncio.subprocess.DEVNULL)
    try:
        for _ in range(2):
            second = await asyncio.create_subprocess_exec(*command, ask, stdout=asyncio.subprocess.PIPE)
            async with asyncio.timeout(SECONDS):
                output, _ = await second.communicate()
            assert (output.split()[-1:], second.returncode) == ([b"hello"], 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            first.send_signal(signal.SIGTERM)
        await first.wait()
        for path in tmp_path.rglob("lan.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGTERM)
