"""What may be uploaded for a training: pictures, known by their first bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator

from trainer.server.novita.refusing import ServiceRefusal
from trainer.server.settings import MEBIBYTE
from trainer.server.signatures import FORMATS, HEAD_BYTES, is_picture

MOST_PICTURE_BYTES = 64 * MEBIBYTE


async def pictures_only(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes, once they are known to be a picture's.

    Raises:
        ServiceRefusal: they are not.
    """
    head = b""
    async for chunk in chunks:
        head += chunk
        if len(head) >= HEAD_BYTES:
            break
    if not is_picture(head):
        message = f"the content is no picture; allowed: {FORMATS}"
        raise ServiceRefusal("invalid", "INVALID_IMAGE_FORMAT", 400, message)
    yield head
    async for chunk in chunks:
        yield chunk
