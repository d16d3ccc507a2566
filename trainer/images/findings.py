"""What is found out about one picture, or by a library, in words; where it is said is not known
here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Remark(BaseModel):
    """Something the user should know of one picture.

    Args:
        kind: `warning`: worth a look before training; `info`: what was done, all being well.
        text: goes on after the picture's name, without a period: `is turned upright`.
    """

    model_config = ConfigDict(frozen=True)
    kind: Literal["info", "warning"]
    text: str

    @classmethod
    def info(cls, text: str) -> Remark:
        """A remark that only the report and the contact sheet show."""
        return cls(kind="info", text=text)

    @classmethod
    def warning(cls, text: str) -> Remark:
        """A remark that is also said while pictures are prepared."""
        return cls(kind="warning", text=text)


def first_line(error: Exception) -> str:
    """What a library's error says, in one line without a period."""
    return str(error).strip().partition("\n")[0].rstrip(".")
