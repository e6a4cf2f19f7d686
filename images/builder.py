"""Build an image from its recipe, without root and without booting anything.

An image is a directory of the cache, named by what went into it: the recipe, the packages' hashes, our init. The same
inputs give the same bytes. images/NAME.json names the current build; it changes only after the build is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images import cache, modules, packages
from images.errors import ImageError
from images.tree import Tree

HERE = Path(__file__).resolve().parent
FORMAT = 1
"""Counts up when the builder itself changes what it makes."""

Progress = Callable[[str, int, int], None]
"""progress(what, done, total)"""


@dataclass(frozen=True, slots=True)
class Built:
    """A finished build: its directory holds vmlinuz, initrd, root.img (not for every recipe) and manifest.json."""

    name: str
    key: str
    directory: Path
    recipe: dict[str, Any]


def recipe_names() -> list[str]:
    return sorted(path.stem for path in (HERE / "recipes").glob("*.toml"))


def load_recipe(name: str) -> dict[str, Any]:
    """A recipe by name, or by the path of a .toml file."""
    path = Path(name) if name.endswith(".toml") else HERE / "recipes" / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ImageError(f"no recipe {name}; there are: {', '.join(recipe_names())}", "config") from error
    except tomllib.TOMLDecodeError as error:
        raise ImageError(f"{path}: {error}", "config") from error


def guest_init() -> bytes:
    """Our init and agent, a static binary that the package's build makes."""
    try:
        return (HERE / "init" / "guest-init.bin").read_bytes()
    except FileNotFoundError as error:
        raise ImageError("guest-init.bin was not built; install the package again") from error


def current(name: str) -> Built | None:
    """The last whole build of a recipe, or None; does not ask apt."""
    try:
        pointer = json.loads((cache.directory("images") / f"{name}.json").read_text())
        place = cache.directory("images") / pointer["directory"]
        manifest = json.loads((place / "manifest.json").read_text())
    except (OSError, ValueError, KeyError):
        return None
    return Built(name, manifest["key"], place, manifest["recipe"])


def build(name: str, progress: Progress | None = None) -> Built:
    """Build a recipe, or find that its build is up to date. Safe when several run at once or one is killed."""
    cache.sweep()
    tell = progress or (lambda what, done, total: None)
    recipe = load_recipe(name)
    name = Path(name).stem if name.endswith(".toml") else name
    with cache.lock(f"image-{name}"):
        tell("looking up packages", 0, 4)
        kernel_package = packages.dependency(recipe["kernel"]["package"], recipe["kernel"]["file"])
        wanted = [packages.resolve(item) for item in (kernel_package, *recipe["root"].get("packages", ()))]
        key = _key(recipe, wanted)
        place = cache.directory("images") / f"{name}-{key[:16]}"
        if not (place / "manifest.json").exists():
            files = []
            for package in wanted:
                tell(f"downloading {package.name} ({package.size >> 10} KiB)", 1, 4)
                files.append(packages.download(package))
            with cache.workspace() as work:
                made = work / "image"
                made.mkdir()
                tell("unpacking the kernel", 2, 4)
                kernel = _kernel(files[0], recipe, made)
                tell("making the root file system", 3, 4)
                _BUILDERS[recipe["kind"]](recipe, kernel, files[1:], made, work)
                hashes = {path.name: cache.file_hash(path) for path in sorted(made.iterdir())}
                manifest = {"format": FORMAT, "key": key, "recipe": recipe, "files": hashes}
                manifest["packages"] = {package.file_name: package.sha256 for package in wanted}
                (made / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
                cache.publish(made, place)
        with cache.workspace() as work:
            pointer = work / "pointer"
            pointer.write_text(json.dumps({"directory": place.name}))
            cache.publish(pointer, place.parent / f"{name}.json")
        tell("done", 4, 4)
    return Built(name, key, place, recipe)


def prune() -> int:
    """Remove builds that are not current and packages that no current build needs; bytes freed."""
    cache.sweep()
    kept, packages_kept = set(), set()
    for pointer in cache.directory("images").glob("*.json"):
        built = current(pointer.stem)
        if built:
            kept.add(built.directory.name)
            packages_kept |= set(json.loads((built.directory / "manifest.json").read_text())["packages"].values())
    freed = 0
    for path in cache.directory("images").iterdir():
        if path.is_dir() and path.name not in kept:
            freed += sum(item.stat().st_blocks * 512 for item in path.rglob("*"))
            shutil.rmtree(path)
    for path in cache.directory("packages").iterdir():
        if path.stem not in packages_kept:
            freed += path.stat().st_size
            path.unlink()
    return freed


def remove(name: str) -> bool:
    """Forget a build; False if there was none."""
    with cache.lock(f"image-{name}"):
        built = current(name)
        (cache.directory("images") / f"{name}.json").unlink(missing_ok=True)
        if built:
            shutil.rmtree(built.directory, ignore_errors=True)
        return built is not None


def _key(recipe: dict[str, Any], wanted: list[packages.Package]) -> str:
    inputs = [FORMAT, recipe, [package.sha256 for package in wanted], hashlib.sha256(guest_init()).hexdigest()]
    if recipe["kind"] == "debian":
        inputs.append(packages.archive_state())
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Kernel:
    version: str
    modules: dict[str, bytes]
    """Path below lib/modules/VERSION -> module, in the order in which they load."""


def _kernel(deb: Path, recipe: dict[str, Any], made: Path) -> _Kernel:
    """Put vmlinuz in place; pick the modules."""
    files: dict[str, bytes] = {}
    built_in: set[str] = set()
    version = ""
    for member, data in packages.contents(deb):
        path = member.name.removeprefix("./").removeprefix("usr/")
        if path.startswith("boot/vmlinuz-"):
            version = path.removeprefix("boot/vmlinuz-")
            (made / "vmlinuz").write_bytes(data)
        elif path.startswith("lib/modules/") and ".ko" in path:
            inner = path.split("/", 3)[3]
            files[inner] = modules.unpack(path, data)
        elif path.endswith("/modules.builtin"):
            built_in |= {modules.module_name(line) for line in data.decode().splitlines()}
    if not version:
        raise ImageError(f"package {deb.name} has no kernel")
    order = modules.closure(recipe["kernel"].get("modules", []), files, built_in)
    return _Kernel(version, {path: files[path] for path in order})


def _initramfs(kernel: _Kernel) -> Tree:
    tree = Tree()
    for name in ("dev", "proc", "sys", "etc", "newroot", "root", "run", "tmp"):
        tree.directory(name)
    tree.character_device("dev/console", 5, 1)
    tree.file("init", guest_init(), 0o755)
    listed = []
    for path, data in kernel.modules.items():
        short = f"lib/modules/{path.rsplit('/', 1)[-1].removesuffix('.xz').removesuffix('.zst')}"
        tree.file(short, data)
        listed.append(f"/{short}\n")
    tree.file("etc/modules", "".join(listed).encode())
    return tree


def _busybox(recipe: dict[str, Any], kernel: _Kernel, debs: list[Path], made: Path, work: Path) -> None:
    """An initramfs that only finds the root, and a root disk with busybox and our init."""
    (made / "initrd").write_bytes(_initramfs(kernel).cpio())
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
    hostname = recipe["root"].get("hostname", "linux")
    for path, text in _ETC.items():
        tree.file(path, text.format(hostname=hostname).encode(), 0o755 if "script" in path else 0o644)
    tree.ext4(made / "root.img", recipe["root"]["size_mib"], hostname, work)


def _debian(recipe: dict[str, Any], kernel: _Kernel, debs: list[Path], made: Path, work: Path) -> None:
    """An initramfs that only finds the root, and a root disk that mmdebstrap fills."""
    (made / "initrd").write_bytes(_initramfs(kernel).cpio())
    root = recipe["root"]
    archive = work / "root.tar"
    command = [packages.tool("mmdebstrap", "mmdebstrap"), "--quiet", "--variant=minbase", "--format=tar"]
    command += ["--include", ",".join(root["include"]), '--aptopt=Acquire::Languages "none"']
    command += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1", "LC_ALL": "C"}
    done = subprocess.run(
        [*command, root["suite"], str(archive)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["no message"]
        raise ImageError(f"mmdebstrap failed: {lines[0]}")
    tree = Tree()
    with tarfile.open(archive) as file:
        tree.add_tar(file)
    archive.unlink()
    for path in [path for path in tree.nodes if path.startswith("dev/")]:
        del tree.nodes[path]
    hostname = root.get("hostname", "debian")
    for path, data in kernel.modules.items():
        tree.file(f"usr/lib/modules/{kernel.version}/{path}", data)
    tree.file("usr/sbin/loopvisor-agent", guest_init(), 0o755)
    for path, text in _DEBIAN.items():
        tree.file(path, text.format(hostname=hostname).encode(), 0o600 if path == "etc/shadow" else 0o644)
    for unit, target in (
        ("loopvisor-agent.service", "multi-user.target.wants"),
        ("systemd-networkd.service", "multi-user.target.wants"),
    ):
        source = "etc" if unit.startswith("loopvisor") else "lib"
        tree.link(f"etc/systemd/system/{target}/{unit}", f"/{source}/systemd/system/{unit}")
    # Every machine has an identity and keys of its own, made at its first start.
    tree.file("etc/machine-id", b"")
    for path in [path for path in tree.nodes if path.startswith("etc/ssh/ssh_host_")]:
        del tree.nodes[path]
    shadow = tree.nodes["etc/shadow"].data.decode()
    tree.file("etc/shadow", re.sub(r"(?m)^root:[^:]*:", "root::", shadow).encode(), 0o640)
    tree.ext4(made / "root.img", root["size_mib"], hostname, work)


_DEBIAN = {
    "etc/hostname": "{hostname}\n",
    "etc/hosts": "127.0.0.1 localhost {hostname}\n::1 localhost\n",
    "etc/fstab": "/dev/vda / ext4 defaults 0 1\n",
    "etc/resolv.conf": "",
    "etc/systemd/network/80-dhcp.network": "[Match]\nName=e*\n\n[Network]\nDHCP=yes\n",
    "etc/systemd/system/loopvisor-agent.service": (
        "[Unit]\nDescription=Guest agent\n\n[Service]\nExecStart=/usr/sbin/loopvisor-agent\nRestart=on-failure\n\n"
        "[Install]\nWantedBy=multi-user.target\n"
    ),
    "etc/systemd/system/ssh-keys.service": (
        "[Unit]\nDescription=SSH host keys\nBefore=ssh.service\n\n[Service]\nType=oneshot\nExecStart=ssh-keygen -A\n"
    ),
    "etc/systemd/system/ssh.service.d/keys.conf": "[Unit]\nRequires=ssh-keys.service\nAfter=ssh-keys.service\n",
}


def _applets(tree: Tree, work: Path) -> list[str]:
    """Where busybox wants its links; asked of the binary itself (it runs on any x86-64 Linux)."""
    binary = work / "busybox"
    binary.write_bytes(tree.nodes["bin/busybox"].data)
    binary.chmod(0o755)
    done = subprocess.run([str(binary), "--list-full"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageError("busybox of the package does not run here")
    return [line for line in done.stdout.splitlines() if line not in ("sbin/init", "linuxrc")]


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
        "deconfig) ip addr flush dev \"$interface\" ;;\n"
        "bound|renew)\n"
        "    ip addr add \"$ip/${{mask:-24}}\" dev \"$interface\" 2>/dev/null\n"
        "    for router in $router; do ip route replace default via \"$router\" dev \"$interface\"; break; done\n"
        "    : >/etc/resolv.conf\n"
        "    for server in $dns; do echo \"nameserver $server\" >>/etc/resolv.conf; done ;;\n"
        "esac\n"
    ),
    "etc/resolv.conf": "",
}

_BUILDERS: dict[str, Callable[[dict[str, Any], _Kernel, list[Path], Path, Path], None]] = {
    "busybox": _busybox,
    "debian": _debian,
}
