"""Debian's docker-registry on the loopback interface, plain or with TLS and a password; skopeo pushes to it."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

USER, PASSWORD = "somebody", "a secret: it has signs"
SALT = "$2b$04$abcdefghijklmnopqrstuu"
"""bcrypt, which is the only kind of password that the registry takes; made by the host's libcrypt through perl."""


@dataclass(frozen=True, slots=True)
class Served:
    """A registry that runs. `name` is HOST:PORT, `ca` the file that vouches for it, `config` a docker configuration
    with the password; None: it wants none."""

    name: str
    ca: Path | None = None
    config: Path | None = None

    def push(self, layout: Path, repository: str, form: str = "oci") -> None:
        """Push an OCI layout's image; its reference is then NAME/REPOSITORY."""
        command = ["skopeo", "copy", "--dest-tls-verify=false", f"--format={form}"]
        command += ["--dest-creds", f"{USER}:{PASSWORD}"] if self.config else []
        command += [f"oci:{layout}:latest", f"docker://{self.name}/{repository}"]
        subprocess.run(command, check=True, capture_output=True)


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A key and a certificate of 127.0.0.1, which signs itself."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command: list[str | Path] = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-keyout", key, "-out", certificate, "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:TRUE"]
    subprocess.run(command, check=True, capture_output=True)
    return key, certificate


def _password(folder: Path) -> Path:
    """The registry's file of passwords."""
    done = subprocess.run(
        ["perl", "-e", "print crypt($ARGV[0], $ARGV[1])", PASSWORD, SALT], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("$2b$"), "the host's crypt() knows no bcrypt"
    path = folder / "htpasswd"
    path.write_text(f"{USER}:{done.stdout}\n")
    return path


@contextmanager
def registry(folder: Path, *, tls: bool = False, auth: bool = False) -> Iterator[Served]:
    """A registry with its data below a folder, which is there already."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    name = f"127.0.0.1:{port}"
    http: dict[str, object] = {"addr": name}
    told: dict[str, object] = {
        "version": "0.1", "log": {"level": "error"}, "http": http,
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
    }  # fmt: skip
    ca = config = None
    if tls:
        key, ca = _certificate(folder)
        http["tls"] = {"certificate": str(ca), "key": str(key)}
    if auth:
        told["auth"] = {"htpasswd": {"realm": "here", "path": str(_password(folder))}}
        config = folder / "docker" / "config.json"
        config.parent.mkdir()
        secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        config.write_text(json.dumps({"auths": {name: {"auth": secret}}}))
    (folder / "registry.yml").write_text(json.dumps(told))  # JSON is YAML
    command = ["docker-registry", "serve", folder / "registry.yml"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, "the registry did not start"
                    time.sleep(0.05)
            yield Served(name, ca, config)
        finally:
            process.terminate()
