"""The terminal session that the README shows is what the product says today."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from images.errors import ImageError
from tests.support.command import ROOT, environment

pytestmark = pytest.mark.debian


@pytest.fixture(scope="module")
def session() -> ModuleType:
    specification = importlib.util.spec_from_file_location("session", ROOT / "docs" / "session.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["session"] = module
    specification.loader.exec_module(module)
    return module


def plain(lines: list[str]) -> list[str]:
    """Without what differs from run to run: process ids, times, and the width of their columns."""
    return [re.sub(r"\d+", "N", re.sub(r" +", " ", line)) for line in lines]


def test_the_picture_shows_what_the_commands_print(
    session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from images import catalog

    try:
        catalog.resolve("linux", build=True)
    except ImageError as error:
        pytest.skip(f"no linux image: {error}")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    shown = session.transcript(session.PICTURE.read_text())
    now = [line.text for line in session.record(environment(tmp_path))]
    assert plain(now) == plain(shown), "python docs/session.py records it anew"


def test_the_picture_is_whole_without_animation(session: ModuleType) -> None:
    """Every line is there and visible to a viewer that does not animate; none is wider than the picture."""
    picture = ElementTree.fromstring(session.PICTURE.read_text())
    texts = [each for each in picture.iter() if each.tag.endswith("text")]
    assert ["".join(each.itertext()) for each in texts] == session.transcript(session.PICTURE.read_text())
    assert all(each.get("visibility") is None for each in texts)
    assert all(len("".join(each.itertext())) <= session.COLUMNS for each in texts)
    moments = [float(each.get("dur", "")[:-1]) for each in picture.iter() if each.tag.endswith("set")]
    assert moments == sorted(moments)
    assert session.svg([session.Line("<&>\"'", 0.5)]).count("&lt;&amp;&gt;\"'") == 1
