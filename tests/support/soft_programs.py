"""Build the standalone C programs that link the software core: the boot harness and the fuzzer.

`python3 -m tests.support.soft_programs [--sanitize] NAME` prints the path of the program. Objects are kept under
build/soft/ and rebuilt when a source or any header is newer, by one process at a time. Needs gcc and nothing else;
knows nothing of the package.
"""

from __future__ import annotations

import argparse
import fcntl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("cpu/soft", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "cpu/soft").iterdir() if path.is_dir()))
PROGRAMS = {"soft_boot": "tests/support/soft_boot.c", "soft_api": "tests/support/soft_api.c",
            "soft_fuzz": "tests/fuzz/soft_fuzz.c", "soft_math": "tests/support/soft_math.c",
            "soft_litmus": "tests/support/soft_litmus.c", "soft_latency": "tests/support/soft_latency.c",
            "oracle": "tests/support/oracle/*.c"}
PYTHON_ONLY = {"backend.c"}
"""Files that belong to the extension module, not to the library."""
FLAGS = ["-std=gnu11", "-g1", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing", "-foptimize-sibling-calls",
         "-Icpu", "-pthread"]
SANITIZE = ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
            # gcc 12 takes the choice between two tables for an access beyond the first one
            "-fno-sanitize=object-size"]


THREADS = ["-O1", "-w"]
UNCHECKED = {"interp", "decode", "jit", "fpu", "ops"}
"""Folders whose code shares nothing with other threads but guest memory, for whose races guests answer."""


def build(name: str, *, sanitize: bool = False, threads: bool = False, hot: int = 0) -> Path:
    """The path of the program `name`, built if need be; raises CalledProcessError if gcc fails.

    sanitize: with ASan and UBSan, interpreting alone. threads: with TSan, but for UNCHECKED. hot: every block becomes
    host code when it is entered for that time: 1, before it has run at all; 2, when it is known where loops go.
    """
    kind = "-sanitize" if sanitize else "-threads" if threads else ("", "-hot", "-loops")[hot]
    out = ROOT / "build" / f"soft{kind}"
    out.mkdir(parents=True, exist_ok=True)
    flags = FLAGS + (SANITIZE if sanitize else THREADS if threads else ["-O2"])
    flags += [f"-DSOFT_HOT={int(hot)}"] if hot else []
    sources = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.c"))
               if path.name not in PYTHON_ONLY]
    own = sorted(ROOT.glob(PROGRAMS[name]))
    sources += own
    headers = max(path.stat().st_mtime for folder in [*map(ROOT.joinpath, FOLDERS), own[0].parent]
                  for path in folder.glob("*.h"))

    def compile_one(source: Path) -> Path:
        target = out / (str(source.relative_to(ROOT)).replace("/", "_") + ".o")
        if not target.exists() or target.stat().st_mtime < max(headers, source.stat().st_mtime):
            checked = "-D__SANITIZE_THREAD__" if source.parent.name in UNCHECKED else "-fsanitize=thread"
            more = [checked] if threads else []
            subprocess.run(["gcc", *flags, *more, "-c", source, "-o", target], check=True, cwd=ROOT)
        return target

    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        program = out / name
        if not program.exists() or program.stat().st_mtime < max(path.stat().st_mtime for path in objects):
            linked = ["-fsanitize=thread"] if threads else []
            subprocess.run(["gcc", *flags, *linked, "-o", program, *objects, "-lm"], check=True, cwd=ROOT)
    return program


def build_mutant(name: str, source: str, old: str, new: str, folder: Path, *, hot: bool = False) -> Path:
    """The program `name` with one file of the core changed: the one place that says `old` says `new` instead. A changed
    header changes the files that include it by name.

    Raises AssertionError if there is no such place, or several.
    """
    build(name, hot=hot)
    out = ROOT / "build" / ("soft-hot" if hot else "soft")
    text = (ROOT / source).read_text()
    assert text.count(old) == 1, f"{source}: {text.count(old)} places say {old!r}"
    mutated = folder / Path(source).relative_to("cpu")
    mutated.parent.mkdir(parents=True, exist_ok=True)
    mutated.write_text(text.replace(old, new))
    flags = [f"-I{folder}", *FLAGS, "-O2", "-Wno-error", "-w", *([f"-DSOFT_HOT={int(hot)}"] if hot else [])]
    sources = [path for part in FOLDERS for path in sorted((ROOT / part).glob("*.c")) if path.name not in PYTHON_ONLY]
    include = f'#include "{Path(source).relative_to("cpu")}"'
    objects = []
    for path in [*sources, *sorted(ROOT.glob(PROGRAMS[name]))]:
        objects.append(out / (str(path.relative_to(ROOT)).replace("/", "_") + ".o"))
        if path == ROOT / source or include in path.read_text():
            objects[-1] = folder / objects[-1].name
            changed = mutated if path == ROOT / source else path
            subprocess.run(["gcc", *flags, "-c", changed, "-o", objects[-1]], check=True, cwd=ROOT)
    program = folder / name
    subprocess.run(["gcc", *flags, "-o", program, *objects, "-lm"], check=True, cwd=ROOT)
    return program


def main() -> int:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--hot", action="store_true")
    parser.add_argument("name", choices=sorted(PROGRAMS))
    arguments = parser.parse_args()
    sys.stdout.write(f"{build(arguments.name, sanitize=arguments.sanitize, hot=arguments.hot)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
