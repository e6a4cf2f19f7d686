"""Names of running machines: one owner each, whatever races and whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli import machines
from tests.support.command import VMM, environment, wait_for
from vmm.errors import ConfigError, HostError
from vmm.management import control, registry
from vmm.management.registry import CONTROL, HeldName, entries, find, runtime_directory
from vmm.management.sockets import listen


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "loopvisor"


def test_a_name_has_one_owner(runtime: Path) -> None:
    slot = HeldName("box")
    slot.write_info({"pid": 4711})
    with pytest.raises(ConfigError, match="'box' is in use by process 4711; choose another --name"):
        HeldName("box")
    assert [entry.name for entry in entries()] == ["box"]
    assert find("box").info == {"pid": 4711}
    slot.release()
    slot.release()
    assert entries() == []
    assert not list(runtime.iterdir())
    HeldName("box").release()


def test_racing_owners(runtime: Path) -> None:
    """At no time do two hold one name, though each removes the directory when it leaves."""
    holding = 0
    most = 0
    got = [0] * 6
    guard = threading.Lock()

    def contend(index: int) -> None:
        nonlocal holding, most
        for _ in range(60):
            try:
                slot = HeldName("same")
            except ConfigError:
                entries()
                continue
            with guard:
                holding += 1
                most = max(most, holding)
                got[index] += 1
            with guard:
                holding -= 1
            slot.release()

    threads = [threading.Thread(target=contend, args=(index,)) for index in range(len(got))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert sum(got) > 0
    assert entries() == []


def test_unknown_name_lists_the_known() -> None:
    slots = [HeldName("a"), HeldName("b")]
    with pytest.raises(ConfigError, match="no machine is called 'c'; running: a, b"):
        find("c")
    for slot in slots:
        slot.release()


def test_a_directory_of_somebody_else_is_refused(runtime: Path) -> None:
    runtime.symlink_to("/")
    with pytest.raises(HostError, match="belongs to somebody else; set XDG_RUNTIME_DIR"):
        runtime_directory()


def test_an_open_directory_is_closed(runtime: Path) -> None:
    runtime.mkdir(mode=0o777)
    runtime.chmod(0o777)
    assert runtime_directory().stat().st_mode & 0o777 == 0o700


def test_damaged_information_is_ignored(runtime: Path) -> None:
    slot = HeldName("x")
    (runtime / "x/info.json").write_text("{")
    assert find("x").info == {}
    slot.release()


def test_socket_mode_does_not_depend_on_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        listener = listen(tmp_path / "s", "test")
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        assert os.umask(0) == 0
        listener.close()
    finally:
        os.umask(before)


@pytest.mark.parametrize("moment", range(8))
def test_killed_at_any_moment_leaves_nothing_after_the_next_command(runtime: Path, moment: int) -> None:
    """SIGKILL while it starts, runs, or ends: what is left vanishes with the next look."""
    process = subprocess.Popen(
        [*VMM, "run", "hello", "--name", "victim", "--console", "none", "--reboot"],
        env=environment(runtime.parent), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    files = [runtime / "victim", runtime / "victim/lock", runtime / "victim/console.sock",
             runtime / "victim/control.sock", runtime / "victim/info.json"]  # fmt: skip
    if moment:
        wait_for(lambda: files[min(moment, len(files)) - 1].exists())
    process.send_signal(signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    assert entries() == []
    assert not runtime.exists() or not list(runtime.iterdir())


def test_a_machine_that_does_not_listen_yet_is_waited_for(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = HeldName("starting")
    listener = socket.socket(socket.AF_UNIX)

    def serve() -> None:
        with listener.accept()[0] as client:
            client.recv(1000)
            client.sendall(b'{"ok": true, "state": "running"}\n')

    server = threading.Thread(target=serve)

    def sleep(_seconds: float) -> None:
        listener.bind(str(slot.path / CONTROL))
        listener.listen()
        server.start()

    monkeypatch.setattr("vmm.management.control.time.sleep", sleep)
    try:
        assert control.request(find("starting"), "status") == {"state": "running"}
    finally:
        server.join(10)
        listener.close()
        slot.release()


def test_a_machine_that_ends_while_it_is_asked_is_not_listed(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slot = HeldName("ending")
    entry = find("ending")
    slot.release()
    with pytest.raises(ConfigError, match="no machine is called 'ending'"):
        control.request(entry, "status")
    looks = iter([[entry]])
    monkeypatch.setattr(machines, "entries", lambda: next(looks, []))
    machines.list_machines(json=True, stats=False, metrics=False)
    assert capsys.readouterr().out == "[]\n"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.dictionaries(st.text(), st.text() | st.integers() | st.floats(-1e300, 1e300) | st.lists(st.text())))
def test_information_is_json(info: dict[str, object]) -> None:
    assert json.loads(registry._json(info)) == info


def test_information_holds_arguments_that_are_no_text() -> None:
    assert json.loads(registry._json(["\udcff", 'a"b\\', "\x00\n"])) == ["\udcff", 'a"b\\', "\x00\n"]
