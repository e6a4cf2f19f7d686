"""The frames between the host and the guest's agent, version 3 of the protocol: images/init/agent.c describes them.

Arguments, environment and paths are bytes in Linux. Text stands for its bytes in UTF-8, and a surrogate for the byte
that Python's own interfaces made it of (PEP 383), so what comes from sys.argv or os.environ arrives as it was.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

from cpu.values import dataclass
from vmm.errors import ConfigError

VERSION = 3
AGENT_PORT = 1024
"""The guest's port; its agent connects once to the host's port AGENT_PORT + its version when it listens."""
VERSIONS = range(1, 16)
"""Versions that an agent may have; those ports of the host are kept for them."""
STDIN, SIGNAL, RESIZE, START, PART = 2, 3, 4, 5, 6
STDOUT, STDERR, EXIT, ERROR, CREDIT, USAGE, STARTED, USED = 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88
TERMINAL, TOOL, NUMBERED, LIMITED, KEPT = 1, 2, 4, 8, 16
"""Flags of START."""
KEPT_PORT = 65536
"""The guest's port, less the number of the process, at which a kept program waits for another connection."""
MAX_FRAME = 65536
"""Bytes of a payload."""
WINDOW = 256 << 10
"""Bytes of STDIN that may be on their way to the program."""
MAX_START = 2 << 20
"""Bytes of arguments and environment: what Linux gives a program at most with the usual stack (execve(2))."""
MAX_STRING = (128 << 10) - 1
"""Bytes of one argument, MAX_ARG_STRLEN of execve(2) without the terminating zero."""
HEAD = struct.Struct("<BI")
_START = struct.Struct("<IHHII")
_LIMITS = struct.Struct("<QQII")

Text = str | bytes
"""Text of a program: bytes, or what stands for them."""
Environment = Mapping[str, Text] | Mapping[bytes, Text]
"""Variables by name."""


def encode(text: Text) -> bytes:
    """The bytes that `text` stands for. Raises ConfigError if it stands for none."""
    try:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{text!r} is no text that has bytes: {error.reason}") from error
    if b"\0" in data:
        raise ConfigError(f"{_shown(data)}: arguments, environment and paths of a program must not contain zero bytes")
    return data


def frame(kind: int, payload: bytes) -> bytes:
    """One frame."""
    return HEAD.pack(kind, len(payload)) + payload


@dataclass(frozen=True, slots=True)
class RunLimits:
    """What one run of a program may use, with all that it starts; 0: as much as there is."""

    memory: int = 0
    """Bytes."""
    disk: int = 0
    """Bytes that the root file system may hold more."""
    processes: int = 0
    """At the same time, threads among them."""

    def check(self) -> None:
        """Raises ConfigError."""
        for name, most in (("memory", 1 << 63), ("disk", 1 << 63), ("processes", 1 << 22)):
            if not 0 <= (value := getattr(self, name)) < most:
                unit = "processes" if name == "processes" else "bytes"
                raise ConfigError(f"{name}: {value} is no limit; give a number of {unit}")


def start(
    arguments: Sequence[Text],
    env: Environment,
    cwd: Text,
    user: Text,
    terminal: tuple[int, int] | None,
    flags: int = 0,
    limits: RunLimits | None = None,
) -> Iterator[bytes]:
    """The frames that start a program. `flags`: TOOL, NUMBERED, KEPT. Raises ConfigError for what cannot be started."""
    if not arguments:
        raise ConfigError("no program to run in the guest: give its name")
    strings = [encode(cwd), encode(user)]
    words = [encode(item) for item in arguments]
    for name, value in env.items():
        key = encode(name)
        if not key or b"=" in key:
            raise ConfigError(f"env: {_shown(key)} is no name of a variable; write NAME=value")
        words.append(key + b"=" + encode(value))
    for word in words:
        if len(word) > MAX_STRING:
            raise ConfigError(f"{_shown(word)}: {len(word)} bytes; one argument or variable has at most {MAX_STRING}")
    total = sum(len(word) + 1 for word in words)
    if total > MAX_START:
        raise ConfigError(f"{len(words)} arguments and variables take {total} bytes; at most {MAX_START} are possible")
    rows, columns = terminal or (0, 0)
    flags |= TERMINAL * (terminal is not None) | LIMITED * (limits is not None)
    head = _START.pack(flags, rows, columns, len(arguments), len(env))
    if limits is not None:
        limits.check()
        head += _LIMITS.pack(limits.memory, limits.disk, limits.processes, 0)
    payload = head + b"".join(item + b"\0" for item in [*strings, *words])
    last = (len(payload) - 1) // MAX_FRAME * MAX_FRAME
    return (
        frame(START if at == last else PART, payload[at : at + MAX_FRAME]) for at in range(0, len(payload), MAX_FRAME)
    )


def _shown(data: bytes) -> str:
    """The beginning of an argument, for a message."""
    text = data.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 60 else text[:60] + "…")
