"""Downloads through apt's methods from a local archive: continued after a kill, checked by hash, once for all who want
them; and programs that end with whoever wanted them."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from images import cache, packages, programs
from images.errors import ImageError
from images.packages import Package
from tests.support.archive import Archive, serve
from tests.support.command import ROOT, wait_for

BODY = random.Random(5).randbytes(3 << 20)
NAME = "thing_1.0_all.deb"

needs_apt = pytest.mark.skipif(not Path("/usr/lib/apt/methods/http").exists(), reason="apt's http method is not here")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOOPVISOR_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    settings = tmp_path / "apt.conf"
    settings.write_text('Acquire::http::Proxy "DIRECT";\n')
    monkeypatch.setenv("APT_CONFIG", str(settings))
    return tmp_path / "cache"


def package(archive: Archive, body: bytes = BODY) -> Package:
    return Package(f"{archive.url}/pool/{NAME}", NAME, len(body), hashlib.sha256(body).hexdigest())


def part(own_cache: Path, wanted: Package) -> Path:
    return own_cache / "packages" / "partial" / f"{wanted.sha256}.part"


@needs_apt
def test_progress_counts_the_bytes_of_all() -> None:
    told: list[tuple[str, int, int]] = []
    with serve({NAME: BODY, "b_1_all.deb": b"second"}, pause=0.02) as archive:
        second = Package(f"{archive.url}/b_1_all.deb", "b_1_all.deb", 6, hashlib.sha256(b"second").hexdigest())
        one, two = packages.download_all([package(archive), second], lambda *values: told.append(values))
    assert (one.read_bytes(), two.read_bytes()) == (BODY, b"second")
    assert {total for _, _, total in told} == {len(BODY) + 6}
    counts = [done for _, done, _ in told]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] >= len(BODY)
    assert len([count for count in counts if 0 < count < len(BODY)]) > 2
    assert told[0][0] == "downloading thing (1 of 2)"


def with_tree() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


KILLED = """
import os, signal, sys
from images import packages
wanted = packages.Package(*sys.argv[1:3], int(sys.argv[3]), sys.argv[4])
packages.download_all([wanted], lambda what, done, total: done > 1 << 20 and os.kill(os.getpid(), signal.SIGKILL))
"""


@needs_apt
def test_a_download_goes_on_after_a_kill(own_cache: Path) -> None:
    with serve({NAME: BODY}, pause=0.02) as archive:
        wanted = package(archive)
        words = [wanted.uri, wanted.file_name, str(wanted.size), wanted.sha256]
        done = subprocess.run([sys.executable, "-c", KILLED, *words], env=with_tree(), check=False)
        assert done.returncode == -signal.SIGKILL
        left = part(own_cache, wanted)
        wait_for(lambda: not programs_of(own_cache))
        assert 1 << 20 < left.stat().st_size < len(BODY)
        size = left.stat().st_size
        archive.pause = 0.0
        assert packages.download(wanted).read_bytes() == BODY
        assert archive.seen == [(NAME, 0), (NAME, size)]
    assert not list((own_cache / "packages" / "partial").iterdir())


def programs_of(own_cache: Path) -> list[str]:
    """Processes that were started with this cache."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if path.parent.name != str(os.getpid()) and f"LOOPVISOR_CACHE={own_cache}".encode() in path.read_bytes():
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@needs_apt
@pytest.mark.parametrize("left", [b"garbage", BODY[: 1 << 20], BODY, BODY + b"more", b""], ids=len)
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("noted", [True, False])
def test_whatever_lies_there_the_right_bytes_come(own_cache: Path, left: bytes, ranges: bool, noted: bool) -> None:
    with serve({NAME: BODY}, ranges=ranges) as archive:
        wanted = package(archive)
        path = part(own_cache, wanted)
        path.parent.mkdir(parents=True)
        path.write_bytes(left)
        if noted:
            path.with_suffix(".changed").write_text("Tue, 01 Jan 2019 00:00:00 +0000")
        assert packages.download(wanted).read_bytes() == BODY


@needs_apt
def test_a_file_that_is_not_what_the_index_names(own_cache: Path) -> None:
    with serve({NAME: bytes(len(BODY))}) as archive:
        with pytest.raises(ImageError):
            packages.download(package(archive))
        assert not list((own_cache / "packages").glob("*.deb"))
        archive.files[NAME] = BODY
        assert packages.download(package(archive)).read_bytes() == BODY


@needs_apt
def test_a_damaged_cache_entry_is_fetched_again() -> None:
    with serve({NAME: BODY}) as archive:
        path = packages.download(package(archive))
        path.write_bytes(b"damaged")
        assert packages.download(package(archive)).read_bytes() == BODY
        packages.download(package(archive))
        assert len(archive.seen) == 2


@needs_apt
def test_moved_and_missing_files() -> None:
    with serve({"new.deb": BODY}) as archive:
        archive.moved[NAME] = f"{archive.url}/new.deb"
        assert packages.download(package(archive)).read_bytes() == BODY
        gone = Package(f"{archive.url}/gone_1_all.deb", "gone_1_all.deb", 1, "0" * 64)
        with pytest.raises(ImageError, match=r"/gone_1_all.deb: 404") as caught:
            packages.download(gone)
        assert "\n" not in str(caught.value)


@needs_apt
@pytest.mark.parametrize("by_proxy", [False, True])
def test_names_that_an_address_must_escape(tmp_path: Path, by_proxy: bool) -> None:
    with serve({"thing_1.0+b1_all.deb": BODY}) as archive:
        if by_proxy:
            (tmp_path / "apt.conf").write_text(f'Acquire::http::Proxy "{archive.url}";\n')
        host = "http://archive.invalid" if by_proxy else archive.url
        wanted = replace(package(archive), uri=f"{host}/pool/thing_1.0%2bb1_all.deb")
        assert packages.download(wanted).read_bytes() == BODY


def test_files_of_a_local_mirror(tmp_path: Path) -> None:
    if not Path("/usr/lib/apt/methods/file").exists():
        pytest.skip("apt's file method is not here")
    (tmp_path / NAME).write_bytes(BODY)
    wanted = Package(f"file:{tmp_path / NAME}", NAME, len(BODY), hashlib.sha256(BODY).hexdigest())
    assert packages.download(wanted).read_bytes() == BODY
    assert (tmp_path / NAME).exists()


def test_an_address_that_apt_cannot_fetch() -> None:
    with pytest.raises(ImageError, match="apt cannot fetch gopher: addresses"):
        packages.download(Package("gopher://x/y_1_all.deb", "y_1_all.deb", 1, "0" * 64))


@needs_apt
def test_two_who_want_one_package_fetch_it_once() -> None:
    with serve({NAME: BODY}, pause=0.01) as archive, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(packages.download, [package(archive)] * 4))
        assert {path.read_bytes() for path in found} == {BODY}
        assert archive.seen == [(NAME, 0)]


OWNER = """
import sys, time
from images.programs import guarded
with guarded(["sh", "-c", sys.argv[1]]) as process:
    print(process.stdout.readline(), end="", flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize("script", [
    "sleep 300 & echo $!; wait", "setsid sleep 300 & echo $!; wait",
    "trap '' TERM INT HUP; sleep 300 & echo $!; wait; wait",
    "(setsid sh -c 'sleep 300 & echo $!; wait') & wait",
])
def test_a_program_and_its_children_end_with_who_wanted_them(script: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, script], stdout=subprocess.PIPE, env=with_tree(), text=True
    ) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        owner.kill()
    wait_for(lambda: gone(child))


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_status_and_output_of_a_program() -> None:
    assert programs.run(["sh", "-c", "echo out; echo err >&2; exit 7"]) == (7, "out\n", ["err"])
    assert programs.run(["sh", "-c", "kill -9 $$"])[0] == 137
    assert programs.run(["/no/such/program"])[0] == 127
    told: list[str] = []
    assert programs.run(["sh", "-c", "echo a >&2; echo b >&2"], told=told.append)[0] == 0
    assert told == ["a", "b"]


def test_an_error_in_the_block_ends_the_program() -> None:
    begin = time.monotonic()
    with pytest.raises(RuntimeError), programs.guarded(["sleep", "300"]) as process:
        raise RuntimeError
    assert process.returncode == 137 and time.monotonic() - begin < 200


def test_prune_waits_for_nobody_and_takes_nothing_from_a_build(own_cache: Path) -> None:
    from images import builder, built

    with cache.lock(builder.BUILDING, shared=True):
        with pytest.raises(ImageError, match="being built just now"):
            builder.prune()
    for name in ("packages/aa.deb", "packages/partial/bb.part", "images/old-1/vmlinuz"):
        (own_cache / name).parent.mkdir(parents=True, exist_ok=True)
        (own_cache / name).write_bytes(bytes(10_000))
    kept = own_cache / "images" / "new-1"
    kept.mkdir()
    (kept / "manifest.json").write_text('{"key": "1", "recipe": {}, "packages": {"a": "cc"}}')
    pointer = built.pointer_name("new")
    (own_cache / "images" / pointer).write_text('{"directory": "new-1"}')
    (own_cache / "packages" / "cc.deb").write_bytes(b"kept")
    assert builder.prune() >= 30_000
    left = {str(path.relative_to(own_cache)) for path in own_cache.rglob("*") if path.is_file()}
    assert {name for name in left if not name.startswith("locks/")} == {
        "images/new-1/manifest.json", f"images/{pointer}", "packages/cc.deb",
    }
