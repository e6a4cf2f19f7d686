"""Post-copy by a user without any rights, on a host that lets such a one answer no page faults of the kernel
(vm.unprivileged_userfaultfd=0): the software core needs none; KVM is refused with the ways out, each of which works."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import ROOT
from vmm import _native

NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set", "-all")
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
DEVICES = {"kvm": "c 10 232", "userfaultfd": "c 10 257"}
SCRIPT = """
import asyncio, json, os, sys, vmm
from vmm.errors import VmmError
from vmm.migration.target import Receiver

async def main(core, where):
    async with vmm.run("echo", memory="32M", platform="pc", core=core) as vm:
        await vm.console.expect(rb"Ctrl-D ends\\n", timeout=60)
        content = os.urandom(1 << 20) * 8
        with memoryview(vm.machine.memory.regions()[0][1]) as memory:
            memory[16 << 20 : 24 << 20] = content
        async with Receiver("unix:" + where, name="", core=core) as receiver:
            try:
                await vm.migrate(receiver.uri, postcopy="now")
            except VmmError as error:
                await vm.console.write("here")
                await vm.console.expect(b"here", timeout=60)
                return {"refused": str(error), "state": vm.state.value}
            new = await receiver.arrive()
        await new.console.write("moved")
        await new.console.expect(b"moved", timeout=60)
        same = new.machine.memory.regions()[0][1][16 << 20 : 24 << 20] == content
        await new.aclose()
        return {"core": new.core, "same": same}

print(json.dumps({"uid": os.getuid(), **asyncio.run(main(*sys.argv[1:]))}))
"""


def as_nobody(home: Path, core: str, *devices: str) -> dict[str, object]:
    """What the script says as nobody, who may use these devices."""
    if SYSCTL.exists() and SYSCTL.read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd allows everybody everything")
    setup = "set -e; mount -t tmpfs none /mnt; "
    for name in devices:
        setup += f"mknod -m 666 /mnt/{name} {DEVICES[name]}; mount --bind /mnt/{name} /dev/{name}; "
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", setup + 'exec "$@"', "sh", *NOBODY, sys.executable, "-c", SCRIPT, core,
         home / "s"],
        env={"HOME": str(home), "XDG_RUNTIME_DIR": str(home), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    if "Permission denied" in done.stderr and "Traceback" not in done.stderr:
        pytest.skip(f"nobody may not run this Python: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    assert found.pop("uid") == 65534
    return found


pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed"),
    pytest.mark.skipif(not _native.can_page(True), reason="the host has no userfaultfd for this process"),
]


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of nobody's, where nobody can go: pytest's are root's."""
    with tempfile.TemporaryDirectory(prefix="lv", dir="/tmp") as name:
        shutil.chown(name, 65534, 65534)
        yield Path(name)


def test_the_software_core_needs_no_rights(home: Path) -> None:
    assert as_nobody(home, "soft") == {"core": "soft", "same": True}


@pytest.mark.kvm
def test_kvm_is_refused_with_the_ways_out(home: Path) -> None:
    refused = as_nobody(home, "kvm", "kvm")
    assert refused["state"] == "running"
    text = str(refused["refused"])
    assert "\n" not in text
    assert all(way in text for way in ("/dev/userfaultfd", "vm.unprivileged_userfaultfd=1", "--core soft")), text


@pytest.mark.kvm
@pytest.mark.skipif(not Path("/dev/userfaultfd").exists(), reason="the kernel has no /dev/userfaultfd")
def test_kvm_with_access_to_the_device(home: Path) -> None:
    assert as_nobody(home, "kvm", "kvm", "userfaultfd") == {"core": "kvm", "same": True}
