"""Whatever an image holds: one line or an I/O error, nothing else. tests/fuzz/image_fuzz.py goes on for longer."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.malformed_images import GROWTH, SIZE, mutate, seeds, use


def test_malformed_images(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    base = (tmp_path / "base").read_bytes()
    path = tmp_path / "image"
    good = seeds(tmp_path)
    refused = 0
    for seed in range(250):
        source = random.Random(seed)
        data = mutate(source.choice(good), source)
        path.write_bytes(data)
        refused += bool(use(path, source))
        assert path.stat().st_blocks * 512 <= len(data) + GROWTH, seed
    assert 50 < refused < 250
    assert (tmp_path / "base").read_bytes() == base
