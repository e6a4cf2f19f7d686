"""Layers of container images: merged by the specification's rules into a file system that EROFS' own tool reads, and
whatever an archive holds, an ImageError at the worst."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from images.errors import ImageError
from images.oci import layers, rootfs, tar
from images.oci.erofs import Writer
from images.oci.layers import LayerStream, decompressed
from images.oci.rootfs import Inode, Rootfs
from images.oci.unpack import apply
from tests.support.oci import Entry, entry, layer

needs_fsck = pytest.mark.skipif(not shutil.which("fsck.erofs"), reason="fsck.erofs is not installed (erofs-utils)")


def merge(*archives: bytes, image: Path | None = None) -> Rootfs:
    """The tree of these layers, written as an image if a path is given."""
    descriptor = os.open(image or "/dev/null", os.O_RDWR | (os.O_CREAT if image else 0), 0o600)
    try:
        tree, writer = Rootfs(), Writer(descriptor, 1 << 40)
        for archive in archives:
            apply(LayerStream(decompressed(io.BytesIO(archive)), 1 << 40), tree, writer)
        if image:
            writer.finish(tree, bytes(16))
        return tree
    finally:
        os.close(descriptor)


def names(tree: Rootfs) -> list[str]:
    """Every path, sorted."""
    found, waiting = [], [("", tree.root)]
    while waiting:
        path, node = waiting.pop()
        for name, (child, _) in node.children.items():
            found.append(f"{path}/{os.fsdecode(name)}")
            waiting.append((found[-1], child))
    return sorted(found)


def at(tree: Rootfs, path: str) -> Inode:
    node = tree.root
    for name in path.encode().split(b"/"):
        node = node.children[name][0]
    return node


# -- what layers mean


def test_an_upper_layer_replaces_and_keeps() -> None:
    tree = merge(
        layer(entry("a/", "dir", mode=0o700), entry("a/one"), entry("a/two"), entry("b", "dir"), entry("b/in")),
        layer(entry("a/", "dir", mode=0o755), entry("a/two", mode=0o600), entry("b", data=b"a file now")),
    )
    assert names(tree) == ["/a", "/a/one", "/a/two", "/b"]
    assert stat.S_IMODE(at(tree, "a").mode) == 0o755 and stat.S_IMODE(at(tree, "a/two").mode) == 0o600
    assert stat.S_ISREG(at(tree, "b").mode)


def test_whiteouts_hide_only_what_is_below() -> None:
    below = layer(entry("a/one"), entry("a/two"), entry("d/x/deep"), entry("gone/a"), entry("gone/b/c"))
    above = layer(entry("a/.wh.one"), entry("a/.wh.never"), entry(".wh.gone"), entry("a/three"))
    assert names(merge(below, above)) == ["/a", "/a/three", "/a/two", "/d", "/d/x", "/d/x/deep"]


@pytest.mark.parametrize("late", [False, True])
def test_an_opaque_directory_hides_what_is_below_wherever_its_mark_stands(late: bool) -> None:
    below = layer(entry("a/one"), entry("a/sub/two"), entry("b"))
    own = [entry("a/new"), entry("a/sub/newer")]
    mark = [entry("a/.wh..wh..opq")]
    tree = merge(below, layer(*(own + mark if late else mark + own)))
    assert names(tree) == ["/a", "/a/new", "/a/sub", "/a/sub/newer", "/b"]


def test_a_whiteout_and_the_same_name_in_one_layer() -> None:
    below = layer(entry("f", mode=0o600), entry("d/old"))
    above = layer(entry(".wh.f"), entry("f", mode=0o644), entry("d", "dir"), entry("d/new"), entry(".wh.d"))
    tree = merge(below, above)
    assert names(tree) == ["/d", "/d/new", "/f"] and stat.S_IMODE(at(tree, "f").mode) == 0o644


def test_hard_links_share_an_inode_over_layers() -> None:
    tree = merge(
        layer(entry("a", data=b"x", uid=7), entry("b", "hard", target="a")),
        layer(entry("c", "hard", target="./b"), entry(".wh.a")),
    )
    assert names(tree) == ["/b", "/c"] and at(tree, "b") is at(tree, "c")
    list(tree.walk())
    assert at(tree, "b").links == 2


def test_parents_are_found_through_links_within_the_image() -> None:
    tree = merge(
        layer(
            entry("usr/lib", "dir"), entry("lib", "link", target="usr/lib"), entry("up", "link", target="../../../usr")
        ),
        layer(entry("lib/so"), entry("up/bin/x"), entry("/absolute/y")),
    )
    assert "/usr/lib/so" in names(tree) and "/usr/bin/x" in names(tree) and "/absolute/y" in names(tree)
    assert stat.S_ISLNK(at(tree, "lib").mode)


# -- the file system

RICH: list[Entry] = [
    entry("./", "dir", mode=0o711),
    entry("bin/su", data=b"\x7fELF" * 3000, mode=0o4755, uid=0, gid=5),
    entry("etc/conf", data=b"text\n", mode=0o600, uid=70_000, gid=80_000, mtime=1_234_567_890),
    entry("etc/hard", "hard", target="etc/conf", mode=0o600, uid=70_000, gid=80_000, mtime=1_234_567_890),
    entry("etc/link", "link", target="/x" * 500),
    entry("tmp", "dir", mode=0o1777),
    entry("dev/tty", "char", device=(5, 300), mode=0o666),
    entry("dev/sda", "block", device=(8, 1)),
    entry("run/pipe", "fifo"),
    entry("empty"),
    entry("odd/a\nb"), entry("odd/\udcff\udcfe"), entry("odd/" + "n" * 255), entry("odd/żółć"), entry("odd/ "),
    *[entry(f"many/file-with-a-name-{number}", data=b"%d" % number) for number in range(700)],
    entry("exactly", data=b"p" * 8192),
    entry("zeroes", data=bytes(100_000) + b"end"),
]  # fmt: skip


@needs_fsck
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to others, which the comparison is about")
def test_erofs_own_tool_extracts_what_tar_does(tmp_path: Path) -> None:
    archive = layer(*RICH)
    merge(archive, image=tmp_path / "image")
    extract = ["fsck.erofs", "--preserve", f"--extract={tmp_path / 'ours'}", str(tmp_path / "image")]
    subprocess.run(extract, check=True, capture_output=True)
    (tmp_path / "theirs").mkdir()
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        file.extractall(tmp_path / "theirs", numeric_owner=True, filter="fully_trusted")
    ours, theirs = (snapshot(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]} == {}


def snapshot(top: Path) -> dict[bytes, tuple[object, ...]]:
    """What a reader of a file tree can see of it."""
    found: dict[bytes, tuple[object, ...]] = {}
    root = os.fsencode(top)
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content: object = None
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            seconds = 0 if stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode) else int(status.st_mtime)
            # fsck.erofs gives files to their owners after it set their modes, which takes set-user-id away, and makes
            # copies of links; tests/integration/test_oci.py sees both in a guest.
            found[os.path.relpath(path, root)] = (
                status.st_mode & ~0o6000, status.st_uid, status.st_gid, status.st_rdev, seconds, content
            )  # fmt: skip
    return found


@needs_fsck
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_tree_is_a_sound_file_system(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    component = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0"), min_size=1, max_size=30)
    paths = data.draw(st.lists(st.lists(component, min_size=1, max_size=4), max_size=60))
    values = {b"user.a": b"x" * data.draw(st.integers(0, 6000)), b"security.capability": b"\1" * 20}
    tree = Rootfs()
    tree.begin_layer()
    for path in paths:
        node = Inode(stat.S_IFLNK | 0o777)
        node.target = b"t" * data.draw(st.integers(1, 4095))
        if data.draw(st.booleans()):
            node.xattrs = values
        try:
            tree.add("/".join(path).encode(), node)
        except ImageError:
            continue  # "." and ".." and what leads through links
    image = tmp_path_factory.mktemp("erofs") / "image"
    with image.open("w+b") as file:
        Writer(file.fileno(), 1 << 40).finish(tree, bytes(16))
    done = subprocess.run(["fsck.erofs", "--extract", str(image)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image.unlink()


def test_what_is_hidden_or_zero_takes_no_room(tmp_path: Path) -> None:
    merge(
        layer(entry("big", data=os.urandom(4 << 20)), entry("sparse", data=bytes(8 << 20))),
        layer(entry(".wh.big")),
        image=tmp_path / "image",
    )
    assert (tmp_path / "image").stat().st_blocks * 512 < 1 << 20


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        merge(layer(*RICH), image=tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("form", ["0.0", "0.1", "1.0", "gnu"])
def test_sparse_files_of_gnu_tar_are_whole(tmp_path: Path, form: str) -> None:
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        for place in range(0, 40 << 20, 3 << 20):
            file.seek(place)
            file.write(b"piece at %d" % place)
        file.truncate(50 << 20)
    how = ["--format=gnu"] if form == "gnu" else ["--format=pax", f"--sparse-version={form}"]
    subprocess.run(["tar", "--sparse", *how, "-C", tmp_path, "-cf", tmp_path / "tar", "sparse"], check=True)
    with (tmp_path / "tar").open("rb") as file:
        [(member, content)] = [(item, list(pieces)) for item, pieces in tar.members(file.read)]
    assert member.size == 50 << 20 and member.name.endswith(b"sparse")
    whole = bytearray(member.size)
    for offset, data in content:
        whole[offset : offset + len(data)] = data
    assert bytes(whole) == source.read_bytes()
    assert (tmp_path / "tar").stat().st_size < 1 << 20


# -- compression


@pytest.mark.parametrize("how", ["plain", "gzip", "gzip members", "zstd", "zstd frames"])
def test_layers_are_unpacked_by_what_they_are(how: str) -> None:
    data = os.urandom(300_000) + bytes(2_000_000)
    packed = {
        "plain": data,
        "gzip": gzip.compress(data),
        "gzip members": gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + bytes(512),
        "zstd": zstandard.compress(data),
        "zstd frames": b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstandard.compress(data[:5]) + zstandard.compress(data[5:]),
    }[how]
    stream = LayerStream(decompressed(io.BytesIO(packed)), 1 << 30)
    assert stream.read(7) + stream.read(5_000_000) == data


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_damaged_layer_is_an_error(pack) -> None:  # type: ignore[no-untyped-def]
    packed = pack(os.urandom(100_000))
    with pytest.raises(ImageError, match="cut short|damaged"):
        stream = LayerStream(decompressed(io.BytesIO(packed[:50_000])), 1 << 30)
        if len(stream.read(100_000)) < 100_000:
            raise ImageError("cut short")
    with pytest.raises(ImageError):
        broken = packed[:20_000] + bytes(100) + packed[20_100:]
        LayerStream(decompressed(io.BytesIO(broken)), 1 << 30).finish()
        if pack is zstandard.compress:
            raise ImageError("a frame without a checksum is found by the layer's digest")


# -- hostile archives


@pytest.mark.parametrize(("entries", "said"), [
    ([entry("../outside")], "leads out"),
    ([entry("a/../../outside")], "leads out"),
    ([entry("a", "link", target="/"), entry("a/../x")], "leads out"),
    ([entry("x", "hard", target="../../etc/passwd")], "leads out"),
    ([entry("x", "hard", target="missing")], "not there"),
    ([entry("d", "dir"), entry("x", "hard", target="d")], "directory"),
    ([entry("a", "link", target="b"), entry("b", "link", target="a"), entry("a/x")], "too many symbolic links"),
    ([entry("f"), entry("f/x")], "is a file"),
    ([entry("n" * 256)], "255 bytes"),
    ([entry("d", "char", device=(5000, 1))], "no device"),
    ([entry("x", uid=1 << 33)], "32 bits"),
    ([entry("x", xattrs={"user." + "n" * 300: "v"})], "attribute"),
    ([entry("x", xattrs={"user.a": "v" * 70_000})], "attribute"),
    ([entry(".")], "root is no directory"),
    ([entry(".wh.")], "nothing"),
    ([entry("/".join("d" * 2000)), entry("x" * 5000)], "longer"),
])  # fmt: skip
def test_hostile_members_end_with_one_line(entries: list[Entry], said: str) -> None:
    with pytest.raises(ImageError, match=said) as error:
        merge(layer(*entries))
    assert "\n" not in str(error.value)


def test_links_out_of_the_image_stay_in_it() -> None:
    tree = merge(layer(
        entry("escape", "link", target="/../../../../etc"), entry("escape/shadow", data=b"ours"),
        entry("p", "link", target="/proc/self/root"), entry("p/tmp/x"),
    ))  # fmt: skip
    assert "/etc/shadow" in names(tree) and "/proc/self/root/tmp/x" in names(tree)


def test_limits_on_files_text_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rootfs, "MAX_ENTRIES", 100)
    with pytest.raises(ImageError, match="more than 100 files"):
        merge(layer(*[entry("same") for _ in range(101)]))
    with pytest.raises(ImageError, match="more than 100 files"):
        merge(layer(entry("/".join("d" * 101))))
    monkeypatch.setattr(rootfs, "MAX_TEXT", 10_000)
    with pytest.raises(ImageError, match="names and attributes"):
        merge(layer(*[entry("x", "link", target="t" * 1000) for _ in range(11)]))
    monkeypatch.setattr(rootfs, "MAX_STEPS", 1000)
    with pytest.raises(ImageError, match="looked up"):
        merge(layer(entry("/".join("d" * 40)), *[entry(".wh..wh..opq")] * 30))


def test_a_bomb_is_stopped_by_the_limit() -> None:
    bomb = gzip.compress(bytes(64 << 20))
    with pytest.raises(ImageError, match="unpacks to more"):
        LayerStream(decompressed(io.BytesIO(bomb)), 1 << 20).finish()
    descriptor = os.memfd_create("image")
    try:
        with pytest.raises(ImageError, match="more than"):
            apply(LayerStream(decompressed(io.BytesIO(huge_sparse())), 1 << 30), Rootfs(), Writer(descriptor, 1 << 30))
    finally:
        os.close(descriptor)


def huge_sparse() -> bytes:
    """A file that says it has 2^62 bytes, all of them holes."""
    member = tarfile.TarInfo("x")
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.realsize": str(1 << 62), "GNU.sparse.map": "0,0"}
    return member.tobuf(tarfile.PAX_FORMAT) + bytes(1024)


@given(st.binary(max_size=3000))
@settings(deadline=None)
def test_any_bytes_are_an_archive_or_an_error(data: bytes) -> None:
    for archive in (data, layers.GZIP + data, gzip.compress(data)):
        try:
            merge(archive)
        except ImageError as error:
            assert "\n" not in str(error)


SAMPLE = layer(*RICH[:16], entry("x" * 200, data=b"d" * 1000, xattrs={"user.a": "b"}))


@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=200)
def test_a_damaged_archive_is_an_archive_or_an_error(changes: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLE)
    for place, value in changes:
        data[place] = value
        block = place // 512 * 512
        if data[block + 257 : block + 262] == b"ustar":  # so that more than the checksum is looked at
            head = data[block : block + 512]
            data[block + 148 : block + 156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 256)
    try:
        merge(bytes(data))
    except ImageError as error:
        assert "\n" not in str(error)
