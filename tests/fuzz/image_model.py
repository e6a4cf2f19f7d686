"""Random operations on qcow2 images beside a model of bytes and QEMU's tools:
`python -m tests.fuzz.image_model OPERATIONS [SEED]`, on each of the parameter sets of tests/support/qcow2.py.

Reads, writes, zeroes, discards, flushes, compressed clusters; after each hundred the whole disk is compared, checked by
us and by qemu-img, and one of these is done to the image: a snapshot taken, applied or deleted, a resize, a commit, a
conversion.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from tests.support.qcow2 import SETS, Parameters, Twin, our_check
from virtio.images.chain import open_chain
from vmm import disks
from vmm.errors import ConfigError

EACH = 100


class Campaign:
    """One run."""

    def __init__(self, folder: Path, parameters: Parameters, seed: int) -> None:
        self.twin = Twin(folder, parameters, seed)
        self.source = random.Random(f"{seed} {parameters}")
        self.kept: dict[str, bytes] = {}
        self.done: dict[str, int] = {}

    def change(self) -> None:
        """One change of the whole image."""
        call = self.source.choice((self.snapshot, self.apply, self.delete, self.resize, self.commit, self.convert))
        self.twin.chain.close()
        try:
            call()
            self.done[call.__name__] = self.done.get(call.__name__, 0) + 1
        except ConfigError as error:
            # What a kind of image cannot: narrow refcounts have no snapshots, and compressed clusters share theirs.
            assert "references" in str(error) or "no backing file" in str(error), error
        report = our_check(self.twin.path)
        assert report.clean, (call, report.problems)
        self.twin.chain = self.twin.open()

    @property
    def path(self) -> str:
        return str(self.twin.path)

    def snapshot(self) -> None:
        name = f"s{self.source.randrange(1 << 30)}"
        disks.snapshot(self.path, "create", name)
        self.kept[name] = bytes(self.twin.model)

    def apply(self) -> None:
        if self.kept:
            name = self.source.choice(list(self.kept))
            disks.snapshot(self.path, "apply", name)
            self.twin.model[:] = self.kept[name]

    def delete(self) -> None:
        if self.kept:
            name = self.source.choice(list(self.kept))
            with open_chain(self.path, read_only=True, snapshot=name) as chain:
                data = bytearray(chain.size)
                chain.image.read(0, data)
                assert data == self.kept[name], name
            disks.snapshot(self.path, "delete", name)
            del self.kept[name]

    def resize(self) -> None:
        if self.kept:
            return  # their sizes would be others'
        size = max(1 << 20, len(self.twin.model) + self.source.randrange(-300, 600) * 512)
        disks.resize(self.path, size, shrink=True)
        del self.twin.model[size:]
        self.twin.model.extend(bytes(size - len(self.twin.model)))

    def commit(self) -> None:
        if not self.kept and self.source.random() < 0.5:
            disks.commit(self.path)

    def convert(self) -> None:
        if self.kept or self.twin.parameters.depth:
            return
        options = self.twin.parameters.options
        other = f"{self.path}.new"
        disks.convert(self.path, other, compress=self.source.random() < 0.5, options=dict(options))
        Path(other).replace(self.path)


def main() -> None:
    operations = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    for parameters in SETS:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="image-model-") as name:
            run = Campaign(Path(name), parameters, seed)
            for number in range(operations):
                run.twin.step()
                if number % EACH == EACH - 1:
                    run.twin.compare()
                    run.change()
            run.twin.compare()
            run.twin.chain.close()
        seconds = time.monotonic() - begin
        print(f"{parameters}: {operations} operations, {run.done}, {seconds:.0f} s", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
