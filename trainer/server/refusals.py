"""Why a request is refused, before it has the shape of any service.

Protocols turn a refusal into their service's status and body; see `protocols`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from trainer.errors import Problem

Reason = Literal[
    "malformed",
    "invalid",
    "unauthorized",
    "forbidden",
    "not_found",
    "wrong_method",
    "unfinished",
    "ended",
    "too_large",
    "too_many",
    "queue_full",
    "no_room",
    "internal",
]

# HTTP status by reason, where a service does not say otherwise. None of those that clients take
# for passing (408, 409, 429, 502, 503, 504) stands for what lasts: 429 is for the rate alone.
STATUSES: Mapping[Reason, int] = {
    "malformed": 400,
    "invalid": 422,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "wrong_method": 405,
    "unfinished": 400,
    "ended": 400,
    "too_large": 413,
    "too_many": 429,
    "queue_full": 507,
    "no_room": 507,
    "internal": 500,
}


class Refusal(Exception):
    """A request that is not done.

    Args:
        reason: of which kind.
        message: what is wrong, for people.
        problems: the fields at fault, named as the request names them.
        headers: for the answer.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        problems: Sequence[Problem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message
        self.problems = tuple(problems)
        self.headers = dict(headers or {})

    @property
    def status(self) -> int:
        """Its HTTP status."""
        return STATUSES[self.reason]

    @classmethod
    def of(cls, field: str, message: str, hint: str = "") -> Refusal:
        """A request that is invalid in one field."""
        problem = Problem(field, message, hint)
        return cls("invalid", str(problem), problems=[problem])
