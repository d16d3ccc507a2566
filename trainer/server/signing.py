"""By what receivers of webhooks know that a message is from this server: two ways of signing.

With a key pair whose public half anyone can fetch, and with a secret that the receiver gave.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from trainer.durable import disk_errors
from trainer.errors import InputError

KEY_NAME = "webhook-key.pem"


class WebhookKey:
    """The key pair of one server.

    Args:
        private: its secret half.
    """

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def sign(self, message: bytes) -> bytes:
        """The signature of a message (RFC 8032)."""
        return self._private.sign(message)

    def jwks(self) -> dict[str, Any]:
        """The public half as a JSON Web Key Set (RFC 7517, RFC 8037)."""
        key = {
            "kty": "OKP",
            "crv": "Ed25519",
            "x": _base64url(self._public),
            "alg": "EdDSA",
            "use": "sig",
            "kid": hashlib.sha256(self._public).hexdigest()[:16],
        }
        return {"keys": [key]}


@cache
def webhook_key(data: Path) -> WebhookKey:
    """The key of the server with this data folder, made the first time.

    Raises:
        InputError: the file holds no such key.
        DiskError: it cannot be written.
    """
    path = data / KEY_NAME
    if not path.exists():
        _make(path)
    try:
        private = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _damaged(path) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise _damaged(path)
    return WebhookKey(private)


def sign_with_secret(header: str, secret: str, body: bytes) -> dict[str, str]:
    """The header with the code of a message under a secret that its receiver knows.

    Args:
        header: its name, such as `X-BFL-Signature`.
    """
    code = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return {header: f"sha256={code}"}


def _make(path: Path) -> None:
    """Writes a new key that only its owner reads; the first of several makers wins."""
    content = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    with disk_errors(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _damaged(path: Path) -> InputError:
    return InputError.of(
        KEY_NAME,
        f"`{path}` holds no Ed25519 key in PEM",
        "remove it, and a new one is made; receivers fetch its public half anew",
    )


def _base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
