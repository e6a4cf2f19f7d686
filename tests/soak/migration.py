"""One machine that moves back and forth between two hosts, over and over: `python -m tests.soak.migration [MOVES
[CUTS [SEED]]]`. Every second move is by post-copy.

The hosts are network namespaces at a bridge in a third; a cable of 1 Gbit/s and 10 ms each way (tests/support/wire.c)
leads to the second host, so each move crosses it, and what the neighbour in a fourth namespace sends every other time.
In the guest, a Debian, fio verifies what it writes to a file system on a qcow2 disk, and a tree of sources is compiled,
whose program must print what it prints on the host; its root is on a raw disk, and both are shared storage. The
neighbour has two SSH sessions, an iperf3 in both directions and TCP transfers with the guest, all the time the same
connections, and compares every byte of the sessions and transfers. After each move all of them must have gone on, the
guest's kernel must have no complaint; every ten moves fio and the compiler must have got on. With CUTS so many of the
moves are cut at a random moment: then the machine must run on, here or there. At last the guest shuts down, and e2fsck
must find nothing on its disks. Needs root, ip, ssh, iperf3, qemu-img and e2fsck.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from images import built
from tests.soak import sources
from tests.support import netns
from tests.support.command import VMM, environment

TROUBLE = re.compile(
    "BUG|WARNING|Oops|Call Trace|lockup|hung_task|blocked for more|EXT4-fs error|I/O error|general protection|segfault"
)
SECONDS = 300.0
"""Deadline of whatever is waited for, far beyond what it takes on a busy host."""
IMAGE = "debian-moves"
PARTS = Path(__file__).parent / "migration_guest"
PEER = Path(__file__).parent / "state_guest" / "peer.c"
WIRE = Path(netns.__file__).parent / "wire.c"
GUEST = "10.77.0.10"
HOSTS = ("10.77.0.1", "10.77.0.2")
BITS, DELAY_US = 1_000_000_000, 10_000
BLOB = 4 << 20
CHECK_MOVES = 10
"""After so many moves the guest's slow work must have got on."""
SLOW = ("fio", "compile")
NETWORK = f"""[Match]
Name=e*

[Network]
Address={GUEST}/24
LinkLocalAddressing=no
"""


class Failure(Exception):
    """A move found something."""


def compiled(folder: Path, source: Path) -> Path:
    """A program of one C file."""
    program = folder / source.stem
    command: list[str | Path] = ["gcc", "-std=gnu11", "-O2", "-pthread", "-o", program, source]
    subprocess.run(command, check=True, capture_output=True)
    return program


@contextmanager
def network(folder: Path) -> Iterator[tuple[list[netns.Namespace], netns.Namespace]]:
    """The hosts and the neighbour, each with an eth0 at one bridge; the second host's is the end of a long cable."""
    with netns.namespaces("a", "b", "c", "s") as (one, two, neighbour, middle):
        wire = subprocess.Popen(
            [compiled(folder, WIRE), f"/run/netns/{two.name}", "eth0", f"/run/netns/{middle.name}", "port1",
             str(BITS), str(DELAY_US)],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert wire.stdout is not None and wire.stdout.readline(), "the cable does not carry"
            middle.ip("link", "add", "sw", "type", "bridge")
            middle.ip("link", "set", "sw", "up")
            for number, space in enumerate((one, two, neighbour)):
                if space is not two:
                    netns.cable(space, middle)
                    middle.ip("link", "set", "eth0", "name", f"port{number}")
                space.ip("link", "set", "eth0", "up")
                middle.ip("link", "set", f"port{number}", "master", "sw", "up")
            host(one, HOSTS[0])
            host(two, HOSTS[1])
            neighbour.ip("addr", "add", "10.77.0.3/24", "dev", "eth0")
            yield [one, two], neighbour
        finally:
            wire.kill()
            wire.communicate()


def host(space: netns.Namespace, address: str) -> None:
    """A host: a bridge with the network's cable and a tap for the machine."""
    space.ip("link", "add", "br0", "type", "bridge")
    space.ip("tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
    for name in ("eth0", "tap0"):
        space.ip("link", "set", name, "master", "br0", "up")
    space.ip("link", "set", "br0", "up")
    space.ip("addr", "add", f"{address}/24", "dev", "br0")


class Client:
    """A program of the neighbour that runs all the time and writes lines."""

    def __init__(self, space: netns.Namespace, log: Path, *command: str) -> None:
        self.log = log
        self._read = 0
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                space.command(*command), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )

    def check(self) -> None:
        """Failure if it has ended."""
        if self._process.poll() is not None:
            raise Failure(
                f"{self.log.stem} ended with status {self._process.returncode}: {self.log.read_text()[-2000:]}"
            )

    def fresh(self) -> list[str]:
        """Whole lines that are new since the last call."""
        self.check()
        with self.log.open("rb") as log:
            log.seek(self._read)
            data = log.read()
        data = data[: data.rfind(b"\n") + 1]
        self._read += len(data)
        return data.decode(errors="replace").splitlines()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Soak:
    """The campaign."""

    def __init__(self, folder: Path, hosts: list[netns.Namespace], neighbour: netns.Namespace, seed: int) -> None:
        self._folder, self._hosts, self._neighbour = folder, hosts, neighbour
        self._runtime = folder / "run"
        self._runtime.mkdir(mode=0o700)
        self._environment = environment(self._runtime)
        self._seed = seed
        self._chance = random.Random(seed)
        self._at = 0
        self._name = "m0"
        self._processes: list[subprocess.Popen[str]] = []
        self._clients: list[Client] = []
        self._counts = dict.fromkeys(SLOW, 0)
        self.stills: list[float] = []
        self.switches: list[float] = []
        """Standstills of post-copy."""
        self.totals: list[float] = []
        self.silences: list[float] = []
        self.failed = 0
        self.told = ""
        """What was done until now."""

    def _start(self, number: int, *words: str) -> subprocess.Popen[str]:
        command = self._hosts[number].command(*VMM, *words)
        with open(self._folder / f"process{len(self._processes)}.log", "w") as log:
            process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
            )
        self._processes.append(process)
        return process

    def _vmm(self, *words: str, data: bytes | None = None) -> subprocess.CompletedProcess[str]:
        command = self._hosts[self._at].command(*VMM, *words)
        stdin = subprocess.DEVNULL if data is None else subprocess.PIPE
        with subprocess.Popen(
            command, env=self._environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                out, errors = process.communicate(data, timeout=SECONDS)
            finally:
                process.kill()
        return subprocess.CompletedProcess(command, process.returncode, out.decode(), errors.decode())

    def guest(self, script: str, data: bytes | None = None) -> str:
        """Run a script in the guest."""
        reads = [] if data is None else ["-i"]
        done = self._vmm("exec", *reads, self._name, "--", "sh", "-c", script, data=data)
        if done.returncode:
            raise Failure(f"{script}: {done.stdout}{done.stderr}")
        return done.stdout

    def _until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise Failure(what)
            time.sleep(0.1)

    def _archive(self) -> bytes:
        """What the guest gets as /work."""
        folder = self._folder / "work"
        folder.mkdir()
        (folder / "expected").write_text(sources.make(folder / "src", self._seed, 24, 8))
        (folder / "blob").write_bytes(self._chance.randbytes(BLOB))
        shutil.copy(PEER, folder)
        shutil.copy(PARTS / "workers.sh", folder)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            tar.add(folder, ".")
        return out.getvalue()

    def _ssh(self) -> list[str]:
        """The neighbour's ssh, without what it is to run; the guest knows its key."""
        key = self._folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        self.guest(
            "mkdir -p -m 700 /root/.ssh; cat >/root/.ssh/authorized_keys; ssh-keygen -A; systemctl restart ssh",
            Path(f"{key}.pub").read_bytes(),
        )
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes", "LogLevel=ERROR")
        return ["ssh", "-i", str(key), *(word for each in options for word in ("-o", each)), f"root@{GUEST}"]

    def begin(self) -> None:
        """Boot the machine, with everything at work."""
        image = built.current(IMAGE)
        assert image is not None
        self._root, self._data = self._folder / "root.img", self._folder / "data.qcow2"
        subprocess.run(["cp", "--sparse=always", image.directory / "root.img", self._root], check=True)
        subprocess.run([*VMM, "disk", "create", self._data, "256M"], check=True, env=self._environment)
        self._running = self._start(
            0, "run", "--kernel", str(image.directory / "vmlinuz"), "--initrd", str(image.directory / "initrd"),
            "--append", "root=/dev/vda rw quiet", "--agent", "--memory", "384M", "--name", self._name,
            "--console", "none",
            "--net", "tap=tap0,id=n0", "--disk", f"{self._root},id=root,format=raw", "--disk", f"{self._data},id=data",
        )  # fmt: skip
        self._until("the machine does not start", lambda: not self._vmm("exec", self._name, "--", "true").returncode)
        self.guest("mkdir /work; tar -xf - -C /work", self._archive())
        self.guest("cat >/etc/systemd/network/00-soak.network; systemctl restart systemd-networkd", NETWORK.encode())
        ssh = self._ssh()
        self.guest("setsid bash /work/workers.sh data >/work/workers.log 2>&1 </dev/null &")
        listening = "ss -Hlnt | grep -q :7001 && ss -Hlnt | grep -q :5201 && echo yes; cat /work/wrong; true"
        self._until("no servers in the guest", lambda: self.guest(listening) != "")
        peer = compiled(self._folder, PEER)
        folder = self._folder
        for name, *command in (
            ("ssh", sys.executable, str(PARTS / "neighbour.py"), *ssh),
            ("iperf3", "iperf3", "-c", GUEST, "--bidir", "-b", "4M", "-t", "86400", "-i", "1", "--forceflush"),
            ("tcp", str(peer), "client", GUEST, "7001", str(folder / "work" / "blob"), str(folder / "transfers")),
        ):
            self._clients.append(Client(self._neighbour, folder / f"{name}.log", *command))
        self._look()

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
            took = json.loads(done.stdout)
            (self.switches if postcopy else self.stills).append(took["downtime"])
            self.totals.append(took["seconds"])
            self._at, self._name, self._running = other, name, process
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
        """Everything goes on, and nothing is wrong."""
        wrong, counts, log = self.guest(
            f"cd /work; cat wrong; echo ---; for n in {' '.join(SLOW)}; do cat count.$n | wc -l; done; echo ---; dmesg"
        ).split("---\n", 2)
        if wrong:
            raise Failure(f"in the guest: {wrong}")
        if found := TROUBLE.search(log):
            raise Failure(f"kernel log: {found[0]}: {log[-4000:]}")
        self._now = dict(zip(SLOW, map(int, counts.split()), strict=True))
        sessions, iperf3, transfers = self._clients
        for client in self._clients:
            client.check()
        for client in (sessions, iperf3):
            client.fresh()  # lines of before do not count
        before = self._transfers()
        lines: list[list[str]] = []
        ways: set[str] = set()

        def ssh() -> bool:
            lines.extend(line.split() for line in sessions.fresh())
            return len(lines) >= 2 and lines[-1][0] != lines[0][0]

        def both_ways() -> bool:
            # [  5][TX-C]   3.00-4.00   sec   512 KBytes  4.19 Mbits/sec …
            for line in iperf3.fresh():
                if found := re.search(r"\[([RT]X)-C\].* sec +([0-9.]+) ", line):
                    ways.update([found[1]] if float(found[2]) else [])
            return len(ways) == 2

        def transferred() -> bool:
            transfers.check()
            return self._transfers() > before

        self._until("the SSH sessions stand still", ssh)
        self._until("iperf3 stands still", both_ways)
        self._until("the transfers stand still", transferred)
        self.silences.append(max(float(line[2]) for line in lines))
        self.told = f"{lines[-1][0]} lines and {lines[-1][1]} sums by ssh, {self._transfers()} transfers, {self._now}"

    def _transfers(self) -> int:
        """That the neighbour compared."""
        with suppress(OSError, IndexError):
            return int((self._folder / "transfers").read_text().split()[0])
        return 0

    def got_on(self) -> None:
        """Failure if the guest's slow work has not got on since the last call."""

        def more() -> bool:
            self._look()
            return all(self._now[name] > self._counts[name] for name in SLOW)

        self._until("fio or the compiler stand still", more)
        self._counts = self._now

    def finish(self) -> None:
        """The guest shuts down; its disks are clean. Failure."""
        for client in self._clients:
            client.check()
            client.close()
        self.guest("systemctl poweroff --no-block")
        status = self._running.wait(SECONDS)
        if status:
            raise Failure(f"the machine ended with status {status}")
        raw = self._folder / "data.raw"
        subprocess.run(["qemu-img", "check", "-q", self._data], check=True)
        subprocess.run(["qemu-img", "convert", "-O", "raw", self._data, raw], check=True)
        for disk in (self._root, raw):
            done = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True)
            if done.returncode:
                raise Failure(f"e2fsck of {disk.name} ends with status {done.returncode}: {done.stdout}")

    def close(self) -> None:
        """End every process."""
        for client in self._clients:
            client.close()
        for process in self._processes:
            process.kill()
            process.wait()


def main(moves: int, cuts: int, seed: int) -> int:
    """Exit status."""
    netns.need("ssh", "iperf3", "qemu-img", "e2fsck", "gcc")
    if built.current(IMAGE) is None:
        from images import builder

        builder.build(str(PARTS / f"{IMAGE}.toml"), None)
    chance = random.Random(seed)
    which = set(chance.sample(range(1, moves + 1), min(cuts, moves)))
    folder = Path(tempfile.mkdtemp(prefix="loopvisor-moves-", dir="/var/tmp"))
    with network(folder) as (hosts, neighbour):
        soak = Soak(folder, hosts, neighbour, seed)
        number = 0
        try:
            soak.begin()
            tell(f"the guest works: {soak.told}")
            for number in range(1, moves + 1):
                cut = number in which
                soak.move(number, cut=cut, postcopy="" if cut else ("", "now", "", "auto")[number % 4])
                if number % CHECK_MOVES == 0 or number == moves:
                    soak.got_on()
                tell(f"move {number}: {soak.told}")
            soak.finish()
        except Failure as error:
            tell(f"FAILED in move {number}, seed {seed}, kept {folder}: {error}")
            return 1
        finally:
            soak.close()
    shutil.rmtree(folder)
    still, short = sorted(soak.stills or [0.0]), sorted(soak.switches or [0.0])
    middle = statistics.median(short) * 1e3
    tell(f"post-copy: {len(short)} moves, standstill median {middle:.0f} ms, most {short[-1] * 1e3:.0f} ms")
    tell(
        f"{moves} moves, {soak.failed} of {len(which)} cut ones failed and ran on, e2fsck finds nothing; pre-copy: "
        f"standstill median {statistics.median(still) * 1e3:.0f} ms, most {still[-1] * 1e3:.0f} ms; whole move median "
        f"{statistics.median(soak.totals or [0.0]):.1f} s; the neighbour's longest wait: median "
        f"{statistics.median(soak.silences) * 1e3:.0f} ms, most {max(soak.silences) * 1e3:.0f} ms"
    )
    return 0


def tell(line: str) -> None:
    """To whoever watches."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]] + [20, 0, random.randrange(1 << 32)][len(sys.argv) - 1 :]
    sys.exit(main(numbers[0], numbers[1], numbers[2]))
