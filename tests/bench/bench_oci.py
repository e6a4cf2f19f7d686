"""An image of ten layers out of Debian's docker-registry: ours beside skopeo, in alternating laps.

Like with like: what `skopeo copy` to a layout does, getting the layers and checking them by digest, beside the same
into our cache. `vmm images pull` also makes the file system image, which is shown beside the copy as well. Then what a
user waits for: the first run of an image, the next one, and a warm one. Shown are medians of BENCH_OCI_LAPS (5) laps,
by the wall and in processor time of the processes started; the registry's own time counts for neither. The layers hold
files of this host's /usr, 25 MiB each, compressed by gzip.
"""

from __future__ import annotations

import gzip
import io
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.bench_boot import VMM
from tests.support import programs
from tests.support.oci import layout
from tests.support.ociregistry import registry

LAPS = int(os.environ.get("BENCH_OCI_LAPS", "5"))
WARM_LAPS = 3 * LAPS
LAYERS, LAYER_BYTES = 10, 25 << 20
LARGEST = 8 << 20
NEEDED = ("skopeo", "docker-registry", "busybox")
PULL_LAYERS = """
import sys
from images.oci.reference import parse
from images.oci.registry import Registry
source = Registry(parse(sys.argv[1]))
for blob in source.open_layers(source.find(), lambda *told: None):
    blob.result().close()
source.close()
"""
"""The first half of `vmm images pull`: the layers are in the cache, and nothing is made of them."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of a command: by the wall, and of the processors."""

    wall: float
    cpu: float


def spent(command: Sequence[str | Path], settings: dict[str, str]) -> Spent:
    """Run a command, which must succeed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-500:]}")
    return Spent(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def large_layers() -> Iterator[bytes]:
    """Archives of files of /usr, the same ones on the same host."""
    files = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk("/usr")
        for name in names
        if not os.path.islink(path := os.path.join(folder, name)) and os.path.getsize(path) <= LARGEST
    )
    random.Random(1).shuffle(files)
    for number in range(LAYERS):
        out, left = io.BytesIO(), LAYER_BYTES
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            if number == 0:
                member = tarfile.TarInfo("bin/true")
                member.mode, member.size = 0o755, os.path.getsize(shutil.which("busybox") or "")
                with open(shutil.which("busybox") or "", "rb") as program:
                    archive.addfile(member, program)
            while left > 0 and files:
                path = files.pop()
                archive.add(path, path[1:], recursive=False)
                left -= os.path.getsize(path)
        yield out.getvalue()


def compared(name: str, ours: list[Spent], theirs: list[Spent], *, goal: bool) -> Iterator[dict[str, object]]:
    """Our medians and the laps' ratios, by the wall and in processor time."""
    for what, said in (("wall", "wall"), ("cpu", "processor time")):
        mine, other = ([getattr(lap, what) for lap in laps] for laps in (ours, theirs))
        ratios = sorted(one / two for one, two in zip(mine, other, strict=True))
        note = f"skopeo copy {statistics.median(other):.3f}; of {', '.join(f'{one:.2f}' for one in ratios)}"
        yield {"name": f"{name}, {said}", "value": round(statistics.median(mine), 3), "unit": "s"}
        row = {"name": f"{name}, {said}, ratio", "value": round(statistics.median(ratios), 2), "unit": "×"}
        yield {**row, "note": note, "goal": 1.0} if goal else {**row, "note": note}


def rows() -> Iterator[dict[str, object]]:
    """Pull, pull and unpack, and runs."""
    missing = programs.missing(NEEDED)
    if missing:
        yield {"name": "pull", "value": None, "unit": "", "note": f"not here: {', '.join(missing)}"}
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bench-oci-") as name:
        folder = Path(name)
        layers = list(large_layers())
        packed = [gzip.compress(one, 6, mtime=0) for one in layers]
        image = layout(folder / "image", layers, packed, Cmd=["/bin/true"])
        yield {"name": "layers, packed", "value": sum(map(len, packed)) >> 20, "unit": "MiB"}
        yield {"name": "layers, unpacked", "value": sum(map(len, layers)) >> 20, "unit": "MiB"}
        del layers, packed
        with registry(folder) as served:
            served.push(image, "ten:layers")
            yield from pulls(folder, f"{served.name}/ten:layers")
            yield from runs(folder, f"oci:{served.name}/ten:layers")


def pulls(folder: Path, reference: str) -> Iterator[dict[str, object]]:
    """Alternating laps of what is compared; the other one first in every second."""
    settings = {**os.environ, "LOOPVISOR_CACHE": str(folder / "cache")}
    target = folder / "layout"
    pull_layers = [sys.executable, "-c", PULL_LAYERS, reference]
    pull = [VMM, "images", "pull", f"oci:{reference}"]
    copy = ["skopeo", "copy", "--src-tls-verify=false", f"docker://{reference}", f"oci:{target}:latest"]

    def clean() -> None:
        for path in (folder / "cache", target):
            subprocess.run(["rm", "-rf", path], check=True)

    laps: dict[str, list[Spent]] = {"layers": [], "copy": [], "pull": []}
    commands = {"layers": pull_layers, "copy": copy, "pull": pull}

    def measure(kind: str, *, counts: bool) -> None:
        clean()
        once = spent(commands[kind], settings)
        if counts:
            laps[kind].append(once)

    for lap in range(-1, LAPS):
        for kind in ("layers", "copy") if lap % 2 else ("copy", "layers"):
            measure(kind, counts=lap >= 0)
    for _ in range(LAPS):  # apart, since the disk is busy for a while with what it has written
        measure("pull", counts=True)
    yield from compared("ten layers into the cache", laps["layers"], laps["copy"], goal=True)
    yield from compared("vmm images pull, which makes the image too", laps["pull"], laps["copy"], goal=False)


def runs(folder: Path, name: str) -> Iterator[dict[str, object]]:
    """The first run pulls, the next ones boot, warm ones go on from a saved machine."""
    from images import builder
    from images.errors import ImageError

    cache = folder / "cache"
    settings = {**os.environ, "LOOPVISOR_CACHE": str(cache), "XDG_RUNTIME_DIR": str(folder)}
    command = [VMM, "run", "--core", "soft", name, "--", "/bin/true"]
    warm = [VMM, "run", "--core", "soft", "--warm", name, "--", "/bin/true"]
    try:
        builder.build("container")
    except ImageError as error:
        yield {"name": "vmm run oci:", "value": None, "unit": "s", "note": f"no kernel for container images: {error}"}
        return
    shutil.rmtree(cache, ignore_errors=True)
    spent([VMM, "images", "build", "container"], settings)
    yield {"name": "vmm run oci:… -- true, first: pulls", "value": round(spent(command, settings).wall, 3), "unit": "s"}
    next_ones = [spent(command, settings).wall for _ in range(LAPS)]
    yield {"name": "vmm run oci:… -- true, next", "value": round(statistics.median(next_ones), 3), "unit": "s"}
    spent(warm, settings)
    times = [spent(warm, settings) for _ in range(WARM_LAPS)]
    wall, cpu = statistics.median(lap.wall for lap in times), statistics.median(lap.cpu for lap in times)
    note = f"least {min(lap.wall for lap in times):.3f}, processor time {cpu:.3f}"
    row = {"name": "vmm run --warm oci:… -- true", "value": round(wall, 3), "unit": "s", "goal": 0.2, "note": note}
    yield row


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(f"{row}\n")
