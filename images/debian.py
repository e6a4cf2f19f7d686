"""A root disk with a whole Debian, which mmdebstrap installs: as root, or in a user namespace, or by fakechroot.

Packages come from our own cache where the host's apt knows the release: they are what was looked up for the image's
key, and mmdebstrap then needs no network. Another release it downloads by itself, from Debian's usual sources.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from images import cache, packages
from images.errors import ImageError
from images.kernel import Kernel, guest_init
from images.packages import Package
from images.programs import run, tool
from images.tree import Tree

STAGED = ("var/cache/apt/archives", "var/lib/apt/lists")
LEFT_OUT = ("doc/*/*", "man/*/*", "locale/*/*", "info/*")
"""Below /usr/share. Directories stay, for scripts of packages make files and links in them."""
MAN_SECTIONS = range(1, 10)
GIVEN_UP = re.compile(r"dpkg: error processing (?:package|archive) (\S+)")
COMPLAINT = re.compile(
    r"(?i)\berror\b|cannot|can't|could not|failed|fatal|unable|no such file|not found|denied|no space"
)
COMPLAINT_LINES = 20
"""How far before dpkg's own message a script's complaint may stand."""
FOLLOWING = re.compile(r"Sub-process|setup failed|mmdebstrap failed|.* failed: E: |apt-get .*failed$|run_chroot")
"""Errors that only say that something else failed."""
STAGES = re.compile(r"I: ((?:running apt-get update|downloading|extracting|installing|creating)\b.*?)\.*$")
"""The lines of mmdebstrap that tell its user something."""


def make(
    recipe: dict[str, Any], kernel: Kernel, debs: dict[Package, Path], image: Path, work: Path,
    tell: Callable[[str], None],
) -> None:
    """Write the root disk. `debs` are the packages of a new system, empty if mmdebstrap is to find them."""
    root = recipe["root"]
    tree = Tree()
    with tarfile.open(_install(root, debs, work, tell)) as archive:
        tree.add_tar(archive)
    tell("making the root file system")
    for path in [path for path in tree.nodes if path.startswith(("dev/", "etc/ssh/ssh_host_"))]:
        del tree.nodes[path]  # every machine has keys of its own, made at its first start
    for path in STAGED:
        tree.directory(path)  # mmdebstrap has given them our user and mode
    hostname = root.get("hostname", "debian")
    for path, data in kernel.modules.items():
        tree.file(f"usr/lib/modules/{kernel.version}/{path}", data)
    tree.file("usr/sbin/loopvisor-agent", guest_init(), 0o755)
    for path, text in _FILES.items():
        tree.file(path, text.format(hostname=hostname).encode())
    for path, target in _LINKS.items():
        tree.link(path, target)
    shadow = tree.nodes["etc/shadow"]
    text = re.sub(r"(?m)^root:[^:]*:", "root::", shadow.data.decode())
    tree.nodes["etc/shadow"] = replace(shadow, data=text.encode())
    tree.ext4(image, root["size_mib"], hostname, work)


def _install(root: dict[str, Any], debs: dict[Package, Path], work: Path, tell: Callable[[str], None]) -> Path:
    """mmdebstrap's tar file."""
    command = [tool("mmdebstrap", "mmdebstrap"), "--variant=minbase", "--format=tar"]
    command += ["--include", ",".join(root["include"]), '--aptopt=Acquire::Languages "none"']
    # dpkg(1): "*" matches slashes as well, and a directory that a package brings is made unless its own name matches.
    command += [f"--dpkgopt=path-exclude=/usr/share/{name}" for name in LEFT_OUT]
    sections = " ".join(f'"$1/usr/share/man/man{section}"' for section in MAN_SECTIONS)
    command += ["--setup-hook", f'mkdir -p "$1/usr/share/info" {sections}']
    sources: list[str] = []
    if debs:
        _stage(debs, root["suite"], work)
        command += ["--setup-hook", 'mkdir -p "$1/' + STAGED[0] + '"']
        command += ["--setup-hook", f"sync-in {work / 'archives'} /{STAGED[0]}"]
        command += ["--setup-hook", f"sync-in {work / 'lists'} /{STAGED[1]}", "--skip=update,download/empty"]
        sources = [str(source) for source in packages.sources(root["suite"])]
    archive = work / "root.tar"
    if os.geteuid() == 0 and run(["unshare", "--mount", "true"])[0] == 0:
        command = ["unshare", "--mount", *command]  # what is mounted for the new system goes with the namespace
    # Other users than ours must get there: apt's, and those of a user namespace.
    environment = {"SOURCE_DATE_EPOCH": "1", "TMPDIR": str(cache.outside(work))}
    command += [root["suite"], str(archive), *sources]
    status, _, lines = run(command, environment=environment, told=lambda line: _stage_told(line, tell))
    if status:
        raise ImageError(f"mmdebstrap failed: {reason(lines)}")
    return archive


def reason(lines: list[str]) -> str:
    """The line of a failed mmdebstrap that says why: of a package's script what it complained of last before dpkg gave
    the package up, else the first error that does not only say that a program failed."""
    for index, line in enumerate(lines):
        if match := GIVEN_UP.match(line):
            before = [item for item in lines[max(0, index - COMPLAINT_LINES) : index] if COMPLAINT.search(item)]
            said = (before or [" ".join(item.strip() for item in lines[index + 1 : index + 2])])[-1].strip()
            return f"package {match[1]}: {said or 'its script failed without a word'}"
    errors = [line.removeprefix("E:").strip() for line in lines if line.startswith("E:")]
    telling = [error for error in errors if not FOLLOWING.match(error)]
    return (telling or errors or [line for line in lines if line.strip()][-1:] or ["no message"])[0]


def _stage_told(line: str, tell: Callable[[str], None]) -> None:
    if match := STAGES.match(line):
        tell(f"mmdebstrap: {match[1]}")


def _stage(debs: dict[Package, Path], suite: str, work: Path) -> None:
    """Packages under the names that apt gives them, and the host's index of the release."""
    for folder in ("archives", "lists"):
        (work / folder).mkdir()
    for package, path in debs.items():
        (work / "archives" / package.file_name).hardlink_to(path)
    for path in packages.index_files(suite):
        shutil.copyfile(path, work / "lists" / path.name)


_FILES = {
    "etc/hostname": "{hostname}\n",
    "etc/hosts": "127.0.0.1 localhost {hostname}\n::1 localhost\n",
    "etc/fstab": "/dev/vda / ext4 defaults 0 1\n",
    "etc/machine-id": "",
    "etc/systemd/network/80-dhcp.network": "[Match]\nName=e*\n\n[Network]\nDHCP=yes\n",
    "etc/systemd/system/loopvisor-agent.service": (
        "[Unit]\nDescription=Guest agent\n\n[Service]\nExecStart=/usr/sbin/loopvisor-agent\nRestart=on-failure\n\n"
        "[Install]\nWantedBy=multi-user.target\n"
    ),
    "etc/systemd/system/ssh-keys.service": (
        "[Unit]\nDescription=SSH host key\nBefore=ssh.service\nConditionPathExists=!/etc/ssh/ssh_host_ed25519_key\n\n"
        "[Service]\nType=oneshot\nExecStart=ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key\n"
    ),
    "etc/systemd/system/ssh.service.d/keys.conf": "[Unit]\nRequires=ssh-keys.service\nAfter=ssh-keys.service\n",
}
_WANTS = "etc/systemd/system/multi-user.target.wants"
_LINKS = {
    "etc/resolv.conf": "/run/systemd/resolve/stub-resolv.conf",
    f"{_WANTS}/loopvisor-agent.service": "/etc/systemd/system/loopvisor-agent.service",
    f"{_WANTS}/systemd-networkd.service": "/lib/systemd/system/systemd-networkd.service",
    f"{_WANTS}/systemd-resolved.service": "/lib/systemd/system/systemd-resolved.service",
}
