"""Run a firmware image of tests/conformance/roms/rom.inc on an execution core: what it prints on port 0xE9."""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path

from cpu import select as choice
from cpu.contract import System
from tests.support.bare import Bare, TooLate

MEMORY = 64 << 20
BELOW_4_GIB = 1 << 32
BELOW_1_MIB = 1 << 20
SECONDS_EACH = 9.0
"""For an image of a folder, times PATIENCE; some come to no end where an emulator differs from the manuals."""


def output(system: System, image: Path, *, timeout: float = 60.0) -> str:
    """What one processor, which begins at its reset vector, prints until the image ends (or `timeout` seconds, times
    PATIENCE, are over); a last line names an end that is none of the image's own."""
    content = image.read_bytes()
    with mmap.mmap(-1, len(content)) as rom, Bare(system, memory=MEMORY) as machine:
        rom[:] = content
        machine.write(BELOW_1_MIB - len(content), content)
        machine.vm.set_memory_slot(1, BELOW_4_GIB - len(content), memoryview(rom), readonly=True)
        machine.start()
        try:
            machine.run(timeout=timeout)
            ends = [f"{exit_}\n" for _, exit_ in machine.exits]
        except TooLate:
            ends = ["it does not come to its end\n"]
        machine.vm.close()
        return machine.console.decode(errors="replace") + "".join(ends)


def main() -> None:
    """`python -m tests.support.firmware CORE FOLDER REPORT`: run every image of a folder; what each
    printed, as JSON."""
    name, folder, report = sys.argv[1:]
    system = choice.open_system(choice.Choice(name, choice.probe(name), ""))
    outputs = {}
    for image in sorted(Path(folder).glob("*.bin")):
        outputs[image.stem] = output(system, image, timeout=SECONDS_EACH)
        print(image.stem, flush=True)
    system.close()
    Path(report).write_text(json.dumps(outputs))


if __name__ == "__main__":
    main()
