"""A session of virsh with this daemon and with libvirtd's QEMU driver, and whether both look alike: fields, their
order, units, exit statuses, errors. Every difference is declared here with its reason.

`make test-libvirtd` (python -m tests.integration.test_libvirt_oracle) prints for each command whether its form is the
same, or why it is not.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from tests.support import debian
from tests.support.libvirtd import DaemonProcess, needs_virsh
from tests.support.libvirtoracle import Oracle, missing

pytestmark = [
    needs_virsh,
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.debian,
    pytest.mark.qemu,
    pytest.mark.skipif("LOOPVISOR_LIBVIRTD" not in os.environ, reason="minutes long: make test-libvirtd"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>console=ttyS0 do=idle quiet</cmdline></os><features><acpi/><apic/></features><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{folder}/{name}.qcow2'/>
<target dev='vda' bus='virtio'/></disk>
<interface type='user'><mac address='{mac}'/><model type='virtio'/></interface>
<console type='pty'/><memballoon model='virtio'/>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng></devices></domain>"""
MAC = "52:54:00:11:22:33"
SESSION = f"""
version; uri; hostname; nodeinfo; capabilities; domcapabilities --virttype qemu; list --all; dominfo test
domstate test --reason; dumpxml test; dumpxml test --inactive; domid test; domuuid test; vcpucount test
vcpuinfo test; dommemstat test; domblklist test; domblklist test --details; domiflist test; domblkinfo test vda
domblkstat test vda; domblkstat test vda --human; domblkerror test; domifstat test {MAC}; domif-getlink test {MAC}
domstats test; domstats test --raw; domcontrol test; domjobinfo test
setvcpus test 2 --config --maximum; setvcpus test 2 --config; setmaxmem test 1G --config; setmem test 1G --config
dominfo test; suspend test; domstate test --reason; suspend test; resume test; domstate test --reason; resume test
start test; autostart test; list --all --autostart; autostart --disable test
define $T/n2.xml; start n2; create $T/n2.xml; undefine n2; list --all; destroy n2; destroy n2; domstate n2
managedsave test; domstate test --reason; dominfo test; list --all --managed-save; start test
domstate test --reason; save test $T/s.img; domstate test --reason; save-image-dumpxml $T/s.img; restore $T/s.img
domstate test --reason
snapshot-create-as test s1; snapshot-list test; snapshot-list test --parent; snapshot-list test --tree
snapshot-info test s1; snapshot-dumpxml test s1; snapshot-current test --name; snapshot-revert test s1
snapshot-delete test s1; snapshot-list test; snapshot-revert test s1
net-list --all; net-dumpxml nope; net-info nope
pool-define-as p dir --target $T/pool; pool-build p; pool-start p; pool-list --all; pool-list --all --details
pool-info p; pool-dumpxml p; pool-autostart p; vol-create-as p v1 1M; vol-create-as p v2 1M --format qcow2
vol-create-as p v1 1M; vol-list p; vol-list p --details; vol-info v1 --pool p; vol-dumpxml v1 --pool p
vol-dumpxml v2 --pool p; vol-path v1 --pool p; vol-pool $T/pool/v1; vol-key v1 --pool p; vol-resize v1 2M --pool p
vol-clone v1 v3 --pool p; vol-wipe v1 --pool p; vol-upload v1 $T/p.img --pool p; vol-download v1 $T/down --pool p
vol-delete v1 --pool p; vol-delete v1 --pool p; pool-refresh p; pool-destroy p; pool-list --all; pool-undefine p
pool-info p; nodedev-list --cap system; nodedev-dumpxml computer; iface-list; secret-list; nwfilter-list
event --all --timeout 1; event test --event lifecycle --timeout 1; screenshot test $T/shot; domtime test
domifaddr test; domfsinfo test; domhostname test; qemu-agent-command test '{{"execute":"guest-ping"}}'
attach-disk test $T/p.img vdb; domblklist test; detach-disk test vdb; detach-disk test vdb; blockresize test vda 80M
blockjob test vda; blockjob test vda --info; blockcommit test vda; blockpull test vda
migrate --live test qemu+unix:///system?socket=/nonexistent; schedinfo test; blkdeviotune test vda
blkdeviotune test vda --total-iops-sec 500; blkdeviotune test vda; blkiotune test; domiftune test {MAC}
memtune test; numatune test; vcpupin test; emulatorpin test; iothreadinfo test; cpu-stats test
cpu-stats test --total; perf test; guestvcpus test; nodecpustats; nodecpustats --percent; nodecpumap; nodememstats
node-memory-tune; freecell; freecell --all; freepages --all; allocpages 4 0; maxvcpus; cpu-models x86_64; sysinfo
desc test; desc test --title hello; desc test --title; metadata test --uri http://x
metadata test --uri http://x --key k --set '<a/>'; metadata test --uri http://x; metadata test --uri http://x --remove
domrename test t2; domdisplay test; vncdisplay test; ttyconsole test; send-key test KEY_A; inject-nmi test
send-process-signal test 1 term; dump test $T/dump; dump test $T/dump2 --memory-only
get-user-sshkeys test root; domlaunchsecinfo test; checkpoint-list test; backup-dumpxml test; dompmsuspend test mem
dompmwakeup test; reset test; reboot test; list --all --state-running
domstate nope; dominfo nope; pool-info nope; vol-info nope; snapshot-info test nope; nodedev-dumpxml nope
iface-dumpxml nope; secret-dumpxml 00000000-0000-0000-0000-000000000001; nwfilter-dumpxml nope; net-autostart nope
setvcpus test 99; setmem test 100G; domblkstat test vdz; domifstat test nope; domblkinfo test vdz
console test --devname nope; destroy test; domstate test --reason; domrename test t2; domid t2; domrename t2 test
suspend test; resume test; save test $T/s2.img; managedsave test; reboot test; reset test; shutdown test
domblkstat test vda; domblkinfo test vda; dommemstat test; vcpuinfo test; cpu-stats test; domstats test
domtime test; domifaddr test; domjobinfo test; undefine test; dominfo test
"""
COMMANDS = [command.strip() for line in SESSION.splitlines() for command in line.split(";") if command.strip()]


class Declared(NamedTuple):
    """Lines of some commands that may differ. `lines`: "-" is libvirtd's, "+" is ours; of XML "- path" of an element
    or an attribute."""

    commands: str
    lines: str
    reason: str


DECLARED = [
    Declared("uri", r".*socket=.*", "the sockets are two"),
    Declared("dominfo.*", r"-Messages: tainted.*", "the oracle runs QEMU as root; our machine drops its privileges"),
    Declared("vcpuinfo.*", r".CPU: .*", "one thread may run several vCPUs"),
    Declared("dommemstat.*", r"-last_update .*", "the guest's driver tells when it is asked, not at a period"),
    Declared("domblkstat.*", r"[+](vda errs|error count:) N", "our devices count requests that failed"),
    Declared("domblkstat.*", r"-.*total.(times|duration).*", "our devices count requests and bytes, not their time"),
    Declared("domifstat.*", r"(.status|-error:|[+]MAC).*", "QEMU has no counters of user networking; we have"),
    Declared("domstats.*", r"[+]net\.N\..*", "QEMU has no counters of user networking; we have"),
    Declared("domstats.*", r"-block\.N\.(rd|wr|fl)\.times=N|[+]block\.N\.errors=N", "as domblkstat"),
    Declared("domstats.*", r"-block\.N\.backingIndex=N", "names of blockdevs are QEMU's"),
    Declared("domstats.*", r"-cpu\.(cache\.monitor|haltpoll)\..*", "KVM's halt polling and Intel's cache monitor"),
    Declared("domstats.*", r"-cpu\.(time|user|system)=N", "a domain that does not run has no process to ask"),
    Declared("domstats.*", r"-(balloon\.last-update|vcpu\.N\.(wait|delay))=N", "as dommemstat and vcpuinfo"),
    Declared("domstats.*", r"-dirtyrate\..*", "VIR_DOMAIN_STATS_DIRTYRATE is not here"),
    Declared("net-list.*", r"[+]default .*", "user networking is always there"),
    Declared("pool-list.*", r"[+]default .*", "the pool default is always there"),
    Declared("vol-upload.*", r".(status|error).*", "a volume takes no more than it has room for"),
    Declared("screenshot.*|send-key.*|dompm.*", r".(status|error).*", "no display, no keyboard, no sleep: by name"),
    Declared("domtime.*|domfsinfo.*|domhostname.*|qemu-agent-command.*", r".error: argument unsupported: .*",
             "the agent is ours, and the error says how to have it"),
    Declared("guestvcpus.*|get-user-sshkeys.*", r".error.*", "the agent is ours, and the error says how to have it"),
    Declared("blockcommit.*", r".error: invalid argument: .*", "the error says that there is no backing file"),
    Declared("schedinfo.*|blkiotune.*|memtune.*|cpu-stats.*", r".*", "the oracle has no cgroups here"),
    Declared("blkdeviotune.*", r"-group_name *:.*|[-+]size_iops_sec.*", "each disk has limits of its own"),
    Declared("domiftune.*", r"-inbound\.floor *: .*", "a floor is a promise of a switch that this host is not"),
    Declared("sysinfo.*", r".*", "libvirtd asks dmidecode, which needs /dev/mem; we read /sys"),
    Declared("freepages.*", r"[-+]NKiB: N", "the host's own sizes of pages"),
    Declared("allocpages.*", r".error: .*", "the host's memory is looked at only"),
    Declared("cpu-models.*", r"..*", "the guest's processor is what the execution core offers"),
    Declared("ttyconsole.*", r".*", "the console is a stream, not a terminal device of the host"),
    Declared("backup-dumpxml.*", r".error.*", "there are no backups: by name"),
    Declared("setmem.*", r".error: invalid argument: cannot set memory.*", "the error says how much there may be"),
    # XML: what is QEMU's own.
    Declared("capabilities|domcapabilities.*", r".*", "what the host and the machines are: another hypervisor"),
    Declared(".*dumpxml.*", r"-.*/(address|alias|seclabel|resource|backingStore|audio|boot|input)(/.*|@.*)?",
             "the machine chooses places; it has no such devices and labels"),
    Declared(".*dumpxml.*", r"-.*/(source@index|(serial|console)/source.*|console@tty|target/model.*|cpu/feature.*)",
             "names and terminals of QEMU's"),
    Declared(".*dumpxml.*", r"-.*/(cpu@check|controller.*)", "our machine is one PCI bus without USB"),
    Declared("snapshot-dumpxml.*", r"-.*/(inactiveDomain|cookie).*", "the definition is kept in the snapshot itself"),
    Declared("vol-dumpxml.*", r"-.*/timestamps/btime", "Python's stat does not tell when a file was made"),
    Declared("nodedev-dumpxml computer", r"-.*/capability/firmware.*", "the host may hide what DMI says"),
    Declared(".*dumpxml.*", r"[+].*/(interface/backend|panic|disk/driver@discard).*",
             "passt and pvpanic, which our machine has, and discards that are always passed on"),
]  # fmt: skip


class Answer(NamedTuple):
    status: int
    text: str


def session(uri: str, folder: Path) -> list[Answer]:
    """What virsh answered to each command."""
    folder.mkdir()
    initrd = debian.initramfs(folder)
    for name, mac in (("test", MAC), ("n2", MAC[:-1] + "4")):
        image = folder / f"{name}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
        xml = DOMAIN.format(name=name, mac=mac, folder=folder, kernel=debian.kernel(), initrd=initrd)
        (folder / f"{name}.xml").write_text(xml)
    (folder / "p.img").write_bytes(bytes(4 << 20))

    def virsh(command: str) -> Answer:
        done = subprocess.run(
            ["virsh", "-c", uri, *shlex.split(command.replace("$T", str(folder)))],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, errors="replace",
        )  # fmt: skip
        return Answer(done.returncode, (done.stdout + done.stderr).replace(str(folder), "$T"))

    for command in ("define $T/test.xml", "start test"):
        begun = virsh(command)
        assert begun.status == 0, begun.text
    return [virsh(command) for command in COMMANDS]


def form(answer: Answer) -> list[str]:
    """Lines without what differs from host to host: numbers, UUIDs, widths of columns; of XML the paths in it."""
    lines = [f"status {answer.status}"]
    if answer.text.startswith("<") and answer.status == 0:
        return lines + sorted(_paths(ElementTree.fromstring(answer.text)))
    for line in answer.text.splitlines():
        plain = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}", "U", line)
        plain = re.sub(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", "MAC", plain)
        plain = re.sub(r"[ \t]+", " ", plain).strip()
        if plain and set(plain) != {"-"}:
            lines.append(re.sub(r"(?<![A-Za-z$])[0-9]+([.][0-9]+)?", "N", plain))
    return lines


def _paths(element: ElementTree.Element, above: str = "") -> set[str]:
    here = f"{above}/{element.tag}"
    found = {here} | {f"{here}@{name}" for name in element.attrib}
    for child in element:
        found |= _paths(child, here)
    return found


class Row(NamedTuple):
    """One command: lines that differ without a reason, and the reasons of the others."""

    command: str
    unexplained: list[str]
    reasons: list[str]


def compared(theirs: list[Answer], ours: list[Answer]) -> list[Row]:
    rows = []
    for command, their, our in zip(COMMANDS, theirs, ours, strict=True):
        changes = difflib.unified_diff(form(their), form(our), lineterm="", n=0)
        unexplained, reasons = [], []
        for line in list(changes)[2:]:
            if line.startswith("@@"):
                continue
            reason = next((one.reason for one in DECLARED if _explains(one, command, line)), None)
            if reason is None:
                unexplained.append(line)
            elif reason not in reasons:
                reasons.append(reason)
        rows.append(Row(command, unexplained, reasons))
    return rows


def _explains(declared: Declared, command: str, line: str) -> bool:
    return bool(re.fullmatch(declared.commands, command) and re.fullmatch(declared.lines, line))


def both() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="vs") as base, Oracle() as oracle, DaemonProcess() as daemon:
        with ThreadPoolExecutor(2) as pool:
            theirs = pool.submit(session, oracle.uri(), Path(base) / "theirs")
            ours = pool.submit(session, daemon.uri("qemu"), Path(base) / "ours")
            return compared(theirs.result(), ours.result())


def test_a_session_looks_as_it_does_with_libvirtd() -> None:
    rows = both()
    unexplained = [f"{row.command}:\n    " + "\n    ".join(row.unexplained) for row in rows if row.unexplained]
    assert not unexplained, "\n".join(unexplained)
    assert sum(not row.reasons for row in rows) > len(rows) // 2


def main() -> int:
    """Tell of each command; 1 if a difference has no reason."""
    rows = both()
    for row in rows:
        told = "; ".join(row.reasons) or "same form"
        sys.stdout.write(f"{row.command}: {'NOT EXPLAINED' if row.unexplained else told}\n")
        sys.stdout.writelines(f"    {line}\n" for line in row.unexplained)
    same = sum(not row.reasons and not row.unexplained for row in rows)
    sys.stdout.write(f"{len(rows)} commands, {same} of the same form, {len(rows) - same} with differences\n")
    return int(any(row.unexplained for row in rows))


if __name__ == "__main__":
    sys.exit(main())
