"""Real programs in a Linux guest on the software core: with direct execution, without, beside QEMU's TCG, and natively.

Three guests stay up, of the same kernel and initrd, each with a copy of the same disk with this host's programs, and
run them by turns; natively they run in a chroot of the same tree. What computes takes 0.4 seconds or more
natively: shorter, it would show how a program starts. BENCH_DIRECT_LAPS (3) times, of which the best
counts. The value of a row is a ratio of wall clocks, for an idle host; its note has the ratio of processor time, of all
processes of a guest, which says more on a busy one. BENCH_DIRECT_PROGRAMS names some, separated by commas. Needs root.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.guestpair import Guest, begin_tree, our_command, qemu_command
from tests.support import programs

LAPS = int(os.environ.get("BENCH_DIRECT_LAPS", "3"))
NEEDED = ("busybox", "mke2fs", "qemu-system-x86_64")
QEMU_MOST, QEMU_MEDIAN, NATIVE_LEAST, OFF_MOST = 0.65, 0.15, 0.6, 1.05

PYTHON = """
import json, re, hashlib, random
r = random.Random(5)
d = [{"a": r.random(), "b": str(r.random())} for i in range(150000)]
e = json.loads(json.dumps(d)); e.sort(key=lambda x: x["b"])
print(len(re.findall("[0-9]+", json.dumps(e))), hashlib.sha256(json.dumps(e).encode()).hexdigest())
"""
PERL = r"""
my %h; for my $i (1..6000000) { $h{$i % 1000} .= chr(65 + $i % 26); }
my $n = 0; for (sort keys %h) { $n += length($h{$_}); $n++ while $h{$_} =~ /ABC/g } print "$n\n";
"""
NODE = """
const a = []; for (let i = 0; i < 3000000; i++) a.push((i * 7919) % 1000003);
a.sort((x, y) => x - y); console.log(a[1000], JSON.stringify(a).length);
"""
C = """
#include <stdio.h>
#include <string.h>
#define F(n) int f##n(int a, int b) { int s = 0; char q[64]; \\
    for (int i = 0; i < a; i++) { s += b * i ^ n; if (s & n) s -= a; } \\
    snprintf(q, sizeof q, "%d", s); return s + (int)strlen(q); }
#define G(n) F(n##0) F(n##1) F(n##2) F(n##3) F(n##4) F(n##5) F(n##6) F(n##7)
G(1) G(2) G(3) G(4) G(5) G(6) G(7)
"""
GIT = """
cd /tmp && rm -rf repo && mkdir repo && cd repo && git init -q . &&
/usr/bin/cp -r /bench/json /bench/asyncio . && git add . &&
GIT_AUTHOR_DATE='1 Jan 2026 00:00 +0000' GIT_COMMITTER_DATE='1 Jan 2026 00:00 +0000' \\
    git -c user.name=a -c user.email=b commit -qm x && git log --stat | cat
"""
COMPUTE: dict[str, str] = {
    "sha256": f"/usr/bin/sha256sum {'/bench/data ' * 80}",
    "python work": "python3 /bench/work.py",
    "perl": "perl /bench/work.pl",
    "node": "node /bench/work.js",
    "xz": "/usr/bin/xz -1 -c /bench/data /bench/data",
    "gzip": "/usr/bin/gzip -nc /bench/data /bench/data /bench/data",
    "openssl": f"cat {'/bench/data ' * 80} | openssl dgst -sha512",
}
OTHER: dict[str, str] = {
    "python start": "for i in 1 2 3 4 5; do python3 -c 'print(1)'; done",
    "gcc": "cd /tmp && gcc -O2 -S -o work.s /bench/work.c && cat work.s",
    "git": GIT,
    "fork loop": "i=0; while [ $i -lt 200 ]; do /bin/true; i=$((i + 1)); done; echo $i",
    "find": "i=0; while [ $i -lt 20 ]; do /usr/bin/find /usr /bench -type f; i=$((i + 1)); done | wc -l",
    "dd": "/usr/bin/dd if=/dev/zero of=/dev/null bs=512 count=100000 2>/dev/null; echo $?",
}
PROGRAMS = COMPUTE | OTHER
"""Shell scripts. What they print is compared. They call what busybox has, too, by its path: the shell of busybox-static
would take its own."""
FILES = {"work.py": PYTHON, "work.pl": PERL, "work.js": NODE, "work.c": C}
BINARIES = ("python3", "perl", "node", "xz", "gzip", "openssl", "git", "gcc", "sha256sum", "find", "dd", "cp", "true")
INIT = """#!/bin/busybox sh
export PATH=/usr/bin:/bin HOME=/tmp LC_ALL=C
mountpoint -q /proc || mount -t proc none /proc; mountpoint -q /dev || mount -t devtmpfs none /dev
mount -t tmpfs none /tmp
stty -echo
echo BENCH ready 0
while read kind rest; do
    [ $kind = end ] && break
    sh /bench/$kind.sh >/tmp/out 2>/dev/null
    echo BENCH $kind $((0x$(md5sum </tmp/out | cut -c1-8)))
done
poweroff -f
"""


def chosen() -> dict[str, str]:
    """The programs to run that this host has, by name."""
    names = os.environ.get("BENCH_DIRECT_PROGRAMS", "")
    wanted = [name.strip() for name in names.split(",")] if names else list(PROGRAMS)
    gone = {name for name in BINARIES if not binary(name).exists()}
    return {name: PROGRAMS[name] for name in wanted if name.split()[0].replace("python", "python3") not in gone}


def binary(name: str) -> Path:
    """The distribution's program, not one of somebody's PATH."""
    return Path("/usr/bin") / name


def place(tree: Path, path: Path) -> None:
    """A program or a directory of this host at the same place below `tree`, with the libraries that it loads."""
    target = tree / path.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.a", "*.pyc"))
        return
    shutil.copy(path, target)
    programs.add_libraries(tree, path)


def answer(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build_tree(tree: Path) -> None:
    """Busybox, the programs, what they read, and INIT."""
    begin_tree(tree, INIT, ("proc", "sys", "dev", "tmp", "bench"))
    for name in answer(str(tree / "bin/busybox"), "--list").split():
        if name != "busybox":
            (tree / "bin" / name).symlink_to("busybox")
    for name in BINARIES:
        if binary(name).exists():
            place(tree, binary(name))
    if binary("python3").exists():
        library = Path(answer("/usr/bin/python3", "-c", "import os; print(os.path.dirname(os.__file__))"))
        place(tree, library)
        for name in ("json", "asyncio"):
            shutil.copytree(library / name, tree / "bench" / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (library / "lib-dynload").glob("*.so"):
            place(tree, path)
    if binary("gcc").exists():
        place(tree, Path(answer("/usr/bin/gcc", "-print-prog-name=cc1")))
        place(tree, Path(answer("/usr/bin/gcc", "-print-file-name=include")))
        place(tree, Path("/usr/include"))
    if binary("git").exists():
        (tree / "usr/share/git-core/templates").mkdir(parents=True)
    with (tree / "bench/data").open("wb") as data:
        data.write(binary("openssl").resolve().read_bytes()[:700000])
        data.write(binary("git").resolve().read_bytes()[:5300000])
    for name, text in FILES.items():
        (tree / "bench" / name).write_text(text)
    for name, text in PROGRAMS.items():
        (tree / "bench" / f"{name.replace(' ', '-')}.sh").write_text(text)


def processor_time(pid: int) -> float:
    """Seconds of a process and its children, those that ended included."""
    total = 0.0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(processor_time(int(child)) for child in (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


class Found:
    """What a program took at one place: the best of its laps."""

    def __init__(self) -> None:
        self.wall = self.processor = float("inf")
        self.printed: set[float | None] = set()

    def add(self, wall: float, processor: float, printed: float | None) -> None:
        self.wall = min(self.wall, wall)
        self.processor = min(self.processor, max(processor, 0.01))
        self.printed.add(printed)


def in_guest(guest: Guest, name: str, found: Found) -> None:
    before, began = processor_time(guest.pid), time.monotonic()
    printed = guest.measure(name.replace(" ", "-"), 0)
    found.add(time.monotonic() - began, processor_time(guest.pid) - before, printed)


def natively(tree: Path, name: str, found: Found) -> None:
    script = f"sh /bench/{name.replace(' ', '-')}.sh >/tmp/out 2>/dev/null; echo $((0x$(md5sum </tmp/out | cut -c1-8)))"
    before, began = os.times(), time.monotonic()
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LC_ALL": "C"}
    result = subprocess.run(
        ["/usr/sbin/chroot", tree, "/bin/sh", "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    wall, after = time.monotonic() - began, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    found.add(wall, used, float(result.stdout))


def compared(name: str, places: dict[str, Found]) -> Iterator[tuple[str, dict[str, object]]]:
    """The rows of a program, by what it is compared with."""
    auto = places["auto"]
    same = len(set().union(*(place.printed for place in places.values()))) == 1
    words = "" if same else "; OUTPUT DIFFERS"
    goals: dict[str, tuple[str, float, float | None]] = {
        "off": ("beside --direct off", auto.wall / places["off"].wall, OFF_MOST),
        "qemu": ("beside QEMU", auto.wall / places["qemu"].wall, QEMU_MOST),
        "native": ("of native speed", places["native"].wall / auto.wall, NATIVE_LEAST if name in COMPUTE else None),
    }
    for other, (label, value, goal) in goals.items():
        less = other != "native"
        one, two = (auto, places[other]) if less else (places[other], auto)
        note = (
            f"{auto.wall:.2f} s, {places[other].wall:.2f} s; processor time {one.processor / two.processor:.2f}{words}"
        )
        row: dict[str, object] = {"name": f"{name}, {label}", "value": round(value, 2), "unit": "×", "note": note}
        yield other, row | {"goal": goal, "better": "less" if less else "more"}


def rows() -> Iterator[dict[str, object]]:
    """A ratio for each program and what it is compared with, and the median beside QEMU."""
    from cpu.direct import support

    missing = programs.missing(NEEDED)
    if missing or os.geteuid() or not support().available:
        why = f"not here: {', '.join(missing)}" if missing else "needs root" if os.geteuid() else support().reason
        yield {"name": "programs with direct execution", "value": None, "unit": "", "note": why}
        return
    from images import catalog

    image = catalog.resolve("linux", build=True)
    assert image.initrd is not None
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bench-direct-") as name:
        folder = Path(name)
        tree, disk = folder / "tree", folder / "ours.img"
        build_tree(tree)
        programs.image(tree, disk, "1500M")
        for device, number in {"null": 3, "zero": 5, "urandom": 9}.items():
            os.mknod(tree / "dev" / device, 0o20666, os.makedev(1, number))
        disks = [disk, folder / "off.img", folder / "qemu.img"]
        for copy in disks[1:]:
            subprocess.run(["cp", "--reflink=auto", "--sparse=always", disk, copy], check=True)
        commands: list[list[str | Path]] = [
            [*our_command(image.kernel, image.initrd, own, 1024), "--net", "none", "--direct", how]
            for own, how in zip(disks, ("auto", "off"), strict=False)
        ]
        commands.append(qemu_command(image.kernel, image.initrd, disks[2], 1024))
        yield from measured(tree, commands)


def measured(tree: Path, commands: Sequence[Sequence[str | Path]]) -> Iterator[dict[str, object]]:
    names = ("auto", "off", "qemu")
    guests: dict[str, Guest] = {}
    beside: list[float] = []
    try:
        for name, command in zip(names, commands, strict=True):
            guests[name] = Guest(command)
        for guest in guests.values():
            guest.wait_ready()
        for program in chosen():
            places = {name: Found() for name in (*names, "native")}
            for lap in range(LAPS):
                for name in names if lap % 2 == 0 else reversed(names):
                    in_guest(guests[name], program, places[name])
                natively(tree, program, places["native"])
            for other, row in compared(program, places):
                yield row
                if other == "qemu":
                    beside.append(places["auto"].wall / places["qemu"].wall)
    finally:
        for guest in guests.values():
            guest.end()
    if beside:
        note = f"{', '.join(f'{ratio:.2f}' for ratio in sorted(beside))}"
        row = {"name": "median beside QEMU", "value": round(statistics.median(beside), 2), "unit": "×"}
        yield row | {"goal": QEMU_MEDIAN, "note": note}
