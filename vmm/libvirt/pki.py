"""A small certificate authority: its key and certificate, the daemon's, and one for each client, in libvirt's files.

    DIR/cacert.pem, cakey.pem, servercert.pem, serverkey.pem    for the host that runs the daemon
    DIR/cacrl.pem                                               once a client is revoked
    DIR/clients/NAME/cacert.pem, clientcert.pem, clientkey.pem  for that client: a whole `pkipath`
Keys are ECDSA P-256; files with keys are 0600. Needs the package `cryptography`, an extra. Blocking.
"""

from __future__ import annotations

import ipaddress
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vmm.errors import ConfigError, HostError, os_reason

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as error:
    raise ConfigError("tls: the package cryptography is missing; pip install 'loopvisor[tls]'") from error

CA_DAYS, DAYS = 3650, 825
CRL_DAYS = 3650
CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,62}")
HOST = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9-]{0,62}\.?)+")
ORGANIZATION = "loopvisor"

Key = ec.EllipticCurvePrivateKey


def init(directory: Path, hosts: list[str], clients: list[str], *, days: int = DAYS) -> list[Path]:
    """A new authority with the daemon's certificate for these names and addresses, and its first clients; the files for
    the clients. Raises ConfigError if there is one already, HostError."""
    if (directory / "cakey.pem").exists() or (directory / "cacert.pem").exists():
        raise ConfigError(f"{directory}: there is a CA already; vmm tls client adds a client")
    names = [_alternative(host) for host in hosts]
    for client in clients:
        _check_client(client)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"CA of {hosts[0]}")
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _builder(name, name, key, CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        _write_key(directory / "cakey.pem", key)
        _write(directory / "cacert.pem", _pem(certificate), 0o644)
        server = ec.generate_private_key(ec.SECP256R1())
        issued = _issue(certificate, key, _name(hosts[0]), server, ExtendedKeyUsageOID.SERVER_AUTH, days, names)
        _write_key(directory / "serverkey.pem", server)
        _write(directory / "servercert.pem", _pem(issued), 0o644)
    except OSError as error:
        raise HostError(f"{error.filename or directory}: {os_reason(error)}") from error
    return [add_client(directory, client, days=days) for client in clients]


def add_client(directory: Path, name: str, *, days: int = DAYS) -> Path:
    """A client's directory with its certificate and key. Raises ConfigError, HostError."""
    _check_client(name)
    authority, key = _authority(directory)
    folder = directory / "clients" / name
    if folder.exists():
        raise ConfigError(f"{folder}: there is a client of this name already")
    own = ec.generate_private_key(ec.SECP256R1())
    issued = _issue(authority, key, _name(name), own, ExtendedKeyUsageOID.CLIENT_AUTH, days, [])
    try:
        folder.mkdir(mode=0o700, parents=True)
        _write_key(folder / "clientkey.pem", own)
        _write(folder / "clientcert.pem", _pem(issued), 0o644)
        _write(folder / "cacert.pem", _pem(authority), 0o644)
    except OSError as error:
        raise HostError(f"{error.filename or folder}: {os_reason(error)}") from error
    return folder


def revoke(directory: Path, name: str) -> Path:
    """Write a revocation list with this client's certificate on it; the list. Raises ConfigError, HostError."""
    _check_client(name)
    authority, key = _authority(directory)
    path = directory / "clients" / name / "clientcert.pem"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such client") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    now = datetime.now(UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(now - timedelta(minutes=5))
        .next_update(now + timedelta(days=CRL_DAYS))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    crl = directory / "cacrl.pem"
    number = 1
    if crl.exists():
        try:
            old = x509.load_pem_x509_crl(crl.read_bytes())
            number = old.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number + 1
        except (OSError, ValueError, x509.ExtensionNotFound) as error:
            raise ConfigError(f"{crl}: {error}") from error
        for entry in old:
            if entry.serial_number != certificate.serial_number:
                builder = builder.add_revoked_certificate(entry)
    entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(now).build()
    signed = builder.add_revoked_certificate(entry).add_extension(x509.CRLNumber(number), critical=False)
    try:
        _write(crl, signed.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), 0o644)
    except OSError as error:
        raise HostError(f"{crl}: {os_reason(error)}") from error
    return crl


def _check_client(name: str) -> None:
    if not CLIENT.fullmatch(name):
        raise ConfigError(f"client: {name!r} is no name; use up to 63 letters, digits, '-', '_', '.' or '@'")


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not HOST.fullmatch(host):
            raise ConfigError(f"host: {host!r} is neither a name nor an address") from None
        return x509.DNSName(host)


def _authority(directory: Path) -> tuple[x509.Certificate, Key]:
    try:
        certificate = x509.load_pem_x509_certificate((directory / "cacert.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "cakey.pem").read_bytes(), None)
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename}: there is no CA; vmm tls init makes one") from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{directory}: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{directory / 'cakey.pem'}: not a key that vmm tls init makes")
    return certificate, key


def _name(common: str) -> x509.Name:
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION)
    return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _builder(subject: x509.Name, issuer: x509.Name, key: Key, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + timedelta(days=days)) - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=not ca,  # libvirt's clients insist on it
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issue(
    authority: x509.Certificate,
    key: Key,
    subject: x509.Name,
    own: Key,
    purpose: x509.ObjectIdentifier,
    days: int,
    names: list[x509.GeneralName],
) -> x509.Certificate:
    builder = (
        _builder(subject, authority.subject, own, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_key(path: Path, key: Key) -> None:
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(path, text, 0o600)


def _write(path: Path, data: bytes, mode: int) -> None:
    part = path.with_name(f".{path.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.replace(path)
