"""Who we are to a registry: ~/.docker/config.json with its credential helpers, and podman's auth.json.

Files that are looked at, the first that knows the registry wins: $REGISTRY_AUTH_FILE,
$XDG_RUNTIME_DIR/containers/auth.json, $DOCKER_CONFIG/config.json or ~/.docker/config.json. A helper is a program
docker-credential-NAME, asked as its protocol says: `get` with the registry's name on standard input, a JSON object on
standard output. *any thread*
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images.errors import ImageError

DOCKER_HUB = "https://index.docker.io/v1/"
"""What docker.io is called in these files."""
HELPER_SECONDS = 60
MAX_OUTPUT = 1 << 20
_HELPER = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class RegistryLogin:
    """A user and a password, or a token with which others are asked for (OAuth 2 refresh token)."""

    user: str = ""
    secret: str = ""
    identity_token: str = ""

    @property
    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()


def find(registry: str, repository: str) -> RegistryLogin | None:
    """What is known for a registry; None: we are nobody there. Raises ImageError if a helper fails."""
    for path in _files():
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise ImageError(f"{path}: {str(error)[:100]}", "config") from error
        if isinstance(value, dict) and (found := _in_file(value, registry, repository, path)) is not None:
            return found
    return None


def _files() -> list[Path]:
    found = []
    if own := os.environ.get("REGISTRY_AUTH_FILE"):
        found.append(Path(own))
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(runtime) / "containers" / "auth.json")
    folder = os.environ.get("DOCKER_CONFIG")
    found.append((Path(folder) if folder else Path.home() / ".docker") / "config.json")
    return found


def _in_file(value: dict[str, Any], registry: str, repository: str, path: Path) -> RegistryLogin | None:
    servers = [DOCKER_HUB, "docker.io", "index.docker.io"] if registry == "docker.io" else [registry]
    helpers = value.get("credHelpers")
    for server in servers:
        if isinstance(helpers, dict) and isinstance(helpers.get(server), str):
            return _ask(helpers[server], server)
    auths = value.get("auths")
    if isinstance(auths, dict):
        for key in _keys(servers, repository):
            if isinstance(entry := auths.get(key), dict) and (found := _entry(entry, key, path)) is not None:
                return found
    store = value.get("credsStore")
    return _ask(store, servers[0]) if isinstance(store, str) and store else None


def _keys(servers: list[str], repository: str) -> list[str]:
    """Podman's files may name a part of a registry: the longest such name counts first."""
    parts = repository.split("/")
    found = []
    for server in servers:
        found += [f"{server.rstrip('/')}/{'/'.join(parts[:count])}" for count in range(len(parts), 0, -1)]
        found += [server, f"https://{server}", f"http://{server}", f"https://{server}/v1/", f"https://{server}/v2/"]
    return found


def _entry(entry: dict[str, Any], key: str, path: Path) -> RegistryLogin | None:
    if isinstance(token := entry.get("identitytoken"), str) and token:
        return RegistryLogin(identity_token=token)
    if isinstance(text := entry.get("auth"), str) and text:
        try:
            user, _, secret = base64.b64decode(text, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise ImageError(f"{path}: auth of {key} is no base64", "config") from error
        return RegistryLogin(user, secret.rstrip("\0"))
    name, password = entry.get("username"), entry.get("password")
    if isinstance(name, str) and isinstance(password, str):
        return RegistryLogin(name, password)
    return None


def _ask(helper: str, server: str) -> RegistryLogin | None:
    """A credential helper; None if it knows nothing of the server."""
    program = f"docker-credential-{helper}"
    if not _HELPER.fullmatch(helper):
        raise ImageError(f"{helper!r} is no name of a credential helper", "config")
    try:
        done = subprocess.run(
            [program, "get"], input=server.encode(), capture_output=True, timeout=HELPER_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise ImageError(f"{program} is not installed, which the docker configuration names for {server}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImageError(f"{program}: {str(error)[:200]}") from error
    text = done.stdout[:MAX_OUTPUT].decode(errors="replace")
    if done.returncode:
        if "credentials not found" in text or "no credentials" in text:
            return None
        said = " ".join((text.strip() or done.stderr[:1000].decode(errors="replace").strip()).split())[:200]
        raise ImageError(f"{program}: {said or f'ends with status {done.returncode}'}")
    try:
        value = json.loads(text)
        user, secret = str(value["Username"]), str(value["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(f"{program}: its answer is not as the helpers' protocol says") from error
    return RegistryLogin(identity_token=secret) if user == "<token>" else RegistryLogin(user, secret)
