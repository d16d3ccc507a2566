"""Which bytes a picture of the web begins with: by these it is known, whatever it is called."""

from __future__ import annotations

HEAD_BYTES = 12
FORMATS = "png, jpeg, webp"
# With a zero where any byte may stand. PNG: its specification, 5.2; JPEG: ITU-T T.81, B.1.1.3;
# WebP: RFC 9649, 2.4.
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP")


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with these bytes, `HEAD_BYTES` of them at least, is a picture."""
    return len(head) >= HEAD_BYTES and any(
        all(own in (0, byte) for own, byte in zip(signature, head, strict=False))
        for signature in _SIGNATURES
    )
