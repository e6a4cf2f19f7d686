"""`vmm serve` to the client of E2B's API from PyPI, unmodified: its flows, synchronous and asynchronous."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from images.oci import find
from tests.support.oci import base, entry, layer, layout, need_container_kernel
from tests.support.ociregistry import registry
from tests.support.serve import SECONDS, Server, eventually, served

e2b = pytest.importorskip("e2b", reason="the package e2b is not installed: pip install '.[test]'")
httpx = pytest.importorskip("httpx", reason="httpx comes with the package e2b")
pytestmark = [pytest.mark.debian, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def server(linux: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("serve")) as server:
        yield server


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a user sets."""
    monkeypatch.setenv("E2B_API_URL", server.url)
    monkeypatch.setenv("E2B_SANDBOX_URL", server.url)
    monkeypatch.setenv("E2B_API_KEY", "local")


@pytest.fixture
def box(environment: None) -> Iterator[Any]:
    box = e2b.Sandbox.create(timeout=300, metadata={"who": "test"}, envs={"GREETING": "hello"})
    yield box
    box.kill()


def test_commands(box: Any) -> None:
    result = box.commands.run("echo $GREETING $MORE; echo oops >&2; pwd", envs={"MORE": "more"}, cwd="/etc")
    assert (result.stdout, result.stderr, result.exit_code) == ("hello more\n/etc\n", "oops\n", 0)
    with pytest.raises(e2b.CommandExitException) as failed:
        box.commands.run("exit 3")
    assert failed.value.exit_code == 3
    assert box.commands.run("id -u", user="nobody").stdout == "65534\n"
    parts: list[str] = []
    box.commands.run("echo one; sleep 0.2; echo two", on_stdout=parts.append)
    assert "".join(parts).split() == ["one", "two"]
    with pytest.raises(e2b.TimeoutException):
        box.commands.run("sleep 100", timeout=1)
    eventually(lambda: not box.commands.list(), "a command goes with its time")


def test_commands_in_the_background(box: Any) -> None:
    handle = box.commands.run("read line; echo got $line; cat", background=True, stdin=True)
    (listed,) = box.commands.list()
    assert (listed.pid, listed.cmd, listed.args[:2]) == (handle.pid, "/bin/bash", ["-l", "-c"])
    again = box.commands.connect(handle.pid)
    box.commands.send_stdin(handle.pid, "this\n")
    handle.send_stdin("that\n")
    box.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == again.wait().stdout == "got this\nthat\n"
    assert box.commands.list() == []
    sleeper = box.commands.run("sleep 100", background=True)
    assert box.commands.kill(sleeper.pid) and not box.commands.kill(sleeper.pid + 1000)
    with pytest.raises(e2b.CommandExitException) as killed:
        sleeper.wait()
    assert killed.value.exit_code == 128 + signal.SIGKILL
    # Who goes away leaves the program alone.
    left = box.commands.run("sleep 0.5; echo there >/tmp/left", background=True)
    left.disconnect()
    eventually(lambda: box.files.exists("/tmp/left"), "a program runs on when nobody listens")


def test_files(box: Any) -> None:
    files = box.files
    assert files.write("/tmp/new/deep.txt", "text").path == "/tmp/new/deep.txt"
    assert files.read("/tmp/new/deep.txt") == "text"
    large = os.urandom(1 << 20)
    written = files.write_files([{"path": "/tmp/a", "data": large}, {"path": "relative", "data": "b"}])
    assert [one.path for one in written] == ["/tmp/a", "/root/relative"]
    assert files.read("/tmp/a", format="bytes") == large
    assert b"".join(files.read("/tmp/a", format="stream")) == large
    files.write("/tmp/zipped", large, gzip=True)
    assert box.commands.run("cmp /tmp/a /tmp/zipped && stat -c %s /tmp/a").stdout == "1048576\n"
    assert files.make_dir("/tmp/new/dir/below") and not files.make_dir("/tmp/new/dir")
    assert [(one.name, one.type.value) for one in files.list("/tmp/new")] == [("deep.txt", "file"), ("dir", "dir")]
    assert [one.path for one in files.list("/tmp/new", depth=2)][-1] == "/tmp/new/dir/below"
    files.rename("/tmp/new/deep.txt", "/tmp/other/name")
    assert files.exists("/tmp/other/name") and not files.exists("/tmp/new/deep.txt")
    box.commands.run("ln -s /tmp/other/name /tmp/link; chmod 600 /tmp/other/name")
    link, info = files.get_info("/tmp/link"), files.get_info("/tmp/other/name")
    assert (link.type.value, link.symlink_target) == ("symlink", "/tmp/other/name")
    assert (info.size, info.permissions, info.owner) == (4, "-rw-------", "root")
    with pytest.raises(e2b.SandboxException, match="[Pp]ermission"):
        files.read("/tmp/other/name", user="nobody")
    files.remove("/tmp/new")
    with pytest.raises(e2b.FileNotFoundException):
        files.list("/tmp/new")
    for missing in ("/none", "/tmp/a/b"):
        with pytest.raises(e2b.SandboxException):
            files.read(missing)
    watch = files.watch_dir("/tmp/other")
    files.write("/tmp/other/more", "x")
    seen: list[Any] = []
    eventually(lambda: seen.extend(watch.get_new_events()) or len(seen) > 1, "changes are told")
    assert (seen[0].name, seen[0].type.value) == ("more", "create")
    watch.stop()


def test_urls_for_files(box: Any, server: Server) -> None:
    to_box = {"E2b-Sandbox-Id": box.sandbox_id}
    url = box.upload_url("/tmp/up", use_signature_expiration=100)
    assert httpx.post(url, headers=to_box, files={"file": ("name", b"content")}).json()[0]["path"] == "/tmp/up"
    down = box.download_url("/tmp/up")
    assert httpx.get(down, headers=to_box).content == b"content"
    assert httpx.get(down.replace("%2Ftmp%2Fup", "%2Fetc%2Fpasswd"), headers=to_box).status_code == 401
    assert httpx.get(url, headers=to_box).status_code == 401, "a signature to write is none to read"
    old = box.download_url("/tmp/up", use_signature_expiration=-1)
    assert httpx.get(old, headers=to_box).status_code == 401
    assert httpx.get(f"{server.url}/files?path=/etc/passwd", headers=to_box).status_code == 401


async def test_terminals_and_watches_asynchronously(environment: None) -> None:
    box = await e2b.AsyncSandbox.create(timeout=300)
    shown = bytearray()
    terminal = await box.pty.create(e2b.PtySize(rows=30, cols=100), on_data=shown.extend)

    async def sees(text: bytes) -> None:
        async with asyncio.timeout(SECONDS):
            while text not in shown:
                await asyncio.sleep(0.02)

    await box.pty.send_stdin(terminal.pid, b"stty size\n")
    await sees(b"30 100")
    await box.pty.resize(terminal.pid, e2b.PtySize(rows=50, cols=120))
    await box.pty.send_stdin(terminal.pid, b"stty size; exit 4\n")
    await sees(b"50 120")
    with pytest.raises(e2b.CommandExitException) as ended:
        await terminal.wait()
    assert ended.value.exit_code == 4
    events: list[Any] = []
    watch = await box.files.watch_dir("/tmp", on_event=events.append, recursive=True, include_entry=True)
    await box.files.write("/tmp/made/file", "x")
    async with asyncio.timeout(SECONDS):
        while not any(event.name == "made/file" and event.type.value == "create" for event in events):
            await asyncio.sleep(0.02)
    assert events[0].name == "made" and events[0].entry.path == "/tmp/made"
    await watch.stop()
    cat = await box.commands.run("cat", background=True, stdin=True)
    async with box.commands.stream_input(cat.pid) as stream:
        for word in ("one ", "two ", "three\n"):
            await stream.send(word)
    await box.commands.close_stdin(cat.pid)
    assert (await cat.wait()).stdout == "one two three\n"
    assert await box.kill() and not await box.is_running()


def test_ports_are_reached_by_host_name_and_header(box: Any, server: Server) -> None:
    script = "mkdir /srv; echo page >/srv/index.html; httpd -f -p 8000 -h /srv"
    web = box.commands.run(script, background=True)
    host = box.get_host(8000)
    assert host == f"8000-{box.sandbox_id}.localhost:{server.port}"
    where = {"Host": host}
    eventually(lambda: httpx.get(f"{server.url}/index.html", headers=where).text == "page\n", "the port is open")
    assert httpx.get(f"{server.url}/none", headers=where).status_code == 404
    named = {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "8000"}
    assert httpx.get(f"{server.url}/index.html", headers=named).text == "page\n"
    closed = httpx.get(server.url, headers={"Host": box.get_host(8001)})
    assert closed.status_code == 502 and "port is not open" in closed.text
    box.commands.kill(web.pid)


def test_listing_and_times(box: Any) -> None:
    others = [e2b.Sandbox.create(timeout=300, metadata={"group": "g", "n": str(n)}) for n in range(3)]
    pages = e2b.Sandbox.list(query=e2b.SandboxQuery(metadata={"group": "g"}), limit=2)
    first = pages.next_items()
    assert pages.has_next
    second = pages.next_items()
    assert not pages.has_next
    assert [one.metadata["n"] for one in first + second] == ["2", "1", "0"], "the last one first"
    info = box.get_info()
    assert info.memory_mb == 256
    assert (info.template_id, info.metadata, info.state.value) == ("base", {"who": "test"}, "running")
    (metrics,) = box.get_metrics()
    assert metrics.mem_total > metrics.mem_used > 0 and metrics.disk_total > 0 and metrics.cpu_count == 1
    others[0].set_timeout(0)
    eventually(lambda: not others[0].is_running(), "a sandbox ends with its time")
    with pytest.raises(e2b.SandboxException, match="not found"):
        others[0].commands.run("true")
    others[1].set_timeout(200)
    assert others[1].get_info().end_at < info.end_at
    for other in others[1:]:
        assert other.kill() and not other.kill()


def test_pause_and_resume(box: Any) -> None:
    counter = box.commands.run(
        "i=0; while :; do i=$((i+1)); echo $i >/tmp/count; sleep 0.05; done", background=True
    )
    eventually(lambda: box.files.exists("/tmp/count"), "the program counts")
    assert box.pause()
    assert not box.pause(), "it is paused already"
    assert not box.is_running() and box.get_info().state.value == "paused"
    box.connect(timeout=300)
    before = int(box.files.read("/tmp/count") or "0")
    (running,) = box.commands.list()
    assert running.pid == counter.pid
    assert box.commands.run("echo $GREETING").stdout == "hello\n"
    eventually(lambda: int(box.files.read("/tmp/count").strip() or "0") > before, "the program goes on")
    assert box.commands.kill(counter.pid)
    eventually(lambda: not box.commands.list(), "it is killed")


def test_a_paused_sandbox_is_taken_up_by_a_request(environment: None) -> None:
    lifecycle = {"on_timeout": "pause", "auto_resume": True}
    box = e2b.Sandbox.create(timeout=300, lifecycle=lifecycle)
    box.files.write("/tmp/kept", "kept")
    box.set_timeout(0)
    eventually(lambda: box.get_info().state.value == "paused", "its time pauses it")
    assert box.files.read("/tmp/kept") == "kept"
    assert box.get_info().state.value == "running"
    box.kill()


async def test_twenty_at_once(environment: None, server: Server) -> None:
    """Each is its own; when they have ended nothing of them is left."""
    before = server.descriptors()

    async def one(number: int) -> str:
        box = await e2b.AsyncSandbox.create(timeout=300)
        try:
            await box.files.write("/tmp/own", str(number))
            result = await box.commands.run("cat /tmp/own", timeout=SECONDS)
            return result.stdout
        finally:
            await box.kill()

    assert await asyncio.gather(*(one(number) for number in range(20))) == [str(number) for number in range(20)]
    async with asyncio.timeout(SECONDS):
        while server.descriptors() > before + 25:  # connections that the client keeps
            await asyncio.sleep(0.05)
    assert not list((server.folder / "state" / "loopvisor" / "serve").glob("[a-z0-9]*"))


def test_templates(environment: None) -> None:
    for template in ("/etc/passwd", "oci:./x", "oci:/etc", "docker-archive:/x.tar", "../x"):
        with pytest.raises(e2b.SandboxException, match="400: template"):
            e2b.Sandbox.create(template)
    with pytest.raises(e2b.SandboxException, match="no image none-such"):
        e2b.Sandbox.create("none-such")


def test_what_is_not_there_is_said(environment: None, server: Server) -> None:
    with pytest.raises(e2b.BuildException, match=r"501: this server has no template builds;.*--template"):
        e2b.Template.build(e2b.Template().from_image("debian:12"), alias="own", cpu_count=1, memory_mb=512)
    with pytest.raises(e2b.VolumeException, match="501: this server has no volumes"):
        e2b.Volume.create("data")
    assert server.ask("GET", "/nonsense")[0] == 404
    assert server.ask("GET", "/sandboxes/none/logs")[0] == 501


@pytest.mark.skipif(not shutil.which("docker-registry"), reason="docker-registry is not installed")
@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")
def test_an_image_of_a_registry_is_a_template(environment: None, tmp_path: Path) -> None:
    """It is pulled when the first sandbox of it is asked for."""
    need_container_kernel()
    image = layout(
        tmp_path / "image", [base(), layer(entry("etc/made", data=b"here"))], Env=["PATH=/bin", "GREETING=hello"],
        User="alice", WorkingDir="/home/alice",
    )  # fmt: skip
    with registry(tmp_path) as served_images:
        served_images.push(image, "made/here:1")
        name = f"oci:{served_images.name}/made/here:1"
        for more in (2, 1, 0):  # a slow pull goes on after the client has given up
            try:
                box = e2b.Sandbox.create(name, timeout=300, request_timeout=SECONDS)
                break
            except e2b.TimeoutException:
                if not more:
                    raise
    try:
        result = box.commands.run("cat /etc/made; echo $GREETING; id -un; pwd", timeout=SECONDS)
        assert result.stdout.split() == ["here" + "hello", "alice", "/home/alice"]
        box.files.write("/tmp/new", "content")
        assert box.files.read("/tmp/new") == "content"
    finally:
        box.kill()
        find.remove(name)


def test_servers_that_end(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, it leaves nothing, and paused sandboxes are found; asked to end, it pauses those that run."""
    with served(tmp_path, cache=server.cache) as server:
        monkeypatch.setenv("E2B_API_URL", server.url)
        monkeypatch.setenv("E2B_SANDBOX_URL", server.url)
        running, paused = e2b.Sandbox.create(timeout=300), e2b.Sandbox.create(timeout=300)
        paused.files.write("/tmp/kept", "kept")
        assert paused.pause()
        assert server.process is not None
        group = server.process.pid
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
        eventually(lambda: not _members(group), "nothing of a killed server runs on")
        server.start()
        monkeypatch.setenv("E2B_API_URL", server.url)
        monkeypatch.setenv("E2B_SANDBOX_URL", server.url)
        assert [one.sandbox_id for one in e2b.Sandbox.list().next_items()] == [paused.sandbox_id]
        again = e2b.Sandbox.connect(paused.sandbox_id, timeout=300)
        assert again.files.read("/tmp/kept") == "kept"
        assert not e2b.Sandbox.kill(running.sandbox_id)
        again.commands.run("sleep 300", background=True)
        status, said = server.end()
        assert status == 0 and "1 sandbox paused, for the next server" in said
        server.start()
        monkeypatch.setenv("E2B_API_URL", server.url)
        monkeypatch.setenv("E2B_SANDBOX_URL", server.url)
        again = e2b.Sandbox.connect(paused.sandbox_id, timeout=300)
        assert [one.args[-1] for one in again.commands.list()] == ["sleep 300"]
        assert again.kill()
        assert server.end()[0] == 0
    assert not list((tmp_path / "state" / "loopvisor" / "serve").glob("[a-z0-9]*"))


def _members(group: int) -> list[int]:
    """Processes of a session that was started by `group`."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{int(name)}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == group and fields[0] != "Z":
                found.append(int(name))
    return found


def test_a_sandbox_answers_soon(environment: None) -> None:
    """Printed, not asserted: see the guide for figures."""
    e2b.Sandbox.create(timeout=60).kill()
    begin = time.perf_counter()
    box = e2b.Sandbox.create(timeout=60)
    assert box.commands.run("echo hi").stdout == "hi\n"
    print(f"created and answered in {time.perf_counter() - begin:.3f} s")  # noqa: T201
    box.kill()
