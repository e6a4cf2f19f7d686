"""Two guests of the same kernel and programs, one on our software core and one under QEMU's TCG, that measure by turns.

Both stay up while a bench runs, each waiting for a line on its serial port that tells it what to measure; so a turn
costs seconds where a boot for each would cost ten, and load that others put on the host falls on both alike. Needs fio,
iperf3, mke2fs and QEMU on the host, and root for taps.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.support import programs

NEEDED = ("fio", "iperf3", "mke2fs", "qemu-system-x86_64")
SECONDS = int(os.environ.get("BENCH_GUEST_SECONDS", "2"))
"""Of each turn."""
LAPS = int(os.environ.get("BENCH_GUEST_LAPS", "5"))
"""Turns of each guest for each row."""
TIMEOUT = float(os.environ.get("BENCH_GUEST_TIMEOUT", "240"))
FIO = {
    "randread": ("guest fio, 4 KiB random read, depth 32", "IOPS"),
    "randwrite": ("guest fio, 4 KiB random write, depth 32", "IOPS"),
    "read": ("guest fio, 1 MiB sequential read", "MB/s"),
    "write": ("guest fio, 1 MiB sequential write", "MB/s"),
}
IPERF = {
    "send": ("guest iperf3, guest to host over a tap", "Mbit/s"),
    "receive": ("guest iperf3, host to guest over a tap", "Mbit/s"),
}

INIT = """#!/bin/busybox sh
export PATH=/bin:/usr/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev; mount -t tmpfs none /tmp
stty -echo
if [ -d /sys/class/net/eth0 ]; then
    read words </proc/cmdline
    for word in $words; do case $word in bench.net=*) net=${word#*=} ;; esac; done
    ip link set lo up; ip addr add $net.2/24 dev eth0; ip link set eth0 up
fi
# Arguments: kind, fields of the terse output for reads and writes, seconds, first MiB, MiBs.
run() {
    case $1 in rand*) how="--bs=4k --iodepth=32" ;; *) how="--bs=1M --iodepth=4" ;; esac
    line=$(fio --name=x --filename=/dev/vdb --direct=1 --ioengine=libaio --time_based --runtime=$4 --rw=$1 $how \\
        --offset=${5}M --size=${6}M --output-format=terse 2>/dev/null | grep '^3;')
    case $1 in *read) field=$2 ;; *) field=$3 ;; esac
    value=$(echo "$line" | cut -d';' -f$field)
}
echo BENCH ready 0
while read kind seconds first size; do
    value=
    case $kind in
    rand*) run $kind 8 49 $seconds $first $size ;;
    read|write) run $kind 7 48 $seconds $first $size; value=$((value / 977)) ;;
    send) value=$(iperf3 -c $net.1 -t $seconds -f m | sed -n "s/.* \\([0-9.]*\\) Mbits.*receiver.*/\\1/p") ;;
    receive) value=$(iperf3 -c $net.1 -t $seconds -f m -R | sed -n "s/.* \\([0-9.]*\\) Mbits.*receiver.*/\\1/p") ;;
    *) break ;;
    esac
    echo BENCH $kind $value
done
poweroff -f
"""


def begin_tree(tree: Path, init: str, folders: Sequence[str] = ()) -> None:
    """Make a directory with busybox, this script as /sbin/init, and empty directories."""
    for name in ("bin", "sbin", *folders):
        (tree / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", tree / "bin/busybox")
    (tree / "sbin/init").write_text(init)
    (tree / "sbin/init").chmod(0o755)


def build_root(folder: Path) -> Path:
    """An ext4 image with busybox, fio, iperf3, their libraries, and INIT as /sbin/init."""
    tree = folder / "tree"
    begin_tree(tree, INIT)
    programs.add(tree, ("fio", "iperf3"))
    return programs.image(tree, folder / "root.img", "256M")


@dataclass(frozen=True, slots=True)
class Tap:
    """Of the host, which is PREFIX.1 there; the guest is PREFIX.2."""

    name: str
    prefix: str


class Guest:
    """A process that runs one guest with its serial port on stdin and stdout."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input: IO[bytes] = self._process.stdin
        self._output: IO[bytes] = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._seen = b""
        self.pid = self._process.pid

    def wait_ready(self) -> None:
        """Until it has booted. Raises TimeoutError, EOFError."""
        self._answer("ready")

    def measure(self, kind: str, seconds: int, first: int = 0, size: int = 0) -> float | None:
        """What it measures, None if its program fails; the disk's part in MiB. Raises TimeoutError, EOFError."""
        self._input.write(f"{kind} {seconds} {first} {size}\n".encode())
        self._input.flush()
        return self._answer(kind)

    def _answer(self, kind: str) -> float | None:
        deadline = time.monotonic() + TIMEOUT
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while True:
                *lines, self._seen = self._seen.split(b"\n")
                for line in lines:
                    # Firmware's last words have no end of line: a guest's first answer may stand behind them.
                    words = line.decode(errors="replace").partition("BENCH ")[2].split()
                    if words[:1] == [kind]:
                        with contextlib.suppress(ValueError, IndexError):
                            return float(words[1])
                        return None
                if not selector.select(deadline - time.monotonic()):
                    raise TimeoutError(f"no answer for {kind}")
                data = self._output.read(1 << 16)
                if not data:
                    raise EOFError(f"the guest ended, its last words: {self._seen[-300:]!r}")
                self._seen += data

    def end(self) -> None:
        """It powers off, or is killed."""
        with contextlib.suppress(OSError):
            self._input.write(b"end\n")
            self._input.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()


def our_command(kernel: Path, initrd: Path, root: Path, memory: int, words: str = "") -> list[str | Path]:
    """`vmm run` as a user has it, with a raw disk, MiB of memory, and more words for the kernel."""
    command: list[str | Path] = [Path(sys.executable).with_name("vmm"), "run", "--core", "soft", "--kernel", kernel]
    command += ["--initrd", initrd, "--append", f"root=/dev/vda rw quiet {words}".rstrip(), "--memory", f"{memory}M"]
    return [*command, "--disk", f"{root},format=raw"]


def qemu_command(kernel: Path, initrd: Path, root: Path, memory: int, words: str = "") -> list[str | Path]:
    """QEMU with the same devices."""
    command: list[str | Path] = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", str(memory)]
    command += ["-smp", "1", "-no-reboot", "-nographic", "-kernel", kernel, "-initrd", initrd, "-nodefaults"]
    command += ["-serial", "stdio", "-append", f"root=/dev/vda rw quiet {words} console=ttyS0"]
    command += ["-drive", f"file={root},if=none,id=d0,format=raw,cache=writeback"]
    return [*command, "-device", "virtio-blk-pci,drive=d0"]


def _words(tap: Tap | None) -> str:
    """What tells INIT its network."""
    return f"bench.net={tap.prefix}" if tap else ""


def ours_with(kernel: Path, initrd: Path, root: Path, data: Path, tap: Tap | None, format: str) -> list[str | Path]:
    """Our machine with a second disk and perhaps a network."""
    command = [*our_command(kernel, initrd, root, 512, _words(tap)), "--disk", f"{data},format={format}"]
    return [*command, "--net", f"tap={tap.name}" if tap else "none"]


def qemu_with(kernel: Path, initrd: Path, root: Path, data: Path, tap: Tap | None, format: str) -> list[str | Path]:
    """QEMU's with the same."""
    command = qemu_command(kernel, initrd, root, 512, _words(tap))
    command += ["-drive", f"file={data},if=none,id=d1,format={format},cache=writeback"]
    command += ["-device", "virtio-blk-pci,drive=d1"]
    if tap:
        command += ["-netdev", f"tap,id=n,ifname={tap.name},script=no,downscript=no,vhost=off"]
        command += ["-device", "virtio-net-pci,netdev=n"]
    return command


def settle(*paths: Path) -> None:
    """Write back what is dirty of these files, so that nobody does it while the next machine is measured; and read
    them, so that the page cache has them whole."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            while file.read(1 << 20):
                pass


@contextlib.contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Beside one process that only calculates."""
    process = subprocess.Popen(["/bin/sh", "-c", "while :; do :; done"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


@contextlib.contextmanager
def taps() -> Iterator[tuple[Tap, Tap] | None]:
    """Two taps with addresses and iperf3 servers, if this user may make some."""
    made = [Tap(f"lvb{number}x{os.getpid() % 1000000}", f"10.213.{9 + number}") for number in range(2)]
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for tap in made:
            for command in (
                f"tuntap add dev {tap.name} mode tap vnet_hdr",
                f"addr add {tap.prefix}.1/24 dev {tap.name}",
                f"link set {tap.name} up",
            ):
                if subprocess.run(["ip", *command.split()], capture_output=True).returncode:
                    yield None
                    return
            server = ["iperf3", "-s", "-B", f"{tap.prefix}.1"]
            servers.append(subprocess.Popen(server, stdout=subprocess.DEVNULL))
        yield made[0], made[1]
    finally:
        for process in servers:
            process.kill()
            process.wait()
        for tap in made:
            subprocess.run(["ip", "link", "del", tap.name], capture_output=True)


@contextlib.contextmanager
def pair(
    folder: Path, disks: Sequence[Path], format: str, nets: tuple[Tap, Tap] | None
) -> Iterator[tuple[Guest, Guest]]:
    """Both guests, booted, ours first, each with its disk."""
    from images import catalog

    image = catalog.resolve("linux", build=True)
    assert image.initrd is not None
    root = folder / "root.img"
    if not root.exists():
        build_root(folder)
    guests: list[Guest] = []
    try:
        for number, command in enumerate((ours_with, qemu_with)):
            own = folder / f"root{number}.img"
            shutil.copyfile(root, own)
            tap = nets[number] if nets else None
            guests.append(Guest(command(image.kernel, image.initrd, own, disks[number], tap, format)))
        for guest in guests:
            guest.wait_ready()
        yield guests[0], guests[1]
    finally:
        for guest in guests:
            guest.end()


Pairs = dict[str, list[tuple[float, float]]]
"""For each kind, what our guest and QEMU's measured in each lap."""


def laps(
    guests: tuple[Guest, Guest],
    kinds: Sequence[str],
    disks: Sequence[Path],
    size: int,
    parts: Iterator[int] | None = None,
) -> Pairs:
    """Every kind, LAPS turns of each guest by turns, the other one first in every second lap. Each uses `size` MiB of
    the disk: the first, or, for what writes, those from the next of `parts` on, so that a disk that takes space when it
    is written to does so in each lap. Both do each kind once before that does not count: their code is translated
    then."""
    found: Pairs = {}
    for kind in kinds:
        for lap in range(-1, LAPS):
            place = next(parts) if parts is not None and "write" in kind else 0
            values: list[float | None] = [None, None]
            for which in (0, 1) if lap % 2 == 0 else (1, 0):
                settle(*disks)
                values[which] = guests[which].measure(kind, SECONDS if lap >= 0 else 1, place, size)
            if lap >= 0 and values[0] and values[1]:
                found.setdefault(kind, []).append((values[0], values[1]))
    return found


def report(pairs: Pairs, labels: Mapping[str, tuple[str, str]], what: str = "") -> Iterator[dict[str, object]]:
    """Our median, QEMU's, and the median of the ratios, a row for each."""
    for key, (label, unit) in labels.items():
        if key not in pairs:
            yield {"name": label + what, "value": None, "unit": unit, "note": "no result"}
            continue
        mine, theirs = (statistics.median(values) for values in zip(*pairs[key], strict=True))
        ratios = sorted(one / two for one, two in pairs[key])
        there = f"QEMU {theirs:.0f}"
        yield {"name": label + what, "value": round(mine, 1), "unit": unit, "better": "more", "note": there}
        yield {
            "name": f"{label}{what}, ratio to QEMU TCG",
            "value": round(statistics.median(ratios), 2),
            "unit": "×",
            "better": "more",
            "goal": 1.0,
            "note": f"of {', '.join(f'{ratio:.2f}' for ratio in ratios)}",
        }
