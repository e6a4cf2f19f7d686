"""Container images in guests: programs get what the configuration says, and the file system is the image's."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

import vmm
from images import builder
from images.oci import find
from tests.support.oci import base, entry, layer, layout, need_container_kernel
from tests.support.ociregistry import registry

pytestmark = pytest.mark.debian
PATIENCE = 120
UPPER = layer(
    entry("etc/.wh.group"),
    entry("data/setuid", data=b"#!", mode=0o4711, uid=7, gid=8, mtime=1_234_567_890),
    entry("data/one", data=b"x"), entry("data/two", "hard", target="data/one"),
    entry("data/fifo", "fifo"), entry("data/null", "char", device=(1, 3), mode=0o666),
    entry("data/odd\nname\udcff", data=b"odd"), entry("data/long", "link", target="/" + "t" * 4000),
    entry("data/big", data=b"0123456789abcdef" * 100_000),
    *[entry(f"many/{number}") for number in range(500)],
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines whose names nobody else looks up."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image of two layers; else the test is skipped with the reason."""
    need_container_kernel()
    wishes = {"Entrypoint": ["/bin/sh", "-c"], "Cmd": ["id; pwd; echo $FOO $PATH"], "Env": ["PATH=/bin", "FOO=bar"],
              "User": "alice", "WorkingDir": "/work/dir", "StopSignal": "SIGUSR1"}  # fmt: skip
    folder = tmp_path_factory.mktemp("oci") / "image"
    name = f"oci:{layout(folder, [base(), UPPER], **wishes)}"
    yield name
    find.remove(name)


def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from cli.main import main; main()", "run", "--core", "soft", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **more)


def test_the_configuration_is_what_the_program_gets(image: str) -> None:
    done = run(image)
    assert done.stdout == "uid=1000(alice) gid=1001\n/work/dir\nbar /bin\n", done.stderr
    options = ["--env", "FOO=other", "--env", "MORE=1", "--user", "0", "--workdir", "/data"]
    done = run(*options, image, "--", "id -u; pwd; env")
    assert {"0", "/data", "FOO=other", "MORE=1", "PATH=/bin"} <= set(done.stdout.splitlines())
    assert not [line for line in done.stdout.splitlines() if line.startswith(("overlay", "stop_signal"))]
    done = run("--entrypoint", "cat -", image, input="from a pipe")
    assert done.stdout == "from a pipe"
    assert run(image, "--", "exit 7").returncode == 7
    assert run("--entrypoint", "none-such", image).returncode == 127


def test_a_program_that_is_not_named_is_asked_for(image: str, tmp_path: Path) -> None:
    name = f"oci:{layout(tmp_path / 'bare', [base()])}"
    try:
        done = run(name)
        assert done.returncode == 2 and "names no program" in done.stderr
    finally:
        find.remove(name)


async def test_the_file_system_is_the_image_with_a_layer_above(image: str) -> None:
    script = (
        "stat -c '%n %a %u %g %Y %h' data/setuid data/one data/two; stat -c '%F %t %T' data/null data/fifo; "
        "cat data/odd*; ls /etc/group; ls many | busybox wc -l; "
        "busybox readlink data/long | busybox wc -c; busybox sha256sum data/big; "
        "echo new >/data/one; cat /data/two; rm /data/setuid; touch /new /etc/x; ls -d /new /data/setuid; "
        "cat /etc/hostname; hostname; busybox tail -n 1 /etc/hosts; "
        "mount | busybox grep -c ' /sys/fs/cgroup '; ls -d /dev/shm"
    )
    async with vmm.run(image, core="soft") as machine:
        result = await machine.exec("sh", "-c", script, user="root", cwd="/", timeout=PATIENCE)
    assert result.text.splitlines() == [
        "data/setuid 4711 7 8 1234567890 1", "data/one 644 0 0 1000000000 2", "data/two 644 0 0 1000000000 2",
        "character special file 1 3", "fifo 0 0", "odd500", "4002",
        hashlib.sha256(b"0123456789abcdef" * 100_000).hexdigest() + "  data/big",
        "new", "/new", "image", "image", "127.0.1.1\timage", "1", "/dev/shm",
    ]  # fmt: skip
    assert b"/etc/group" in result.stderr and b"/data/setuid" in result.stderr


async def test_a_machine_of_an_image_has_its_defaults_for_every_program(image: str) -> None:
    async with vmm.run(image, core="soft", name=f"oci-test-{os.getpid()}") as machine:
        assert (await machine.exec()).text.startswith("uid=1000(alice)")
        assert (await machine.exec("sh", "-c", "pwd; echo $FOO", env={"FOO": "x"})).text == "/work/dir\nx"
        words = [sys.executable, "-c", "from cli.main import main; main()", "exec", f"oci-test-{os.getpid()}", "pwd"]
        process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE)
        assert (await process.communicate())[0] == b"/work/dir\n"


async def test_stopping_sends_the_images_signal_and_waits(image: str) -> None:
    async with vmm.run(image, core="soft") as machine:
        script = "trap 'echo stopping; exit 9' USR1; echo up; while :; do sleep 1; done"
        process = await machine.start_process("sh", "-c", script)
        async with process:
            assert await process.stdout.read() == b"up\n"
            outcome = await machine.ask_to_stop(60)
            assert (await process.stdout.read(), await process.wait()) == (b"stopping\n", 9)
    assert outcome.status == 0


def test_a_warm_start_goes_on_with_another_program(image: str, tmp_path: Path) -> None:
    images = str(builder.cache.cache_directory())
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "LOOPVISOR_CACHE": images}
    for number in range(3):
        done = run("--warm", "--env", f"N={number}", image, "--", "echo $N $FOO; touch /tmp/x", env=environment)
        assert done.stdout == f"{number} bar\n", done.stderr
    assert len(list((tmp_path / "loopvisor" / "warm").glob("*/*.json"))) >= 1


@pytest.mark.skipif(not shutil.which("passt"), reason="passt is not installed")
def test_a_published_port_leads_into_the_guest(image: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-c", "from cli.main import main; main()", "run", "--core", "soft"]
    words += ["--publish", f"{port}:80", "--user", "root", image, "--", "echo ready; echo hello | nc -l -p 80"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            answer, deadline = b"", time.monotonic() + PATIENCE
            while not answer and time.monotonic() < deadline:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as client:
                    client.settimeout(10)
                    client.sendall(b"please\n")  # some versions of passt wait for the client to say something
                    answer = client.recv(100)
            assert answer == b"hello\n"
        finally:
            process.send_signal(signal.SIGTERM)


@pytest.mark.skipif(not shutil.which("docker-registry"), reason="docker-registry is not installed")
@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")
@pytest.mark.parametrize(("form", "guarded"), [("oci", False), ("v2s2", False), ("oci", True)])
def test_what_skopeo_pushed_to_a_registry_runs(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, guarded: bool
) -> None:
    """`guarded`: the registry has a certificate of its own and wants a password."""
    with registry(tmp_path, tls=guarded, auth=guarded) as served:
        served.push(Path(image.removeprefix("oci:")), "a/b:c", form)
        name = f"oci:{served.name}/a/b:c"
        if guarded:
            monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
            untrusted = run(name)
            assert untrusted.returncode and "certificate is not trusted" in untrusted.stderr, untrusted.stderr
            (tmp_path / "config/loopvisor").mkdir(parents=True)
            (tmp_path / "config/loopvisor/registries.toml").write_text(f'["{served.name}"]\nca = "{served.ca}"\n')
            nobody = run(name)
            assert nobody.returncode and "docker login" in nobody.stderr, nobody.stderr
            assert served.config is not None
            monkeypatch.setenv("DOCKER_CONFIG", str(served.config.parent))
        done = run(name, "--", "echo $FOO")
        find.remove(name)
        assert done.stdout == "bar\n", done.stderr
