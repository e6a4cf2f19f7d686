"""A large tree unpacked into a shared directory and `git status` of one, in our guest and in one under QEMU's TCG.

The same kernel, initrd, root disk and init (guestpair) with one vCPU, each with a directory of its own on the same file
system of the host: ours by `--share`, QEMU's by its virtiofsd, both with the cache that each has by default. By turns,
BENCH_SHARE_LAPS (5) times, the other one first in every second. "Cold" is after the guest has dropped what it remembers
of names, attributes and content. BENCH_SHARE_DIR (/var/tmp) is where the directories are. Needs root for virtiofsd.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.guestpair import Guest, begin_tree, our_command, qemu_command
from tests.support import programs

LAPS = int(os.environ.get("BENCH_SHARE_LAPS", "5"))
FILES = int(os.environ.get("BENCH_SHARE_FILES", "2000"))
LARGEST = 64 << 10
NEEDED = ("git", "tar", "busybox", "mke2fs", "qemu-system-x86_64")
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
KINDS = {
    "unpack": "tar, unpacking into the share",
    "status": "git status, cold",
    "again": "git status, warm",
    "read": "tar, reading the tree, cold",
    "remove": "rm -r of the tree",
}
INIT = """#!/bin/busybox sh
export PATH=/bin:/usr/bin HOME=/tmp GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=*
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mountpoint -q /proc || mount -t proc none /proc; mountpoint -q /dev || mount -t devtmpfs none /dev
mount -t tmpfs none /tmp
stty -echo
now() { read up rest </proc/uptime; echo $((${up%.*} * 100 + 1${up#*.} - 100)); }
cat /tree.tar >/dev/null
echo BENCH ready 0
while read kind files rest; do
    case $kind in status|read) echo 3 >/proc/sys/vm/drop_caches ;; esac
    [ $kind = status ] && cat /usr/bin/git /tree.tar >/dev/null
    began=$(now)
    case $kind in
    unpack) tar xf /tree.tar -C /mnt/work ;;
    remove) rm -rf /mnt/work/* ;;
    read) tar cf - -C /mnt/repo . | wc -c >/dev/null ;;
    status|again) git -C /mnt/repo status --porcelain >/tmp/status; [ -s /tmp/status ] && began=0 ;;
    *) break ;;
    esac
    ended=$(now)
    [ $ended -gt $began ] || ended=$((began + 1))
    echo BENCH $kind $((files * 100000 / (ended - began)))
done
poweroff -f
"""
"""What it answers is a thousandth of a file for each second."""
SHARE = "loopvisor.share.share0=/mnt"
"""What init mounts; `vmm run` says so by itself."""


def tree(folder: Path) -> Path:
    """FILES files of this host's /usr, as an archive, the same on the same host."""
    path = folder / "tree.tar"
    left = FILES
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for top in ("/usr/include", "/usr/lib/python3", "/usr/share/doc", "/usr/lib", "/usr/share"):
            for directory, folders, names in os.walk(top):
                folders.sort()
                for name in sorted(names):
                    file = os.path.join(directory, name)
                    if left and os.path.isfile(file) and not os.path.islink(file) and os.path.getsize(file) <= LARGEST:
                        archive.add(file, file[1:], recursive=False)
                        left -= 1
            if not left:
                break
    return path


def root(folder: Path, archive: Path) -> Path:
    """A disk with busybox, git, the archive and INIT."""
    made = folder / "root"
    begin_tree(made, INIT, ("mnt", "proc", "sys", "dev", "tmp"))
    programs.add(made, ("git",))
    shutil.copy(archive, made / "tree.tar")
    return programs.image(made, folder / "root.img", f"{256 + (archive.stat().st_size >> 20)}M")


def shared(folder: Path, archive: Path) -> Path:
    """A directory with an empty `work` and a repository of the tree, whose index is fresh."""
    repo = folder / "repo"
    repo.mkdir(parents=True)
    (folder / "work").mkdir()
    with tarfile.open(archive) as packed:
        packed.extractall(repo, filter="fully_trusted")
    settings = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    who = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for words in (["init", "-q"], ["add", "-A", "-f"], [*who, "commit", "-q", "-m", "tree"], ["status"]):
        subprocess.run(["git", *words], cwd=repo, env=settings, check=True, capture_output=True)
    return folder


@contextmanager
def virtiofsd(folder: Path, path: Path) -> Iterator[Path]:
    """QEMU's daemon for a directory; its socket."""
    socket = folder / "fs.sock"
    command = [VIRTIOFSD, "-f", f"--socket-path={socket}", "-o", f"source={path}", "-o", "xattr"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("virtiofsd did not start")
                time.sleep(0.05)
            yield socket
        finally:
            process.terminate()


def with_share(kernel: Path, initrd: Path, disk: Path, share: Path) -> list[str | Path]:
    """Our machine with a shared directory."""
    return [*our_command(kernel, initrd, disk, 512), "--net", "none", "--share", f"{share}:/mnt"]


def with_virtiofsd(kernel: Path, initrd: Path, disk: Path, socket: Path) -> list[str | Path]:
    """QEMU's, whose memory is shared with the daemon, as vhost-user wants."""
    command = qemu_command(kernel, initrd, disk, 512, SHARE)
    command += ["-object", "memory-backend-memfd,id=mem,size=512M,share=on", "-numa", "node,memdev=mem"]
    command += ["-chardev", f"socket,id=fs,path={socket}"]
    return [*command, "-device", "vhost-user-fs-pci,chardev=fs,tag=share0"]


def rows() -> Iterator[dict[str, object]]:
    """Files for each second of ours, and the median of the laps' ratios to QEMU's."""
    missing = programs.missing(NEEDED) + ([] if VIRTIOFSD.exists() else [str(VIRTIOFSD)])
    if missing or os.geteuid():
        why = f"not here: {', '.join(missing)}" if missing else "needs root"
        yield {"name": "tree in a share", "value": None, "unit": "", "note": why}
        return
    from images import catalog

    image = catalog.resolve("linux", build=True)
    assert image.initrd is not None
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_SHARE_DIR", "/var/tmp"), prefix="bench-share-") as name:
        folder = Path(name)
        archive = tree(folder)
        disks = [folder / "ours.img", folder / "theirs.img"]
        made = root(folder, archive)
        for disk in disks:
            shutil.copyfile(made, disk)
        shares = [shared(folder / "ours", archive), shared(folder / "theirs", archive)]
        with virtiofsd(folder, shares[1]) as socket:
            guests: list[Guest] = []
            try:
                guests.append(Guest(with_share(image.kernel, image.initrd, disks[0], shares[0])))
                guests.append(Guest(with_virtiofsd(image.kernel, image.initrd, disks[1], socket)))
                for guest in guests:
                    guest.wait_ready()
                yield from measured(guests, shares)
            finally:
                for guest in guests:
                    guest.end()


def measured(guests: list[Guest], shares: list[Path]) -> Iterator[dict[str, object]]:
    """All kinds in each lap; the first lap does not count."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for lap in range(-1, LAPS):
        for kind in KINDS:
            values = [0.0, 0.0]
            for which in (0, 1) if lap % 2 == 0 else (1, 0):
                values[which] = guests[which].measure(kind, FILES) or 0.0
                if kind == "unpack":
                    count = sum(len(names) for _, _, names in os.walk(shares[which] / "work"))
                    assert count == FILES, f"{count} files were unpacked"
            if lap >= 0 and all(values):
                found[kind].append((values[0], values[1]))
    for kind, label in KINDS.items():
        if not found[kind]:
            yield {"name": label, "value": None, "unit": "", "note": "no result"}
            continue
        mine, theirs = (statistics.median(values) / 1000 for values in zip(*found[kind], strict=True))
        ratios = sorted(one / two for one, two in found[kind])
        note = f"QEMU {theirs:.0f}; of {', '.join(f'{ratio:.2f}' for ratio in ratios)}"
        yield {"name": label, "value": round(mine, 1), "unit": "files/s", "better": "more"}
        row = {"name": f"{label}, ratio to QEMU with virtiofsd", "value": round(statistics.median(ratios), 2)}
        yield {**row, "unit": "×", "better": "more", "goal": 1.0, "note": note}


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(f"{row}\n")
