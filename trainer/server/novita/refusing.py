"""Refusals in Novita's words: code, reason, message, and the fields in `metadata`."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse, Response

from trainer.server.novita.messages import Error
from trainer.server.refusals import Reason, Refusal
from trainer.server.security import NO_KEY

# The service's words for refusals, and their statuses.
_CODES: Mapping[Reason, tuple[str, int]] = {
    "malformed": ("INVALID_REQUEST_BODY", 400),
    "invalid": ("INVALID_REQUEST_BODY", 400),
    "unauthorized": ("INVALID_API_KEY", 403),
    "forbidden": ("FORBIDDEN", 403),
    "not_found": ("API_NOT_FOUND", 404),
    "wrong_method": ("API_NOT_FOUND", 405),
    "too_large": ("REQUEST_BODY_TOO_LARGE", 413),
    "too_many": ("RATE_LIMIT_EXCEEDED", 429),
    "queue_full": ("CREATE_TASK_FAILED", 500),
    "no_room": ("CREATE_TASK_FAILED", 500),
}
_OTHER_CODE = ("INTERNAL_ERROR", 500)


class ServiceRefusal(Refusal):
    """A refusal for which the service has a word of its own."""

    def __init__(self, reason: Reason, word: str, status: int, message: str) -> None:
        super().__init__(reason, message)
        self.code = (word, status)


def refused(refusal: Refusal) -> Response:
    """The service's answer to a refusal."""
    usual = _CODES.get(refusal.reason, _OTHER_CODE)
    if refusal.message == NO_KEY:
        usual = ("MISSING_API_KEY", 400)
    word, status = refusal.code if isinstance(refusal, ServiceRefusal) else usual
    named = {problem.field: problem.message for problem in refusal.problems}
    error = Error(code=status, reason=word, message=refusal.message, metadata=named)
    return JSONResponse(error.model_dump(), status, refusal.headers)
