"""A real Linux guest as its user meets it: shell on a terminal, power button, panic, reboot, commands, bulk output."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from images import catalog
from images.errors import ImageError
from tests.support import passt
from tests.support.command import VMM, Background, Session, environment, vmm, wait_for
from vmm import VirtualMachine
from vmm.launch import config_for, run

pytestmark = pytest.mark.debian
PROMPT = b"linux:~# "
BOOT = 240.0


@pytest.fixture(scope="module")
def image() -> catalog.Image:
    try:
        return catalog.resolve("linux", build=True)
    except ImageError as error:
        pytest.skip(f"no linux image: {error}")


@pytest.fixture
def runtime(tmp_path: Path, image: catalog.Image) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_shell_on_a_terminal_poweroff_is_status_0(runtime: Path) -> None:
    with Session(runtime, "run", "linux") as session:
        session.expect(PROMPT, BOOT)
        session.type(b"echo $((6*7)).\n")
        session.expect(b"42.")
        session.type(b"sh -c 'echo sl\"\"eeping; exec sleep 1000'\n")  # already a job of its own when it says so
        session.expect(b"sleeping")
        session.type(b"\x03")
        session.type(b"echo $?.\n")
        session.expect(b"130.")
        session.type(b"poweroff -f\n")
        assert session.wait(BOOT) == 0
        assert session.restored


def test_a_script_is_typed_whole(runtime: Path) -> None:
    """It is there before the guest's driver is, which clears FIFOs and reads blindly as it starts."""
    script = "".join(f"echo M$((1000+{number}))\n" for number in range(200)) + "exit\n"
    done = vmm(runtime, "run", "linux", input=script, stdin=None, timeout=BOOT)
    assert done.returncode == 0
    assert re.findall(r"^M(\d+)\r?$", done.stdout, re.MULTILINE) == [str(1000 + number) for number in range(200)]


async def test_input_of_any_size_and_pace_arrives(runtime: Path, image: catalog.Image) -> None:
    """More than Linux' driver takes within one interrupt (128 KiB) and than its tty buffers."""
    size = int(os.environ.get("LOOPVISOR_CONSOLE_BYTES", "140000"))
    async with run("linux", name="") as vm:
        await vm.console.expect(PROMPT, BOOT)
        await vm.console.write(f"stty -echo; echo RE''ADY; head -c {size} | tr -d '\\n' | wc -c; stty echo\n")
        await vm.console.expect(rb"READY\r\n", BOOT)
        line = b"x" * 99 + b"\n"
        await vm.console.write(line * (size // len(line)))
        assert int((await vm.console.expect(rb"(\d+)\r\n", BOOT))[1]) == size // 100 * 99
        await vm.console.write("echo af''ter\n")
        await vm.console.expect(rb"after", BOOT)


def test_piped_input_of_vmm_console_ends_it(runtime: Path) -> None:
    with Background(runtime, "linux", "--name", "box", "--console", "none") as machine:
        wait_for(lambda: (runtime / "loopvisor/box/info.json").exists())
        with Session(runtime, "console", "box") as session:
            session.expect(PROMPT, BOOT)
        done = vmm(runtime, "console", "box", input="echo o''ne; echo tw''o\n", stdin=None, timeout=BOOT)
        assert done.returncode == 0
        assert re.search(r"^one\r?\ntwo\r?$", done.stdout, re.MULTILINE)
        assert "box: detached" in done.stderr
        script = "sleep 4; echo l''ate; sleep 1; poweroff -f\n"
        done = vmm(runtime, "console", "box", "--follow", input=script, stdin=None, timeout=BOOT)
        assert "late" in done.stdout
        assert "the machine closed its console" in done.stderr
        assert machine.process.wait(60) == 0


def test_what_the_parent_ignores_stays_ignored_and_shared_streams_stay_as_they_are(runtime: Path) -> None:
    """SIGINT, as a shell's `trap '' INT` has it; and the shell's next program reads on where the command stopped."""
    command = shlex.join([*VMM, "run", "linux", "--", "sh", "-c", "echo up; sleep 3; echo st''ill here"])
    script = f"trap '' INT; {{ {command}; echo status $?; head -n 1; }} & wait"
    with subprocess.Popen(
        ["sh", "-c", script.replace("} &", "} <&3 &")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(runtime), preexec_fn=lambda: os.dup2(0, 3), pass_fds=[3], start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "up\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "still here\n"
        assert process.stdout.readline() == "status 0\n"
        process.stdin.write("late\n")
        process.stdin.flush()
        assert process.stdout.readline() == "late\n"


def test_panic_is_status_3(runtime: Path) -> None:
    with Session(runtime, "run", "linux", "--name", "p") as session:
        session.expect(PROMPT, BOOT)
        session.type(b"echo c >/proc/sysrq-trigger\n")
        assert session.wait(BOOT) == 3
        assert b"Kernel panic" in session.seen
        assert b"vmm: p: crash: " in session.seen


def test_reboot_in_place(runtime: Path) -> None:
    with Session(runtime, "run", "linux", "--reboot") as session:
        session.expect(PROMPT, BOOT)
        session.type(b"reboot -f\n")
        session.expect(PROMPT, BOOT)
        session.type(b"poweroff -f\n")
        assert session.wait(BOOT) == 0


def test_stop_presses_the_power_button(runtime: Path) -> None:
    with Background(runtime, "linux", "--name", "box", "--console", "none") as machine:
        wait_for(lambda: (runtime / "loopvisor/box/info.json").exists())
        with Session(runtime, "console", "box") as session:
            session.expect(PROMPT, BOOT)
            done = vmm(runtime, "stop", "box", "--json")
            assert json.loads(done.stdout)["reason"] == "shutdown"
            assert machine.process.wait(60) == 0
            assert session.wait() == 0
            assert session.restored


def test_command_with_status_streams_and_input(runtime: Path) -> None:
    script = "cat; echo out; echo err >&2; exit 7"
    done = vmm(runtime, "run", "linux", "--", "sh", "-c", script, stdin=None, input="in\n", timeout=BOOT)
    assert (done.returncode, done.stdout) == (7, "in\nout\n")
    # The machine's network is optional; where it cannot be had, a warning of ours stands before.
    assert done.stderr.splitlines()[-1:] == ["err"] and (done.stderr == "err\n" or passt.why_not())


def test_command_on_a_terminal(runtime: Path) -> None:
    with Session(runtime, "run", "linux", "--", "sh", "-c", "tty; stty size; read line; echo got $line") as session:
        session.expect(b"/dev/pts/0", BOOT)
        session.type(b"a line\r")
        session.expect(b"got a line")
        assert session.wait() == 0
        assert session.restored


def test_timing_of_a_command(runtime: Path) -> None:
    """Every phase is there, in order; the picture as well; standard output is the command's alone."""
    picture = runtime / "boot.svg"
    words = ["run", "linux", "--name", "t", "--timing", "--timing-svg", str(picture), "--", "echo", "hi"]
    done = vmm(runtime, *words, timeout=BOOT)
    assert (done.returncode, done.stdout) == (0, "hi\n")
    rows = [line.split() for line in done.stderr.splitlines()[1:] if "|" in line]
    shown = [row[0] for row in rows]
    assert shown == ["python", "image", "loop", "build", "unpack", "kernel", "init", "system", "command", "close"]
    begins, tooks = [float(row[2]) for row in rows], [float(row[3]) for row in rows]
    assert begins == sorted(begins)
    begin, took = dict(zip(shown, begins, strict=True)), dict(zip(shown, tooks, strict=True))
    for before, after in (("kernel", "init"), ("init", "system")):
        assert begin[before] + took[before] == pytest.approx(begin[after], abs=0.11)
    assert begin["unpack"] + took["unpack"] <= begin["build"] + took["build"] + 0.11
    assert begin["system"] + took["system"] <= begin["command"] + 0.11
    assert "kernel, guest: " in picture.read_text()


async def test_the_timeline_of_an_embedded_machine(image: catalog.Image) -> None:
    async with run("linux") as vm:
        await vm.exec("true")
        phases = {phase.name: phase for phase in vm.timeline.phases()}
    assert {"image", "build", "unpack", "kernel", "init", "system"} <= set(phases)
    assert 0 < phases["kernel"].end - phases["kernel"].begin < BOOT
    moments = dict(vm.timeline.moments)
    assert moments["resume"] <= moments["first exit"] < moments["init"] < moments["root"] < moments["agent"]


def test_output_that_cannot_be_written(runtime: Path) -> None:
    with open("/dev/full", "wb") as full:
        words = [*VMM, "run", "linux", "--", "echo", "hi"]
        done = subprocess.run(words, env=environment(runtime), stdin=subprocess.DEVNULL, stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=BOOT)  # fmt: skip
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == "vmm: standard output: no space left on device"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("closing", "shown"), [("<&-", "hi\n"), (">&-", ""), ("<&- >&- 2>&-", "")])
def test_standard_streams_that_are_closed(runtime: Path, closing: str, shown: str) -> None:
    command = f"exec {shlex.join([*VMM, 'run', 'linux', '--', 'echo', 'hi'])} {closing}"
    done = subprocess.run(["sh", "-c", command], env=environment(runtime), capture_output=True, text=True, timeout=BOOT)
    assert (done.returncode, done.stdout) == (0, shown), done.stderr
    assert done.stderr == "" or passt.why_not()


@pytest.mark.parametrize(("command", "why"), [("poweroff", "shutdown"), ("reboot", "reset")])
def test_a_command_that_ends_the_machine(runtime: Path, command: str, why: str) -> None:
    done = vmm(runtime, "run", "linux", "--name", "p", "--", "sh", "-c", f"{command}; sleep 100", timeout=BOOT)
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(f"vmm: p: the machine ended before the command: {why}: .*", done.stderr.splitlines()[-1])
    assert "BusyBox" not in done.stderr, "the console has nothing to say to it"


def test_a_crash_under_a_command_shows_the_console(runtime: Path) -> None:
    done = vmm(runtime, "run", "linux", "--name", "p", "--", "sh", "-c", "echo c >/proc/sysrq-trigger", timeout=BOOT)
    assert done.returncode == 3
    *console, last = done.stderr.splitlines()
    assert re.match("vmm: p: the machine ended before the command: crash: ", last)
    assert any("Kernel Offset" in line or "Kernel panic" in line for line in console)
    assert "\x1b" not in done.stderr


def test_program_that_is_not_there(runtime: Path) -> None:
    done = vmm(runtime, "run", "linux", "--", "/no/such/program", timeout=BOOT)
    assert done.returncode in (126, 127, 3)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
async def test_ten_megabytes_and_a_paste(image: catalog.Image) -> None:
    """Output at full speed without losing a character; a paste into a slow reader arrives whole."""
    lines, copies = 150_000, 11
    async with VirtualMachine(config_for(image, timeout=280)) as vm:
        reader = vm.console.reader(lossless=True)
        vm.resume()
        await reader.expect("~# ", BOOT)
        files = " /tmp/f" * copies
        await vm.console.write(f"stty -onlcr; seq 1 {lines} >/tmp/f; echo be''gin; cat{files}; echo do''ne\n")
        await reader.expect(rb"begin\r?\n", BOOT)
        output = bytearray()
        while b"done\n" not in output[-100:]:
            output += await reader.read()
            assert reader.skipped == 0
        numbers = b"".join(b"%d\n" % number for number in range(1, lines + 1))
        assert len(numbers) * copies > 10_000_000
        assert output[: output.index(b"done\n")] == numbers * copies
        await reader.expect("~# ", BOOT)
        paste = bytes(33 + index % 90 for index in range(100_000))
        await vm.console.write("stty raw -echo; echo re''ady; head -c 100000 >/tmp/p; stty sane; cat /tmp/p; echo\n")
        await reader.expect("ready\r?\n")
        await vm.console.write(paste)
        await reader.expect(re.compile(re.escape(paste)), 120)
