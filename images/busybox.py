"""A root disk of busybox and our init."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from images import modules, packages
from images.errors import ImageError
from images.kernel import Kernel, guest_init
from images.programs import run
from images.tree import Tree


def make(recipe: dict[str, Any], kernel: Kernel, debs: list[Path], image: Path, work: Path) -> None:
    """Write the root disk. `debs` are the recipe's packages."""
    tree = Tree()
    for name in ("dev", "proc", "sys", "run", "root", "mnt", "var/log", "sbin", "usr/bin", "usr/sbin"):
        tree.directory(name)
    tree.directory("tmp", 0o1777)
    tree.file("sbin/init", guest_init(), 0o755)
    for deb in debs:
        for member, data in packages.contents(deb):
            path = member.name.removeprefix("./").rstrip("/")
            if path.startswith("usr/share/"):
                continue
            if member.isreg():
                tree.file(path, data, stat.S_IMODE(member.mode))
            elif member.issym():
                tree.link(path, member.linkname)
    for path in _applets(tree, work):
        if path not in tree.nodes:
            tree.link(path, "/bin/busybox")
    _add_modules(tree, kernel, recipe["root"].get("modules", []))
    hostname = recipe["root"].get("hostname", "linux")
    for path, text in _ETC.items():
        tree.file(path, text.format(hostname=hostname).encode(), 0o755 if "script" in path else 0o644)
    tree.ext4(image, recipe["root"]["size_mib"], hostname, work)


def _add_modules(tree: Tree, kernel: Kernel, names: list[str]) -> None:
    """Modules of the kernel's that modprobe finds, with those that they need. Raises ImageError."""
    by_name = {modules.module_name(path): path for path in kernel.modules}
    lines: dict[str, str] = {}

    def add(name: str) -> str:
        if name not in by_name:
            raise ImageError(f"root.modules: {name} is none of kernel.modules and kernel.file_systems", "config")
        data = kernel.modules[by_name[name]]
        place = by_name[name].removesuffix(".xz").removesuffix(".zst")
        needed = [add(other) for other in modules.depends(data) if other in by_name]
        tree.file(f"lib/modules/{kernel.version}/{place}", data)
        lines[place] = f"{place}: {' '.join(needed)}".rstrip() + "\n"
        return place

    for name in names:
        add(name.replace("-", "_"))
    if lines:
        tree.file(f"lib/modules/{kernel.version}/modules.dep", "".join(lines.values()).encode())


def binary(debs: list[Path]) -> bytes | None:
    """The busybox of these packages."""
    for deb in debs:
        for member, data in packages.contents(deb):
            if member.isreg() and member.name.removeprefix("./") in ("bin/busybox", "usr/bin/busybox"):
                return data
    return None


def _applets(tree: Tree, work: Path) -> list[str]:
    """Where busybox wants its links; asked of the binary itself (it runs on any x86-64 Linux)."""
    if "bin/busybox" not in tree.nodes:
        raise ImageError("root.packages: none of them brings bin/busybox; add busybox-static", "config")
    binary = work / "busybox"
    binary.write_bytes(tree.nodes["bin/busybox"].data)
    binary.chmod(0o755)
    status, printed, _ = run([str(binary), "--list-full"])
    if status:
        raise ImageError("busybox of the package does not run here")
    return [line for line in printed.splitlines() if line not in ("sbin/init", "linuxrc")]


_ETC = {
    "etc/hostname": "{hostname}\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost {hostname}\n::1 localhost\n",
    "etc/profile": "export PS1='{hostname}:\\w# '\nstty -echoctl 2>/dev/null\n",
    "etc/rc": (
        "# Runs once, in the background, after start.\n"
        "for link in /sys/class/net/e*; do\n"
        "    [ -e \"$link\" ] || continue\n"
        "    ip link set \"${{link##*/}}\" up\n"
        "    udhcpc -q -n -t 5 -T 1 -i \"${{link##*/}}\" -s /etc/udhcpc.script >/dev/null 2>&1\n"
        "done\n"
    ),
    "etc/udhcpc.script": (
        "#!/bin/sh\n"
        "case \"$1\" in\n"
        "bound|renew)\n"
        "    ip addr add \"$ip/${{mask:-24}}\" dev \"$interface\" 2>/dev/null\n"
        "    for router in $router; do ip route replace default via \"$router\" dev \"$interface\"; break; done\n"
        "    : >/etc/resolv.conf\n"
        "    for server in $dns; do echo \"nameserver $server\" >>/etc/resolv.conf; done ;;\n"
        "esac\n"
    ),
    "etc/resolv.conf": "",
}
