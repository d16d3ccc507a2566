"""What the server can be asked for: each operation once, as a route and in its OpenAPI."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trainer import __version__
from trainer.server.workshop import Workshop

Handler = Callable[[Request, Workshop], Awaitable[Response]]

_REFERENCES = "#/components/schemas/{model}"
_PLACE = re.compile(r"{(\w+)(?::\w+)?}")


@dataclass(frozen=True)
class Operation:
    """One thing to be asked for.

    Args:
        method: of HTTP.
        path: with places such as `{id}`.
        handler: answers; a `Refusal` that it raises is answered in the protocol's shape.
        summary: one line.
        tag: the protocol's name.
        body: of the request, as JSON.
        query: its fields are parameters.
        answer: of status `status`. None: no JSON, of `media`.
        error: what the protocol answers to a refusal.
        status: of success.
        media: of an answer that is no JSON.
        other_statuses: further statuses with the same answer.
        takes_bytes: whether the body is a file.
        is_listed: whether it is in the OpenAPI; an alias is not.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    error: type[BaseModel] | None = None
    status: int = 200
    media: str = "application/octet-stream"
    other_statuses: Sequence[int] = ()
    takes_bytes: bool = False
    is_listed: bool = True


class Told(BaseModel):
    """Why something is refused, where no service has a shape of its own for it."""

    detail: Any


def routes(operations: Sequence[Operation], workshop: Workshop) -> list[Route]:
    """A route for every path, in the order of the operations."""
    by_path: dict[str, dict[str, Handler]] = {}
    for operation in operations:
        by_path.setdefault(operation.path, {})[operation.method] = operation.handler
    return [_route(path, handlers, workshop) for path, handlers in by_path.items()]


def openapi(operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI 3.1 description of operations."""
    listed = [operation for operation in operations if operation.is_listed]
    used = {m for o in listed for m in (o.body, o.answer, o.error) if m is not None}
    models = sorted(used, key=lambda model: f"{model.__module__}.{model.__qualname__}")
    references, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template=_REFERENCES
    )
    schemas = {model: references[model, "validation"] for model in models}
    paths: dict[str, dict[str, Any]] = {}
    for operation in listed:
        path = _PLACE.sub(r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _described(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "trainer",
            "version": __version__,
            "description": "Hosted image-personalisation services on your own machine",
        },
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {
                "authorization": {"type": "apiKey", "in": "header", "name": "Authorization"},
                "x-key": {"type": "apiKey", "in": "header", "name": "X-Key"},
            },
        },
        "security": [{"authorization": []}, {"x-key": []}, {}],
    }


def _route(path: str, handlers: Mapping[str, Handler], workshop: Workshop) -> Route:
    async def endpoint(request: Request) -> Response:
        # Who may GET may also ask for the head alone.
        method = "GET" if request.method == "HEAD" else request.method
        return await handlers[method](request, workshop)

    return Route(path, endpoint, methods=list(handlers))


def _described(
    operation: Operation, schemas: Mapping[type[BaseModel], Mapping[str, Any]]
) -> dict[str, Any]:
    places = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PLACE.findall(operation.path)
    ]
    described: dict[str, Any] = {
        "summary": operation.summary,
        "tags": [operation.tag],
        "operationId": _identifier(operation),
        "parameters": [*places, *_parameters(operation.query)],
        "responses": _answers(operation, schemas),
    }
    if operation.body is not None:
        content = {"application/json": {"schema": schemas[operation.body]}}
        described["requestBody"] = {"required": True, "content": content}
    elif operation.takes_bytes:
        binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        described["requestBody"] = {"required": True, "content": binary}
    return described


def _answers(
    operation: Operation, schemas: Mapping[type[BaseModel], Mapping[str, Any]]
) -> dict[str, Any]:
    if operation.answer is None:
        content: dict[str, Any] = {operation.media: {}}
    else:
        content = {"application/json": {"schema": schemas[operation.answer]}}
    answer = {"description": "Done", "content": content}
    answers = {str(status): answer for status in (operation.status, *operation.other_statuses)}
    if operation.error is not None:
        failed = {"application/json": {"schema": schemas[operation.error]}}
        answers["default"] = {"description": "Refused", "content": failed}
    return answers


def _parameters(query: type[BaseModel] | None) -> list[dict[str, Any]]:
    if query is None:
        return []
    schema = query.model_json_schema(by_alias=True)
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": field}
        for name, field in schema["properties"].items()
    ]


def _identifier(operation: Operation) -> str:
    words = re.findall(r"[A-Za-z0-9]+", operation.path)
    return "_".join([operation.method.lower(), *words])
