"""`python -m tests.rig [PYTEST ARGUMENT...]`: run tests in the rig; by default all that are marked `kvm`.

Exits with pytest's status; 125 if the guest did not come that far, 124 if it took longer than --timeout.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from images.errors import ImageError
from tests.rig.guest import Guest, build

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ["-m", "kvm and not qemu and not root", "tests"]
OPTIONS = ["-o", "faulthandler_timeout=300", "-o", "cache_dir=/dev/shm/pytest"]  # the checkout is read-only there
NO_RESULT, TIMED_OUT = 125, 124


def qemu(guest: Guest, command: str, status: Path, memory_mib: int) -> list[str]:
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise ImageError("qemu-system-x86_64 is missing; as root: apt-get install qemu-system-x86")
    return [
        program, "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", str(memory_mib), "-M", "pc",
        "-nodefaults", "-display", "none", "-no-reboot", "-kernel", str(guest.kernel), "-initrd", str(guest.initrd),
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog",
        "-serial", "stdio", "-serial", f"file:{status}",
        "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
        "-fw_cfg", f"name=opt/rig/command,string={command.replace(',', ',,')}",
    ]  # fmt: skip


def run(guest: Guest, command: str, timeout: float, memory_mib: int) -> int:
    """Run a shell command in the guest, its output on stdout; its status."""
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder) / "status"
        try:
            started = qemu(guest, command, status, memory_mib)
            subprocess.run(started, stdin=subprocess.DEVNULL, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            print(f"rig: stopped after {timeout:.0f} s", file=sys.stderr)
            return TIMED_OUT
        words = status.read_text().split() if status.exists() else []
        return int(words[1]) if len(words) == 2 and words[0] == "status" else NO_RESULT


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rig", description="run KVM-marked tests on kvm-amd")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=3072, help="the guest's RAM in MiB (default: %(default)s)")
    parser.add_argument("--shell", metavar="COMMAND", help="run this instead of pytest")
    arguments, rest = parser.parse_known_args()
    begin = time.monotonic()
    try:
        guest = build()
        pytest = [sys.executable, "-u", "-m", "pytest", "-v", *OPTIONS, *(rest or DEFAULT)]
        command = f"cd {shlex.quote(str(ROOT))} && export LOOPVISOR_KERNEL={shlex.quote(str(guest.kernel))} && "
        command += arguments.shell or shlex.join(pytest)
        status = run(guest, command, arguments.timeout - (time.monotonic() - begin), arguments.memory)
    except ImageError as error:
        print(f"rig: {error}", file=sys.stderr)
        return NO_RESULT
    print(f"rig: status {status} after {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
