"""Machines that are saved, killed and taken up again, over and over: `python -m tests.soak.state ROUNDS`.

A Debian guest works all the while: it writes files with known content, reads them again past its page cache, and
computes. Each round saves it while it runs, alone or as an increment on the round before, kills the process, and goes
on from the directory. The kernel's log is looked through each time, the file system at the end.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vmm.state import manifest as manifests

WORK = """
mkdir -p /work; cd /work
n=0
while :; do
    n=$((n + 1))
    f=/work/$((n % 40))
    (echo $n; head -c $((n % 200 * 1000 + 1)) /dev/urandom) >$f.new; sha256sum <$f.new >$f.sum.new
    mv $f.new $f; mv $f.sum.new $f.sum
    [ $((n % 7)) = 0 ] && { sync; echo 1 >/proc/sys/vm/drop_caches; }
    g=/work/$((n * 17 % 40))
    if [ -e $g.sum ] && [ "$(sha256sum <$g)" != "$(cat $g.sum)" ]; then echo "$g is wrong" >>/work/wrong; fi
    [ "$(seq 1 2000 | sha256sum)" = "$SEQ" ] || echo "seq is wrong" >>/work/wrong
    echo $n >/work/count
done
"""
CHILD = """
import asyncio, json, pathlib, sys
import vmm

async def main(mode, source, target, base, seconds, work):
    manager = vmm.run("linux", nets=[]) if mode == "run" else vmm.restore(source)
    async with manager as vm:
        async def text(script):
            return (await vm.exec("sh", "-c", script, timeout=120)).text
        if mode == "run":
            await vm.exec("sh", "-c", "cat >/work.sh", input=work.encode(), timeout=120, check=True)
            await text("SEQ=$(seq 1 2000 | sha256sum) setsid sh /work.sh >/dev/null 2>&1 &")
        before = await text("cat /work/count 2>/dev/null || echo 0")
        await asyncio.sleep(seconds)
        facts = {"before": before, "after": await text("cat /work/count || echo 0"),
                 "wrong": await text("cat /work/wrong 2>/dev/null; true"), "log": await text("dmesg")}
        if target.endswith("last"):
            await text("pkill -f work.sh; sleep 0.5; sync; mount -o remount,ro /; sync")
        await vm.snapshot(target, base=pathlib.Path(base) if base else None)
        print(json.dumps(facts), flush=True)
        await asyncio.sleep(1000)

asyncio.run(main(*json.loads(sys.argv[1])))
"""
TROUBLE = re.compile("BUG|WARNING|Oops|lockup|rcu.*stall|EXT4-fs error|I/O error|blocked for more")


def child(*arguments: object) -> dict[str, str]:
    """What one process saw before it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(arguments)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the process ended with status {process.wait()}")
        facts: dict[str, str] = json.loads(line)
        return facts
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def check_disk(snapshot: Path, raw: Path) -> int:
    """e2fsck of the disk that a snapshot holds as an overlay; its status."""
    manifest, _ = manifests.read(snapshot)
    entry = manifest.disks["disk0"]
    sectors = (snapshot / "disks" / "disk0.sectors").read_bytes()
    shutil.copy(entry.files[0].path, raw)
    with raw.open("r+b") as disk, (snapshot / "disks" / "disk0.overlay").open("rb") as overlay:
        for sector in range(entry.capacity // 512):
            if sectors[sector // 8] >> sector % 8 & 1:
                overlay.seek(sector * 512)
                disk.seek(sector * 512)
                disk.write(overlay.read(512))
    return subprocess.run(["e2fsck", "-fn", raw], stdout=subprocess.DEVNULL, check=False).returncode


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    source = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns())
    with tempfile.TemporaryDirectory(prefix="loopvisor-soak-", dir="/var/tmp") as name:
        folder = Path(name)
        last, chain, done = "", 0, 0
        for number in range(rounds + 1):
            target = str(folder / (f"s{number}" if number < rounds else "last"))
            base = last if last and number < rounds and chain < 8 and source.random() < 0.7 else ""
            chain = chain + 1 if base else 0
            mode = "run" if not last else "restore"
            facts = child(mode, last, target, base, source.random() * 0.5, WORK)
            trouble = facts["wrong"] or TROUBLE.search(facts["log"])
            if trouble or int(facts["after"]) < int(facts["before"]):
                counts = f"{facts['before']} then {facts['after']} files"
                sys.stdout.write(f"round {number}: {trouble}; {counts}\n{facts['log'][-3000:]}\n")
                return 1
            if not base:
                for old in folder.iterdir():
                    if str(old) != target:
                        shutil.rmtree(old)
            last, done = target, int(facts["after"])
        status = check_disk(Path(last), folder / "disk")
    sys.stdout.write(f"{rounds} rounds, {done} files written: nothing wrong; e2fsck ends with status {status}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
