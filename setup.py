"""Build the native parts: the vCPU thread loop with the execution cores, and the virtqueue walker."""

import glob
import os
import sys

from setuptools import Extension, setup

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

FLAGS = ["-std=gnu11", "-O2", "-g1", "-Wall", "-Wextra", "-fvisibility=hidden", "-fno-strict-aliasing",
         "-fno-semantic-interposition", "-foptimize-sibling-calls", "-pthread"]
LINK = ["-pthread"]
if os.environ.get("LOOPVISOR_WERROR"):
    FLAGS.append("-Werror")
if os.environ.get("LOOPVISOR_SANITIZE"):
    FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    LINK += ["-fsanitize=address,undefined"]


def extension(name: str, *folders: str) -> Extension:
    """The extension module `name` from every C file in `folders`."""
    return Extension(
        name,
        sources=sorted(path for folder in folders for path in glob.glob(f"{folder}/*.c")),
        depends=sorted(path for folder in folders for path in glob.glob(f"{folder}/*.h")),
        include_dirs=["cpu"] if name.startswith("cpu.") else [],
        extra_compile_args=FLAGS,
        extra_link_args=LINK,
    )


setup(
    ext_modules=[
        extension("cpu._core", "cpu/native", "cpu/kvm", "cpu/soft", "cpu/soft/fpu", "cpu/soft/irqchip"),
        extension("virtio._ring", "virtio/native"),
    ],
)
