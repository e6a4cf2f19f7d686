"""One machine that moves back and forth between two hosts, over and over: `python -m tests.soak.migration [MOVES
[CUTS]]`. Every second move is by post-copy.

The hosts are network namespaces, joined by a bridge in a third; a neighbour in a fourth holds a TCP connection to the
guest and compares every byte that comes back, and pings it. In the guest fio writes to a disk on shared storage and
verifies what it reads. After each move the connection must still be there, the guest must have got on, and its kernel's
log must have no trouble. With CUTS so many of the moves are cut at a random byte: then the machine must run on, here or
there. At the end the neighbour's longest silence and the standstills are printed. Needs root, ip, ping and fio.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.support import netns, programs
from tests.support.command import VMM, environment

TROUBLE = re.compile("BUG|WARNING|Oops|Call Trace|lockup|hung_task|EXT4-fs error|I/O error|general protection|segfault")
SECONDS = 120.0
GUEST = "10.77.0.10"
HOSTS = ("10.77.0.1", "10.77.0.2")
FIO = (
    "chroot /tools /usr/bin/fio --name=x --direct=1 --ioengine=libaio --iodepth=8 --verify_state_save=0 "
    "--verify_fatal=1 --minimal --rw=randwrite --bs=4k --size=4M --verify=crc32c --do_verify=1 --filename=/dev/$D"
)
NEIGHBOUR = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], 9))
s.settimeout(60)
worst = last = 0.0
count = 0
while True:
    count += 1
    line = (f"{count} " * 40)[:200].encode() + b"\\n"
    began = time.monotonic()
    s.sendall(line)
    got = b""
    while len(got) < len(line):
        part = s.recv(4096)
        if not part:
            sys.exit("the connection ended")
        got += part
    if got != line:
        sys.exit(f"wrong bytes in line {count}")
    worst = max(worst, time.monotonic() - began)
    if time.monotonic() - last > 0.2:
        last = time.monotonic()
        print(count, worst, flush=True)
        worst = 0.0
    time.sleep(0.005)
"""


class Failure(Exception):
    """A move found something."""


def switch(spaces: list[netns.Namespace], middle: netns.Namespace) -> None:
    """Every namespace's eth0 at one bridge in the middle."""
    middle.ip("link", "add", "sw", "type", "bridge")
    middle.ip("link", "set", "sw", "up")
    for number, space in enumerate(spaces):
        netns.cable(space, middle)
        middle.ip("link", "set", "eth0", "name", f"port{number}")
        middle.ip("link", "set", f"port{number}", "master", "sw", "up")


def host(space: netns.Namespace, address: str) -> None:
    """A host: a bridge with the network's cable and a tap for the machine."""
    space.ip("link", "add", "br0", "type", "bridge")
    space.ip("tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
    for name in ("eth0", "tap0"):
        space.ip("link", "set", name, "master", "br0", "up")
    space.ip("link", "set", "br0", "up")
    space.ip("addr", "add", f"{address}/24", "dev", "br0")


class Soak:
    """The campaign."""

    def __init__(self, folder: Path, hosts: list[netns.Namespace], neighbour: netns.Namespace, seed: int) -> None:
        self._folder, self._hosts, self._neighbour = folder, hosts, neighbour
        self._runtime = folder / "run"
        self._runtime.mkdir(mode=0o700)
        self._environment = environment(self._runtime)
        self._chance = random.Random(seed)
        self._at = 0
        self._name = "m0"
        self._processes: list[subprocess.Popen[str]] = []
        self.stills: list[float] = []
        self.switches: list[float] = []
        """Standstills of post-copy."""
        self.silences: list[float] = []
        self.failed = 0

    def _start(self, number: int, *words: str) -> subprocess.Popen[str]:
        command = self._hosts[number].command(*VMM, *words)
        with open(self._folder / f"process{len(self._processes)}.log", "w") as log:
            process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
            )
        self._processes.append(process)
        return process

    def _vmm(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = self._hosts[self._at].command(*VMM, *words)
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=SECONDS)

    def guest(self, script: str) -> str:
        """Run a script in the guest."""
        done = self._vmm("exec", self._name, "--", "sh", "-c", script)
        if done.returncode:
            raise Failure(f"{script}: {done.stdout}{done.stderr}")
        return done.stdout

    def begin(self) -> None:
        """Boot the machine, with everything at work."""
        tools, data = programs.tools(self._folder, ["fio"]), self._folder / "data.img"
        data.write_bytes(bytes(16 << 20))
        self._start(
            0, "run", "linux", "--name", self._name, "--console", "none", "--net", "tap=tap0,id=n0",
            "--disk", f"{tools},ro,id=tools", "--disk", f"{data},id=data,format=raw",
        )  # fmt: skip
        deadline = time.monotonic() + SECONDS
        while self._vmm("exec", self._name, "--", "true").returncode:
            if time.monotonic() > deadline:
                raise Failure("the machine does not start")
            time.sleep(0.5)
        disk = "cd /sys/block; for d in vd?; do [ $(cat $d/serial) = {0} ] && {1}=$d; done; "
        self.guest(disk.format("tools", "T") + "true; " + programs.MOUNT.format(device="$T"))
        self.guest(f"ip link set eth0 up; ip addr add {GUEST}/24 dev eth0")
        self.guest("mkfifo /echo; (while :; do nc -l -p 9 </echo | cat >/echo; done) >/dev/null 2>&1 &")
        work = f"{disk.format('data', 'D')} cd /; while {FIO} >/fio.log 2>&1; do echo x >>/fio.rounds; done"
        work += "; echo bad >/fio.bad"
        self.guest(f"({work}) >/dev/null 2>&1 &")
        command = self._neighbour.command(sys.executable, "-c", NEIGHBOUR, GUEST)
        deadline = time.monotonic() + SECONDS
        while True:
            self._echo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert self._echo.stdout is not None
            if self._echo.stdout.readline():
                break
            self._echo.wait()
            if time.monotonic() > deadline:
                raise Failure(f"no connection to the guest: {self._echo.stderr and self._echo.stderr.read()}")
        os.set_blocking(self._echo.stdout.fileno(), False)

    def move(self, number: int, *, cut: bool, postcopy: str = "") -> None:
        """To the other host, and look at everything. With `cut` the connection dies on the way. `postcopy`: auto or
        now."""
        other = 1 - self._at
        name, port = f"m{number}", 4000 + number % 1000
        process = self._start(
            other, "receive", f"tcp:{HOSTS[other]}:{port}", "--trust", "--name", name, "--console", "none"
        )
        log = self._folder / f"process{len(self._processes) - 1}.log"
        deadline = time.monotonic() + SECONDS
        while "waiting at" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failure(f"vmm receive: {log.read_text()}")
            time.sleep(0.05)
        if cut:
            one = f"state established sport = :{port}"
            script = f"for i in $(seq 3000); do ss -Hnt {one} | grep -q . && break; sleep 0.02; done; "
            script += f"sleep {self._chance.uniform(0.0, 0.8):.3f}; ss -K {one} >/dev/null"
            killer = self._hosts[other].command("sh", "-c", script)
            killing = subprocess.Popen(killer, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        how = {"": "", "auto": "--postcopy", "now": "--postcopy-now"}[postcopy]
        done = self._vmm("migrate", self._name, f"tcp:{HOSTS[other]}:{port}", "--json", *filter(None, [how]))
        if cut:
            killing.wait()
        if done.returncode == 0:
            (self.switches if postcopy else self.stills).append(json.loads(done.stdout)["downtime"])
            self._at, self._name = other, name
        elif not cut:
            raise Failure(f"vmm migrate: {done.stderr}")
        else:
            self.failed += 1
            process.wait(SECONDS)  # whoever was waiting has heard
        names = [entry["name"] for entry in json.loads(self._vmm("ps", "--json").stdout) if entry["state"] == "running"]
        if names != [self._name]:
            raise Failure(f"running: {names}, not {self._name} alone: {done.stderr}")
        self._look()

    def _look(self) -> None:
        before = self.guest("cat /fio.rounds 2>/dev/null | wc -l")
        self.guest(f"i=0; while [ $(cat /fio.rounds | wc -l) -le {int(before)} ]; do sleep 0.2; "
                   "[ -e /fio.bad ] && break; i=$((i+1)); [ $i -gt 400 ] && exit 9; done; true")  # fmt: skip
        if self.guest("cat /fio.bad 2>/dev/null; true"):
            raise Failure(f"fio: {self.guest('cat /fio.log')}")
        if found := TROUBLE.search(self.guest("dmesg")):
            raise Failure(f"kernel log: {found[0]}")
        if self._echo.poll() is not None:
            raise Failure(f"the neighbour: {self._echo.stderr and self._echo.stderr.read()}")
        assert self._echo.stdout is not None
        lines = []
        deadline = time.monotonic() + SECONDS
        while not lines and time.monotonic() < deadline:
            with suppress(TypeError):
                lines = self._echo.stdout.read().splitlines()
            time.sleep(0.1)
        if not lines:
            raise Failure("the neighbour hears nothing")
        self.silences.append(max(float(line.split()[1]) for line in lines if len(line.split()) == 2))

    def close(self) -> None:
        """End every process."""
        for process in [*self._processes, *([self._echo] if hasattr(self, "_echo") else [])]:
            process.kill()
            process.wait()


async def main(moves: int, cuts: int, seed: int) -> int:
    """Exit status."""
    netns.need("fio", "ping")
    chance = random.Random(seed)
    which = set(chance.sample(range(1, moves + 1), min(cuts, moves)))
    with (
        netns.namespaces("a", "b", "c", "s") as (one, two, neighbour, middle),
        tempfile.TemporaryDirectory(dir="/var/tmp") as name,
    ):
        switch([one, two, neighbour], middle)
        host(one, HOSTS[0])
        host(two, HOSTS[1])
        neighbour.ip("addr", "add", "10.77.0.3/24", "dev", "eth0")
        soak = Soak(Path(name), [one, two], neighbour, seed)
        try:
            soak.begin()
            for number in range(1, moves + 1):
                cut = number in which
                soak.move(number, cut=cut, postcopy="" if cut else ("", "now", "", "auto")[number % 4])
                sys.stdout.write(f"move {number}: ok\n")
                sys.stdout.flush()
        except Failure as error:
            sys.stdout.write(f"FAILED, seed {seed}: {error}\n")
            return 1
        finally:
            soak.close()
    still = sorted(soak.stills or [0.0])
    short = sorted(soak.switches or [0.0])
    middle = statistics.median(short) * 1e3
    sys.stdout.write(f"post-copy: {len(short)} moves, standstill {middle:.0f} ms, most {short[-1] * 1e3:.0f} ms\n")
    sys.stdout.write(
        f"{moves} moves, {soak.failed} of {len(which)} cut ones failed and ran on; standstill median "
        f"{statistics.median(still) * 1e3:.0f} ms, most {still[-1] * 1e3:.0f} ms; the neighbour's longest wait: median "
        f"{statistics.median(soak.silences) * 1e3:.0f} ms, most {max(soak.silences) * 1e3:.0f} ms\n"
    )
    return 0


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]] + [20, 0, random.randrange(1 << 32)][len(sys.argv) - 1 :]
    sys.exit(asyncio.run(main(numbers[0], numbers[1], numbers[2])))
