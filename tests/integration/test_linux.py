"""Debian's unmodified kernels on the machine: clean boots in all shapes, the same warnings as on QEMU, every ending."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support import debian
from tests.support.command import vmm as command
from vmm.boot import identify
from vmm.boot.elf import PT_NOTE
from vmm.lifecycle import Reason
from vmm.machine import layout

pytestmark = [pytest.mark.debian]

QEMU_CMDLINE = "console=ttyS0 panic=-1 cryptomgr.notests no_timer_check do=dmesg"

ALLOWED = {
    r"hrtimer: interrupt took \d+ ns": "the host was busy: real time passes while a vCPU does not run",
    r"Unable to init MCE device \(rc: -5\)": "the software core has no machine-check banks, QEMU's CPU has ten",
}
"""Warnings that QEMU with the same kernel does not show, and why each is right here."""

WARNING = 4
SUSPICIOUS = re.compile(
    r"\b(error|fail(ed|ure)?|warn(ing)?|bug|invalid|unexpected|timed? ?out|corrupt)\b", re.IGNORECASE
)


def kernel_log(console: str) -> list[tuple[int, str]]:
    """(level, text) of every line between the marks."""
    match = re.search(r"DMESG-BEGIN\n(.*?)DMESG-END", console.replace("\r", ""), re.DOTALL)
    assert match, console[-2000:]
    found = []
    for line in match[1].splitlines():
        parts = re.match(r"<(\d+)>\[\s*\d+\.\d+\] ?(.*)", line)
        if parts:
            found.append((int(parts[1]) & 7, parts[2]))
    return found


def normal(text: str) -> str:
    """A line without its addresses, numbers and times."""
    return re.sub(r"0x[0-9a-fA-F]+|\b[0-9a-f]{4,}\b|\d+", "#", text)


def suspicious(log: list[tuple[int, str]]) -> dict[str, str]:
    """Lines of level warning and worse, and those that speak of an error, by their normal form."""
    return {normal(text): text for level, text in log if level <= WARNING or SUSPICIOUS.search(text)}


def unexplained(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Our lines that QEMU has not and ALLOWED does not explain."""
    return [
        text for key, text in ours.items()
        if key not in theirs and not any(re.search(pattern, text) for pattern in ALLOWED)
    ]  # fmt: skip


def boot(
    folder: Path, *options: str, do: str, append: str = "", kernel: Path | None = None, initrd: Path | None = None,
    core: str = "soft",
) -> subprocess.CompletedProcess[str]:
    return command(
        folder, "run", "--core", core, "--kernel", str(kernel or debian.kernel()),
        "--initrd", str(initrd or debian.initramfs(folder)), "--append", f"{append} do={do}".strip(),
        "--timeout", f"{90 * debian.PATIENCE:g}", "--json", *options, timeout=120 * debian.PATIENCE,
    )  # fmt: skip


CLOUD, GENERIC = "linux-image-cloud-amd64", "linux-image-amd64"
PRODUCT = list(itertools.product((CLOUD, GENERIC), ("", "acpi=off"), (1, 2, 4), (128, 1024, 6144)))
PAIRWISE = [
    (CLOUD, "", 1, 128), (GENERIC, "acpi=off", 1, 1024), (CLOUD, "acpi=off", 1, 6144), (GENERIC, "", 2, 128),
    (CLOUD, "", 2, 1024), (GENERIC, "acpi=off", 2, 6144), (CLOUD, "acpi=off", 4, 128), (GENERIC, "", 4, 6144),
    (CLOUD, "", 4, 1024),
]  # fmt: skip
"""Each pair of two parameters' values is in at least one of these. `make test-matrix` runs the whole product."""


async def shell_log(
    kernel: Path, initrd: Path, cmdline: str, cpus: int, found: int, memory_mib: int
) -> list[tuple[int, str]]:
    """The kernel's log, asked for at a shell on the machine's console; `found` of `cpus` processors are found."""
    config = vmm.Config(
        core="soft", kernel=kernel, initrd=initrd, append=f"{cmdline} do=shell", cpus=cpus, memory=memory_mib << 20
    )
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        await machine.console.expect(rb"INIT shell cpus=%d\r" % found, timeout=120)
        await machine.console.expect(rb"shell# ", timeout=60)
        await machine.console.write("echo DMESG''-BEGIN; /bin/busybox dmesg -r; echo DMESG''-END\n")
        text = (await machine.console.expect(rb"(?s)DMESG-BEGIN.*DMESG-END", timeout=60))[0].decode(errors="replace")
        machine.kill()
    log = kernel_log(text)
    usable = re.findall(r"BIOS-e820: \[mem 0x([0-9a-f]+)-0x([0-9a-f]+)\] usable", "\n".join(line for _, line in log))
    found_memory = sum(int(last, 16) + 1 - int(first, 16) for first, last in usable)
    assert found_memory == (memory_mib << 20) - (layout.KERNEL_BASE - layout.EBDA.start)
    return log


@pytest.mark.qemu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("meta", "append", "cpus", "memory_mib"), PRODUCT if os.environ.get("LOOPVISOR_MATRIX") else PAIRWISE
)
async def test_kernel_log_has_no_warning_that_qemu_lacks(
    tmp_path: Path, meta: str, append: str, cpus: int, memory_mib: int
) -> None:
    """Beside QEMU's q35 with the same kernel, initramfs, processors and memory."""
    kernel, initrd = debian.kernel(meta), debian.initramfs(tmp_path)
    oracle = asyncio.create_task(
        asyncio.to_thread(
            debian.qemu, kernel, initrd, cmdline=f"{QEMU_CMDLINE} {append}", cpus=cpus, memory_mib=memory_mib
        )
    )
    # Without ACPI processors are in the MP table, which Debian's cloud kernel cannot read.
    found = 1 if append and meta == CLOUD else cpus
    ours = suspicious(await shell_log(kernel, initrd, append, cpus, found, memory_mib))
    theirs = suspicious(kernel_log(await oracle))
    assert unexplained(ours, theirs) == []


def test_the_short_matrix_holds_every_pair() -> None:
    def pairs(rows: Iterable[tuple[object, ...]]) -> set[tuple[object, ...]]:
        return {(i, row[i], j, row[j]) for row in rows for i, j in itertools.combinations(range(4), 2)}

    assert pairs(PAIRWISE) == pairs(PRODUCT)


@pytest.mark.parametrize(
    ("do", "append", "status", "reason"),
    [
        ("poweroff", "", 0, "shutdown"),
        ("reboot", "", 0, "reset"),
        ("reboot", "reboot=k", 0, "reset"),
        ("reboot", "reboot=b", 0, "reset"),
        ("reboot", "reboot=t", 3, "triple-fault"),
        ("panic", "", 3, "crash"),
        ("halt", "", 0, "halted"),
        ("poweroff", "acpi=off", 0, "halted"),
    ],
)
def test_every_way_to_end(tmp_path: Path, stock_core: str, do: str, append: str, status: int, reason: str) -> None:
    done = boot(tmp_path, do=do, append=f"quiet {append}", core=stock_core)
    assert (done.returncode, json.loads(done.stderr.splitlines()[-1])["reason"]) == (status, reason), done.stderr


def test_default_command_line_of_each_core(tmp_path: Path, stock_core: str) -> None:
    done = command(tmp_path, "run", "--core", stock_core, "--kernel", str(debian.kernel()), "--print-cmdline")
    software = " cryptomgr.notests no_timer_check" if stock_core == "soft" else ""
    assert done.stdout == f"console=ttyS0,115200n8r panic=-1 reboot=panic_warm{software}\n"


@pytest.mark.parametrize("protocol", ["linux64", "vmlinux", "pvh", "bzimage"])
def test_one_kernel_by_every_protocol(
    tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch, unpacked: Callable[[], Path]
) -> None:
    """As bzImage with its payload unpacked here; as the ELF file inside by PVH and, without the note, by the 64-bit
    protocol; and by its own decompressor."""
    if protocol == "pvh":
        image = unpacked()
        assert identify(image) == "pvh"
    elif protocol == "vmlinux":
        image = unpacked()
        elf = bytearray(image.read_bytes())
        table, size, count = struct.unpack_from("<Q14xHH", elf, 32)
        for at in range(table, table + size * count, size):
            if struct.unpack_from("<I", elf, at) == (PT_NOTE,):
                struct.pack_into("<I", elf, at, 0)
        image.write_bytes(elf)
        assert identify(image) == "vmlinux"
    elif protocol == "bzimage":
        image = tmp_path / "own-decompressor"
        data = bytearray(debian.kernel().read_bytes())
        data[0x248:0x250] = bytes(8)  # no payload in the header: it is entered as it is
        image.write_bytes(data)
    else:
        image = debian.kernel()
    done = boot(tmp_path, do="poweroff", kernel=image)
    assert done.returncode == 0 and "INIT poweroff" in done.stdout, done.stdout[-1000:] + done.stderr


PACKERS = {
    "gzip": ["gzip", "-n1c"],
    "bzip2": ["bzip2", "-1c"],
    "lzma": ["xz", "--format=lzma", "-0c"],
    "xz": ["xz", "--check=crc32", "--x86", "--lzma2=preset=0,dict=32MiB", "-c"],
    "lz4": ["lz4", "-l1c"],
    "zstd": ["zstd", "-1c"],
    "lzo": ["lzop", "-1c"],
}
"""As Linux's build packs its payload, but quickly."""
DAILY = "zstd"
"""The other kernels are a campaign: what their decoders make of a payload is tested in unit/test_boot.py. Every other
test boots Debian's, which is packed by lz4."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == DAILY else pytest.mark.campaign) for kind in PACKERS]
)
def test_a_kernel_of_every_compression_boots(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, unpacked: Callable[[], Path]
) -> None:
    """Debian's kernel, its payload packed again by the host's tool."""
    if kind == "lzo":
        pytest.importorskip("lzallright", reason="needs the Python package lzallright for lzo")
    program = PACKERS[kind]
    if shutil.which(program[0]) is None:
        pytest.skip(f"needs the program {program[0]}")
    from vmm.boot.unpack import compression

    plain = unpacked()
    packed = subprocess.run([*program, plain], capture_output=True, check=True, timeout=60).stdout
    assert compression(packed) == kind
    payload = packed + struct.pack("<I", plain.stat().st_size)
    data = bytearray(debian.kernel().read_bytes())
    setup = (data[0x1F1] + 1) * 512
    offset, _ = struct.unpack_from("<II", data, 0x248)  # payload_offset, payload_length
    struct.pack_into("<I", data, 0x24C, len(payload))
    struct.pack_into("<I", data, 0x1F4, -(-(offset + len(payload)) // 16))  # syssize
    image = tmp_path / "kernel"
    image.write_bytes(data[: setup + offset] + payload)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = boot(tmp_path, do="poweroff", append="quiet", kernel=image)
    assert done.returncode == 0 and "INIT poweroff" in done.stdout, done.stdout[-1000:] + done.stderr
    (kept,) = (tmp_path / "cache/loopvisor/kernels").iterdir()
    assert kept.read_bytes() == plain.read_bytes()


@pytest.fixture
def unpacked(tmp_path: Path) -> Callable[[], Path]:
    def make() -> Path:
        from vmm.boot import linux
        from vmm.boot.unpack import unpack_cached

        data = memoryview(debian.kernel().read_bytes())
        path = tmp_path / "vmlinux"
        path.write_bytes(unpack_cached(linux.parse(data, "kernel").payload))
        return path

    return make


async def test_power_button_is_heard(tmp_path: Path) -> None:
    loaded = debian.modules("linux-image-cloud-amd64", "button.ko", "evdev.ko")
    initrd = debian.initramfs(tmp_path, loaded={name: loaded[name] for name in ("evdev.ko", "button.ko")})
    config = vmm.Config(core="soft", kernel=debian.kernel(), initrd=initrd, append="do=button")
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        await machine.console.expect(rb"WAITING", timeout=90)
        outcome = await machine.stop(timeout=30)
    assert outcome.reason is Reason.SHUTDOWN


async def test_pvpanic_driver_reports_a_panic(tmp_path: Path) -> None:
    loaded = debian.modules("linux-image-cloud-amd64", "pvpanic.ko", "pvpanic-mmio.ko")
    order = [name for name in ("pvpanic.ko", "pvpanic-mmio.ko") if name in loaded]
    initrd = debian.initramfs(tmp_path, loaded={name: loaded[name] for name in order})
    config = vmm.Config(core="soft", kernel=debian.kernel(), initrd=initrd, append="do=panic")
    async with vmm.VirtualMachine(config) as machine:
        events = machine.events()
        machine.resume()
        outcome = await machine.wait()
        last = [event async for event in events][-1]
    assert outcome.reason is Reason.CRASH and "pvpanic" in str(outcome) and outcome.status == 3
    assert last == vmm.Ended(outcome)


@pytest.mark.parametrize("guest", ["plain", "image"])
async def test_boot_makes_few_synchronous_exits(tmp_path: Path, stock_core: Any, guest: str) -> None:
    """From the first instruction to the shell, without devices and with virtio disk, network, vsock and entropy."""
    if guest == "plain":
        initrd = debian.initramfs(tmp_path)
        running = vmm.run(core=stock_core, kernel=debian.kernel(), initrd=initrd, append="do=shell")
    else:
        running = vmm.run("linux", core=stock_core)
    async with running as machine:
        await machine.console.expect(rb"BusyBox v.* built-in shell", timeout=90 * debian.PATIENCE)
        stats = machine.stats()
        machine.kill()
    synchronous = sum(count for name, count in stats.items() if name.startswith("exit."))
    assert 0 < synchronous < 5000, stats


@pytest.mark.parametrize(("append", "controller"), [("", "PCI-MSI"), ("acpi=off", "XT-PIC"), ("pci=nomsi", "IO-APIC")])
async def test_virtio_on_pci_interrupts_by_msix_and_by_shared_lines(
    stock_core: Any, append: str, controller: str
) -> None:
    """Root disk and agent socket work with MSI-X, and with INTx through the IOAPIC and through the PIC."""
    async with vmm.run("linux", core=stock_core, append=f"root=/dev/vda rw quiet {append}") as machine:
        interrupts = (await machine.exec("cat", "/proc/interrupts")).text
        copied = await machine.exec("sh", "-c", "dd if=/dev/zero of=/big bs=1M count=16 2>/dev/null && sync && echo ok")
        machine.kill()
    lines = [line for line in interrupts.splitlines() if "virtio" in line]
    assert lines and all(controller in line for line in lines)
    assert copied.text.strip() == "ok"


def test_virtual_clock_and_seed_make_runs_identical(tmp_path: Path) -> None:
    options = ("--clock", "virtual", "--seed", "7", "--name", "same")
    runs = [boot(tmp_path, *options, do="dmesg") for _ in range(2)]
    assert all(done.returncode == 0 for done in runs), runs[0].stderr
    assert runs[0].stdout == runs[1].stdout


def test_sixteen_processors(tmp_path: Path) -> None:
    done = boot(tmp_path, "--cpus", "16", "--memory", "512M", do="poweroff", append="quiet")
    assert done.returncode == 0 and "INIT poweroff cpus=16" in done.stdout, done.stdout[-1000:] + done.stderr


async def test_reboot_restarts_in_place(tmp_path: Path, stock_core: Any) -> None:
    initrd = debian.initramfs(tmp_path)
    config = vmm.Config(core=stock_core, kernel=debian.kernel(), initrd=initrd, append="quiet do=reboot", reboot=True)
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        for _ in range(2):
            await machine.console.expect(rb"INIT reboot", timeout=90 * debian.PATIENCE)
        machine.kill()


async def test_acpi_describes_virtio_mmio_rtc_and_the_rest(tmp_path: Path, stock_core: Any) -> None:
    """A disk on virtio-mmio is found by ACPI alone, the RTC's alarm interrupts, every described device is there."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4 << 20))
    disks = (vmm.Disk(path=disk, transport="mmio"),)
    script = (
        "cat /proc/partitions; ls /sys/bus/acpi/devices; cat /proc/tty/driver/serial;"
        "cat /sys/devices/system/clocksource/clocksource0/available_clocksource; echo nobody reads this > /dev/ttyS1;"
        "echo +1 > /sys/class/rtc/rtc0/wakealarm;"
        "until grep -q ' 8: *[1-9].*rtc0' /proc/interrupts; do sleep 0.1; done; grep -E 'rtc0|virtio' /proc/interrupts"
    )
    async with vmm.run("linux", core=stock_core, disks=disks) as machine:
        text = (await machine.exec("sh", "-c", script, timeout=60 * debian.PATIENCE)).text
        machine.kill()
    assert re.search(r"\b4096 vdb", text), text
    assert re.search(r"16: +[1-9]\d* .*virtio", text), text
    assert re.search(r"8: +[1-9]\d* .*rtc0", text), text
    assert re.search(r"^1: uart:16550A port:000002F8 irq:3", text, re.MULTILINE), text
    assert " acpi_pm" in text, text
    for name in ("PNP0A08", "PNP0501", "PNP0B00", "QEMU0001", "LNRO0005", "LOOP0001", "LNXPWRBN"):
        assert name in text, name


TOPOLOGY = """
cd /sys/devices/system/cpu
for cpu in cpu[0-9]*; do
    cd $cpu/topology
    echo $cpu $(cat physical_package_id core_id thread_siblings_list core_siblings_list)
    cd ../..
done
grep apicid /proc/cpuinfo
"""


@pytest.mark.parametrize("cpus", [3, 4])
async def test_the_guest_sees_one_package_of_single_threaded_cores(stock_core: Any, cpus: int) -> None:
    """What CPUID says of each processor is what the MADT says."""
    async with vmm.run("linux", core=stock_core, cpus=cpus) as machine:
        text = (await machine.exec("sh", "-c", TOPOLOGY, timeout=60 * debian.PATIENCE)).text
        machine.kill()
    for cpu in range(cpus):
        assert f"cpu{cpu} 0 {cpu} {cpu} 0-{cpus - 1}\n" in text, text
    for kind in ("apicid", "initial apicid"):
        ids = [int(number) for number in re.findall(rf"^{kind}\s*: (\d+)$", text, re.MULTILINE)]
        assert ids == list(range(cpus)), text


async def test_a_new_generation_id_reseeds_the_guest(tmp_path: Path) -> None:
    """Debian's generic kernel has the driver; the event comes by ACPI."""
    kernel, initrd = debian.kernel(GENERIC), debian.initramfs(tmp_path)
    async with vmm.run(core="soft", kernel=kernel, initrd=initrd, memory="512M", append="do=shell") as machine:
        await machine.console.expect(rb"shell# ", timeout=90)
        assert machine._machine is not None
        machine._machine.services.generation_id.renew()
        await machine.console.expect(rb"crng reseeded due to virtual machine fork", timeout=60)
        machine.kill()


async def test_a_kernel_that_probes_finds_a_keyboard(tmp_path: Path) -> None:
    """Without ACPI, which says that there is none."""
    initrd = debian.initramfs(tmp_path)
    async with vmm.run(core="soft", kernel=debian.kernel(), initrd=initrd, append="acpi=off do=idle") as machine:
        await machine.console.expect(rb"serio: i8042 KBD port at 0x60,0x64 irq 1", timeout=90)
        await machine.console.expect(rb"input: AT Translated Set 2 keyboard", timeout=60)
        await machine.console.expect(rb"IDLE", timeout=60)
        machine.kill()


MOVE = """
set -e
path=$(readlink -f /sys/block/vdb/../../..)
sed -n 5p $path/resource
echo 1 > $path/remove
echo 1 > /sys/bus/pci/rescan
sed -n 5p $path/resource
md5sum < /dev/vdb
"""
"""Linux gives a disk that it finds later an address in the 64-bit window for its BAR 4."""


async def test_a_disk_works_where_its_registers_are_moved(tmp_path: Path, stock_core: Any) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(1 << 20))
    async with vmm.run("linux", core=stock_core, disks=(str(disk),)) as machine:
        done = await machine.exec("sh", "-c", MOVE, timeout=60 * debian.PATIENCE)
        machine.kill()
    assert done.status == 0, done
    before, after, digest = done.text.splitlines()
    below, above = (int(line.split()[0], 16) for line in (before, after))
    assert layout.MMIO32.start <= below < layout.MMIO32.end and above >= 1 << 32, done.text
    assert digest.split()[0] == hashlib.md5(disk.read_bytes()).hexdigest()
