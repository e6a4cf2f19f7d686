"""Machines that are kept for warm starts: what goes wrong beside a start is no end of it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmm import launch
from vmm.state import warm
from vmm.state.manifest import MANIFEST


def test_files_that_go_while_an_installation_is_looked_at(tmp_path: Path) -> None:
    """A name without a file is what remains of one that was removed between the list and the look."""
    module = tmp_path / "package" / "module.py"
    module.parent.mkdir()
    module.write_text("")
    os.utime(module, ns=(5, 7))
    (tmp_path / "gone.py").symlink_to(tmp_path / "nothing")
    assert warm._newest(str(tmp_path)) == 7
    assert warm._newest(str(tmp_path / "nothing")) == 0


def test_the_snapshots_used_last_are_kept_beside_one_that_another_process_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(warm.KEEP + 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / MANIFEST).touch()
        os.utime(folder, (number, number))
    real = warm._used
    last = tmp_path / str(warm.KEEP + 2)

    def used(path: Path) -> int:
        if path == last and path.exists():
            (path / MANIFEST).unlink()
            path.rmdir()
        return real(path)

    monkeypatch.setattr(warm, "_used", used)
    with warm.making(tmp_path / "new") as ours:
        assert ours
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name != ".lock") == list(
        range(2, warm.KEEP + 2)
    )


async def test_a_cache_that_takes_nothing_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(warm, "folder", lambda config: tmp_path / "file" / "warm" / "key")
    told: list[str] = []

    async def execute(*words: str) -> None:
        pass

    vm: Any = SimpleNamespace(restored=False, config=None, exec=execute, tell=told.append)
    await launch.keep_warm(vm)
    assert len(told) == 1 and "not kept for warm starts" in told[0]
    assert told[0].endswith(f"{tmp_path / 'file' / 'warm'}: not a directory")
