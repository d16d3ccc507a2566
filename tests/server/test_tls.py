"""The authority and its certificates, as OpenSSL judges them through Python's `ssl`."""

from __future__ import annotations

import re
import shlex
import shutil
import ssl
import stat
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from trainer.errors import InputError
from trainer.server.hosts import LOCAL_NAMES, SERVICE_HOSTS, path_here
from trainer.server.tls import Certificates, certificates, environment_lines

PAGE = Path(__file__).parent.parent.parent / "docs/clients.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A folder as the first start of a server leaves it."""
    return certificates(tmp_path_factory.mktemp("tls") / "new")


def handshake(server_file: Path, trusted: Path, name: str) -> None:
    """Lets a strict client meet a server in memory.

    Raises:
        ssl.SSLError: the client does not trust it under this name.
    """
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(server_file)
    theirs = ssl.create_default_context(cafile=trusted)
    # What `create_default_context` does of itself from Python 3.13 on.
    theirs.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = theirs.wrap_bio(to_client, to_server, server_hostname=name)
    server = ours.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for side in (client, server):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    assert client.getpeercert()


def signed_by(authority: Path, name: str) -> bytes:
    """A certificate for a name by the authority's own key, as a thief of the key would make it."""
    content = authority.read_bytes()
    key = serialization.load_pem_private_key(content, None)
    issuer = x509.load_pem_x509_certificate(content)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(issuer.not_valid_before_utc)
        .not_valid_after(issuer.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + builder.sign(key, hashes.SHA256()).public_bytes(pem)


@pytest.mark.parametrize("name", [*SERVICE_HOSTS, *LOCAL_NAMES])
def test_a_strict_client_accepts_the_server_under_every_name(made: Certificates, name: str) -> None:
    handshake(made.server, made.authority, name)


def test_a_client_that_trusts_the_bundle_accepts_it_too(made: Certificates) -> None:
    handshake(made.server, made.bundle, "queue.fal.run")


def test_another_name_is_not_accepted(made: Certificates) -> None:
    with pytest.raises(ssl.SSLError, match="Hostname mismatch"):
        handshake(made.server, made.authority, "example.org")


def test_what_the_authority_signs_for_other_names_is_worthless(
    made: Certificates, tmp_path: Path
) -> None:
    authority = made.authority.with_name("authority.pem")
    for name in ("localhost", "example.org"):
        (tmp_path / name).write_bytes(signed_by(authority, name))

    handshake(tmp_path / "localhost", made.authority, "localhost")
    with pytest.raises(ssl.SSLError, match="permitted subtree violation"):
        handshake(tmp_path / "example.org", made.authority, "example.org")


def test_a_client_that_trusts_only_the_system_does_not_accept_it(
    made: Certificates, tmp_path: Path
) -> None:
    system = tmp_path / "system.pem"
    system.write_bytes(made.bundle.read_bytes().removesuffix(made.authority.read_bytes()))

    assert system.read_bytes().count(b"BEGIN CERTIFICATE") > 50
    with pytest.raises(ssl.SSLError, match="unable to get local issuer"):
        handshake(made.server, system, "queue.fal.run")


def test_the_second_start_changes_nothing(made: Certificates) -> None:
    folder = made.authority.parent
    before = {path: path.read_bytes() for path in folder.iterdir()}

    again = certificates(folder)

    assert made.made == ("authority", "server")
    assert again.made == ()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_keys_are_for_the_owner_alone(made: Certificates) -> None:
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in made.authority.parent.iterdir()
        if b"PRIVATE KEY" in path.read_bytes()
    }

    assert modes == {"authority.pem": 0o600, "server.pem": 0o600}


def test_lives_are_ten_years_and_what_browsers_accept(made: Certificates) -> None:
    authority = x509.load_pem_x509_certificate(made.authority.read_bytes())
    server = x509.load_pem_x509_certificate(made.server.read_bytes())

    years = authority.not_valid_after_utc - authority.not_valid_before_utc
    assert timedelta(days=3650) <= years < timedelta(days=3660)
    assert server.not_valid_after_utc - server.not_valid_before_utc <= timedelta(days=397)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == (
        x509.BasicConstraints(ca=True, path_length=0)
    )


@pytest.mark.parametrize(
    ("days", "made_then"),
    [(300, ()), (370, ("server",)), (3600, ("server",)), (3630, ("authority", "server"))],
)
def test_what_has_less_than_thirty_days_left_is_renewed(
    made: Certificates, tmp_path: Path, days: int, made_then: tuple[str, ...]
) -> None:
    folder = shutil.copytree(made.authority.parent, tmp_path / "later")

    later = certificates(folder, now=datetime.now(UTC) + timedelta(days=days))

    assert later.made == made_then


def test_a_new_name_is_served_and_earlier_names_stay_permitted(
    made: Certificates, tmp_path: Path
) -> None:
    folder = shutil.copytree(made.authority.parent, tmp_path / "named")

    first = certificates(folder, ["box.example.org", "10.1.2.3"])
    handshake(first.server, first.authority, "box.example.org")
    handshake(first.server, first.authority, "10.1.2.3")
    second = certificates(folder, ["127.0.0.5"])
    handshake(second.server, second.authority, "127.0.0.5")

    assert first.made == ("authority", "server")
    assert second.made == ("server",)
    assert certificates(folder, ["other.example.org"]).made == ("authority", "server")
    assert certificates(folder, ["BOX.example.org.", "10.1.2.3"]).made == ("server",)


@pytest.mark.parametrize("name", ["https://box", "box:8700", "a b", "", "*.example.org"])
def test_what_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="neither a host name nor an address"):
        certificates(tmp_path / "tls", [name])


def test_a_crash_after_the_first_file_is_made_good(made: Certificates, tmp_path: Path) -> None:
    shutil.copy(made.authority.with_name("authority.pem"), tmp_path)

    after = certificates(tmp_path)

    assert after.made == ("server",)
    handshake(after.server, after.authority, "localhost")


def test_a_crash_between_authority_and_server_is_made_good(
    made: Certificates, tmp_path: Path
) -> None:
    folder = shutil.copytree(made.authority.parent, tmp_path / "torn")
    other = certificates(tmp_path / "other")
    shutil.copy(other.authority.with_name("authority.pem"), folder)

    after = certificates(folder)

    assert after.made == ("server",)
    handshake(after.server, after.authority, "localhost")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("authority.pem", b"", "is damaged"),
        ("server.pem", b"nonsense", "is damaged"),
        ("authority.pem", None, "not their `authority.pem`"),
        ("authority.pem", b"server.pem", "is not an authority that this program made"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_and_left_as_it_is(
    made: Certificates, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    folder = shutil.copytree(made.authority.parent, tmp_path / "odd")
    match content:
        case None:
            (folder / name).unlink()
        case b"server.pem":
            shutil.copy(folder / "server.pem", folder / name)
        case _:
            (folder / name).write_bytes(content)
    before = {path: path.read_bytes() for path in folder.iterdir()}

    with pytest.raises(InputError, match=said) as refusal:
        certificates(folder)

    assert "move `" in str(refusal.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_key_and_a_certificate_of_two_pairs_are_refused(
    made: Certificates, tmp_path: Path
) -> None:
    folder = shutil.copytree(made.authority.parent, tmp_path / "mixed")
    key = (folder / "server.pem").read_bytes().partition(b"-----BEGIN CERT")[0]
    (folder / "authority.pem").write_bytes(key + made.authority.read_bytes())

    with pytest.raises(InputError, match="do not belong together"):
        certificates(folder)


def test_a_key_that_others_may_read_is_refused(made: Certificates, tmp_path: Path) -> None:
    folder = shutil.copytree(made.authority.parent, tmp_path / "open")
    (folder / "authority.pem").chmod(0o640)

    with pytest.raises(InputError, match=r"chmod 600 .*authority\.pem"):
        certificates(folder)


def test_the_bundle_does_not_take_itself_for_the_system(
    made: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(made.authority.parent, tmp_path / "again")
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca-bundle.pem"))

    certificates(folder, ["box.example.org"])

    replaced, current = made.authority.read_bytes(), (folder / "ca.pem").read_bytes()
    assert replaced not in (folder / "ca-bundle.pem").read_bytes()
    assert (folder / "ca-bundle.pem").read_bytes().count(current) == 1


def test_the_lines_to_print_are_shell_and_the_page_explains_each_variable(
    made: Certificates,
) -> None:
    lines = environment_lines(made, "localhost:8743", "127.0.0.1:8744")
    words = [word for block in lines.values() for line in block for word in shlex.split(line)]
    variables = {word.partition("=")[0]: word.partition("=")[2] for word in words if "=" in word}
    page = PAGE.read_text()

    assert {line.split()[0] for block in lines.values() for line in block} == {"export"}
    assert variables["FAL_RUN_HOST"] == "localhost:8743/run"
    assert variables["HTTPS_PROXY"] == "http://127.0.0.1:8744"
    assert Path(variables["SSL_CERT_FILE"]).samefile(made.bundle)
    assert [name for name in variables if not re.search(rf"\b{name}=", page)] == []
    assert "HTTPS_PROXY" not in str(environment_lines(made, "localhost:8743"))


@pytest.mark.parametrize(
    ("host", "path", "here"),
    [
        ("queue.fal.run", "/fal-ai/x", "/fal-ai/x"),
        ("fal.run", "/fal-ai/x", "/run/fal-ai/x"),
        ("Rest.Fal.ai", "/storage/auth/token", "/storage/auth/token"),
        ("v3.fal.media", "/files/upload", "/files/upload"),
        ("localhost", "/fal-ai/x", None),
    ],
)
def test_a_service_path_has_its_place_here(host: str, path: str, here: str | None) -> None:
    assert path_here(host, path) == here
