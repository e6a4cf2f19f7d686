"""Sets of processors, and threads that are found and moved."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.libvirt import host, pinning
from vmm.libvirt.cpusets import cpu_set, cpu_text, from_map
from vmm.libvirt.errors import LibvirtError
from vmm.libvirt.spec import EMULATOR, Pins


@settings(deadline=None)
@given(st.frozensets(st.integers(0, 2000), min_size=1, max_size=40))
def test_sets_there_and_back(cpus: frozenset[int]) -> None:
    assert cpu_set(cpu_text(cpus)) == cpus
    data = bytearray(256)
    for cpu in cpus:
        data[cpu // 8] |= 1 << cpu % 8
    assert from_map(bytes(data)) == cpus


def test_what_users_write() -> None:
    assert cpu_set("0-3,^2, 8") == {0, 1, 3, 8}
    for text in ("", "a", "3-1", "^1", "1,,2", "99999", "-1", "0-99999", "0-9," * 50_000 + "1"):
        with pytest.raises(LibvirtError):
            cpu_set(text)
    with pytest.raises(LibvirtError):
        from_map(bytes(4))


def test_pins_change_one_by_one() -> None:
    pins = Pins().changed(1, frozenset({0})).changed(EMULATOR, frozenset({1})).changed(0, frozenset({1}))
    assert pins == Pins(((0, frozenset({1})), (1, frozenset({0}))), frozenset({1}))
    assert pins.changed(1, None).changed(0, None).changed(EMULATOR, None) == Pins()


def test_threads_are_found_by_name_and_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process itself: a thread that is called as a vCPU's is."""
    home = os.sched_getaffinity(0)
    if len(home) < 2:
        pytest.skip("this host has one processor")
    first, *_, last = sorted(home)
    end, named, thread = threading.Event(), threading.Event(), []

    def vcpu() -> None:
        thread.append(threading.get_native_id())
        Path(f"/proc/self/task/{thread[0]}/comm").write_text("vcpu7")
        named.set()
        end.wait()

    running = threading.Thread(target=vcpu)
    running.start()
    try:
        named.wait()
        threads = pinning.threads_of(os.getpid())
        assert threads.vcpus[7] == thread[0] and thread[0] not in threads.others
        pinning.apply(os.getpid(), Pins(((7, frozenset({last})),)), frozenset(home))
        assert os.sched_getaffinity(thread[0]) == {last} and os.sched_getaffinity(0) == home
        pinning.apply(os.getpid(), Pins(((7, frozenset({first})),)), frozenset(home))
        assert host.thread_time(os.getpid(), thread[0])[1] >= 0
        assert os.sched_getaffinity(thread[0]) == {first}
        pinning.apply(os.getpid(), Pins(((8, frozenset({last})),)), frozenset(home))
        assert os.sched_getaffinity(thread[0]) == home  # it is not pinned any more
    finally:
        end.set()
        running.join()
    assert pinning.threads_of(1 << 22) == ({}, 0, [], []) and host.thread_time(os.getpid(), 1 << 22) == (0, -1)


def test_what_the_host_says_of_its_boards(tmp_path: Path) -> None:
    assert host.system_information(tmp_path) is None
    (tmp_path / "bios_vendor").write_text("Some & Sons\n")
    (tmp_path / "product_name").write_text("Box\x01 1\n")
    told = host.system_information(tmp_path)
    assert told is not None
    assert '<entry name="vendor">Some &amp; Sons</entry>' in told.replace("'", '"') and "Box 1" in told
    assert "chassis" not in told
