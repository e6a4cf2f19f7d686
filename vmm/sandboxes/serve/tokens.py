"""Who may use the server, and how much of it: the token file. *any thread*

A line is TOKEN [NAME] [sandboxes=N] [lifetime=SECONDS]; "#" begins a comment. Others than its owner may not read the
file.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from cpu.values import dataclass
from vmm.errors import ConfigError, os_reason

SANDBOXES = 100
"""Sandboxes of one token unless its line says otherwise, paused ones among them."""
LIFETIME = 24 * 3600
"""Seconds that a sandbox may be told to live from now."""
MIN_TOKEN = 16
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who a token stands for."""

    name: str
    sandboxes: int = SANDBOXES
    lifetime: int = LIFETIME


LOCAL = Tenant("local")
"""Everybody, where no tokens are asked for."""


class Tokens:
    """The tokens of a file; without one everybody is LOCAL."""

    def __init__(self, tenants: Iterable[tuple[str, Tenant]] | None) -> None:
        self._known = None if tenants is None else [(_digest(token), tenant) for token, tenant in tenants]

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """Raises ConfigError."""
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"{path}: others can read it; run: chmod 600 {path}")
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = os_reason(error) if isinstance(error, OSError) else "not text"
            raise ConfigError(f"{path}: {reason}") from error
        found = []
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if words:
                found.append(_tenant(f"{path}:{number}", words))
        if not found:
            raise ConfigError(f"{path}: no token is in it")
        names = [tenant.name for _, tenant in found]
        if len(set(names)) < len(names):
            raise ConfigError(f"{path}: two tokens have the same name")
        return cls(found)

    def find(self, token: str) -> Tenant | None:
        """Who that is; None: nobody. Takes as long for one as for another."""
        if self._known is None:
            return LOCAL
        digest, found = _digest(token), None
        for known, tenant in self._known:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def by_name(self, name: str) -> Tenant:
        """A tenant whose sandbox is there; one whose token is gone has the usual limits."""
        return next((tenant for _, tenant in self._known or () if tenant.name == name), Tenant(name))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _tenant(where: str, words: list[str]) -> tuple[str, Tenant]:
    token, name = words[0], ""
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"{where}: a token has {MIN_TOKEN} characters at least")
    values = {"sandboxes": SANDBOXES, "lifetime": LIFETIME}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals and not name and _NAME.fullmatch(word):
            name = word
        elif key in values and value.isdigit() and 0 < int(value) < 1 << 31:
            values[key] = int(value)
        else:
            raise ConfigError(f"{where}: {word!r}: write TOKEN [NAME] [sandboxes=N] [lifetime=SECONDS]")
    return token, Tenant(name or f"token-{_digest(token).hex()[:8]}", values["sandboxes"], values["lifetime"])
