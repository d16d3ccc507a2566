"""What pictures were asked for in vain, in the words of whoever asked."""

from __future__ import annotations

from collections.abc import Callable

from trainer.generation import GenerationRequest
from trainer.job import Result
from trainer.server.queue import Job


def ignored_in(job: Job, result: Result | None, name_of: Callable[[str], str]) -> dict[str, str]:
    """Options of a request for pictures that are not taken, with the reason.

    Those that the request itself does not have here are known at once; what does not fit the base
    model, when it was loaded.

    Args:
        result: of the job, where there is one.
        name_of: gives the request's name of an option of a generation.
    """
    work = GenerationRequest.model_validate_json(job.work)
    own = {note.field: note.message for note in work.notes if note.kind == "ignored"}
    found = {} if result is None else result.ignored_options
    return own | {name_of(n): message for n, message in found.items() if n not in own}
