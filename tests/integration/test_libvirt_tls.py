"""TLS with client certificates: the good one is in; whoever else is out before anything is served."""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import vmm
from tests.support.libvirtd import DaemonProcess, needs_virsh, tiny, wait_for
from tests.support.netns import cable, namespaces, need

pytest.importorskip("cryptography")
from vmm.libvirt import pki  # noqa: E402
from vmm.libvirt.tls import parse_listen, subject_of  # noqa: E402

AUTH_LIST = struct.pack(">IIIiIIi", 28, 0x20008086, 1, 66, 0, 1, 0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as a user makes them."""
    base = tmp_path_factory.mktemp("pki")
    directory = base / "tls"
    made = vmm(base, "tls", "init", str(directory), "--host", "localhost", "--host", "127.0.0.1", "--client", "alice")
    assert made.returncode == 0 and "?pkipath=" in made.stderr
    for name in ("bob", "mallory"):
        assert vmm(base, "tls", "client", str(directory), name).returncode == 0
    pki.add_client(directory, "expired", days=-1)
    pki.init(base / "other", ["localhost"], ["alice"])
    (directory / "allowed").write_text("# who may\nO=loopvisor,CN=alice\nO=loopvisor,CN=b*\nO=loopvisor,CN=expired\n")
    return directory


@pytest.fixture(scope="module")
def daemon(certificates: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess("--listen-tls", "127.0.0.1:0", "--tls", str(certificates)) as running:
        yield running


def virsh(daemon: DaemonProcess, pkipath: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    uri = f"loopvisor+tls://localhost:{daemon.port()}/system?pkipath={pkipath}"
    return subprocess.run(["virsh", "-q", "-c", uri, *arguments], capture_output=True, text=True, timeout=30)


def connect(daemon: DaemonProcess, client: Path | None, ca: Path, version: ssl.TLSVersion | None = None) -> bytes:
    """What comes of a call after the handshake; empty: the connection ended first."""
    context = ssl.create_default_context(cafile=str(ca))
    if client is not None:
        context.load_cert_chain(str(client / "clientcert.pem"), str(client / "clientkey.pem"))
    if version is not None:
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = version
        context.set_ciphers("ALL:@SECLEVEL=0")
    try:
        with socket.create_connection(("127.0.0.1", daemon.port()), 10) as raw:
            with context.wrap_socket(raw, server_hostname="localhost") as connection:
                connection.sendall(AUTH_LIST)
                data = b""
                while len(data) < 37 and (more := connection.recv(64)):
                    data += more
                return data
    except (OSError, ssl.SSLError):
        return b""


@needs_virsh
def test_who_has_a_certificate_is_in(daemon: DaemonProcess, certificates: Path) -> None:
    for name in ("alice", "bob"):
        done = virsh(daemon, certificates / "clients" / name, "list", "--all")
        assert done.returncode == 0, done.stderr
    assert "O=loopvisor,CN=bob" not in daemon.log.read_text()  # nothing to complain of


def test_the_byte_and_the_call_after_it(daemon: DaemonProcess, certificates: Path) -> None:
    data = connect(daemon, certificates / "clients" / "alice", certificates / "cacert.pem")
    assert data[:1] == b"\1" and len(data) == 37 and data[-8:] == b"\0\0\0\1\0\0\0\0"
    assert connect(daemon, certificates / "clients" / "alice", certificates / "cacert.pem", ssl.TLSVersion.TLSv1_2)


@pytest.mark.parametrize("who", ["none", "other CA", "expired", "not allowed", "TLS 1.1", "a server's certificate"])
def test_who_has_none_is_out(daemon: DaemonProcess, certificates: Path, who: str, tmp_path: Path) -> None:
    clients = certificates / "clients"
    version = None
    match who:
        case "none":
            client = None
        case "other CA":
            client = certificates.parent / "other" / "clients" / "alice"
        case "expired":
            client = clients / "expired"
        case "not allowed":
            client = clients / "mallory"
        case "TLS 1.1":
            client, version = clients / "alice", ssl.TLSVersion.TLSv1_1
        case _:
            client = tmp_path
            for part in ("cert", "key"):
                shutil.copy(certificates / f"server{part}.pem", tmp_path / f"client{part}.pem")
    if version is not None:
        with pytest.warns(DeprecationWarning):
            data = connect(daemon, client, certificates / "cacert.pem", version)
    else:
        data = connect(daemon, client, certificates / "cacert.pem")
    assert data in (b"", b"\0")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize(
    ("options", "served"),
    [
        (["-cert", "clientcert.pem", "-key", "clientkey.pem"], True),
        (["-cert", "clientcert.pem", "-key", "clientkey.pem", "-tls1_2"], True),
        ([], False),
        (["-tls1_2"], False),
        (["-cert", "clientcert.pem", "-key", "clientkey.pem", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], False),
    ],
)
def test_openssl_s_client(daemon: DaemonProcess, certificates: Path, options: list[str], *, served: bool) -> None:
    """It believes any server: with Alice's certificate it is answered, without one or with an old protocol cut off."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{daemon.port()}", "-quiet", *options]
    with subprocess.Popen(
        command, cwd=certificates / "clients" / "alice", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as client:  # fmt: skip
        assert client.stdin is not None and client.stdout is not None
        try:
            client.stdin.write(AUTH_LIST)
            client.stdin.flush()
        except BrokenPipeError:
            assert not served
            with contextlib.suppress(BrokenPipeError):
                client.stdin.close()  # which tries once more
        # A byte that says that the certificate will do, and a reply of a header and two numbers.
        data = client.stdout.read(37 if served else -1)
        client.kill()
    assert (len(data) == 37) if served else data == b"", data


def test_revocation_by_sighup_keeps_who_is_connected(daemon: DaemonProcess, certificates: Path) -> None:
    context = ssl.create_default_context(cafile=str(certificates / "cacert.pem"))
    bob = certificates / "clients" / "bob"
    context.load_cert_chain(str(bob / "clientcert.pem"), str(bob / "clientkey.pem"))
    with socket.create_connection(("127.0.0.1", daemon.port()), 10) as raw:
        with context.wrap_socket(raw, server_hostname="localhost") as connection:
            assert connection.recv(1) == b"\1"
            assert vmm(certificates.parent, "tls", "revoke", str(certificates), "bob").returncode == 0
            assert daemon.process is not None
            before = daemon.log.read_text().count("read anew")
            os.kill(daemon.process.pid, signal.SIGHUP)
            wait_for(lambda: daemon.log.read_text().count("read anew") > before, "not read anew")
            assert connect(daemon, bob, certificates / "cacert.pem") == b""
            assert connect(daemon, certificates / "clients" / "alice", certificates / "cacert.pem")
            connection.sendall(AUTH_LIST)
            assert len(connection.recv(64)) == 36
    (certificates / "cacrl.pem").write_text("garbage")
    os.kill(daemon.process.pid, signal.SIGHUP)
    wait_for(lambda: "the old certificates are used on" in daemon.log.read_text(), "not refused")
    assert connect(daemon, certificates / "clients" / "alice", certificates / "cacert.pem")


@needs_virsh
@pytest.mark.root
def test_two_hosts(tmp_path: Path) -> None:
    """A console, a volume and a machine's life from another network namespace; without a certificate nothing."""
    need()
    directory, here, there = tmp_path / "tls", "10.73.9.1", "10.73.9.2"
    pki.init(directory, [here], ["alice"])
    pki.init(tmp_path / "other", [here], ["eve"])
    with namespaces("h", "c") as (host, client):
        cable(host, client)
        host.ip("addr", "add", f"{here}/24", "dev", "eth0")
        client.ip("addr", "add", f"{there}/24", "dev", "eth0")
        options = ("--listen-tls", here, "--tls", str(directory))
        with DaemonProcess(*options, prefix=host.command()) as daemon:
            (tmp_path / "d.xml").write_text(tiny("far"))
            uri = f"loopvisor+tls://{here}/system?pkipath={directory / 'clients' / 'alice'}"

            def remote(*arguments: str) -> str:
                return client.run("virsh", "-q", "-c", uri, *arguments)

            remote("define", str(tmp_path / "d.xml"))
            remote("start", "far")
            assert remote("domstate", "far").strip() == "running"
            assert daemon.virsh("list", "--name") == "far"
            remote("pool-create-as", "p", "dir", "--target", str(tmp_path))
            (tmp_path / "data").write_bytes(os.urandom(3 << 20))
            remote("vol-create-as", "p", "v", "3M")
            remote("vol-upload", "v", str(tmp_path / "data"), "--pool", "p")
            assert (tmp_path / "v").read_bytes() == (tmp_path / "data").read_bytes()
            remote("destroy", "far")
            stranger = uri.replace(str(directory / "clients" / "alice"), str(tmp_path / "other" / "clients" / "eve"))
            refused = subprocess.run(client.command("virsh", "-c", stranger, "list"), capture_output=True, timeout=60)
            assert refused.returncode != 0  # told so, or by SIGPIPE, as the connection ends in its handshake
            assert not list((daemon.path / "loopvisor").glob("*/control.sock"))


def test_plain_text_and_silence_harm_nobody(daemon: DaemonProcess, certificates: Path) -> None:
    with socket.create_connection(("127.0.0.1", daemon.port()), 10) as silent:
        with socket.create_connection(("127.0.0.1", daemon.port()), 10) as plain:
            plain.sendall(AUTH_LIST * 10)
            assert connect(daemon, certificates / "clients" / "alice", certificates / "cacert.pem")
        assert silent.fileno() >= 0


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    missing = vmm(
        tmp_path, "daemon", "--state", str(tmp_path / "s"), "--listen-tls", "127.0.0.1:0", "--tls", str(tmp_path)
    )
    assert missing.returncode == 2 and "vmm tls init" in missing.stderr
    wrong = vmm(
        tmp_path, "daemon", "--state", str(tmp_path / "s"), "--listen-tls", "127.0.0.1:x", "--tls", str(tmp_path)
    )
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert vmm(tmp_path, "tls", "init", str(tmp_path / "t"), "--host", "a b").returncode == 2
    assert vmm(tmp_path, "tls", "client", str(tmp_path / "t"), "x").returncode == 2


@pytest.mark.parametrize(
    ("text", "found"),
    [("0.0.0.0", ("0.0.0.0", 16514)), ("h:1", ("h", 1)), ("[::1]:2", ("::1", 2)), ("::1", ("::1", 16514)),
     (":3", ("", 3)), ("[::]", ("::", 16514))],
)  # fmt: skip
def test_addresses(text: str, found: tuple[str, int]) -> None:
    assert parse_listen(text) == found


def test_subjects_cannot_pretend() -> None:
    assert (
        subject_of({"subject": ((("organizationName", "a,CN=root"),), (("commonName", "b"),))}) == "O=a\\,CN=root,CN=b"
    )
