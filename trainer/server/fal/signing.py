"""How fal signs what it tells webhooks: https://docs.fal.ai/model-endpoints/webhooks."""

from __future__ import annotations

import hashlib

from trainer.server.signing import WebhookKey


def signature(
    key: WebhookKey, request_id: str, user_id: str, timestamp: int, body: bytes
) -> dict[str, str]:
    """The headers of a message.

    Args:
        timestamp: seconds since 1970; receivers take five minutes about it.
        body: exactly as it is sent.
    """
    digest = hashlib.sha256(body).hexdigest()
    message = "\n".join((request_id, user_id, str(timestamp), digest))
    return {
        "X-Fal-Webhook-Request-Id": request_id,
        "X-Fal-Webhook-User-Id": user_id,
        "X-Fal-Webhook-Timestamp": str(timestamp),
        "X-Fal-Webhook-Signature": key.sign(message.encode()).hex(),
    }
