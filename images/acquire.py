"""Downloads through apt's own transports (its "methods"), so that proxies, mirrors, certificates and passwords are
those of the host's apt. A file that was half there is continued.

Interface: libapt-pkg-doc, "APT Method Interface": messages of a status line and fields, ended by an empty line, on the
method's standard input and output. What apt-get itself cannot do after a kill is to continue, for the server must be
asked with the file's time of change (RFC 9110, 13.1.5), which only a clean end writes; here it is kept beside the part.
"""

from __future__ import annotations

import email.utils
import os
import select
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self
from urllib.parse import unquote

from images.errors import ImageError
from images.programs import guarded, run

Message = tuple[int, dict[str, str]]
REDIRECTS = 10
TICK_SECONDS = 0.1
"""How often the part's size is looked at for the progress bar."""
START, DONE, FAILURE, GENERAL_FAILURE, REDIRECT = 200, 201, 400, 401, 103
PENDING: tuple[int, dict[str, str]] = (0, {})


class Transports:
    """apt's methods, each started when the first file needs it; ended with the block."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._configuration = ""
        self._folder = Path()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.clear()
        self._stack.close()

    def fetch(self, uri: str, part: Path, sha256: str, size: int, tell: Callable[[int], None]) -> None:
        """Fetch `uri` into `part`, from where it stopped before. `tell` gets the bytes that are there.
        Raises ImageError; what came stays for the next time. The hash is for the caller to check."""
        wanted = f"Filename: {part}\nExpected-SHA256: {sha256}\nMaximum-Size: {size}\n\n"
        for _ in range(REDIRECTS):
            scheme = uri.partition(":")[0]
            found = _fetch(self._method(scheme), f"600 URI Acquire\nURI: {uri}\n{wanted}", uri, part, tell)
            if found is None:
                return
            uri = found
        raise ImageError(f"{uri}: redirected too often")

    def _method(self, scheme: str) -> subprocess.Popen[str]:
        running = self._running.get(scheme)
        if running is not None and running.poll() is None:
            return running
        if not self._configuration:
            self._configure()
        program = self._folder / scheme
        if not program.exists():
            raise ImageError(f"apt cannot fetch {scheme}: addresses; as root: apt-get install apt-transport-{scheme}")
        running = self._stack.enter_context(
            guarded([str(program)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        )
        _send(running, self._configuration)
        self._running[scheme] = running
        return running

    def _configure(self) -> None:
        """apt's configuration as a method wants it."""
        form = ["--no-empty", "--format", "Config-Item: %F=%V%n"]
        status, out, errors = run(["apt-config", "dump", *form])
        if status:
            raise ImageError(f"apt-config failed: {(errors or ['no message'])[0]}")
        # apt's own user could not write into the cache; addresses are sent as the index has them, escaped.
        own = "Config-Item: APT::Sandbox::User=root\nConfig-Item: Acquire::Send-URI-Encoded=1\n"
        self._configuration = f"601 Configuration\n{out}{own}\n"
        found = run(["apt-config", "shell", "found", "Dir::Bin::methods/d"])[1]
        self._folder = Path(found.partition("'")[2].partition("'")[0] or "/usr/lib/apt/methods")


def _send(process: subprocess.Popen[str], message: str) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it says why
        process.stdin.write(message)
        process.stdin.flush()


def _fetch(
    process: subprocess.Popen[str], request: str, uri: str, part: Path, tell: Callable[[int], None]
) -> str | None:
    """None when it is there, or where else it is."""
    _prepare(part)
    _send(process, request)
    for code, fields in messages(process):
        with suppress(OSError):
            tell(part.stat().st_size)
        if code == START and (changed := fields.get("Last-Modified")):
            _note(part).write_text(changed)
        elif code == REDIRECT:
            return fields.get("New-URI", "")
        elif code == DONE:
            _take(Path(fields.get("Filename", str(part))), part)
            return None
        elif code in (FAILURE, GENERAL_FAILURE):
            raise ImageError(f"{uri}: {fields.get('Message', 'the download failed')}")
    raise ImageError(f"{uri}: the download ended early")


def messages(process: subprocess.Popen[str]) -> Iterator[Message]:
    """A method's messages, and PENDING whenever none came for a while."""
    assert process.stdout is not None
    descriptor, buffer = process.stdout.fileno(), b""
    while True:
        if not select.select([descriptor], [], [], TICK_SECONDS)[0]:
            yield PENDING
            continue
        data = os.read(descriptor, 1 << 16)
        if not data:
            return
        *whole, buffer = (buffer + data).split(b"\n\n")
        for message in whole:
            first, *rest = message.decode(errors="replace").strip().splitlines() or [""]
            code = first.partition(" ")[0]
            fields = (line.partition(": ") for line in rest)
            yield int(code) if code.isdigit() else 0, {name: value for name, _, value in fields}


def _note(part: Path) -> Path:
    return part.with_suffix(".changed")


def _prepare(part: Path) -> None:
    """Give the part the time of change that its server named; without it, begin anew."""
    try:
        changed = email.utils.parsedate_to_datetime(_note(part).read_text()).timestamp()
        os.utime(part, (changed, changed))
    except (OSError, ValueError):
        part.unlink(missing_ok=True)


def _take(source: Path, part: Path) -> None:
    """A method for local files names the original instead of copying it."""
    if source != part:
        import shutil

        shutil.copyfile(unquote(str(source)), part)


def discard(part: Path) -> None:
    """Forget what came."""
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)
