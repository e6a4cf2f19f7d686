"""What a user types and sees: exit statuses, one-line errors with the cure, machines that run in the background."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from cpu import select
from cpu.contract import Capability
from images import guests
from tests.support.command import VMM, Background, Session, environment, vmm, wait_for
from vmm.cores import SMALL_KERNEL

HELLO = "Hello from guest mode!\n"


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def echo(runtime: Path) -> Iterator[Background]:
    """A machine called `echo` that sends back what it receives."""
    with Background(runtime, "echo", "--name", "echo", "--console", "none") as machine:
        wait_for(lambda: (runtime / "loopvisor/echo/info.json").exists() or machine.process.poll() is not None)
        yield machine


def empty(runtime: Path) -> bool:
    return not list((runtime / "loopvisor").iterdir())


def test_hello(runtime: Path) -> None:
    done = vmm(runtime, "run", "hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO, "")
    assert empty(runtime)


@pytest.mark.parametrize(("number", "status"), [(0, 1), (21, 43), (127, 255)])
def test_exit_port_decides_the_status(runtime: Path, number: int, status: int) -> None:
    assert vmm(runtime, "run", "exit", "--cmdline", str(number)).returncode == status


def test_triple_fault_is_status_3(runtime: Path) -> None:
    done = vmm(runtime, "run", "triple", "--name", "t")
    assert done.returncode == 3
    assert re.fullmatch(r"vmm: t: triple-fault: vCPU 0 at rip 0x[0-9a-f]+\n", done.stderr)


@pytest.mark.kvm
def test_a_kernel_that_the_core_may_not_carry_is_warned_of(runtime: Path, tmp_path: Path) -> None:
    """A guest as large as a stock kernel, on a KVM that does not run stock kernels."""
    found = select.probe("kvm")
    if not found.available or Capability.STOCK_KERNELS in found.capabilities:
        pytest.skip("needs a /dev/kvm that cannot run stock kernels")
    kernel = tmp_path / "kernel"
    kernel.write_bytes(guests.path("hello").read_bytes().ljust(SMALL_KERNEL, b"\0"))
    done = vmm(runtime, "run", "--kernel", str(kernel), "--core", "kvm", "--platform", "bare", "--name", "k")
    assert (done.returncode, done.stdout) == (0, HELLO)
    assert re.fullmatch(r"vmm: k: the kvm core here lacks stock-kernels: .*; --core auto takes .*\n", done.stderr)


def test_timeout_is_status_124(runtime: Path) -> None:
    done = vmm(runtime, "run", "spin", "--timeout", "0.2", "--name", "s")
    assert done.returncode == 124
    assert done.stderr == "vmm: s: timeout: still running after 0.2 s\n"


def test_json_outcome(runtime: Path) -> None:
    done = vmm(runtime, "run", "exit", "--json", "--name", "j")
    assert json.loads(done.stderr) == {
        "name": "j",
        "reason": "exit",
        "detail": "exit: the guest wrote 0x15 to the exit port",
        "status": 43,
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_machine(runtime: Path, number: signal.Signals) -> None:
    with Background(runtime, "spin", "--name", "s") as machine:
        wait_for(lambda: (runtime / "loopvisor/s/info.json").exists())
        machine.process.send_signal(number)
        assert machine.process.wait(20) == 128 + number
    assert empty(runtime)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_stays_ignored(runtime: Path, number: signal.Signals) -> None:
    """As nohup has it, and a shell for what it runs in the background of a script."""
    ignore = partial(signal.signal, number, signal.SIG_IGN)
    with Background(runtime, "spin", "--name", "s", preexec_fn=ignore) as machine:
        wait_for(lambda: (runtime / "loopvisor/s/info.json").exists())
        machine.process.send_signal(number)
        assert json.loads(vmm(runtime, "ps", "--json").stdout)[0]["state"] == "running"
        machine.process.send_signal(signal.SIGTERM)
        assert machine.process.wait(20) == 128 + signal.SIGTERM


BAD = [
    (["run", "nothing-here"], 2, "no image nothing-here; there are: "),
    (["run", "./nothing-here"], 2, "no file ./nothing-here"),
    (["run", "--kernel", "/nothing"], 2, "kernel: /nothing: no such file or directory"),
    (["run", "--kernel", "/etc"], 2, "kernel: /etc: is a directory"),
    (["run", "--kernel", "/etc/passwd"], 2, "/etc/passwd: not a kernel that can be booted"),
    (["run", "hello", "--memory", "4000G"], 2, "memory: 4000G is more than this host's "),
    (["run", "hello", "--memory", "16"], 2, "memory: 16 is less than 1M; write 16M for MiB"),
    (["run", "hello", "--name", "x" * 63, "--console", "none"], 2, "are too long for a socket, which takes 107"),
    (["run", "hello", "--console", "socket=/nothing/here"], 2, "console socket: /nothing/here: no such file"),
    (["run", "hello", "--disk", "/nothing.img"], 2, "disk: /nothing.img: no such file or directory"),
    (["run", "hello", "--core", "xen"], 2, "core: 'xen' is none of auto, kvm, soft"),
    (["run", "hello", "--core", "kvm", "--clock", "virtual"], 4, "the kvm core has no virtual-clock, on any host"),
    (["run", "hello", "--config", "/nothing.toml"], 2, "/nothing.toml: no such file or directory"),
    (["run"], 2, "nothing to run: name an image or give --kernel"),
    (["run", "hello", "--", "ls"], 2, "agent"),
    (["console", "nobody"], 2, "no machine is called 'nobody'; none is running"),
    (["console", "/nothing/here.sock"], 4, "console socket /nothing/here.sock: no such file"),
    (["stop", "nobody"], 2, "no machine is called 'nobody'"),
    (["kill", "nobody"], 2, "no machine is called 'nobody'"),
    (["pause", "nobody"], 2, "no machine is called 'nobody'"),
    (["stop", "nobody", "--timeout", "nan"], 2, "timeout: nan is outside 0 to 86400 seconds"),
    (["stop", "nobody", "--timeout", "-20"], 2, "timeout: -20 is outside 0 to 86400 seconds"),
    (["run", "hello", "--cmdline", "\udcff"], 2, "cmdline: '\\udcff' is not text in UTF-8"),
    (["run", "hello", "--vsock", "/" + "x" * 200, "--platform", "pc"], 2, "AF_UNIX path too long"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    runtime = tmp_path / ("r" * 30 if "x" * 63 in arguments else "run")
    runtime.mkdir()
    done = vmm(runtime, *arguments)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("vmm: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [["ps"], ["doctor"], ["doctor", "--json"], ["run", "hello", "--print-config"]])
def test_output_to_a_full_disk_is_one_line(runtime: Path, arguments: list[str], buffered: bool) -> None:
    env = {key: value for key, value in environment(runtime).items() if key != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*VMM, *arguments], env=env | ({} if buffered else {"PYTHONUNBUFFERED": "1"}),
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (4, "vmm: standard output: no space left on device\n")


def test_no_more_descriptors_is_one_line(runtime: Path) -> None:
    """Whatever the first descriptor is that cannot be had."""
    for limit in range(8, 32):
        done = subprocess.run(
            ["prlimit", f"--nofile={limit}", *VMM, "run", "hello"],
            env=environment(runtime), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if done.returncode == 0:
            break
        assert done.returncode in (2, 4), done.stderr
        # asyncio itself may add a word on a loop that it could not make.
        assert re.match(r"vmm: .*: [tT]oo many open files\n", done.stderr), done.stderr
    assert limit > 8 and done.stdout == HELLO


def test_a_full_runtime_directory_is_one_line(runtime: Path) -> None:
    done = subprocess.run(
        ["prlimit", "--fsize=0", *VMM, "run", "hello", "--name", "h"],
        env=environment(runtime), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr == f"vmm: {runtime}/loopvisor/h/info.json.part: file too large\n"
    assert empty(runtime)


@pytest.mark.parametrize("option", ["--kernel", "--flat", "--initrd"])
def test_a_pipe_in_place_of_a_file_is_refused(runtime: Path, tmp_path: Path, option: str) -> None:
    """It would be read, for as long as nobody writes to it, by the loop."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = vmm(runtime, "run", *(["hello"] if option == "--initrd" else []), option, str(pipe))
    assert (done.returncode, done.stderr) == (2, f"vmm: {option[2:]}: {pipe}: is a pipe; put its content into a file\n")


def test_a_configuration_nested_without_end_is_one_line(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "deep.toml").write_text("a=" + "[" * 100_000)
    done = vmm(runtime, "run", "hello", "--config", str(tmp_path / "deep.toml"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "deep.toml: not TOML" in done.stderr


@pytest.mark.parametrize("arguments", [["run", "hello", "--frobnicate"], ["run", "--memory"], ["frobnicate"], []])
def test_usage_errors_are_status_2(runtime: Path, arguments: list[str]) -> None:
    done = vmm(runtime, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_no_permission(tmp_path: Path) -> None:
    """An unreadable kernel, and no right to /dev/kvm: each one line with the cure."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"x")
    kernel.chmod(0o600)
    code = (
        "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "from cli.main import main; sys.argv[0] = 'vmm'; main()"
    )

    # What nobody may not read afterwards, if this Python stands in somebody's home.
    early = (
        "cli.errors", "cli.foreground", "cli.main", "cli.run", "concurrent.futures.thread", "cpu.kvm.probe",
        "cpu.kvm.system", "images.catalog", "shutil", "uvloop", "vmm.management.control",
    )  # fmt: skip

    def as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
        folder = Path("/tmp") / f"loopvisor-test-{os.getpid()}"
        folder.mkdir(mode=0o777, exist_ok=True)
        folder.chmod(0o777)
        try:
            return subprocess.run(
                [VMM[0], "-c", f"import {', '.join(early)};{code}", *arguments],
                env=environment(folder), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        finally:
            shutil.rmtree(folder)

    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)
    done = as_nobody("run", "--kernel", str(kernel))
    assert done.returncode == 2
    assert f"kernel: {kernel}: permission denied" in done.stderr
    if Path("/dev/kvm").exists() and not Path("/dev/kvm").stat().st_mode & 0o006:
        hello = tmp_path / "hello"
        shutil.copy(Path(__file__).resolve().parents[2] / "images/guests/hello.bin", hello)
        hello.chmod(0o644)
        done = as_nobody("run", "--core", "kvm", "--kernel", str(hello))
        assert done.returncode == 4
        assert "no permission to open /dev/kvm (join its group: sudo adduser $USER kvm" in done.stderr


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("command", [["images", "build", "linux"], ["run", "linux", "--", "true"]])
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, command: list[str]) -> None:
    script = 'mount -t tmpfs -o ro none "$1" && shift && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), *VMM, *command], text=True, timeout=60,
        stdin=subprocess.DEVNULL, capture_output=True, env=environment(tmp_path) | {"LOOPVISOR_CACHE": str(tmp_path)},
    )  # fmt: skip
    if "mount" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 4
    assert done.stdout == ""
    message = rf"vmm: {tmp_path}/\w+: read-only file system; LOOPVISOR_CACHE names another place\n"
    assert re.fullmatch(message, done.stderr)


def test_name_in_use(runtime: Path, echo: Background) -> None:
    done = vmm(runtime, "run", "hello", "--name", "echo")
    assert done.returncode == 2
    pid = echo.process.pid
    assert done.stderr == (
        f"vmm: name: 'echo' is in use by process {pid}; choose another --name, or end it with: vmm stop echo\n"
    )


def test_what_a_killed_process_left_is_cleaned(runtime: Path, echo: Background) -> None:
    echo.process.kill()
    echo.process.wait(10)
    assert (runtime / "loopvisor/echo/console.sock").exists()
    assert vmm(runtime, "ps", "--json").stdout == "[]\n"
    assert empty(runtime)


def test_the_name_of_a_killed_process_is_free(runtime: Path, echo: Background) -> None:
    echo.process.kill()
    echo.process.wait(10)
    done = vmm(runtime, "run", "hello", "--name", "echo")
    assert (done.returncode, done.stdout) == (0, HELLO)
    assert empty(runtime)


def test_a_stale_console_socket_is_replaced(runtime: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert vmm(runtime, "run", "hello", "--console", f"socket={path}").returncode == 0
    assert not path.exists()


def test_a_live_console_socket_is_left_alone(runtime: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        done = vmm(runtime, "run", "hello", "--console", f"socket={path}")
        assert done.returncode == 2
        assert "another program listens there; choose another path" in done.stderr
        assert path.exists()


def test_ps_pause_resume_stats_kill(runtime: Path, echo: Background) -> None:
    table = vmm(runtime, "ps").stdout.splitlines()
    assert table[0].split() == ["NAME", "STATE", "CORE", "CPUS", "MEMORY", "UPTIME", "PID"]
    assert table[1].split()[:2] == ["echo", "running"]
    assert table[1].split()[-1] == str(echo.process.pid)
    done = vmm(runtime, "pause", "echo")
    assert (done.returncode, done.stderr) == (0, "vmm: echo: paused\n")
    again = vmm(runtime, "pause", "echo")
    assert (again.returncode, again.stderr) == (
        2,
        "vmm: echo: cannot pause a machine that is paused; possible: resume, end\n",
    )
    assert json.loads(vmm(runtime, "ps", "--json").stdout)[0]["state"] == "paused"
    assert json.loads(vmm(runtime, "resume", "echo", "--json").stdout)["state"] == "running"
    assert "posted" in vmm(runtime, "ps", "--stats").stdout
    assert 'loopvisor_events_total{machine="echo"' in vmm(runtime, "ps", "--metrics").stdout
    killed = json.loads(vmm(runtime, "kill", "echo", "--json").stdout)
    assert killed == {"reason": "killed", "detail": "", "status": 137}
    assert echo.process.wait(20) == 137
    assert empty(runtime)


def test_metrics_of_several_machines_are_one_group(runtime: Path, echo: Background) -> None:
    with Background(runtime, "echo", "--name", "other", "--console", "none"):
        wait_for(lambda: (runtime / "loopvisor/other/info.json").exists())
        lines = vmm(runtime, "ps", "--metrics").stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("#")] == ["HELP", "TYPE"]
    for name in ("echo", "other"):
        values = dict(re.findall(rf'loopvisor_events_total{{machine="{name}",kind="([^"]+)"}} (\d+)', "\n".join(lines)))
        assert {"exit.port-in", "exit.port-out", "posted", "shadow"} <= values.keys()
        assert sum(map(int, values.values())) > 0


def test_stop_waits_then_kills(runtime: Path, echo: Background) -> None:
    done = vmm(runtime, "stop", "echo", "--timeout", "0.2", "--json")
    assert json.loads(done.stdout)["reason"] == "killed"
    assert echo.process.wait(20) == 137


def test_a_client_that_sends_garbage_harms_nobody(runtime: Path, echo: Background) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(runtime / "loopvisor/echo/control.sock"))
        for line in (
            b"garbage\n",
            b"[]\n",
            b'{"command": "fly"}\n',
            b'{"command": "stop", "timeout": "x"}\n',
            b"[" * 50_000 + b"\n",
        ):
            client.sendall(line)
            answer = json.loads(client.recv(65536))
            assert answer["ok"] is False and answer["kind"] == "ConfigError"
        client.sendall(b"x" * 100_000)
    assert json.loads(vmm(runtime, "ps", "--json").stdout)[0]["state"] == "running"


def test_a_client_that_is_connected_at_the_end_is_no_error(runtime: Path, echo: Background) -> None:
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(runtime / "loopvisor/echo/control.sock"))
        assert vmm(runtime, "kill", "echo").returncode == 0
        assert echo.process.communicate(timeout=20)[1] == "vmm: echo: killed\n"
        assert idle.recv(1) == b""


def test_sockets_are_for_this_user_alone(runtime: Path, echo: Background) -> None:
    folder = runtime / "loopvisor"
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("control.sock", "console.sock"):
        assert (folder / "echo" / name).stat().st_mode & 0o777 == 0o600


def test_print_config_is_a_config_file(runtime: Path, tmp_path: Path) -> None:
    arguments = ["run", "exit", "--cmdline", "9", "--name", "same", "--disk", "/dev/null,ro", "--memory", "32M"]
    printed = vmm(runtime, *arguments, "--print-config").stdout
    path = tmp_path / "machine.toml"
    path.write_text(printed)
    assert vmm(runtime, "run", "--config", str(path), "--print-config").stdout == printed
    assert vmm(runtime, "run", "--config", str(path), "--cmdline", "4").returncode in (9, 2)


def test_options_win_over_the_file(runtime: Path, tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text('cmdline = "1"\nmemory = "32M"\n')
    assert vmm(runtime, "run", "exit", "--config", str(path)).returncode == 3
    assert vmm(runtime, "run", "exit", "--config", str(path), "--cmdline", "2").returncode == 5


def test_print_cmdline(runtime: Path) -> None:
    assert vmm(runtime, "run", "exit", "--cmdline", "a", "--append", "b", "--print-cmdline").stdout == "a b\n"
    spaced = vmm(runtime, "run", "exit", "--cmdline", 'a="x  y"', "--append", "b  -- c", "--print-cmdline").stdout
    assert spaced == 'a="x  y" b  -- c\n', "what is given stays as it is"
    share = f"{runtime}:/work"
    shared = vmm(runtime, "run", "exit", "--cmdline", 'a="x  y" -- c', "--share", share, "--print-cmdline").stdout
    assert shared == 'a="x  y" loopvisor.share.share0=/work -- c\n', "a share's word is the kernel's, not init's"


def test_a_warning_is_told_and_the_machine_goes_on(runtime: Path) -> None:
    """A console log on a full disk stops; the guest does not notice."""
    done = vmm(runtime, "run", "hello", "--name", "h", "--console", "stdio,log=/dev/full")
    assert (done.returncode, done.stdout) == (0, HELLO)
    assert done.stderr.strip() == "vmm: h: console log: /dev/full: no space left on device; logging stops"


def test_input_from_a_pipe(runtime: Path) -> None:
    done = vmm(runtime, "run", "echo", stdin=None, input="typed\x04")
    assert done.returncode == 0
    assert done.stdout == "echo: type, Ctrl-D ends\ntyped"


def test_input_from_a_file(runtime: Path, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"from a file\x04")
    with path.open() as file:
        assert vmm(runtime, "run", "echo", stdin=file).stdout.endswith("from a file")


def test_input_without_end(runtime: Path) -> None:
    """What the guest did not read is left where it is."""
    with Path("/dev/zero").open("rb") as zeros:
        done = vmm(runtime, "run", "hello", stdin=zeros)
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO, "")


def test_output_to_a_reader_that_leaves(runtime: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [*VMM, "run", "hello", "--name", "x"], env=environment(runtime), stdout=writer, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, text=True, timeout=60,
    )  # fmt: skip
    os.close(writer)
    assert process.returncode == 4
    assert process.stderr == "vmm: x: host-error: standard output: closed by its reader\n"


def test_output_is_whole_through_a_slow_pipe(runtime: Path) -> None:
    with subprocess.Popen(
        [*VMM, "run", "flood", "--cmdline", "30000"], env=environment(runtime), stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        received = bytearray()
        while data := process.stdout.read(4096):
            received += data
        assert process.wait(60) == 0
    line = bytes(range(48, 48 + 63)) + b"\n"
    assert bytes(received) == (line * 500)[:30_000]


def test_run_on_a_terminal_and_ctrl_bracket_ends_it(runtime: Path) -> None:
    with Session(runtime, "run", "echo", "--name", "e") as session:
        session.expect(b"Ctrl-D ends")
        session.type(b"\x03abc")  # Ctrl-C is the guest's
        session.expect(b"\x03abc")
        session.type(b"\x1d")
        assert session.wait() == 137
        assert b"killed: Ctrl-] was typed" in session.seen
        assert session.restored


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminal_is_restored_on_signals(runtime: Path, number: signal.Signals) -> None:
    with Session(runtime, "run", "echo") as session:
        session.expect(b"Ctrl-D ends")
        session.kill(number)
        assert session.wait() == 128 + number
        assert session.restored


def test_a_terminal_that_goes_away_ends_the_machine(runtime: Path) -> None:
    """Even if nobody passes SIGHUP on, as under a shell that ignores it."""
    command = ["sh", "-c", 'trap "" HUP; "$@"; exit $?', "sh", *VMM, "run", "echo", "--name", "e"]
    session = Session.of(command, environment(runtime), runtime)
    try:
        session.expect(b"Ctrl-D ends")
        session.hang_up()
        assert session.process.wait(30) == 128 + signal.SIGHUP
    finally:
        session.process.kill()
        session.process.wait(10)


def test_console_attach_twice_and_detach(runtime: Path, echo: Background) -> None:
    with Session(runtime, "console", "echo") as first, Session(runtime, "console", "echo") as second:
        for session in (first, second):
            session.expect(b"attached; Ctrl-] detaches")
            session.expect(b"echo: type")  # what was said before they came
        first.type(b"from the first")
        for session in (first, second):
            session.expect(b"from the first")
        first.type(b"\x1d")
        assert first.wait() == 0
        assert b"echo: detached" in first.seen
        assert first.restored
        second.type(b"still here")
        second.expect(b"still here")
        echo.process.kill()
        assert second.wait() == 0
        assert b"the machine closed its console" in second.seen
        assert second.restored


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_console_restores_the_terminal_on_signals(runtime: Path, echo: Background, number: signal.Signals) -> None:
    with Session(runtime, "console", "echo") as session:
        session.expect(b"echo: type")
        session.kill(number)
        assert session.wait() == 128 + number
        assert session.restored


@pytest.fixture
def spin(runtime: Path) -> Iterator[Background]:
    """A machine called `spin` that reads nothing."""
    with Background(runtime, "spin", "--name", "spin", "--console", "none") as machine:
        wait_for(lambda: (runtime / "loopvisor/spin/info.json").exists() or machine.process.poll() is not None)
        yield machine


@pytest.mark.parametrize(
    ("arguments", "status"), [(["run", "spin"], 137), (["console", "spin"], 0)], ids=["run", "console"]
)
def test_ctrl_bracket_behind_a_paste_that_the_guest_does_not_read(
    runtime: Path, spin: Background, arguments: list[str], status: int
) -> None:
    with Session(runtime, *arguments) as session:
        session.expect(b"Ctrl-]")
        wait_for(lambda: not session.restored)
        typist = subprocess.Popen(
            [VMM[0], "-c", "import os; [os.write(1, b'x' * 4096) for _ in range(256)]; os.write(1, bytes([29]))"],
            stdout=session.master,
        )
        try:
            assert session.wait() == status
        finally:
            typist.kill()
            typist.wait()
        assert session.restored


@pytest.mark.parametrize("arguments", [["run", "spin"], ["console", "spin"]], ids=["run", "console"])
def test_a_command_that_was_stopped_makes_its_terminal_raw_again(
    runtime: Path, spin: Background, arguments: list[str]
) -> None:
    """As `fg` finds it: the shell that had the terminal meanwhile has made it its own."""
    with Session(runtime, *arguments) as session:
        session.expect(b"Ctrl-]")
        wait_for(lambda: not session.restored)
        session.kill(signal.SIGSTOP)
        os.waitid(os.P_PID, session.process.pid, os.WSTOPPED)
        session.give_back()
        session.kill(signal.SIGCONT)
        wait_for(lambda: not session.restored)
        session.type(b"\x1d")
        session.wait()
        assert session.restored


@pytest.mark.skipif(shutil.which("socat") is None, reason="socat is not installed")
def test_console_by_socat(runtime: Path, echo: Background) -> None:
    path = runtime / "loopvisor/echo/console.sock"
    with subprocess.Popen(
        ["socat", "-", f"UNIX-CONNECT:{path}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"by socat\x04")
        process.stdin.flush()
        assert echo.process.wait(30) == 0
        assert process.stdout.read() == b"echo: type, Ctrl-D ends\nby socat"


def test_console_in_a_pipe(runtime: Path, echo: Background) -> None:
    done = vmm(runtime, "console", "echo", stdin=None, input="piped\x04")
    assert done.returncode == 0
    assert done.stdout == "echo: type, Ctrl-D ends\npiped"


def test_doctor(runtime: Path) -> None:
    facts = json.loads(vmm(runtime, "doctor", "--json").stdout)
    assert [core["name"] for core in facts["cores"]] == ["kvm", "soft"]
    for core in facts["cores"]:
        assert core["reason"]
        assert core["available"] or core["cure"]
    shown = vmm(runtime, "doctor").stdout
    assert "core kvm: " in shown and "core soft: " in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(runtime: Path, shell: str) -> None:
    """What a shell asks for; --show-completion prints the same for the shell above it, if there is one."""
    asked = environment(runtime) | {"_VMM_COMPLETE": f"source_{shell}"}
    done = subprocess.run(VMM, env=asked, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "_VMM_COMPLETE=complete_" + shell in done.stdout, done.stderr


def test_completion_knows_running_machines(runtime: Path, echo: Background) -> None:
    code = "from cli.app import complete_machine as c; print(c('e'), c('x'))"
    done = subprocess.run(
        [VMM[0], "-c", code], env=environment(runtime), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "['echo'] []\n"
