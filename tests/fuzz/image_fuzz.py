"""Malformed disk images for a given time, under ASan and UBSan: `python -m tests.fuzz.image_fuzz SECONDS [SEED]`.

virtio's C parts are compiled for it into build/image-fuzz, and the campaign runs in a process that loads those. A seed
that fails is printed and its image kept there. FUZZ_PLAIN=1: without sanitizers, with the module as it is installed.
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzz import sanitized

BUILD = sanitized.ROOT / "build" / "image-fuzz"
STALL = 20.0
"""Seconds of the processor that one image may take, sanitized."""


def campaign(seconds: float, first: int) -> int:
    """How many images were tried. SystemExit: one failed."""
    from tests.support.malformed_images import GROWTH, SIZE, mutate, seeds, use

    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="image-fuzz-") as name:
        folder = Path(name)
        (folder / "base").write_bytes(b"b" * SIZE)
        good, path = seeds(folder), folder / "image"
        refused = 0
        for done, seed in enumerate(itertools.count(first)):
            if time.monotonic() > end:
                print(f"{done} images, {refused} refused: nothing found")  # noqa: T201
                return done
            source = random.Random(seed)
            data = mutate(source.choice(good), source)
            path.write_bytes(data)
            (BUILD / "last").write_bytes(data)  # a crash of the process leaves it
            begin = time.process_time()
            try:
                refused += bool(use(path, source))
                assert path.stat().st_blocks * 512 <= len(data) + GROWTH, "the image has grown"
                assert time.process_time() - begin < STALL, "it takes too long"
            except Exception:
                traceback.print_exc()
                (BUILD / f"seed-{seed}").write_bytes(data)
                raise SystemExit(f"seed {seed} failed; {BUILD}/seed-{seed} is its image") from None
        raise AssertionError


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    first = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 32)
    if sanitized.inside():
        BUILD.mkdir(parents=True, exist_ok=True)
        print(f"from seed {first}", flush=True)  # noqa: T201
        campaign(seconds, first)
        return
    sanitized.run(BUILD, __file__, seconds, first)


if __name__ == "__main__":
    main()
