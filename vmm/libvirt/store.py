"""Where definitions are kept: one XML file each, written whole or not at all, so that a kill at any moment loses none.

    STATE/lock                 held by the daemon that uses the directory
    STATE/domains/NAME.xml     what is defined
    STATE/autostart/NAME       started with the daemon
    STATE/live/NAME.xml, .json what a running domain was started with, and its id
    STATE/config/NAME.toml     what its process was started with
    STATE/log/NAME.log         what that process said
    STATE/channel/NAME/…       sockets of its channels
    STATE/pools                as domains
    STATE/networks             see vmm/libvirt/networks.py
    STATE/saves, STATE/snapshots  see vmm/libvirt/saves.py
Blocking, for a few system calls each.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from vmm.errors import ConfigError, HostError, os_reason

FOLDERS = ("domains", "autostart", "live", "config", "log", "channel", "pools", "networks", "saves", "snapshots")


class Store:
    """A state directory, held for this process."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if another daemon has it, HostError."""
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise ConfigError(f"state {path}: another daemon uses it; give another --state") from None
            for name in FOLDERS:
                (path / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise HostError(f"state {path}: {os_reason(error)}") from error

    def close(self) -> None:
        """Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def write(self, folder: str, name: str, text: str) -> None:
        """Replace a file, durably. Raises HostError."""
        directory = self.path / folder
        part = directory / f".{name}.part"
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                data = text.encode()
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            part.replace(directory / name)
            _sync(directory)
        except OSError as error:
            raise HostError(f"{directory / name}: {os_reason(error)}") from error

    def remove(self, folder: str, name: str) -> None:
        """Also if it is not there. Raises HostError."""
        path = self.path / folder / name
        try:
            path.unlink(missing_ok=True)
            _sync(path.parent)
        except OSError as error:
            raise HostError(f"{path}: {os_reason(error)}") from error

    def rename(self, folder: str, old: str, new: str) -> None:
        """Raises HostError."""
        try:
            (self.path / folder / old).replace(self.path / folder / new)
            _sync(self.path / folder)
        except OSError as error:
            raise HostError(f"{self.path / folder / old}: {os_reason(error)}") from error

    def exists(self, folder: str, name: str) -> bool:
        return (self.path / folder / name).exists()

    def read(self, folder: str, name: str) -> str | None:
        """None if it is not there or cannot be read."""
        try:
            return (self.path / folder / name).read_text()
        except (OSError, UnicodeDecodeError):
            return None

    def read_json(self, folder: str, name: str) -> dict[str, Any]:
        """{} if it is not there or no object."""
        try:
            value = json.loads(self.read(folder, name) or "{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """The names of its whole files, without the suffix, in order."""
        return sorted(
            path.name.removesuffix(suffix)
            for path in (self.path / folder).iterdir()
            if path.name.endswith(suffix) and not path.name.startswith(".")
        )

    def file(self, folder: str, name: str) -> Path:
        """Where a file of that name is."""
        return self.path / folder / name


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
