"""kill -9 of the image builder and of `vmm run` at random moments: after the next command nothing is left of them, and
no entry of the cache is damaged.

`make soak` kills twenty times each, a daily run twice. A failure names its seed: LOOPVISOR_SEED repeats it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from images import builder, cache
from images.built import pointer_name
from tests.support.archive import serve
from tests.support.command import ROOT, VMM, wait_for

pytestmark = pytest.mark.debian

SOAK = bool(os.environ.get("LOOPVISOR_SOAK"))
KILLS = 20 if SOAK else 2
SEED = int(os.environ.get("LOOPVISOR_SEED") or time.time_ns() % 1_000_000)
MARK = "LOOPVISOR_KILL_TEST"
"""Set in the environment of everything that a test starts, by which what is left of it is found."""


def left_over(mark: str) -> list[str]:
    """Command lines of the processes that inherited the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}\0".encode() in path.read_bytes():
                command = (path.parent / "cmdline").read_text().replace("\0", " ").strip()
                if command:  # a zombie has none
                    found.append(f"{path.parent.name}: {command}")
        except OSError:
            continue
    return found


def interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def namespaces() -> set[str]:
    """Network, mount and process namespaces that some process is in."""
    found = set()
    for kind in ("net", "mnt", "pid", "user"):
        for path in Path("/proc").glob(f"[0-9]*/ns/{kind}"):
            try:
                found.add(os.readlink(path))
            except OSError:
                continue
    return found


class Victim:
    """A command that is killed after a while, unless it ends before."""

    def __init__(self, words: list[str], environment: dict[str, str], mark: str) -> None:
        self.words, self.mark = words, mark
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: mark, **environment}

    def whole(self) -> tuple[float, str]:
        """Let it run to its end: (seconds, standard output)."""
        begin = time.monotonic()
        done = subprocess.run(
            [*VMM, *self.words], env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return time.monotonic() - begin, done.stdout

    def killed(self, after: float) -> None:
        with self._started() as process:
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                process.kill()
        assert process.returncode in (0, -signal.SIGKILL)

    def killed_with(self, program: str) -> None:
        """Killed as soon as it has started this program."""
        with self._started() as process:
            wait_for(lambda: any(program in line for line in left_over(self.mark)) or process.poll() is not None)
            process.kill()
        assert process.returncode == -signal.SIGKILL

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*VMM, *self.words], env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def next(self, *words: str) -> Any:
        """Another command of ours, which prints JSON."""
        done = subprocess.run(
            [*VMM, *words], env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def check_cache(folder: Path) -> None:
    """Every entry is what its name or manifest says, and nothing unfinished is among them."""
    for path in (folder / "packages").glob("*.deb"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    for pointer in (folder / "images").glob("*.json"):
        assert (folder / "images" / json.loads(pointer.read_text())["directory"] / "manifest.json").exists()
    for place in (folder / "images").glob("*/"):
        manifest = json.loads((place / "manifest.json").read_text())
        assert {path.name for path in place.iterdir()} == {*manifest["files"], "manifest.json"}
        for name, digest in manifest["files"].items():
            assert cache.file_hash(place / name) == digest


@contextmanager
def archive(built: builder.Built) -> Iterator[dict[str, str]]:
    """The environment in which apt gets the image's packages from a slow proxy of ours, which has them in the cache."""
    files: dict[str, bytes | Path] = {}
    for name, digest in json.loads((built.directory / "manifest.json").read_text())["packages"].items():
        package, version, rest = unquote(name).split("_")
        plain = f"{package}_{version.rpartition(':')[2]}_{rest}"  # an archive's file names have no epoch
        files[plain] = cache.directory("packages") / f"{digest}.deb"
    with serve(files, pause=0.002) as served, tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "apt.conf"
        settings.write_text(f'Acquire::http::Proxy "{served.url}";\nAcquire::Retries "0";\n')
        yield {"APT_CONFIG": str(settings), "http_proxy": served.url}


@pytest.mark.slow
def test_the_builder_is_killed(tmp_path: Path, linux: builder.Built) -> None:
    with archive(linux) as environment:
        kill_the_builder("linux", tmp_path, environment, KILLS)


@pytest.mark.slow
@pytest.mark.skipif(not SOAK, reason="only in make soak")
@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed")
def test_the_builder_of_a_whole_debian_is_killed(tmp_path: Path) -> None:
    with archive(builder.build("debian")) as environment:
        kill_the_builder("debian", tmp_path, environment, KILLS // 3)


def kill_the_builder(name: str, tmp_path: Path, archive: dict[str, str], kills: int) -> None:
    mark = f"build-{os.getpid()}-{time.time_ns()}"
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    archive = {**archive, "TMPDIR": str(scratch)}
    own = tmp_path / "whole"
    words = ["images", "build", name]
    try:
        seconds, printed = Victim(words, {**archive, "LOOPVISOR_CACHE": str(own)}, mark).whole()
    except AssertionError as error:
        pytest.skip(f"the packages do not come through an http proxy here: {error}")
    wanted = json.loads((Path(printed.strip()) / "manifest.json").read_text())
    chance = random.Random(SEED)
    own = tmp_path / "cache"
    victim = Victim(words, {**archive, "LOOPVISOR_CACHE": str(own)}, mark)
    victim.killed_with("methods/http")
    for number in range(kills):
        after = chance.uniform(0, seconds)
        about = f"seed {SEED}, kill {number} after {after:.3f} s of {seconds:.3f} s"
        victim.killed(after)
        rows = victim.next("images", "ls", "--json")
        assert {row["name"] for row in rows} >= {"linux", "hello"}, about
        mounts = Path("/proc/self/mounts").read_text()
        assert "loopvisor-build-" not in mounts and str(own) not in mounts, about
        wait_for(lambda: not left_over(mark))
        assert not list((own / "tmp").iterdir()), about
        assert not list(scratch.glob("loopvisor-build-*")), about
        check_cache(own)
    victim.whole()
    check_cache(own)
    place = own / "images" / json.loads((own / "images" / pointer_name(name)).read_text())["directory"]
    made = json.loads((place / "manifest.json").read_text())
    assert made["files"] == wanted["files"], "the same inputs gave other bytes"
    assert not left_over(mark)


def test_builders_at_once(tmp_path: Path, linux: builder.Built) -> None:
    """Three of them, of whom one is killed while it downloads: the image is made once and whole."""
    own, mark = tmp_path / "cache", f"at-once-{os.getpid()}-{time.time_ns()}"
    with archive(linux) as environment:
        victim = Victim(["images", "build", "linux"], {**environment, "LOOPVISOR_CACHE": str(own)}, mark)
        builders = [victim._started() for _ in range(3)]
        try:
            wait_for(lambda: any("methods/http" in line for line in left_over(mark)))
            builders[0].kill()
            assert builders[0].wait() == -signal.SIGKILL
            assert [process.wait(300) for process in builders[1:]] == [0, 0]
        finally:
            for process in builders:
                process.kill()
                process.wait()
        wait_for(lambda: not left_over(mark))
    check_cache(own)
    assert len(list((own / "images").glob("*/"))) == 1
    assert not list((own / "tmp").iterdir()) and not list((own / "packages/partial").iterdir())


def networks() -> list[list[str]]:
    """What the killed machines have: passt, and as root a tap."""
    kinds = [["--net", "user"]] if shutil.which("passt") else [[]]
    if os.geteuid() == 0 and os.access("/dev/net/tun", os.R_OK | os.W_OK):
        kinds.append(["--net", f"tap=lvk{os.getpid() % 100000}"])
    return kinds


@pytest.mark.slow
def test_a_running_machine_is_killed(tmp_path: Path, linux: builder.Built) -> None:
    mark = f"run-{os.getpid()}-{time.time_ns()}"
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    environment = {"XDG_RUNTIME_DIR": str(tmp_path), "TMPDIR": str(scratch)}
    words = ["run", "linux", "--console", f"socket={tmp_path}/c", "--vsock", f"{tmp_path}/v"]
    words += ["--port", f"p={tmp_path}/p"]
    seconds, _ = Victim([*words, "--", "true"], environment, mark).whole()
    interfaces_before, namespaces_before = interfaces(), namespaces()
    chance = random.Random(SEED)
    if shutil.which("passt"):
        Victim([*words, "--net", "user", "--", "sleep", "300"], environment, mark).killed_with("passt --foreground")
    for number in range(KILLS):
        after = chance.uniform(0, 1.2 * seconds)
        network = chance.choice(networks())
        about = f"seed {SEED}, kill {number} after {after:.3f} s of {seconds:.3f} s with {network}"
        victim = Victim([*words, *network, "--name", "victim", "--", "sleep", "300"], environment, mark)
        victim.killed(after)
        # The same name, paths and interface again: whatever the killed one left is no obstacle.
        if number % 5 == 4:
            Victim([*words, *network, "--name", "victim", "--", "true"], environment, mark).whole()
        else:
            assert victim.next("ps", "--json") == [], about
        assert not list((tmp_path / "loopvisor").iterdir()), about
        wait_for(lambda: not left_over(mark))
        assert not list(scratch.iterdir()), about
        # The interfaces of other tests that run at the same time come and go.
        wait_for(lambda: interfaces() <= interfaces_before, 60)
        assert not [path for path in (tmp_path / "c", tmp_path / "p", tmp_path / "v") if live(path)], about
    assert not [name for name in namespaces() - namespaces_before if owned(name, mark)]
    done = Victim([*words, "--name", "victim", "--", "echo", "alive"], environment, mark).whole()
    assert done[1] == "alive\n"
    assert not [name for name in ("c", "p", "v") if (tmp_path / name).exists()]


def live(path: Path) -> bool:
    from vmm.management.sockets import is_live

    return path.exists() and is_live(path)


def owned(namespace: str, mark: str) -> bool:
    """A process with the mark is in it."""
    for path in Path("/proc").glob(f"[0-9]*/ns/{namespace.partition(':')[0]}"):
        try:
            if os.readlink(path) == namespace and mark.encode() in (path.parents[1] / "environ").read_bytes():
                return True
        except OSError:
            continue
    return False
