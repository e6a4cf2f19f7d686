"""Debian's unmodified kernels on KVM, to a shell, beside the software core with the same kernel, initramfs and command
line in the same run: the same console text, and few exits on both. In tests.rig this is kvm-amd; on a host with VT-x
the guest's processor is Intel's there."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest

import vmm
from tests.integration.conftest import require_stock_core
from tests.support import debian

pytestmark = [pytest.mark.kvm, pytest.mark.stock_kvm, pytest.mark.debian]

CMDLINE = f"console=ttyS0 panic=-1 reboot=panic_warm cryptomgr.notests no_timer_check {debian.APPEND} do=shell"
PROMPT = rb"shell# "
SECONDS = 60 * debian.PATIENCE
LIMIT = 5000
"""Synchronous exits from the first instruction to the shell."""

DIFFERENT = {
    r"Calibrating delay loop|tsc: |clocksource: |sched_clock: |kvm-clock: cpu|kvm-guest: stealtime":
        "time: the counter's frequency, and when it was measured",
    r"^Freeing initrd memory": "a worker unpacks the initramfs while the kernel goes on: this line's place varies",
    r"^Memory: |^Freeing unused|^audit: type=2000|setting system clock": "how much, and when",
    r"^Last level [id]TLB entries": "CPUID: the processor's TLBs",
    r"smpboot: CPU0: ": "CPUID: the processor's name",
    r"process: using AMD E400 aware idle routine": "CPUID: a processor of that family has no always running APIC timer",
    r"^(Spectre|Speculative|Spec|Retbleed|RETBleed|SRBDS|MDS|TAA|MMIO|Mitigation|Register|Transient|Meltdown|L1TF|GDS|"
    r"SRSO|ITS|TSA|VMSCAPE|x86/bugs|active return thunk)\b": "CPUID: which of the processor's faults need a cure",
    r"x86/fpu: |^signal: max sigframe size": "CPUID: the processor's register sets",
    r"^(x86/cpu|x86/tme|x86/split lock detection|ENERGY_PERF_BIAS|intel_pstate|intel_idle|RAPL PMU|microcode|resctrl|"
    r"CET detected|core: CPUID marked event|process: using mwait)\b":
        "CPUID: what Intel's processors have; the software core's is AMD's",
    r"kvm-guest: (KVM setup pv remote TLB flush|setup PV (IPIs|sched yield)|PV spinlocks)|^PV qspinlock hash table":
        "what KVM offers beyond kvmclock: help between vCPUs, which take turns on the software core",
    r"^mce: ": "the software core has no machine-check banks",
    r"^hrtimer: interrupt took": "how fast the host is",
    r"^x86: Booting SMP|^smpboot: |^\.\.\.\. node|^Performance Events|^\.\.\. |^perf: ":
        "processors that start one after the other, and counters that KVM may have",
}
"""Lines that depend on the processor or the time, and why each does."""


def comparable(text: str) -> list[str]:
    """The console's lines without times, addresses and other numbers of the machine, and without DIFFERENT."""
    found = []
    for line in text.replace("\r", "").splitlines():
        line = re.sub(r"^\[ *\d+\.\d+\] ?|\x1b\[6n", "", line).rstrip()
        if not line or any(re.search(pattern, line) for pattern in DIFFERENT):
            continue
        found.append(re.sub(r"0x[0-9a-fA-F]+|\b[0-9a-f]{8,}\b|\d+\.\d+", "#", line))
    return found


def difference(one: list[str], two: list[str]) -> list[str]:
    """What `diff` would show: lines only here or only there, in order."""
    return [line for line in difflib.unified_diff(one, two, "soft", "kvm", lineterm="", n=0) if line[:1] in "+-"][2:]


async def to_shell(core: str, kernel: Path, initrd: Path, cpus: int) -> tuple[str, dict[str, int]]:
    """Boot to a shell that does what is typed; the console's text so far and the exits up to the prompt."""
    config = vmm.Config(core=core, kernel=kernel, initrd=initrd, cpus=cpus, cmdline=CMDLINE)  # type: ignore[arg-type]
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        await machine.console.expect(PROMPT, timeout=SECONDS)
        exits = machine.stats()
        await machine.console.write("echo $((6 * 7)) processors=$(busybox nproc); /bin/busybox uname -s\n")
        await machine.console.expect(rb"42 processors=%d\r\nLinux\r\n" % cpus, timeout=SECONDS)
        await machine.console.expect(PROMPT, timeout=SECONDS)
        text = machine.console.text
        await machine.console.write("exit\n")
        outcome = await machine.wait()
    assert outcome.reason is vmm.Reason.SHUTDOWN, outcome
    return text, exits


@pytest.mark.parametrize(
    ("meta", "cpus"), [("linux-image-cloud-amd64", 1), ("linux-image-cloud-amd64", 2), ("linux-image-amd64", 1)]
)
async def test_boots_to_a_shell_with_the_same_text_and_few_exits_as_on_the_software_core(
    tmp_path: Path, meta: str, cpus: int
) -> None:
    require_stock_core("kvm")
    kernel, initrd = debian.kernel(meta), debian.initramfs(tmp_path)
    texts = {}
    for core in ("soft", "kvm"):
        texts[core], exits = await to_shell(core, kernel, initrd, cpus)
        synchronous = sum(count for name, count in exits.items() if name.startswith("exit."))
        assert 0 < synchronous < LIMIT, (core, exits)
    assert "Hypervisor detected: KVM" in texts["kvm"]
    soft, kvm = comparable(texts["soft"]), comparable(texts["kvm"])
    assert difference(soft, kvm) == []
    assert len(soft) > 150, "most lines are compared"
