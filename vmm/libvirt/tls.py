"""TLS for the daemon: who may connect is who has a certificate of the right CA, unrevoked, with a subject that is
allowed.

Files of a directory, with libvirt's names:
    cacert.pem                       the CA whose clients are let in
    servercert.pem, serverkey.pem    the daemon's own
    cacrl.pem                        revoked certificates; if it is there it must be valid
    allowed                          subjects that may connect, one pattern a line; if it is not there, all
Without a directory the standard places are taken (/etc/pki/CA, /etc/pki/libvirt). A client is served after the
handshake, the check of its subject, and the byte that libvirt's clients wait for. Loop thread.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vmm.errors import ConfigError, HostError, os_reason

HANDSHAKE_SECONDS = 10.0
MAX_HANDSHAKES = 100
"""At a time; who comes then waits in the socket's queue."""
DEFAULT_PORT = 16514
VERIFIED = b"\1"
"""What libvirt's server sends when the client's certificate is good."""
SHORT = {
    "commonName": "CN",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "stateOrProvinceName": "ST",
    "localityName": "L",
    "emailAddress": "EMAIL",
}
log = logging.getLogger(__name__)


class Files:
    """Where the parts are."""

    def __init__(self, directory: Path | None) -> None:
        if directory is not None:
            self.ca, self.crl = directory / "cacert.pem", directory / "cacrl.pem"
            self.certificate, self.key = directory / "servercert.pem", directory / "serverkey.pem"
            self.allowed = directory / "allowed"
        else:
            pki = Path("/etc/pki")
            self.ca, self.crl = pki / "CA" / "cacert.pem", pki / "CA" / "cacrl.pem"
            self.certificate = pki / "libvirt" / "servercert.pem"
            self.key = pki / "libvirt" / "private" / "serverkey.pem"
            self.allowed = pki / "libvirt" / "allowed"


class Credentials:
    """What is in the files at one moment."""

    def __init__(self, files: Files) -> None:
        """Raises ConfigError that names the file."""
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.verify_flags |= ssl.VERIFY_X509_STRICT
        self.context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        # A resumed session would skip a revocation list that came meanwhile.
        self.context.options |= ssl.OP_NO_TICKET
        self.context.num_tickets = 0
        for path in (files.ca, files.certificate, files.key):
            if not path.is_file():
                raise ConfigError(f"tls: {path} is missing; vmm tls init DIR makes what is needed, --tls DIR names it")
        self._load(files.ca, lambda: self.context.load_verify_locations(str(files.ca)))
        self._load(files.certificate, lambda: self.context.load_cert_chain(str(files.certificate), str(files.key)))
        if files.crl.exists():
            self._load(files.crl, lambda: self.context.load_verify_locations(str(files.crl)))
            self.context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        self._allowed = _patterns(files.allowed)

    @staticmethod
    def _load(path: Path, load: Callable[[], object]) -> None:
        try:
            load()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            reason = getattr(error, "reason", None) or (os_reason(error) if isinstance(error, OSError) else str(error))
            raise ConfigError(f"tls: {path}: {str(reason).lower().replace('_', ' ')}") from error

    def admits(self, subject: str) -> bool:
        """Whether a certificate's subject, as `subject_of` writes it, is among those that are allowed."""
        return self._allowed is None or any(fnmatchcase(subject, pattern) for pattern in self._allowed)


def _patterns(path: Path) -> list[str] | None:
    if not path.exists():
        return None
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tls: {path}: {error}") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def subject_of(certificate: dict[str, Any]) -> str:
    """A certificate's subject as "O=…,CN=…", in its own order; a comma in a value is written \\,"""
    parts = []
    for names in certificate.get("subject", ()):
        for name, value in names:
            escaped = str(value).replace("\\", "\\\\").replace(",", "\\,")
            parts.append(f"{SHORT.get(name, name)}={escaped}")
    return ",".join(parts)


def parse_listen(text: str) -> tuple[str, int]:
    """HOST:PORT, HOST, [IPV6]:PORT or :PORT. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")) or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    if not port.isascii() or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ConfigError(f"listen-tls: {text!r} is not HOST:PORT; write for instance 0.0.0.0:{DEFAULT_PORT}")
    return host.removeprefix("[").removesuffix("]"), int(port)


Accepted = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str, str], None]


class TlsListener:
    """Accepts TLS clients and hands those over that are let in."""

    def __init__(self, address: str, files: Files, accepted: Accepted) -> None:
        """`accepted(reader, writer, subject, address)`. Raises ConfigError, HostError."""
        self._files, self._accepted = files, accepted
        self.credentials = Credentials(files)
        host, port = parse_listen(address)
        self._sockets = _bind(host, port)
        self._slots = asyncio.Semaphore(MAX_HANDSHAKES)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The one that is listened on."""
        return int(self._sockets[0].getsockname()[1])

    def start(self) -> None:
        """Accept from now on."""
        for listener in self._sockets:
            self._spawn(self._accept(listener), "accept TLS")

    def reload(self) -> None:
        """Read the files anew, for who connects from now on. Raises ConfigError; then everything stays as it was."""
        self.credentials = Credentials(self._files)

    async def aclose(self) -> None:
        """Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listener in self._sockets:
            listener.close()

    def _spawn(self, coroutine: Any, name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._slots.acquire()
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as error:  # too many descriptors, or the client has gone
                self._slots.release()
                log.warning("tls: %s", os_reason(error))
                await asyncio.sleep(0.1)
                continue
            except BaseException:
                self._slots.release()
                raise
            self._spawn(self._greet(connection, str(address[0])), "TLS handshake")

    async def _greet(self, connection: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        credentials = self.credentials
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol,
                    connection,
                    ssl=credentials.context,
                    ssl_handshake_timeout=HANDSHAKE_SECONDS,
                    ssl_shutdown_timeout=1.0,
                )
            except (OSError, ssl.SSLError, asyncio.IncompleteReadError) as error:
                log.info("tls: %s: %s", address, error)
                connection.close()
                return
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            subject = subject_of(transport.get_extra_info("peercert") or {})
            if not credentials.admits(subject):
                log.warning("tls: %s: %s is not allowed", address, subject)
                with suppress(OSError):
                    writer.write(b"\0")
                transport.abort()
                return
            writer.write(VERIFIED)
            self._accepted(reader, writer, subject, address)
        finally:
            self._slots.release()


def _bind(host: str, port: int) -> list[socket.socket]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"listen-tls: {host}: {error.strerror or error}") from error
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            sockets.append(listener)
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(128)
    except OSError as error:
        for listener in sockets:
            listener.close()
        raise HostError(f"listen-tls: {host or '*'}:{port}: {os_reason(error)}") from error
    return sockets
