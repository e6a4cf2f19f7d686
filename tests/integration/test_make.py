"""`make run` where apt brings no kernel: it says so, and what it runs instead."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.command import ROOT

pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
    pytest.mark.skipif(not (ROOT / ".venv/bin/vmm").exists(), reason="the tests do not run in make's environment"),
]


def broken_apt(folder: Path) -> Path:
    """An apt configuration that knows no package."""
    (folder / "lists/partial").mkdir(parents=True)
    (folder / "parts").mkdir()
    settings = folder / "apt.conf"
    settings.write_text(
        f'Dir::State::lists "{folder}/lists";\nDir::Etc::SourceList "{folder}/none";\n'
        f'Dir::Etc::SourceParts "{folder}/parts";\n'
    )
    return settings


@pytest.mark.parametrize("apt", ["knows nothing", "is not there"])
def test_make_run_without_a_kernel(apt: str, tmp_path: Path) -> None:
    environment = {**os.environ, "LOOPVISOR_CACHE": str(tmp_path / "cache"), "XDG_RUNTIME_DIR": str(tmp_path)}
    if apt == "knows nothing":
        environment["APT_CONFIG"] = str(broken_apt(tmp_path / "apt"))
        reason = "vmm: apt-cache depends failed for linux-image-cloud-amd64: E: No packages found"
    else:
        (tmp_path / "bin").mkdir()
        for name in os.listdir("/usr/bin"):
            if not name.startswith(("apt", "dpkg")):
                (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
        environment["PATH"] = str(tmp_path / "bin")
        reason = "vmm: apt-cache is not on this machine; images are built from Debian packages"
    made = ["-o", "venv", "-o", ".venv/.installed"]  # not again
    done = subprocess.run(
        ["make", "-s", *made, "run"], cwd=ROOT, env=environment, input="typed\x04", capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("echo: type, Ctrl-D ends\ntyped")
    said = done.stderr.splitlines()
    assert any(line.startswith(reason) for line in said), done.stderr
    wanted = "the linux image cannot be had here, as said above: the tiny guest 'echo' runs instead (Ctrl-D ends it)"
    assert wanted in said
