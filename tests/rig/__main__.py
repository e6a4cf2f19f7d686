"""`python -m tests.rig [PYTEST ARGUMENT...]`: run tests in the rig; by default all that are marked `kvm` or
`stock_kvm`, and then the bench `machine`, whose figures for both cores go to rig.json.

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

from images import cache, catalog
from images.errors import ImageError
from tests.rig.guest import Guest, build

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ["-m", "(kvm and not qemu and not root) or stock_kvm", "tests"]
OPTIONS = ["--durations=20", "-o", "faulthandler_timeout=600", "-o", "cache_dir=/dev/shm/pytest"]
"""The checkout is read-only there."""
PROCESSOR = "max,family=25,model=17,stepping=1"
"""The family of the software core's processor. QEMU's own choice, a K8, makes guests look for AGP bridges on all buses:
16,400 port reads."""
SCRATCH = "8G"
"""A disk for the tests' files, for a file system in memory has no O_DIRECT; sparse on the host."""
NO_RESULT, TIMED_OUT = 125, 124


def qemu(guest: Guest, command: str, status: Path, scratch: Path, memory_mib: int) -> list[str]:
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise ImageError("qemu-system-x86_64 is missing; as root: apt-get install qemu-system-x86")
    return [
        program, "-accel", "tcg", "-cpu", PROCESSOR, "-smp", "1", "-m", str(memory_mib), "-M", "pc",
        "-nodefaults", "-display", "none", "-no-reboot", "-kernel", str(guest.kernel), "-initrd", str(guest.initrd),
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog no_timer_check",
        "-serial", "stdio", "-serial", f"file:{status}",
        "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
        "-drive", f"file={scratch},format=raw,if=virtio,cache=unsafe",
        "-fw_cfg", f"name=opt/rig/command,string={command.replace(',', ',,')}",
    ]  # fmt: skip


def run(guest: Guest, command: str, timeout: float, memory_mib: int) -> tuple[int, str]:
    """Run a shell command in the guest, its output on stdout; its status, and what it wrote to $RIG_REPORT."""
    with tempfile.TemporaryDirectory() as folder:
        status, scratch = Path(folder) / "status", Path(folder) / "scratch"
        try:
            mke2fs = ["/sbin/mke2fs", "-q", "-F", "-t", "ext4", str(scratch), SCRATCH]
            subprocess.run(mke2fs, stdout=subprocess.DEVNULL, check=True, timeout=60)
            started = qemu(guest, command, status, scratch, memory_mib)
            subprocess.run(started, stdin=subprocess.DEVNULL, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            print(f"rig: stopped after {timeout:.0f} s", file=sys.stderr)
            return TIMED_OUT, ""
        first, _, report = status.read_text().partition("\n") if status.exists() else ("", "", "")
        words = first.split()
        return (int(words[1]) if len(words) == 2 and words[0] == "status" else NO_RESULT), report


def prepare() -> str:
    """Have what tests look for in the cache, which the guest sees read-only; a shell command that offers it there."""
    from tests.support import debian

    catalog.resolve("linux", build=True)
    kernels = {meta: debian.kernel(meta) for meta in ("linux-image-cloud-amd64", "linux-image-amd64")}
    images = shlex.quote(str(cache.directory("images")))
    given = shlex.quote(" ".join(f"{meta}={path}" for meta, path in kernels.items()))
    return f"mkdir -p ~/.cache/loopvisor && ln -s {images} ~/.cache/loopvisor/ && export LOOPVISOR_KERNELS={given}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rig", description="run KVM-marked tests on kvm-amd")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=3072, help="the guest's RAM in MiB (default: %(default)s)")
    parser.add_argument("--shell", metavar="COMMAND", help="run this instead of pytest")
    arguments, rest = parser.parse_known_args()
    begin = time.monotonic()
    try:
        guest = build()
        command = shlex.join([sys.executable, "-u", "-m", "pytest", "-v", *OPTIONS, *(rest or DEFAULT)])
        if not rest:
            python = shlex.quote(sys.executable)
            command += f"; s=$?; {python} -m tests.bench machine --output $RIG_REPORT || s=1; exit $s"
        command = f"{prepare()} && cd {shlex.quote(str(ROOT))} && {{ {arguments.shell or command}; }}"
        left = arguments.timeout - (time.monotonic() - begin)
        status, report = run(guest, command, left, arguments.memory)
        if report:
            Path("rig.json").write_text(report)
    except ImageError as error:
        print(f"rig: {error}", file=sys.stderr)
        return NO_RESULT
    print(f"rig: status {status} after {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
