"""The machines that this user runs: one directory each under the runtime directory, held by a lock.

    RUNTIME/NAME/lock          flock(2) held while the machine lives: who can take it knows that its owner is gone
    RUNTIME/NAME/info.json     pid, command, start time
    RUNTIME/NAME/control.sock  vmm/management/control.py
    RUNTIME/NAME/console.sock  vmm/console/server.py

RUNTIME is $XDG_RUNTIME_DIR/loopvisor, else /run/user/UID/loopvisor or /tmp/loopvisor-UID; it must belong to this user
with mode 0700. What a killed process left is removed by whoever looks next. Blocking, but only for a few system calls.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path
from typing import Any

from cpu.values import dataclass
from vmm.errors import ConfigError, HostError, os_reason
from vmm.management.sockets import check_path

ATTEMPTS = 25
LOCK, INFO, CONTROL, CONSOLE = "lock", "info.json", "control.sock", "console.sock"


def runtime_directory() -> Path:
    """Made if it is not there. Raises HostError if it is not this user's alone."""
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(base) / "loopvisor"
    elif os.access(f"/run/user/{os.getuid()}", os.W_OK):
        path = Path(f"/run/user/{os.getuid()}/loopvisor")
    else:
        path = Path(f"/tmp/loopvisor-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, parents=False, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise HostError(f"runtime directory {path}: {os_reason(error)}; set XDG_RUNTIME_DIR") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise HostError(f"runtime directory {path}: belongs to somebody else; set XDG_RUNTIME_DIR")
    if stat.S_IMODE(status.st_mode) & 0o077:
        path.chmod(0o700)
    return path


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """A machine that lives."""

    name: str
    path: Path
    info: dict[str, Any]

    @property
    def control(self) -> Path:
        """Its control socket (vmm/management/control.py)."""
        return self.path / CONTROL

    @property
    def console(self) -> Path:
        """Its console socket (vmm/console/server.py)."""
        return self.path / CONSOLE


def _json(value: Any) -> str:
    """JSON of what info.json holds. The json package would take longer to load than a small guest runs (tests.bench
    start), and only readers need it."""
    if isinstance(value, str):
        escaped = (char if " " <= char <= "~" and char not in '"\\' else _escape(char) for char in value)
        return '"' + "".join(escaped) + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_json(name)}: {_json(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_json(item) for item in value) + "]"
    return repr(value)


def _escape(char: str) -> str:
    code = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{code[at]:02x}{code[at + 1]:02x}" for at in range(0, len(code), 2))


class HeldName:
    """A name held by this process. `release()` removes everything."""

    def __init__(self, name: str) -> None:
        """Raises ConfigError if a live machine has the name, or its sockets' paths would be too long."""
        self.name = name
        self.path = runtime_directory() / name
        check_path(self.path / CONTROL, "name")
        self._lock = -1
        try:
            for attempt in range(ATTEMPTS):
                try:
                    os.mkdir(self.path, 0o700)
                except FileExistsError:
                    pass
                self._lock = _lock(self.path)
                if self._lock >= 0:
                    break
                info = _info(self.path)
                if "pid" in info or attempt == ATTEMPTS - 1:
                    owner = f" by process {info['pid']}" if "pid" in info else ""
                    raise ConfigError(
                        f"name: {name!r} is in use{owner}; choose another --name, or end it with: vmm stop {name}"
                    )
                time.sleep(0.002)  # somebody only looks (entries()), or is about to write its information
            _clean(self.path, keep_lock=True)
        except OSError as error:
            self.release()
            raise HostError(f"{self.path}: {os_reason(error)}") from error

    def write_info(self, info: dict[str, Any]) -> None:
        """Replace the machine's information, whole. Raises HostError."""
        part = self.path / (INFO + ".part")
        try:
            part.write_text(_json(info))
            part.replace(self.path / INFO)
        except OSError as error:
            raise HostError(f"{part}: {os_reason(error)}") from error

    def release(self) -> None:
        """Idempotent."""
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            _clean(self.path, keep_lock=False)
            os.close(lock)


def entries() -> list[RegistryEntry]:
    """The machines that live, by name; what dead ones left is removed."""
    found = []
    for path in sorted(runtime_directory().iterdir()):
        if not path.is_dir():
            continue
        try:
            lock = _lock(path)
        except OSError:
            continue
        if lock >= 0:
            _clean(path, keep_lock=False)
            os.close(lock)
        elif path.exists():
            found.append(RegistryEntry(path.name, path, _info(path)))
    return found


def find(name: str) -> RegistryEntry:
    """A live machine by name. Raises ConfigError that lists those there are."""
    known = entries()
    for entry in known:
        if entry.name == name:
            return entry
    names = ", ".join(entry.name for entry in known)
    raise ConfigError(f"no machine is called {name!r}; " + (f"running: {names}" if names else "none is running"))


def _lock(path: Path) -> int:
    """A descriptor that holds the directory's lock; -1 if a live machine holds it or the directory just went."""
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have removed it meanwhile: only the file that the path still names counts.
        if os.path.samestat(os.fstat(descriptor), os.stat(path / LOCK)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return -1


def _clean(path: Path, *, keep_lock: bool) -> None:
    """Remove a directory's contents; the lock is held."""
    for name in (CONTROL, CONSOLE, INFO, INFO + ".part"):
        (path / name).unlink(missing_ok=True)
    if not keep_lock:
        (path / LOCK).unlink(missing_ok=True)
        try:
            path.rmdir()
        except OSError:
            pass  # another process is making it anew


def _info(path: Path) -> dict[str, Any]:
    try:
        import json

        value = json.loads((path / INFO).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
