"""Files as clients fetch them: uploads and results, by their random ids."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from trainer.server.operations import Operation, Told
from trainer.server.refusals import Refusal
from trainer.server.workshop import Workshop

# What a browser may show; everything else it stores. An SVG may hold scripts.
_SHOWN = ("image/png", "image/jpeg", "image/webp", "application/json")


async def fetch(request: Request, workshop: Workshop) -> Response:
    """A file, or the range of it that was asked for."""
    file = await run_in_threadpool(workshop.files.find, request.path_params["id"])
    if file is None or file.is_expected or not file.path.is_file():
        raise Refusal("not_found", "there is no such file")
    return FileResponse(
        file.path,
        media_type=file.content_type,
        filename=file.name,
        content_disposition_type="inline" if file.content_type in _SHOWN else "attachment",
        headers={"Content-Security-Policy": "sandbox; default-src 'none'"},
    )


OPERATIONS = (
    Operation(
        "GET",
        "/files/{id}/{name}",
        fetch,
        "Fetch an upload or a result",
        "files",
        error=Told,
        media="*/*",
        other_statuses=(206,),
    ),
    Operation("GET", "/files/{id}", fetch, "Fetch a file", "files", is_listed=False),
)
