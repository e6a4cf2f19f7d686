"""`python -m tests.rig.bochs [PYTEST ARGUMENT...]`: run tests where KVM has everything that debugging needs.

QEMU's emulation of SVM neither intercepts INT3 nor loads a guest's debug registers (APM vol. 2, 15.5.1 and 15.12.4), so
`tests.rig` cannot show GDB on KVM. Bochs emulates a processor with VMX, debug registers and exception bitmaps included:
in it runs Debian's kernel with kvm-intel, on a disk made of this checkout, its interpreter, GDB and the linux image. By
default the tests of GDB run. It executes some 30 million instructions a second, so that a test takes minutes.

Exits with pytest's status; 125 if the guest did not come that far, 124 if it took longer than --timeout.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from images import catalog
from images.errors import ImageError
from tests.rig import tree
from tests.rig.guest import INIT_BEGIN, Guest, build
from tests.support import bochs

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ["-k", "kvm", "tests/integration/test_gdb_linux.py"]
"""The bare guests of test_gdb.py know what Bochs does otherwise, too: give `-k kvm tests/integration/test_gdb.py`."""
OPTIONS = ["-o", "faulthandler_timeout=3600", "-p", "no:cacheprovider"]
MODULES = ["ata_piix", "sd_mod", "crc32c_generic", "ext4", "kvm_intel"]
GRUB = Path("/usr/lib/grub/i386-pc")
GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "linux", "serial", "terminal")
CMDLINE = "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog cryptomgr.notests nokaslr tsc=reliable"
SECTOR = 512
ROOT_AT = 2048
"""The sector where the file system begins; the boot loader is before it."""
NO_RESULT, TIMED_OUT = 125, 124

INIT = INIT_BEGIN + """while ! $b test -b /dev/sda1; do $b sleep 1; done
$b mkdir -p /root
$b mount -t ext4 /dev/sda1 /root || echo "rig: no root"
for name in proc sys dev; do $b mount --move /$name /root/$name; done
exec $b switch_root /root /bin/busybox sh /rig
"""
RIG = """
b=/bin/busybox
export PATH={path} HOME=/root TMPDIR=/tmp XDG_RUNTIME_DIR=/tmp/run LC_ALL=C.UTF-8 LOOPVISOR_PATIENCE=20
export LOOPVISOR_RIG=bochs
export PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
$b mkdir -p /dev/shm /dev/pts
$b mount -t tmpfs -o mode=1777 shm /dev/shm
$b mount -t tmpfs -o mode=1777 tmp /tmp
$b mount -t devpts -o ptmxmode=666 pts /dev/pts
$b mkdir -p /tmp/run
$b ip link set lo up
ls -l /dev/kvm
cd {checkout}
{command}
status=$?
$b sleep 5 # the console's last lines leave
echo "status $status" >/dev/ttyS1
$b sync
$b poweroff -f
"""


def boot_sectors(work: Path) -> bytes:
    """What stands before the file system: GRUB, told to start the kernel there, and a partition table."""
    script, core = work / "grub.cfg", work / "core.img"
    lines = ("set root=(hd0,msdos1)", f"linux /boot/vmlinuz {CMDLINE}", "initrd /boot/initrd", "boot")
    script.write_text("\n".join(("serial", "terminal_output serial", *lines)) + "\n")
    command = ["grub-mkimage", "-O", "i386-pc", "-p", "/", "-c", script, "-o", core]
    subprocess.run([*command, *GRUB_MODULES], check=True, timeout=60)
    sectors = bytearray((GRUB / "boot.img").read_bytes() + core.read_bytes())
    if len(sectors) > ROOT_AT * SECTOR:
        raise ImageError("the boot loader does not fit before the file system")
    return bytes(sectors) + bytes(ROOT_AT * SECTOR - len(sectors))


def disk(work: Path, guest: Guest, command: str) -> Path:
    """The whole disk."""
    root = work / "tree"
    tree.stage(root, ROOT)
    (root / "boot").mkdir()
    shutil.copy(guest.kernel, root / "boot/vmlinuz")
    shutil.copy(guest.initrd, root / "boot/initrd")
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/sbin:/usr/sbin"
    (root / "rig").write_text(RIG.format(path=path, checkout=shlex.quote(str(ROOT)), command=command))
    used = int(subprocess.run(["du", "-sm", root], capture_output=True, check=True, text=True).stdout.split()[0])
    target, sectors = work / "disk", (used + used // 4 + 64) << 11
    cylinders = -(-(ROOT_AT + sectors) // (16 * 63))
    with target.open("wb") as file:
        head = bytearray(boot_sectors(work))
        head[446:510] = bytes(64)  # code for floppy disks
        head[446:462] = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", ROOT_AT, sectors)
        head[510:512] = b"\x55\xaa"
        file.write(head)
        file.truncate(cylinders * 16 * 63 * SECTOR)
    options = f"offset={ROOT_AT * SECTOR},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
    make = ["/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-O", "^metadata_csum,^64bit,^has_journal", "-E", options]
    subprocess.run([*make, "-m", "0", "-d", root, target, f"{sectors // 2}k"], check=True, timeout=600)
    shutil.rmtree(root)
    return target


def run(guest: Guest, command: str, timeout: float, memory_mib: int, model: str) -> int:
    """Run a shell command in the guest, its console on stdout; its status."""
    if bochs.program() is None or not GRUB.is_dir():
        raise ImageError(f"{bochs.MISSING} grub-pc-bin grub-common")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        work = Path(folder)
        image = disk(work, guest, command)
        console, status = work / "console", work / "status"
        console.touch()
        status.touch()
        settings = [
            f"romimage: file={bochs.FIRMWARE}, options=fastboot",
            "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
            f"ata0-master: type=disk, path={image}, mode=flat",
            "boot: disk",
            f"com1: enabled=1, mode=file, dev={console}",
            f"com2: enabled=1, mode=file, dev={status}",
        ]
        begin, shown = time.monotonic(), 0
        emulator = bochs.start(work, settings, model=model, memory_mib=memory_mib)
        try:
            while emulator.poll() is None and not status.read_text().endswith("\n"):
                time.sleep(0.5)
                text = console.read_bytes()
                sys.stdout.buffer.write(text[shown:])
                sys.stdout.buffer.flush()
                shown = len(text)
                if time.monotonic() - begin > timeout:
                    print(f"rig: stopped after {timeout:.0f} s", file=sys.stderr)
                    return TIMED_OUT
        finally:
            emulator.kill()
            emulator.wait()
        sys.stdout.buffer.write(console.read_bytes()[shown:])
        sys.stdout.buffer.flush()
        words = status.read_text().split()
        if len(words) != 2 or words[0] != "status":
            print("\n".join((work / "log").read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
            return NO_RESULT
        return int(words[1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rig.bochs", description="run GDB's tests on kvm-intel")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for the guest (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=1536, help="the guest's RAM in MiB (default: %(default)s)")
    parser.add_argument("--cpu", default="broadwell_ult", help="Bochs' name of the processor (default: %(default)s)")
    parser.add_argument("--shell", metavar="COMMAND", help="run this instead of pytest")
    arguments, rest = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that Bochs is ended, too
    begin = time.monotonic()
    try:
        catalog.resolve("linux", build=True)
        guest = build(MODULES, INIT)
        command = shlex.join([sys.executable, "-u", "-m", "pytest", "-v", *OPTIONS, *(rest or DEFAULT)])
        status = run(guest, arguments.shell or command, arguments.timeout, arguments.memory, arguments.cpu)
    except ImageError as error:
        print(f"rig: {error}", file=sys.stderr)
        return NO_RESULT
    print(f"rig: status {status} after {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
