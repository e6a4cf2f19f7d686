"""Connections of a migration: addresses, TLS, and frames over a socket.

Whatever the way, what carries frames is a plain stream socket, used by threads that wait without the interpreter's
lock: TLS runs in a thread of its own between the network's socket and a socket pair. Addresses:

    tcp:HOST:PORT   tcp://HOST:PORT     with `tls`, by certificates on both sides
    unix:PATH       unix:///PATH        only its owner can connect
    fd:N                                a connected stream socket, inherited
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vmm._native import crc32c
from vmm.errors import ConfigError, HostError, StateError, os_reason
from vmm.libvirt.tls import Credentials, Files, subject_of
from vmm.management.sockets import listen as listen_unix
from vmm.migration import protocol
from vmm.migration.protocol import COMPRESSED, HEADER, LIMITS, OLDEST, VERSION, Hello, Kind

SILENCE = 30.0
"""Seconds without a byte after which the other side counts as gone."""
CONNECT_SECONDS = 10.0
PING_SECONDS = 5.0
BUFFER = 4 << 20
"""Asked for as the kernel's buffer of a socket."""


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URI."""

    kind: Literal["tcp", "unix", "fd"]
    host: str = ""
    port: int = 0
    path: Path = Path()
    fd: int = -1

    def __str__(self) -> str:
        if self.kind == "tcp":
            return f"tcp:{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"
        return f"unix:{self.path}" if self.kind == "unix" else f"fd:{self.fd}"


def parse_uri(text: str) -> Address:
    """Raises ConfigError."""
    scheme, _, rest = text.partition(":")
    rest = rest.removeprefix("//")
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        if port.isascii() and port.isdecimal() and 0 <= int(port) <= 65535 and len(host) < 256:
            return Address("tcp", host=host.removeprefix("[").removesuffix("]"), port=int(port))
    elif scheme == "unix" and rest and "\0" not in rest:
        return Address("unix", path=Path(rest))
    elif scheme == "fd" and rest.isascii() and rest.isdecimal() and len(rest) < 8:
        return Address("fd", fd=int(rest))
    raise ConfigError(f"{text}: not an address; write tcp:HOST:PORT, unix:PATH or fd:NUMBER")


# ---- TLS ----


def client_context(directory: Path) -> ssl.SSLContext:
    """For the source: cacert.pem, clientcert.pem and clientkey.pem of the directory, as `vmm tls` makes them for a
    client. Raises ConfigError that names the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    parts = [directory / name for name in ("cacert.pem", "clientcert.pem", "clientkey.pem")]
    for path in parts:
        if not path.is_file():
            raise ConfigError(f"tls: {path} is missing; vmm tls client DIR NAME makes it, --tls names its directory")
    try:
        context.load_verify_locations(str(parts[0]))
        context.load_cert_chain(str(parts[1]), str(parts[2]))
        if (directory / "cacrl.pem").exists():
            context.load_verify_locations(str(directory / "cacrl.pem"))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except (OSError, ValueError) as error:
        raise ConfigError(f"tls: {directory}: {_ssl_reason(error)}") from error
    return context


def _ssl_reason(error: BaseException) -> str:
    message = getattr(error, "verify_message", None) or getattr(error, "reason", None)
    if not message:
        message = os_reason(error) if isinstance(error, OSError) else str(error)
    return str(message).lower().replace("_", " ")


def secure(sock: socket.socket, context: ssl.SSLContext, *, host: str | None) -> tuple[socket.socket, str]:
    """Shake hands and put a thread between; the plain end, and the other side's subject. `host`: we are the client, and
    that is whom we want. Blocks. Raises HostError; the socket is closed then."""
    sock.settimeout(CONNECT_SECONDS)
    try:
        secured = context.wrap_socket(sock, server_side=host is None, server_hostname=host)
        subject = subject_of(secured.getpeercert() or {})
    except (OSError, ValueError) as error:
        sock.close()
        raise HostError(f"tls: {_ssl_reason(error)}") from error
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    threading.Thread(target=_pump, args=(secured, theirs), name="migration TLS", daemon=True).start()
    return ours, subject


def _pump(secured: ssl.SSLSocket, plain: socket.socket) -> None:
    """Both ways between a TLS socket and a plain one, until one side ends. One thread: OpenSSL takes one at a time."""
    try:
        secured.setblocking(False)
        plain.setblocking(False)
        incoming, outgoing = memoryview(b""), memoryview(b"")
        ended = False
        while True:
            wants = 0
            if not incoming:
                try:
                    incoming = memoryview(secured.recv(1 << 16))
                    if not incoming:
                        break
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLWantWriteError:
                    wants |= select.POLLOUT
            if incoming:
                with contextlib.suppress(BlockingIOError):
                    incoming = incoming[plain.send(incoming) :]
            if not outgoing and not ended:
                try:
                    outgoing = memoryview(plain.recv(1 << 18))
                    ended = not outgoing
                except BlockingIOError:
                    pass
            if outgoing:
                try:
                    outgoing = outgoing[secured.send(outgoing) :]
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLWantWriteError:
                    wants |= select.POLLOUT
            if ended and not outgoing:
                break
            poll = select.poll()
            network = wants | (0 if incoming else select.POLLIN) | (select.POLLOUT if outgoing else 0)
            poll.register(secured.fileno(), network)
            poll.register(plain.fileno(), (select.POLLOUT if incoming else 0) | (0 if outgoing else select.POLLIN))
            if secured.pending() and not incoming:
                continue
            poll.poll(1000)
    except OSError:
        pass  # whoever uses the plain end sees it end
    finally:
        with contextlib.suppress(OSError, ValueError):
            secured.setblocking(True)
            secured.settimeout(1.0)
            secured.unwrap()
        secured.close()
        plain.close()


# ---- frames ----


class Closed(HostError):
    """The other side is gone."""


class Link:
    """One connection. Sending and receiving are each for one thread at a time; sends are in order."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self.version = VERSION
        self.sent = 0
        """Bytes."""
        self._sock = sock
        self._sock.settimeout(SILENCE)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                if sock.family != socket.AF_UNIX or option == socket.SO_SNDBUF:
                    sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE * 1000))
        self._sending = threading.Lock()
        self._head = bytearray(HEADER.size)
        self._room = bytearray(64 << 10)
        self._decompressor: Any = None
        self._reader: threading.Thread | None = None
        self._closed = False

    # *any thread*, blocking

    def send(self, kind: Kind, *parts: bytes | bytearray | memoryview, flags: int = 0) -> None:
        """Send a frame. Raises Closed."""
        crc = length = 0
        for part in parts:
            crc = crc32c(part, crc)
            length += len(part)
        assert length <= LIMITS[kind], f"{kind.name} of {length} bytes"
        views = [
            memoryview(protocol.header(kind, length, crc, flags)),
            *(memoryview(part) for part in parts if len(part)),
        ]
        self.sent += length + HEADER.size
        with self._sending:
            try:
                while views:
                    done = self._sock.sendmsg(views)
                    while done:
                        if done >= len(views[0]):
                            done -= len(views[0])
                            del views[0]
                        else:
                            views[0] = views[0][done:]
                            done = 0
            except TimeoutError:
                self.abort()
                raise Closed(f"{self.peer}: has read nothing for {SILENCE:g} s") from None
            except OSError as error:
                raise Closed(f"{self.peer}: {os_reason(error)}") from error

    def send_message(self, kind: Kind, message: Any = None) -> None:
        """Send a declared message. Raises Closed."""
        self.send(kind, b"" if message is None else protocol.pack(message))

    def receive(self, patience: float | None = SILENCE) -> tuple[Kind, memoryview]:
        """The next frame, decompressed and checked; its payload is good until the next call. PINGs are swallowed.
        Raises Closed, StateError."""
        while True:
            self._fill(memoryview(self._head), patience, start=True)
            kind, flags, length, crc = protocol.parse_header(self._head)
            if length > len(self._room):
                self._room = bytearray(length)
            payload = memoryview(self._room)[:length]
            self._fill(payload, patience)
            protocol.check_payload(crc, payload)
            if flags & COMPRESSED:
                if self.version < 2:
                    raise StateError("a compressed frame, which version 1 has not")
                payload = self._decompress(kind, payload)
            if kind is not Kind.PING:
                return kind, payload

    def expect(self, *kinds: Kind, patience: float | None = SILENCE) -> tuple[Kind, Any]:
        """The next frame as a message, of one of these kinds. Raises Closed, StateError."""
        kind, payload = self.receive(patience)
        if kind not in kinds:
            raise StateError(f"{self.peer}: sent {kind.name} instead of {' or '.join(k.name for k in kinds)}")
        return kind, protocol.unpack(kind, payload)

    def fileno(self) -> int:
        """Of its socket: for a native thread that speaks over it from now on."""
        return self._sock.fileno()

    def greet(self, *, newest: int = VERSION) -> None:
        """HELLO, both ways. Raises Closed, StateError."""
        self.send_message(Kind.HELLO, Hello(OLDEST, newest))
        _, hello = self.expect(Kind.HELLO, patience=CONNECT_SECONDS)
        self.version = protocol.common_version(hello, newest=newest)

    def _decompress(self, kind: Kind, payload: memoryview) -> memoryview:
        import zstandard

        if self._decompressor is None:
            self._decompressor = zstandard.ZstdDecompressor(max_window_size=8 << 20)
        try:
            size = zstandard.frame_content_size(payload)
            if not 0 <= size <= LIMITS[kind]:
                raise StateError(f"a compressed frame of {size} bytes; {kind.name} has at most {LIMITS[kind]}")
            return memoryview(self._decompressor.decompress(payload, max_output_size=size))
        except zstandard.ZstdError as error:
            raise StateError(f"a frame cannot be decompressed: {error}") from error

    def _fill(self, view: memoryview, patience: float | None, *, start: bool = False) -> None:
        total = len(view)
        try:
            self._sock.settimeout(patience)
            while view:
                got = self._sock.recv_into(view)
                if not got:
                    where = "" if start and len(view) == total else " in the middle of a frame"
                    raise Closed(f"{self.peer}: ended the connection{where}")
                view = view[got:]
        except TimeoutError:
            raise Closed(f"{self.peer}: has said nothing for {patience:g} s") from None
        except OSError as error:
            raise Closed(f"{self.peer}: {os_reason(error)}") from error

    def read_on(self, take: Callable[[Kind, memoryview], None], over: Callable[[BaseException], None]) -> None:
        """Have a thread receive frames from now on, without a limit of time if `over` decides on it: `take` gets each
        and may raise, `over` gets what ended it."""

        def work() -> None:
            try:
                while True:
                    take(*self.receive(SILENCE))
            except BaseException as error:
                over(error)

        self._reader = threading.Thread(target=work, name="migration reader", daemon=True)
        self._reader.start()

    def abort(self) -> None:
        """Wake whoever waits; both ways end. *any thread*. Idempotent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back. Blocks until its reader has ended. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.abort()
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join()
        self._sock.close()

    def finish(self) -> None:
        """Nothing more will be sent; what was is delivered. Idempotent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)


class Threads:
    """Threads of one migration: so that a link that waits keeps none of the loop's other work waiting."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="migration")

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A call in a thread. Cancelled, it goes on; whoever cancels aborts the link that it waits for."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def close(self) -> None:
        """Threads that still run end when their links are closed."""
        self._pool.shutdown(wait=False)


# ---- making connections ----


def connect(address: Address, tls: ssl.SSLContext | None = None, *, patience: float = CONNECT_SECONDS) -> Link:
    """Blocks. Raises ConfigError, HostError."""
    where = str(address)
    if tls is not None and address.kind != "tcp":
        raise ConfigError(f"{where}: TLS is for tcp: addresses")
    try:
        if address.kind == "tcp":
            sock = socket.create_connection((address.host or "localhost", address.port), timeout=patience)
        elif address.kind == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(patience)
                sock.connect(str(address.path))
            except BaseException:
                sock.close()
                raise
        else:
            sock = adopt(address)
    except OSError as error:
        cure = (
            "; is vmm receive running there?" if isinstance(error, ConnectionRefusedError | FileNotFoundError) else ""
        )
        raise HostError(f"{where}: {_ssl_reason(error)}{cure}") from error
    if tls is not None:
        try:
            sock, _ = secure(sock, tls, host=address.host)
        except HostError as error:
            raise HostError(f"{where}: {error}") from error
    return Link(sock, where)


def adopt(address: Address) -> socket.socket:
    """An inherited descriptor as a socket; it is ours from now on. Raises ConfigError."""
    try:
        if not stat.S_ISSOCK(os.fstat(address.fd).st_mode):
            raise ConfigError(f"{address}: no socket")
        os.set_inheritable(address.fd, False)
        sock = socket.socket(fileno=address.fd)
        sock.getpeername()
        if sock.type != socket.SOCK_STREAM:
            raise ConfigError(f"{address}: no stream socket")
    except OSError as error:
        raise ConfigError(f"{address}: {os_reason(error)}; give the number of a connected socket") from error
    return sock


class Listener:
    """Where a target waits for connections. *worker thread* for accept()."""

    def __init__(self, address: Address, tls: Path | None = None) -> None:
        """Raises ConfigError, HostError."""
        self.address = address
        self._credentials: Credentials | None = None
        self._sockets: list[socket.socket] = []
        self._given = address.kind == "fd"
        if tls is not None:
            if address.kind != "tcp":
                raise ConfigError(f"{address}: TLS is for tcp: addresses")
            self._credentials = Credentials(Files(tls))
        if address.kind == "tcp":
            self._bind()
        elif address.kind == "unix":
            self._sockets.append(listen_unix(address.path, "receive"))
        else:
            self._sockets.append(adopt(address))
        self._wake, self._woken = socket.socketpair()

    def _bind(self) -> None:
        host, port = self.address.host, self.address.port
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, number, _, place in dict.fromkeys(found):
                listener = socket.socket(family, kind, number)
                self._sockets.append(listener)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if self.address.port == 0 and len(self._sockets) > 1:
                    place = (place[0], self._sockets[0].getsockname()[1], *place[2:])
                listener.bind(place)
                listener.listen(64)
        except OSError as error:
            for listener in self._sockets:
                listener.close()
            raise HostError(f"{self.address}: {os_reason(error)}") from error
        self.address = Address("tcp", host=host, port=int(self._sockets[0].getsockname()[1]))

    @property
    def trusted(self) -> bool:
        """Only who may use this user's files can connect: by certificate, by the socket's mode, by inheritance."""
        return self.address.kind != "tcp" or self._credentials is not None

    def accept(self) -> socket.socket | None:
        """The next connection, as it comes; None: the listener was stopped. Blocks. Raises OSError."""
        if self.address.kind == "fd":
            if self._given:
                self._given = False
                return self._sockets.pop()
            select.select([self._woken], [], [])
            return None
        for listener in self._sockets:
            listener.setblocking(False)
        while True:
            ready, _, _ = select.select([*self._sockets, self._woken], [], [])
            if self._woken in ready:
                return None
            for listener in ready:
                with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                    sock, _ = listener.accept()
                    sock.setblocking(True)
                    return sock

    def open(self, sock: socket.socket) -> Link:
        """An accepted connection, after its handshake. Blocks. Raises HostError, and it is closed then."""
        peer = "the source"
        with contextlib.suppress(OSError, IndexError, TypeError):
            name = sock.getpeername()
            if isinstance(name, tuple):
                peer = f"the source at {name[0]}"
        if self._credentials is not None:
            sock, subject = secure(sock, self._credentials.context, host=None)
            if not self._credentials.admits(subject):
                sock.close()
                raise HostError(f"{peer}: {subject} is not allowed")
        return Link(sock, peer)

    def stop(self) -> None:
        """accept() returns None. *any thread*"""
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def close(self) -> None:
        """After accept() has returned. Idempotent."""
        for listener in (*self._sockets, self._wake, self._woken):
            listener.close()
        if self.address.kind == "unix" and self._sockets:
            with contextlib.suppress(OSError):  # its directory may be another's by now
                self.address.path.unlink()
        self._sockets = []
