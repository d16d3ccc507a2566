"""Certificates for https on this machine: an authority of our own, and what it signs.

A client that only speaks https trusts the authority's file, `ca.pem`, or the bundle of it and the
system's. The authority can sign for the names in its own certificate and for no other: whoever
gets hold of its key cannot pretend to be a bank. Every key lies in one file with its certificate,
so that no crash can part them. Knows files and names, and nothing of the server that uses them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import ssl
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import certifi
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trainer.durable import disk_errors, publish_file, write_bytes
from trainer.errors import InputError
from trainer.server.hosts import LOCAL_NAMES, SERVICE_HOSTS

AUTHORITY_LIFE = timedelta(days=3650)
SERVER_LIFE = timedelta(days=397)
"""The most that browsers accept (CA/Browser Forum ballot SC31)."""
RENEWED_BEFORE = timedelta(days=30)
_CLOCKS_DIFFER = timedelta(days=1)
_LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_ORGANISATION = "tok-trainer"


@dataclass(frozen=True)
class Certificates:
    """The files of one folder.

    Args:
        authority: certificate that clients trust.
        bundle: the system's authorities and ours, for clients that also talk to others.
        server: key and certificate of the server, in one file.
        made: which of `authority` and `server` are new.
    """

    authority: Path
    bundle: Path
    server: Path
    made: tuple[str, ...]


@dataclass(frozen=True)
class _Pair:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def pem(self) -> bytes:
        """Key and certificate, as `ssl.SSLContext.load_cert_chain` takes them from one file."""
        key = self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return key + _pem(self.certificate)


def certificates(
    folder: Path, names: Collection[str] = (), now: datetime | None = None
) -> Certificates:
    """Finds or makes the authority and the server's certificate.

    The authority is made once for ten years, and again when a name is asked for that it may not
    sign. The server's certificate is renewed 30 days before its end and when names change.

    Args:
        folder: private to this server; made where missing.
        names: hosts and addresses beside the services' and this machine's own.
        now: the time to judge by; the clock's where none is given.

    Raises:
        InputError: a name that cannot stand in a certificate, or a folder with other contents.
        DiskError: the folder cannot be written.
    """
    now = now or datetime.now(UTC)
    wanted = {_name(name) for name in (*SERVICE_HOSTS, *LOCAL_NAMES, *names)}
    files = [folder / name for name in ("authority.pem", "server.pem", "ca.pem", "ca-bundle.pem")]
    secret, server_file, public, bundle = files
    to_sign = _beyond_loopback(wanted)
    made = []

    authority = _read(secret)
    if authority is None and any(path.exists() for path in files):
        raise _refusal(folder, f"`{folder}` holds certificates but not their `{secret.name}`")
    if authority is not None and not _is_authority(authority.certificate):
        raise _refusal(folder, f"`{secret}` is not an authority that this program made")
    if authority is None or _ends(authority, now) or not to_sign <= _permitted(authority):
        earlier = _permitted(authority) if authority else set()
        authority = _new_authority(to_sign | earlier, now)
        _write_private(secret, authority.pem())
        made.append("authority")

    server = _read(server_file)
    if (
        server is None
        or _ends(server, now)
        or _names_of(server.certificate) != wanted
        or not _signed_by(server.certificate, authority.certificate)
    ):
        _write_private(server_file, _new_server(wanted, authority, now).pem())
        made.append("server")

    ours = _pem(authority.certificate)
    _write_changed(public, ours)
    _write_changed(bundle, _system_authorities(folder) + ours)
    return Certificates(public, bundle, server_file, tuple(made))


def environment_lines(
    certificates: Certificates, address: str, proxy: str = ""
) -> dict[str, list[str]]:
    """The shell lines that point unchanged clients here, under what each is for.

    Args:
        certificates: the files to name.
        address: `host:port` of the https address.
        proxy: `host:port` of the CONNECT proxy, or nothing where there is none.
    """
    trust = f"SSL_CERT_FILE={shlex.quote(str(certificates.bundle.absolute()))}"
    requests = f"REQUESTS_CA_BUNDLE={shlex.quote(str(certificates.bundle.absolute()))}"
    node = f"NODE_EXTRA_CA_CERTS={shlex.quote(str(certificates.authority.absolute()))}"
    lines = {
        "fal_client and fal, by address (no uploads)": [
            f"export FAL_QUEUE_RUN_HOST={address} FAL_RUN_HOST={address}/run {trust}"
        ],
        "Node.js, for https addresses": [f"export {node}"],
        "requests, for https addresses": [f"export {requests}"],
    }
    if proxy:
        through = f"export HTTPS_PROXY=http://{proxy}"
        lines["any client unchanged, by proxy (uploads too)"] = [f"{through} {trust} {requests}"]
        lines["Node.js 24 unchanged, by proxy"] = [f"{through} NODE_USE_ENV_PROXY=1 {node}"]
    return lines


def _name(name: str) -> str:
    """A host name or address as it stands in certificates.

    Raises:
        InputError: it is neither.
    """
    bare = name.lower().rstrip(".").removeprefix("[").removesuffix("]")
    with suppress(ValueError):
        return str(ipaddress.ip_address(bare))
    if not _NAME.fullmatch(bare):
        raise InputError.of(
            "names",
            f"`{name}` is neither a host name nor an address",
            "give it without scheme, port and path, for example `box.example.org`",
        )
    return bare


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _general_names(names: Collection[str]) -> list[x509.GeneralName]:
    pairs = [(name, _address(name)) for name in sorted(names)]
    return [x509.IPAddress(ip) if ip else x509.DNSName(name) for name, ip in pairs]


def _constraints(names: Collection[str]) -> x509.NameConstraints:
    """What an authority may sign: these names, those below them, and all of loopback."""
    addresses = [ip for ip in map(_address, sorted(_beyond_loopback(names))) if ip]
    networks = [*_LOOPBACK, *(ipaddress.ip_network(ip) for ip in addresses)]
    return x509.NameConstraints(
        [
            *(x509.DNSName(name) for name in sorted(names) if not _address(name)),
            *(x509.IPAddress(network) for network in networks),
        ],
        None,
    )


def _beyond_loopback(names: Collection[str]) -> set[str]:
    """Without the addresses that every authority of ours may sign."""
    addresses = {name: _address(name) for name in names}
    return {name for name, address in addresses.items() if not (address and address.is_loopback)}


def _permitted(authority: _Pair) -> set[str]:
    """The names that an authority may sign, as they were asked for."""
    found = authority.certificate.extensions.get_extension_for_class(x509.NameConstraints)
    trees = found.value.permitted_subtrees or []
    hosts = {tree.value for tree in trees if isinstance(tree, x509.DNSName)}
    networks = [tree.value for tree in trees if isinstance(tree, x509.IPAddress)]
    return hosts | {str(network).partition("/")[0] for network in networks}


def _base(subject: str, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_distinguished(subject))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )


def _distinguished(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _new_authority(names: Collection[str], now: datetime) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    # Told apart by the day and the key: two authorities of one name confuse key stores.
    digest = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:8]
    subject = f"{_ORGANISATION} local authority {now:%Y-%m-%d} {digest}"
    builder = (
        _base(subject, key.public_key())
        .issuer_name(_distinguished(subject))
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(_constraints(names), critical=True)
    )
    return _Pair(key, builder.sign(key, hashes.SHA256()))


def _new_server(names: Collection[str], authority: _Pair, now: datetime) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _base("localhost", key.public_key())
        .issuer_name(issuer.subject)
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(min(now - _CLOCKS_DIFFER + SERVER_LIFE, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.SubjectAlternativeName(_general_names(names)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
    )
    return _Pair(key, builder.sign(authority.key, hashes.SHA256()))


def _read(path: Path) -> _Pair | None:
    """Key and certificate of a file, or nothing where there is none.

    Raises:
        InputError: the file is damaged, not ours, or open to others.
    """
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
        key = serialization.load_pem_private_key(content, password=None)
        certificate = x509.load_pem_x509_certificate(content)
    except (OSError, ValueError, TypeError) as error:
        raise _refusal(path.parent, f"`{path}` is damaged or not ours: {error}") from error
    if (
        not isinstance(key, ec.EllipticCurvePrivateKey)
        or key.public_key() != certificate.public_key()
    ):
        raise _refusal(path.parent, f"`{path}`: key and certificate do not belong together")
    if path.stat().st_mode & 0o077:
        raise InputError.of(
            "tls",
            f"`{path}` holds a private key and may be read by others",
            f"close it: chmod 600 {shlex.quote(str(path))}",
        )
    return _Pair(key, certificate)


def _refusal(folder: Path, message: str) -> InputError:
    hint = f"move `{folder}` away: it is made anew, and clients read the new `ca.pem` in its place"
    return InputError.of("tls", message, hint)


def _is_authority(certificate: x509.Certificate) -> bool:
    organisations = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    if [attribute.value for attribute in organisations] != [_ORGANISATION]:
        return False
    found = certificate.extensions
    try:
        return bool(
            found.get_extension_for_class(x509.BasicConstraints).value.ca
            and found.get_extension_for_class(x509.NameConstraints)
        )
    except x509.ExtensionNotFound:
        return False


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _ends(pair: _Pair, now: datetime) -> bool:
    return pair.certificate.not_valid_after_utc - now < RENEWED_BEFORE


def _names_of(certificate: x509.Certificate) -> set[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hosts = found.get_values_for_type(x509.DNSName)
    return {*hosts, *(str(ip) for ip in found.get_values_for_type(x509.IPAddress))}


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _system_authorities(folder: Path) -> bytes:
    """The authorities that clients trust without us, each once."""
    paths = ssl.get_default_verify_paths()
    places = [certifi.where(), paths.cafile, paths.openssl_cafile]
    # Debian and its kin name a folder of single files; this one in it has them all.
    places.append(os.path.join(paths.capath or paths.openssl_capath, "ca-certificates.crt"))
    files = [Path(place) for place in places if place and Path(place).is_file()]
    # A shell that was pointed here already has our own bundle in SSL_CERT_FILE.
    foreign = [path for path in files if path.resolve().parent != folder.resolve()]
    blocks = [block for path in foreign for block in _PEM.findall(path.read_bytes())]
    return b"".join(block + b"\n" for block in dict.fromkeys(blocks))


def _write_changed(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content)


def _write_private(path: Path, content: bytes) -> None:
    """Writes a file that nobody else could read at any moment."""
    temporary = path.with_name(f".tmp-{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    publish_file(temporary, path)
