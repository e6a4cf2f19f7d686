"""Records the terminal session that the README shows: `python docs/session.py` writes docs/session.svg.

The commands below run for real, in one shell; the picture shows what they printed, each line at the moment (pauses
shortened) at which it came. A viewer that knows no animation shows the whole session. `transcript()` reads a picture's
text back, by which tests/integration/test_session.py sees whether the product still says that.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

PICTURE = Path(__file__).with_name("session.svg")
PROGRAM = '''\
import asyncio, vmm

async def guest(number):
    async with vmm.run("linux") as vm:
        return (await vm.exec("sh", "-c", f"echo guest {number}: $(uname -sm)")).text

async def main():
    for line in await asyncio.gather(*map(guest, range(3))):
        print(line)

asyncio.run(main())
'''
SESSION = (
    "vmm run linux -- sh -c 'id -un; uname -s; exit 7'; echo status $?",
    "echo 'through a pipe' | vmm run linux -- tr a-z A-Z",
    "cat guests.py",
    "python guests.py",
    "vmm run linux --name web --console none &",
    "vmm exec web hostname",
    "vmm ps",
    "vmm stop web",
)
QUIETLY_BEFORE = {"vmm exec web hostname": "until vmm ps | grep -q running; do sleep 0.1; done"}
END = "--session-step--"
COLUMNS, LINE, CHARACTER, MARGIN = 88, 19, 8.43, 16
TYPING, PAUSE, LONGEST = 0.6, 0.9, 1.5
"""Seconds: before a command's output, after it, and of any pause in between."""


@dataclass(frozen=True)
class Line:
    """One line of the screen, and when it is seen (seconds)."""

    text: str
    at: float

    @property
    def command(self) -> bool:
        return self.text.startswith("$ ")


def record(environment: dict[str, str]) -> list[Line]:
    """Run the session. Raises CalledProcessError if the shell dies."""
    lines: list[Line] = []
    now = 0.5
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "guests.py").write_text(PROGRAM)
        with subprocess.Popen(
            ["bash", "--norc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=folder, env=environment, bufsize=1,
        ) as shell:  # fmt: skip
            assert shell.stdin is not None and shell.stdout is not None
            for command in SESSION:
                quiet = QUIETLY_BEFORE.get(command, ":")
                background = "&" if command.endswith("&") else ""
                # What a command reads is not the shell's own input.
                shell.stdin.write(f"{quiet}\n{{ {command.removesuffix('&')}; }} </dev/null {background}\n")
                shell.stdin.write(f"echo {END}\n")
                lines.append(Line(f"$ {command}", now))
                now += TYPING
                before = time.monotonic()
                for text in shell.stdout:
                    now += min(time.monotonic() - before, LONGEST)
                    before = time.monotonic()
                    if text.rstrip() == END:
                        break
                    lines.append(Line(text.rstrip(), now))
                else:
                    raise subprocess.CalledProcessError(shell.wait(), command)
                now += PAUSE
            shell.stdin.write("wait\n")
    return lines


def svg(lines: list[Line]) -> str:
    """The picture."""
    width, height = int(COLUMNS * CHARACTER + 2 * MARGIN), len(lines) * LINE + 2 * MARGIN + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="14">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#1b1f27"/>',
        *(f'<circle cx="{MARGIN + 6 + 20 * at}" cy="18" r="6" fill="{colour}"/>' for at, colour in enumerate(
            ("#ff5f57", "#febc2e", "#28c840"))),
    ]  # fmt: skip
    for row, line in enumerate(lines):
        colour = "#8fd18f" if line.command else "#d7dae0"
        hidden = f'<set attributeName="visibility" to="hidden" begin="0s" dur="{line.at:.2f}s"/>'
        parts.append(
            f'<text x="{MARGIN}" y="{MARGIN + 24 + (row + 1) * LINE - 5}" fill="{colour}" xml:space="preserve">'
            f"{escape(line.text, quote=False)}{hidden}</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


def transcript(picture: str) -> list[str]:
    """The lines that a picture shows."""
    return [unescape(text) for text in re.findall(r'xml:space="preserve">(.*?)<set ', picture)]


def main() -> None:
    import os

    with tempfile.TemporaryDirectory() as runtime:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        lines = record({**os.environ, "PATH": path, "XDG_RUNTIME_DIR": runtime})
    PICTURE.write_text(svg(lines))
    sys.stdout.write("\n".join(line.text for line in lines) + "\n")


if __name__ == "__main__":
    main()
