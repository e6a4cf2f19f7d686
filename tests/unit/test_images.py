"""The image builder's parts: cache, tree, modules, catalogue. No network, no apt."""

from __future__ import annotations

import fcntl
import io
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import tomllib
from pathlib import Path

import pytest

from images import builder, built, cache, catalog, debian, guests, kernel, modules, packages, programs, recipe
from images.errors import ImageError
from images.tree import Tree


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOOPVISOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sample_tree() -> Tree:
    tree = Tree()
    tree.file("etc/deep/file", b"content\n", 0o640)
    tree.link("bin/link", "/etc/deep/file")
    tree.directory("tmp", 0o1777)
    return tree


@pytest.mark.skipif(not shutil.which("cpio"), reason="cpio is not installed")
def test_cpio_is_what_cpio_reads(tmp_path: Path) -> None:
    tree = sample_tree()
    tree.character_device("dev/console", 5, 1)
    listing = subprocess.run(["cpio", "-tv", "--quiet"], input=tree.cpio(), capture_output=True, check=True)
    lines = listing.stdout.decode().splitlines()
    assert [line.split()[0] for line in lines if line.endswith("etc/deep/file") and "->" not in line] == ["-rw-r-----"]
    assert any("5,   1" in line and line.endswith("dev/console") for line in lines)
    assert any("bin/link -> /etc/deep/file" in line for line in lines)


def has_e2fsprogs() -> bool:
    return bool(shutil.which("mke2fs") or shutil.which("mke2fs", path="/usr/sbin:/sbin"))


@pytest.mark.skipif(not has_e2fsprogs(), reason="e2fsprogs is not installed")
def test_ext4_is_clean_and_reproducible(tmp_path: Path) -> None:
    images = []
    for name in ("one", "two"):
        work = tmp_path / name
        work.mkdir()
        sample_tree().ext4(work / "image", 16, "test", work)
        images.append(work / "image")
    assert cache.file_hash(images[0]) == cache.file_hash(images[1])
    check = subprocess.run([programs.tool("e2fsck", "e2fsprogs"), "-fn", images[0]], capture_output=True, check=False)
    assert check.returncode == 0, check.stdout

    def debugfs(request: str) -> str:
        command = [programs.tool("debugfs", "e2fsprogs"), "-R", request, images[0]]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    described = debugfs("stat etc/deep/file")
    assert "Mode:  0640" in described and "User:     0   Group:     0" in described
    assert debugfs("cat etc/deep/file") == "content\n"


def module(*depends: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0name=x\0"


def driver(alias: str, *depends: str) -> bytes:
    return module(*depends) + b"alias=" + alias.encode() + b"\0"


def test_modules_come_after_what_they_need() -> None:
    files = {"net/virtio_net.ko": module("virtio", "failover"), "virtio/virtio.ko": module("virtio-ring"),
             "virtio/virtio-ring.ko": module(), "net/failover.ko": module("packet")}
    order = modules.closure(["virtio-net"], files, {"packet"})
    assert list(order) == ["virtio/virtio-ring.ko", "virtio/virtio.ko", "net/failover.ko", "net/virtio_net.ko"]


def test_modules_for_hardware_that_may_not_be_there() -> None:
    """What only conditional modules need is as conditional as they are; what any other needs is always loaded."""
    files = {"bus.ko": module(), "net.ko": driver("virtio:d00000001v*", "helper", "shared", "bus"),
             "mmio.ko": driver("acpi*:LNRO0005:*", "bus"), "blk.ko": driver("virtio:d00000002v*", "bus", "shared"),
             "helper.ko": module(), "shared.ko": module(), "input.ko": driver("input:b*v*", "shared2"),
             "shared2.ko": module()}  # fmt: skip
    assert modules.closure(["bus", "mmio", "net", "blk", "input"], files, set()) == {
        "bus.ko": [], "mmio.ko": ["acpi acpi:LNRO0005:"], "helper.ko": ["virtio virtio:d00000001v"],
        "shared.ko": ["virtio virtio:d00000001v", "virtio virtio:d00000002v"], "net.ko": ["virtio virtio:d00000001v"],
        "blk.ko": ["virtio virtio:d00000002v"], "shared2.ko": [], "input.ko": [],
    }  # fmt: skip


def test_modules_that_only_a_root_file_system_needs() -> None:
    """What something else needs as well is loaded with that."""
    files = {"crc.ko": module(), "xor.ko": module(), "virtio.ko": module("crc"),
             "btrfs.ko": module("crc", "xor") + b"alias=fs-btrfs\0"}  # fmt: skip
    assert modules.closure(["virtio"], files, {"ext4"}, ["btrfs", "ext4"]) == {
        "crc.ko": [], "virtio.ko": [], "xor.ko": ["fs btrfs"], "btrfs.ko": ["fs btrfs"]
    }  # fmt: skip
    assert modules.closure(["btrfs"], files, set(), ["btrfs"])["btrfs.ko"] == []


def test_a_missing_module_is_named_with_who_needs_it() -> None:
    with pytest.raises(ImageError, match="no module gone, which module a needs"):
        modules.closure(["a"], {"a.ko": module("gone")}, set())


def test_modules_that_need_each_other_are_refused() -> None:
    with pytest.raises(ImageError, match="depends on itself"):
        modules.closure(["a"], {"a.ko": module("b"), "b.ko": module("a")}, set())


def deb(path: Path, **files: bytes) -> Path:
    """A minimal package: debian-binary, control.tar, data.tar.xz."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", lzma.compress(body.getvalue()))]
    out = b"!<arch>\n"
    for name, data in parts:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) & 1)
    path.write_bytes(out)
    return path


def test_package_contents(tmp_path: Path) -> None:
    members = dict((m.name, data) for m, data in packages.contents(deb(tmp_path / "x.deb", a=b"1", b=b"22")))
    assert members == {"./a": b"1", "./b": b"22"}


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_bytes(b"something else")
    with pytest.raises(ImageError, match="not a Debian package"):
        list(packages.contents(tmp_path / "x.deb"))


def test_a_workspace_outlives_neither_its_block_nor_its_process(own_cache: Path) -> None:
    with cache.workspace() as work:
        (work / "file").write_text("x")
        cache.sweep()
        assert (work / "file").exists(), "a live workspace was swept"
    assert not work.exists()
    script = "import os, signal; from images import cache\nwith cache.workspace() as w:\n" \
             "    (w / 'half').write_text('x'); print(w, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    assert done.returncode == -signal.SIGKILL
    left = Path(done.stdout.strip())
    assert left.exists()
    cache.sweep()
    assert not left.exists()


def test_publish_replaces_whole(own_cache: Path) -> None:
    target = cache.directory("images") / "x"
    for text in ("one", "two"):
        with cache.workspace() as work:
            made = work / "made"
            made.mkdir()
            (made / "file").write_text(text)
            cache.publish(made, target)
    assert (target / "file").read_text() == "two"


def test_the_lock_excludes(own_cache: Path) -> None:
    inside = threading.Event()
    with cache.lock("x"):
        other = threading.Thread(target=lambda: (cache.lock("x").__enter__(), inside.set()))
        with (cache.directory("locks") / "x").open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.start()
        assert not inside.is_set()
    other.join(10)
    assert inside.is_set()


def test_what_the_host_refuses_is_one_line_with_a_way_out(own_cache: Path) -> None:
    with pytest.raises(ImageError, match=f"^{own_cache}: no space left on device; vmm images prune makes room, and "):
        with cache.host_errors(), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    (own_cache / "locks" / "builds").mkdir(parents=True)
    for act in (lambda: builder.build("linux"), builder.prune, lambda: catalog.resolve("linux", build=True)):
        with pytest.raises(ImageError, match=f"^{own_cache}/locks/builds: is a directory$") as caught:
            act()
        assert caught.value.kind == "host"
    own_cache.joinpath("images").write_text("")
    with pytest.raises(ImageError, match=f"^{own_cache}/images: file exists"):
        cache.directory("images")


def test_every_tiny_guest_resolves() -> None:
    assert {"hello", "real", "echo", "timer", "exit", "triple", "spin", "dirty", "flood"} <= set(guests.names())
    for name in guests.names():
        image = catalog.resolve(name)
        assert image.kernel.stat().st_size < 16384
        assert image.kind == ("real" if name == "real" else "auto")


@pytest.mark.parametrize(("name", "message"), [
    ("nonsense", "no image nonsense; there are: .*hello"),
    ("./gone", "no file ./gone"),
    ("linux", "vmm images build linux"),
])
def test_unknown_images_are_one_line(name: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        catalog.resolve(name)
    assert caught.value.kind == "config" and "\n" not in str(caught.value)


def test_a_file_is_an_image(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"x")
    assert catalog.resolve(str(tmp_path / "kernel")).kernel == tmp_path / "kernel"


def test_recipes_are_whole() -> None:
    for name in built.recipe_names():
        assert recipe.load(name)["description"]
    with pytest.raises(ImageError, match="no recipe x"):
        recipe.load("x")


RECIPE = """
kind = "busybox"
[kernel]
package = "linux-image-cloud-amd64"
file = "linux-image-.*"
[root]
packages = ["busybox-static"]
size_mib = 64
"""


@pytest.mark.parametrize(("old", "new", "message"), [
    ('"busybox"', '"gentoo"', "kind: 'gentoo' is none of busybox, container, debian"),
    ('kind = "busybox"', "", "kind: None is none of"),
    ("kind =", "knid =", "unknown key knid; known are "),
    ('kind = "busybox"', 'kind = "debian"', "unknown key root.packages"),
    ("size_mib = 64", "", "root.size_mib is missing: a number of MiB"),
    ("64\n", '"64"\n', "root.size_mib: '64' is not a number"),
    ("64\n", "true\n", "root.size_mib: True is not"),
    ('package = "linux-image-cloud-amd64"', "", "kernel.package is missing"),
    ('"linux-image-.*"', '"("', "kernel.file: '[(]' is not a regular expression"),
    ("[root]", "[rot]", "unknown key rot"),
    ('["busybox-static"]', '"busybox-static"', "root.packages: 'busybox-static' is not a list of texts"),
    ("size_mib = 64", 'size_mib = 64\nhostname = "a b"', "root.hostname: 'a b' is no host name"),
    ("[kernel]", "kernel = 1\n[other]", "unknown key other"),
    ("=", "==", "Invalid|Expected"),
    ('package = "linux', 'package = "\\u0000linux', "kernel.package: .* is not text"),
])
def test_mistakes_in_a_recipe_are_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(RECIPE)
    assert recipe.load(str(path))["root"]["size_mib"] == 64
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(ImageError, match=message) as caught:
        recipe.load(str(path))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value) and caught.value.kind == "config"


def put_build(own_cache: Path, name: str, pointer: str, recipe: dict[str, object]) -> Path:
    made = own_cache / "images" / f"{name}-1"
    made.mkdir(parents=True, exist_ok=True)
    (made / "manifest.json").write_text(json.dumps({"key": "1", "recipe": recipe, "packages": {}}))
    (own_cache / "images" / pointer).write_text(json.dumps({"directory": made.name}))
    return made


def test_what_a_user_built_is_found_by_its_name(own_cache: Path) -> None:
    described: dict[str, object] = {"description": "my own", "defaults": {"memory": "99M"}}
    made = put_build(own_cache, "mine", built.pointer_name("mine"), described)
    image = catalog.resolve("mine")
    assert (image.kernel, image.memory, image.disk) == (made / "vmlinuz", "99M", None)
    assert ("mine", "my own", True) in catalog.names()
    for name in ("../images/mine", "mine.json", "", ".", "mine@0"):
        assert built.current(name) is None


@pytest.mark.parametrize("pointer", ["mine@00000000.json", "mine.json"])
def test_an_image_of_another_init_is_built_again(
    pointer: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host and guest speak a protocol: an image whose init is not ours is not run as it is."""
    described = tomllib.loads(RECIPE)
    put_build(own_cache, "mine", pointer, described)
    assert built.current("mine") is None
    assert ("mine", "", False) in catalog.names()
    with pytest.raises(ImageError, match="image mine was built by another version of vmm; run: vmm images build mine"):
        catalog.resolve("mine")
    asked = []

    def packages_of(recipe: dict[str, object]) -> None:
        asked.append(recipe)
        raise ImageError("apt is asked")

    monkeypatch.setattr(builder, "_wanted", packages_of)
    with pytest.raises(ImageError, match="apt is asked"):
        catalog.resolve("mine", build=True)
    assert asked == [described]
    put_build(own_cache, "mine", built.pointer_name("mine"), described)
    builder.prune()
    assert [path.name for path in (own_cache / "images").glob("*.json")] == [built.pointer_name("mine")]
    assert builder.remove("mine") and not list((own_cache / "images").iterdir()) and not builder.remove("mine")


@pytest.mark.parametrize(("log", "wanted"), [
    ("""I: running apt-get update...
no matching group file entry in /etc/gshadow
Setting up openjdk-17-jre-headless:amd64 (17.0.19+10-1~deb12u2) ...
update-alternatives: using /usr/lib/jvm/java-17-openjdk-amd64/bin/java to provide /usr/bin/java (java) in auto mode
update-alternatives: error: error creating symbolic link '/usr/share/man/man1/java.1.gz': No such file or directory
dpkg: error processing package openjdk-17-jre-headless:amd64 (--configure):
 installed openjdk-17-jre-headless:amd64 package post-installation script subprocess returned error exit status 2
Processing triggers for ca-certificates-java (20230710~deb12u1) ...
No JRE found. Skipping Java certificates setup.
Errors were encountered while processing:
 openjdk-17-jre-headless:amd64
E: Sub-process env returned an error code (1)
E: setup failed: E: apt-get -o Dir::Bin::dpkg=env --yes install failed
E: mmdebstrap failed to run""",
     "package openjdk-17-jre-headless:amd64: update-alternatives: error: error creating symbolic link "
     "'/usr/share/man/man1/java.1.gz': No such file or directory"),
    ("""Setting up quiet (1) ...
dpkg: error processing package quiet (--configure):
 installed quiet package post-installation script subprocess returned error exit status 2
E: Sub-process env returned an error code (1)""",
     "package quiet: installed quiet package post-installation script subprocess returned error exit status 2"),
    ("I: x\nE: Unable to locate package nonsense\nE: setup failed: E: apt-get install nonsense failed",
     "Unable to locate package nonsense"),
    ("E: setup failed: E: apt-get x failed\nE: mmdebstrap failed to run", "setup failed: E: apt-get x failed"),
    ("mmdebstrap: cannot run here\n", "mmdebstrap: cannot run here"), ("", "no message"),
])  # fmt: skip
def test_a_failed_installation_shows_the_tools_own_reason(log: str, wanted: str) -> None:
    assert debian.reason(log.splitlines()) == wanted


@pytest.mark.skipif(not has_e2fsprogs(), reason="e2fsprogs is not installed")
def test_an_image_that_is_too_small_says_so(tmp_path: Path) -> None:
    tree = Tree()
    tree.file("big", bytes(range(256)) * (8 << 12))
    with pytest.raises(ImageError, match="mke2fs failed: .*; make root.size_mib larger"):
        tree.ext4(tmp_path / "image", 4, "test", tmp_path)


@pytest.mark.parametrize("name", ["a b.toml", "-x.toml", "a.b.toml", "x" * 41 + ".toml"])
def test_names_that_no_image_can_have(name: str, tmp_path: Path) -> None:
    path = tmp_path / "sub" / name
    (tmp_path / "sub").mkdir()
    path.write_text(RECIPE)
    with pytest.raises(ImageError, match="is no name for an image"):
        builder.build(str(path))


def test_the_guest_init_is_static_and_small() -> None:
    data = kernel.guest_init()
    assert data[:4] == b"\x7fELF" and len(data) < 65536
    assert b"/lib64/ld-linux" not in data
