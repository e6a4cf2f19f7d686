"""The boot timeline as data, as text and as a picture; and that a machine's moments are taken where they happen."""

from __future__ import annotations

import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images import guests
from tests.support.command import vmm
from vmm import VirtualMachine
from vmm.timeline import ALONE, PHASES, Timeline, process_start
from vmm.timelineview import COLOURS, as_svg, as_text

SVG = "{http://www.w3.org/2000/svg}"
NAMES = sorted({name for phase in PHASES for name in phase[2:]} | set(ALONE))


def whole() -> Timeline:
    timeline = Timeline()
    order = ["exec", "begin", "configured", "enter", "load", "loaded", "built", "resume", "first exit", "init", "root",
             "agent", "command", "first output", "status", "end", "closed"]  # fmt: skip
    for number, name in enumerate(order):
        timeline.mark(name, (5_000_000_000 + number * 10_000_000, number * 7_000_000))
    return timeline


def test_phases_lie_between_their_moments() -> None:
    timeline = whole()
    assert timeline.moments[0] == ("exec", 0.0)
    found = {phase.name: (phase.where, round(phase.begin, 3), round(phase.end, 3)) for phase in timeline.phases()}
    assert found["build"] == ("host", 0.03, 0.06)
    assert found["kernel"] == ("guest", 0.07, 0.09)
    assert set(found) == {name for name, *_ in PHASES}
    assert timeline.to_dict()["phases"][0] == {
        "name": "python", "where": "host", "begin": 0.0, "end": 0.01, "processor": 0.007
    }  # fmt: skip


def test_the_first_moment_of_a_name_counts() -> None:
    timeline = Timeline()
    timeline.mark("init", (1, 0))
    timeline.mark("init", (2, 5))
    timeline.mark("root", (3, 1))
    assert timeline.phases() == [("init", "guest", 0.0, 2e-9, 1e-9)]


@given(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 10**13)), st.text(max_size=20))
def test_any_timeline_can_be_shown(moments: dict[str, int], title: str) -> None:
    timeline = Timeline()
    for name, at in moments.items():
        timeline.mark(name, (at, at // 2))
    assert as_text(timeline, title).count("|") >= 2 * len(timeline.phases())
    clean = "".join(char for char in title if char.isprintable())
    ElementTree.fromstring(as_svg(timeline, clean))


def test_the_picture_is_to_scale() -> None:
    timeline = whole()
    picture = ElementTree.fromstring(as_svg(timeline, "a & b <c>"))
    assert picture.findtext(f"{SVG}title") == "a & b <c>"
    bars = {}
    for rect in picture.iter(f"{SVG}rect"):
        said = rect.findtext(f"{SVG}title")
        if said:
            bars[said.partition(",")[0]] = rect
    for phase in timeline.phases():
        bar = bars[phase.name]
        assert bar.get("fill") == COLOURS[phase.where]
        unit = float(bars["build"].get("width", 0)) / 0.03
        assert float(bar.get("width", 0)) == pytest.approx((phase.end - phase.begin) * unit, abs=0.02)
        assert float(bar.get("x", 0)) - float(bars["python"].get("x", 0)) == pytest.approx(phase.begin * unit, abs=0.02)


def test_the_start_of_this_process_is_in_the_past() -> None:
    start, taken = process_start()
    assert start < time.monotonic_ns() and taken == 0
    assert abs(process_start()[0] - start) < 1_000_000_000


async def test_a_machine_marks_its_moments_in_order() -> None:
    before = time.monotonic_ns()
    async with VirtualMachine(kernel=guests.path("hello"), memory="16M", platform="bare") as vm:
        assert {"enter", "load", "loaded", "built"} == {name for name, _ in vm.timeline.moments}
        await vm.run()
    names = [name for name, _ in vm.timeline.moments]
    assert names[:5] == ["enter", "load", "loaded", "built", "resume"]
    assert names.index("first exit") < names.index("first console byte") < names.index("end") < names.index("closed")
    assert vm.timeline.moments[-1].seconds <= (time.monotonic_ns() - before) / 1e9


def test_timing_goes_to_stderr_and_the_picture_to_its_file(tmp_path: Path) -> None:
    done = vmm(tmp_path, "run", "hello", "--name", "h", "--timing", "--timing-svg", str(tmp_path / "boot.svg"))
    assert (done.returncode, done.stdout) == (0, "Hello from guest mode!\n")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("h: ") and lines[0].endswith(" ms")
    assert [line.split()[0] for line in lines[2:8]] == ["python", "image", "loop", "build", "unpack", "close"]
    assert any(line.strip().startswith("first console byte") for line in lines)
    assert ElementTree.parse(tmp_path / "boot.svg").getroot().tag == f"{SVG}svg"
    done = vmm(tmp_path, "run", "hello", "--timing-svg", "/nothing/boot.svg")
    assert done.returncode == 4
    assert done.stderr == "vmm: timing-svg: /nothing/boot.svg: no such file or directory\n"
