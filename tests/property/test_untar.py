"""Archives from a hostile guest: nothing outside the target changes, whatever the bytes; only UntarError is raised."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.guest.untar import MAX_EXTENDED, UntarError, unpack

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


class Slowly:
    """Gives a few bytes at a time."""

    def __init__(self, data: bytes, step: int = 1000) -> None:
        self._file, self._step = io.BytesIO(data), step

    def read(self, size: int, /) -> bytes:
        return self._file.read(min(size, self._step))


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "", mode: int = 0o644) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mode = kind, len(data), link, mode
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


END = bytes(1024)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A target beside something precious."""
    (tmp_path / "precious").write_text("untouched")
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def untouched(place: Path) -> bool:
    names = {path.name for path in place.parent.iterdir()}
    return names == {"precious", "target"} and (place.parent / "precious").read_text() == "untouched"


@pytest.mark.parametrize("archive", [
    member("../precious", data=b"evil"), member("/tmp/evil-loopvisor", data=b"evil"),
    member("a/../../precious", data=b"evil"), member("..", tarfile.DIRTYPE),
    member("l", tarfile.SYMTYPE, link="..") + member("l/precious", data=b"evil"),
    member("l", tarfile.SYMTYPE, link="..") + member("l", tarfile.SYMTYPE, link="..") + member("l/x", data=b"evil"),
    member("d", tarfile.DIRTYPE) + member("d", tarfile.SYMTYPE, link="..") + member("d/precious", data=b"evil"),
    member("h", tarfile.LNKTYPE, link="../precious") + member("h", data=b"evil"),
    member("h", tarfile.LNKTYPE, link="/etc/passwd"), member("", data=b"evil"), member(".", data=b"evil"),
    member("l", tarfile.SYMTYPE, link="../precious") + member("h", tarfile.LNKTYPE, link="l"),
    member("l", tarfile.SYMTYPE, link=".."), member("old/precious", data=b"evil"),
])  # fmt: skip
@pytest.mark.parametrize("twice", [False, True])
def test_nothing_outside_changes(archive: bytes, twice: bool, place: Path) -> None:
    """Also where a link of an earlier copy already stands."""
    if twice:
        (place / "l").symlink_to("..")
        (place / "old").symlink_to("..")
    for _ in range(2):
        try:
            unpack(Slowly(archive + END), place)
        except (UntarError, OSError):
            pass
        assert untouched(place)
    assert not Path("/tmp/evil-loopvisor").exists()


def test_modes_and_kinds(place: Path) -> None:
    archive = member("set", data=b"x", mode=0o6755) + member("dir", tarfile.DIRTYPE, mode=0o7000)
    archive += member("null", tarfile.CHRTYPE) + member("fifo", tarfile.FIFOTYPE) + member("dir/file", data=b"y")
    unpack(Slowly(archive + END), place)
    assert (place / "set").stat().st_mode & 0o7777 == 0o755
    assert (place / "dir").stat().st_mode & 0o7777 == 0o700
    assert sorted(path.name for path in place.rglob("*")) == ["dir", "file", "set"]


@pytest.mark.parametrize("archive", [
    b"", b"x", bytes(511), member("a", data=b"x" * 600)[:-600], b"x" * 512, member("a", data=b"x") + b"junk" * 128,
    member("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"x" * (MAX_EXTENDED + 1)) + member("a"),
    member("x", tarfile.XHDTYPE, b"99999 path=b\n") + member("a"),
    member("x", tarfile.XHDTYPE, b"0 =\n") + member("a"),
    member("x", tarfile.XHDTYPE, b"12 size=-5\n") + member("a"),
    member("x", tarfile.XHDTYPE, b"nonsense") + member("a"),
])  # fmt: skip
def test_broken_archives_are_named(archive: bytes, place: Path) -> None:
    with pytest.raises(UntarError):
        unpack(Slowly(archive), place)
    assert untouched(place)


NAMES = st.lists(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=120).filter(
        lambda name: name not in (".", "..") and len(name.encode()) < 250
    ),
    min_size=1, max_size=3, unique=True,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    files=st.dictionaries(NAMES.map("/".join), st.binary(max_size=2000), max_size=4),
    kind=st.sampled_from([*FORMATS]), step=st.integers(1, 3000),
)  # fmt: skip
def test_what_tarfile_writes_is_read(
    files: dict[str, bytes], kind: str, step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("tar")
    buffer = io.BytesIO()
    kept = {}
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind]) as archive:
        for name, data in files.items():
            if any(name.startswith(f"{other}/") or other.startswith(f"{name}/") for other in kept):
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                archive.addfile(info, io.BytesIO(data))
            except ValueError:
                continue  # too long a name for ustar
            kept[name] = data
    unpack(Slowly(buffer.getvalue(), step), place)
    assert {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()} == kept


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_any_bytes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Mostly archives with a few bytes changed."""
    base = bytearray(
        member("d", tarfile.DIRTYPE) + member("d/f", data=b"x" * 700) + member("l", tarfile.SYMTYPE, link="d/f")
        + member("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"d/long\0") + member("s", data=b"y")
        + member("x", tarfile.XHDTYPE, b"11 path=d/g\n"[:12]) + member("g", data=b"z") + END
    )  # fmt: skip
    for _ in range(data.draw(st.integers(0, 4))):
        base[data.draw(st.integers(0, len(base) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        for at in range(0, len(base), 512):  # right checksums again
            total = sum(base[at : at + 148]) + 8 * 32 + sum(base[at + 156 : at + 512])
            base[at + 148 : at + 156] = b"%06o\0 " % (total & 0o777777)
    place = tmp_path_factory.mktemp("tar")
    target = place / "target"
    try:
        unpack(Slowly(bytes(base)), target)
    except (UntarError, OSError):
        pass
    assert os.listdir(place) in ([], ["target"])
