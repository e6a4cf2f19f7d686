"""A tree of C sources that is made up from a seed, and compiled as a kernel is: many files, a header, one program. What
the program prints depends on every file of it."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

MAKEFILE = Path(__file__).parent / "migration_guest" / "Makefile"


def _expression(chance: random.Random, depth: int) -> str:
    if not depth or chance.random() < 0.1:
        return chance.choice(("a", "b", "t[i & 15]", f"{chance.randrange(1 << 32)}u"))
    left, right = _expression(chance, depth - 1), _expression(chance, depth - 1)
    match chance.randrange(8):
        case 0:
            return f"({left} >> ({right} & 31))"
        case 1:
            return f"({left} / ({right} | 1))"
        case 2:
            return f"({left} > {right} ? {left} : b)"
        case _:
            return f"({left} {chance.choice('+-*^&|')} {right})"


def _function(chance: random.Random, name: str) -> str:
    lines = [f"uint32_t {name}(uint32_t a, uint32_t b)", "{", "    uint32_t t[16] = { a, b };"]
    lines.append(f"    for (uint32_t i = 0; i < {chance.randrange(20, 60)}; i++) {{")
    for _ in range(chance.randrange(2, 6)):
        lines.append(f"        t[{chance.randrange(16)}] ^= {_expression(chance, 3)};")
        lines.append(f"        {chance.choice('ab')} += {_expression(chance, 3)};")
    lines += ["        a ^= t[(i + b) & 15];", "    }", "    return a ^ b;", "}", ""]
    return "\n".join(lines)


def make(folder: Path, seed: int, files: int, functions: int) -> str:
    """Write the tree with its Makefile; what its program prints, compiled by the host."""
    chance = random.Random(seed)
    folder.mkdir()
    names = [[f"f{file}_{number}" for number in range(functions)] for file in range(files)]
    head = "".join(f"uint32_t {name}(uint32_t a, uint32_t b);\n" for each in names for name in each)
    (folder / "all.h").write_text(f"#include <stdint.h>\n#include <stdio.h>\n{head}")
    for number, each in enumerate(names):
        body = "\n".join(_function(chance, name) for name in each)
        (folder / f"part{number}.c").write_text(f'#include "all.h"\n\n{body}')
    calls = "".join(
        f'    a = {name}(a, {chance.randrange(1 << 32)}u);\n    printf("{name} %08x\\n", (unsigned)a);\n'
        for each in names
        for name in each
    )
    (folder / "main.c").write_text(f'#include "all.h"\n\nint main(void)\n{{\n    uint32_t a = 1;\n{calls}}}\n')
    shutil.copy(MAKEFILE, folder / "Makefile")
    subprocess.run(["make", "-s", "-j2", "-C", folder], check=True, capture_output=True)
    printed = subprocess.run([folder / "program"], check=True, capture_output=True, text=True).stdout
    subprocess.run(["make", "-s", "-C", folder, "clean"], check=True, capture_output=True)
    return printed
