"""Build the native parts: the vCPU thread loop with the execution cores, the virtqueue walker, the tiny guests."""

import glob
import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=gnu11", "-O2", "-g1", "-Wall", "-Wextra", "-fvisibility=hidden", "-fno-strict-aliasing",
         "-fno-semantic-interposition", "-foptimize-sibling-calls", "-pthread"]
LINK = ["-pthread"]
if os.environ.get("LOOPVISOR_WERROR"):
    FLAGS.append("-Werror")
if os.environ.get("LOOPVISOR_SANITIZE"):
    FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    LINK += ["-fsanitize=address,undefined"]

CORE_FOLDERS = sorted({str(path.parent) for path in Path("cpu/soft").rglob("*.[ch]")})
GUESTS = Path("images/guests")
RUNNER = Path("cpu/runner")
GUEST_LINK = ["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,max-page-size=4096"]
INIT_SOURCES = sorted(glob.glob("images/init/*.c"))
INIT_FLAGS = ["-m64", "-std=gnu11", "-Os", "-Wall", "-Wextra", "-ffreestanding", "-fno-stack-protector", "-fno-pic",
              "-mno-red-zone", "-fno-asynchronous-unwind-tables"]
FLAT = {"real": ["-Wl,-Ttext=0x7c00", "-Wl,--oformat=binary", "-Wl,-e,start"]}
"""Guests that are flat binaries; all others are ELF with a PVH note."""


def extension(name: str, *folders: str) -> Extension:
    """The extension module `name` from every C file in `folders`."""
    return Extension(
        name,
        sources=sorted(path for folder in folders for path in glob.glob(f"{folder}/*.c")),
        depends=sorted(path for folder in folders for path in glob.glob(f"{folder}/*.[hi]*")),
        include_dirs=["cpu"] if name.startswith("cpu.") else [],
        extra_compile_args=FLAGS,
        extra_link_args=LINK,
    )


class BuildNative(build_ext):
    """Extensions as usual, then the tiny guests: assembled and linked with the C compiler alone."""

    def run(self) -> None:
        super().run()
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = GUESTS if in_place else Path(self.build_lib) / GUESTS
        target.mkdir(parents=True, exist_ok=True)
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
        newest = max(path.stat().st_mtime for path in [*GUESTS.glob("*.h"), *GUESTS.glob("*.ld"), Path("setup.py")])
        init = target.parent / "init" / "guest-init.bin"
        init.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([compiler, *INIT_FLAGS, *GUEST_LINK, "-Wl,-s", "-o", str(init), *INIT_SOURCES])
        runner = (Path() if in_place else Path(self.build_lib)) / RUNNER / "runner.bin"
        runner.parent.mkdir(parents=True, exist_ok=True)
        sources = [str(path) for pattern in ("*.c", "*.S") for path in sorted(RUNNER.glob(pattern))]
        self.spawn([compiler, *INIT_FLAGS, *GUEST_LINK, "-Icpu", "-Wl,-s", "-o", str(runner), *sources])
        for source in sorted(GUESTS.glob("*.S")):
            binary = target / f"{source.stem}.bin"
            if binary.exists() and binary.stat().st_mtime > max(newest, source.stat().st_mtime):
                continue
            layout = FLAT.get(source.stem, [f"-Wl,-T,{GUESTS / 'elf.ld'}"])
            self.spawn([compiler, "-m64", *GUEST_LINK, *layout, "-o", str(binary), str(source)])

    def get_outputs(self) -> list[str]:
        guests = [str(Path(self.build_lib) / GUESTS / f"{path.stem}.bin") for path in GUESTS.glob("*.S")]
        others = [str(Path(self.build_lib) / name) for name in ("images/init/guest-init.bin", RUNNER / "runner.bin")]
        return [*super().get_outputs(), *guests, *others]


setup(
    ext_modules=[
        extension("cpu._core", "cpu/native", "cpu/kvm", *CORE_FOLDERS),
        extension("virtio._ring", "virtio/native"),
        extension("vmm._native", "vmm/native"),
    ],
    cmdclass={"build_ext": BuildNative},
)
