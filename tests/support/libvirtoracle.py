"""libvirtd with its QEMU and test drivers, as the oracle of what virsh shows.

It runs in a mount namespace in which its directories are a temporary one's, needs no systemd, and runs QEMU without KVM
as the user that the tests are.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from tests.support.command import not_ignored

SETTINGS = {
    "libvirtd.conf": """auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_group = "root"
unix_sock_dir = "{path}/sock"
""",
    "qemu.conf": """security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
""",
}
PLACES = {"etc": "/etc/libvirt", "run": "/run/libvirt", "lib": "/var/lib/libvirt", "log": "/var/log/libvirt",
          "cache": "/var/cache/libvirt"}  # fmt: skip
DRIVER = Path("/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so")


def missing() -> str:
    """Why it cannot run here; empty if it can."""
    if os.getuid() != 0:
        return "libvirtd's own directories are covered by mounts, which only root makes"
    if shutil.which("libvirtd") is None or not DRIVER.exists():
        return "libvirtd and its QEMU driver are not installed (libvirt-daemon, libvirt-daemon-driver-qemu)"
    if shutil.which("qemu-system-x86_64") is None:
        return "QEMU is not installed (qemu-system-x86)"
    return ""


class Oracle:
    """One libvirtd; its machines are ended with it."""

    def __enter__(self) -> Self:
        self.path = Path(tempfile.mkdtemp(prefix="or"))
        for name in (*PLACES, "sock"):
            (self.path / name).mkdir()
        (self.path / "etc" / "qemu").mkdir()
        for name, text in SETTINGS.items():
            (self.path / "etc" / name).write_text(text.format(path=self.path))
        mounts = [f"mkdir -p {place} && mount --bind {self.path / name} {place}" for name, place in PLACES.items()]
        script = " && ".join(["mount --make-rprivate /", *mounts, "exec libvirtd -f /etc/libvirt/libvirtd.conf"])
        with (self.path / "output").open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=not_ignored,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while subprocess.run(["virsh", "-c", self.uri(), "version"], capture_output=True).returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = (self.path / "output").read_text()
                self.__exit__()
                raise RuntimeError(f"libvirtd does not start: {text[-2000:]}")
            time.sleep(0.1)
        return self

    def uri(self, driver: str = "qemu", path: str = "/system") -> str:
        return f"{driver}+unix://{path}?socket={self.path}/sock/libvirt-sock"

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        for file in (self.path / "run" / "qemu").glob("*.pid"):
            try:
                os.kill(int(file.read_text()), signal.SIGKILL)
            except (OSError, ValueError):
                pass
        shutil.rmtree(self.path, ignore_errors=True)
