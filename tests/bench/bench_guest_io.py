"""fio and iperf3 in a Debian kernel on the software core, and the same kernel, disk and tap under QEMU's TCG.

By turns, BENCH_GUEST_LAPS times each, with one vCPU, the same cache mode, and a disk that is clean and in the page
cache at the start of each turn; fio and iperf3 run for a second before they count, in which both translate what they
execute. Shown are the medians; the ratio is the median of the turns' ratios. Needs fio, iperf3, mke2fs and QEMU
on the host, and root for the tap; what is missing leaves its rows without a value.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support import programs

HOST, GUEST = "10.213.9.1", "10.213.9.2"
SECONDS = int(os.environ.get("BENCH_GUEST_SECONDS", "4"))
LAPS = int(os.environ.get("BENCH_GUEST_LAPS", "3"))
TIMEOUT = 240
MEASURED = {
    "randread": ("guest fio, 4 KiB random read, depth 32", "IOPS"),
    "randwrite": ("guest fio, 4 KiB random write, depth 32", "IOPS"),
    "read": ("guest fio, 1 MiB sequential read", "MB/s"),
    "write": ("guest fio, 1 MiB sequential write", "MB/s"),
    "send": ("guest iperf3, guest to host over a tap", "Mbit/s"),
    "receive": ("guest iperf3, host to guest over a tap", "Mbit/s"),
}

INIT = f"""#!/bin/busybox sh
export PATH=/bin:/usr/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev; mount -t tmpfs none /tmp
run() {{
    fio --name=x --filename=/dev/vdb --direct=1 --ioengine=libaio --time_based --ramp_time=1 --runtime={SECONDS} \\
        --output-format=terse "$@" 2>/dev/null | grep '^3;'
}}
for kind in randread randwrite; do
    line=$(run --rw=$kind --bs=4k --iodepth=32)
    [ $kind = randread ] && field=8 || field=49
    echo "BENCH $kind $(echo "$line" | cut -d';' -f$field)"
done
for kind in read write; do
    line=$(run --rw=$kind --bs=1M --iodepth=4)
    [ $kind = read ] && field=7 || field=48
    echo "BENCH $kind $(( $(echo "$line" | cut -d';' -f$field) / 977 ))"
done
if [ -d /sys/class/net/eth0 ]; then
    ip link set lo up; ip addr add {GUEST}/24 dev eth0; ip link set eth0 up
    for kind in send receive; do
        [ $kind = send ] && flag= || flag=-R
        iperf3 -c {HOST} -O 1 -t {SECONDS} -f m $flag | sed -n "s/.* \\([0-9.]*\\) Mbits.*receiver.*/BENCH $kind \\1/p"
    done
fi
echo BENCH end
poweroff -f
"""


def build_root(folder: Path) -> Path:
    """An ext4 image with busybox, fio, iperf3, their libraries, and INIT as /sbin/init."""
    tree = folder / "tree"
    for name in ("bin", "sbin"):
        (tree / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", tree / "bin/busybox")
    programs.add(tree, ("fio", "iperf3"))
    (tree / "sbin/init").write_text(INIT)
    (tree / "sbin/init").chmod(0o755)
    return programs.image(tree, folder / "root.img", "256M")


@contextlib.contextmanager
def tap() -> Iterator[str | None]:
    """A tap with an address and an iperf3 server, if this user may make one."""
    name = f"lvb{os.getpid() % 1000000}"
    commands = (
        f"tuntap add dev {name} mode tap vnet_hdr",
        f"addr add {HOST}/24 dev {name}",
        f"link set {name} up",
    )
    server = None
    try:
        if any(subprocess.run(["ip", *command.split()], capture_output=True).returncode for command in commands):
            yield None
            return
        server = subprocess.Popen(["iperf3", "-s", "-B", HOST], stdout=subprocess.DEVNULL)
        yield name
    finally:
        if server is not None:
            server.kill()
            server.wait()
        subprocess.run(["ip", "link", "del", name], capture_output=True)


def parse(output: str) -> dict[str, float]:
    found = {}
    for line in output.splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "BENCH":
            with contextlib.suppress(ValueError):
                found[words[1]] = float(words[2])
    return found


async def ours(kernel: Path, initrd: Path, root: Path, data: Path, net: str | None, format: str = "raw") -> str:
    import vmm

    async with vmm.VirtualMachine(
        kernel=kernel,
        initrd=initrd,
        append="root=/dev/vda rw quiet",
        memory="512M",
        core="soft",
        disks=(f"{root},format=raw", f"{data},format={format}"),
        nets=(f"tap={net}",) if net else (),
        timeout=TIMEOUT,
    ) as vm:
        vm.resume()
        lines = []
        while True:
            found = await vm.console.expect(rb"(BENCH [a-z]+[^\r\n]*)[\r\n]", timeout=TIMEOUT)
            lines.append(found[1].decode())
            if lines[-1].startswith("BENCH end"):
                return "\n".join(lines)


def qemu(kernel: Path, initrd: Path, root: Path, data: Path, net: str | None, format: str = "raw") -> str:
    command = [
        "qemu-system-x86_64",
        "-M",
        "q35",
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-m",
        "512",
        "-smp",
        "1",
        "-no-reboot",
    ]
    command += ["-nographic", "-kernel", str(kernel), "-initrd", str(initrd), "-nodefaults", "-serial", "stdio"]
    command += ["-append", "root=/dev/vda rw quiet console=ttyS0"]
    for number, (path, kind) in enumerate(((root, "raw"), (data, format))):
        command += ["-drive", f"file={path},if=none,id=d{number},format={kind},cache=writeback"]
        command += ["-device", f"virtio-blk-pci,drive=d{number}"]
    if net:
        command += ["-netdev", f"tap,id=n,ifname={net},script=no,downscript=no,vhost=off"]
        command += ["-device", "virtio-net-pci,netdev=n"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    return done.stdout


def settle(*paths: Path) -> None:
    """Write back what is dirty of these files, so that nobody does it while the next machine is measured; and read
    them, so that the page cache has them whole."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            while file.read(1 << 20):
                pass


def rows() -> Iterator[dict[str, object]]:
    """Each measurement on our core, under TCG, and the ratio."""
    missing = programs.missing(("fio", "iperf3", "mke2fs", "qemu-system-x86_64"))
    if missing:
        yield {"name": "guest fio and iperf3", "value": None, "unit": "", "note": f"not here: {', '.join(missing)}"}
        return
    from images import catalog

    image = catalog.resolve("linux", build=True)
    assert image.initrd is not None
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, tap() as net:
        folder = Path(name)
        root, data = build_root(folder), folder / "data.img"
        command = ["dd", "if=/dev/urandom", f"of={data}", "bs=1M", "count=256"]
        subprocess.run(command, check=True, capture_output=True)
        arguments = (image.kernel, image.initrd, root, data, net)
        mine: list[dict[str, float]] = []
        theirs: list[dict[str, float]] = []
        for _ in range(LAPS):
            settle(root, data)
            mine.append(parse(asyncio.run(ours(*arguments))))
            settle(root, data)
            theirs.append(parse(qemu(*arguments)))
    for key, (label, unit) in MEASURED.items():
        pairs = [(one[key], two[key]) for one, two in zip(mine, theirs, strict=True) if one.get(key) and two.get(key)]
        note = "" if net or key not in ("send", "receive") else "needs root for a tap"
        if not pairs:
            yield {"name": label, "value": None, "unit": unit, "note": note or "no result"}
            continue
        for name, values in zip((label, f"{label}, QEMU TCG"), zip(*pairs, strict=True), strict=True):
            yield {"name": name, "value": round(statistics.median(values), 1), "unit": unit, "better": "more"}
        ratios = [round(one / two, 2) for one, two in pairs]
        yield {
            "name": f"{label}, ratio",
            "value": round(statistics.median(ratios), 2),
            "unit": "×",
            "better": "more",
            "goal": 1.0,
            "note": f"of {', '.join(map(str, ratios))}",
        }


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(f"{row}\n")
