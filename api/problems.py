"""Errors as RFC 9457 problem details: one form for a refused spec, an unknown path and a crash alike."""

from __future__ import annotations

import difflib
import errno
import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import DataError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from core.errors import AppError, Conflict, DiskFull, InvalidSpec, Unavailable
from core.specs import SPECS
from core.specs.base import field_names

MEDIA_TYPE = "application/problem+json"
_MAX_INPUT_CHARS = 500
_CODES = {400: "malformed_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}

log = structlog.get_logger(__name__)


class FieldError(BaseModel):
    """One wrong field."""

    loc: list[str | int] = Field(
        description="Where: `body`, `query`, `path` or `header`, then the names and indices that lead there."
    )
    message: str
    input: Any = Field(None, description="The value given, shortened.")


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(description="`urn:temper:problem:` and the code.", examples=["urn:temper:problem:invalid_spec"])
    title: str = Field(description="The HTTP status in words.")
    status: int
    code: str = Field(description="Stable, for programs.", examples=["incompatible_plan"])
    detail: str = Field(description="What is wrong, with field and value.")
    hint: str | None = Field(None, description="What would work.")
    request_id: str = Field(description="Also in the X-Request-Id header and in the server's log.")
    errors: list[FieldError] | None = Field(
        None, description="The fields that are wrong, where the request does not fit its schema."
    )


_DESCRIPTIONS = {
    400: "The body cannot be read.",
    401: "No valid API key.",
    403: "The key's role does not allow it.",
    404: "There is no such thing, or it is not yours.",
    409: "The state of the resource does not allow it.",
    413: "Larger than the limit.",
    415: "Not the content type that is needed.",
    416: "The range lies outside the content.",
    422: "The request is wrong, or cannot run; says what would work.",
    503: "A part of the service does not answer.",
    507: "No space left.",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route for its OpenAPI entry; 401, 422 and 503 always belong to them."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": _DESCRIPTIONS[status], "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in sorted({401, 422, 503, *statuses})
    }


def problem_response(
    request_id: str,
    *,
    status: int,
    code: str,
    detail: str,
    hint: str | None = None,
    errors: Sequence[FieldError] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Build the answer."""
    problem = Problem(
        type=f"urn:temper:problem:{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        code=code,
        detail=detail,
        hint=hint,
        request_id=request_id,
        errors=list(errors) if errors is not None else None,
    )
    body = problem.model_dump(mode="json", exclude_none=True)
    return JSONResponse(body, status_code=status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def from_error(request_id: str, error: AppError) -> JSONResponse:
    """An `AppError` as a problem."""
    headers = (
        {"WWW-Authenticate": "Bearer"} if error.status == 401 else {"Retry-After": "1"} if error.status == 503 else {}
    )
    return problem_response(
        request_id, status=error.status, code=error.code, detail=error.message, hint=error.hint, headers=headers
    )


def from_unexpected(request_id: str, error: Exception) -> JSONResponse:
    """Whatever got through: what the world did to us gets its own code, the rest is our mistake and says nothing of itself."""
    known = _translate(error)
    if known is not None:
        log.warning("http.refused", error=repr(error), code=known.code)
        return from_error(request_id, known)
    log.error("http.crashed", exc_info=error)
    detail = "The server failed on this request; its log says why under the request id."
    return problem_response(request_id, status=500, code="internal_error", detail=detail)


def install(app: FastAPI) -> None:
    """Have `app` answer every refusal in this form."""
    app.add_exception_handler(AppError, _on_app_error)  # type: ignore[arg-type]  # Starlette types handlers by Exception
    app.add_exception_handler(RequestValidationError, _on_validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _on_http_exception)  # type: ignore[arg-type]


def request_id_of(request: Request) -> str:
    """The id that the middleware gave the request."""
    return str(request.scope.get("state", {}).get("request_id", "-"))


async def _on_app_error(request: Request, error: AppError) -> JSONResponse:
    return from_error(request_id_of(request), error)


async def _on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    found = [_field_error(item) for item in _causes(error.errors())]
    if any(item["type"] == "json_invalid" for item in error.errors()):
        reason = error.errors()[0].get("ctx", {}).get("error", "")
        detail = f"the body is not JSON: {reason} at character {found[0].loc[-1]}"
        return problem_response(request_id_of(request), status=400, code="malformed_json", detail=detail)
    first = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    hint = _known_fields(error.errors()[0])
    if isinstance(error.body, bytes) and first.loc == ["body"]:
        hint = "send Content-Type: application/json"
    return problem_response(
        request_id_of(request),
        status=422,
        code=InvalidSpec.code,
        detail=f"{'.'.join(map(str, first.loc))}: {first.message}{_given(error.errors()[0])}{more}",
        hint=hint,
        errors=found,
    )


async def _on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
    details = {
        404: f"no such path: {request.url.path}",
        405: f"{request.method} is not allowed at {request.url.path}",
    }
    return problem_response(
        request_id_of(request),
        status=error.status_code,
        code=_CODES.get(error.status_code, f"http_{error.status_code}"),
        detail=details.get(error.status_code, str(error.detail)),
        headers=error.headers,
    )


def _translate(error: Exception) -> AppError | None:
    match error:
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull("the server's disk is full", hint="delete artifacts that are no longer needed")
        case OperationalError() | InterfaceError() | PoolTimeout():
            return Unavailable("the database does not answer", hint="try again")
        case IntegrityError():
            return Conflict("what this request refers to was changed meanwhile", hint="try again", code="raced")
        case DataError():
            return InvalidSpec("the database cannot hold a value of this request; text must not contain NUL characters")
        case _:
            return None


def _causes(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without complaints that a list is too short because its items were wrong."""
    wrong = {tuple(item["loc"][:-1]) for item in items}
    return [item for item in items if not (item["type"] == "too_short" and tuple(item["loc"]) in _prefixes(wrong))]


def _prefixes(locs: set[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    return {loc[:length] for loc in locs for length in range(1, len(loc) + 1)}


def _given(item: Mapping[str, Any]) -> str:
    """The value that was refused, where it is short and the message does not name it."""
    value = item.get("input")
    if item["type"] in ("missing", "extra_forbidden", "value_error", "union_tag_invalid") or isinstance(
        value, dict | list
    ):
        return ""
    text = json.dumps(_printable(value), ensure_ascii=False)
    return f", got {text}" if len(text) <= 80 else ""


def _field_error(item: Mapping[str, Any]) -> FieldError:
    loc = [part if isinstance(part, int) else str(part) for part in item["loc"]]
    if loc[:1] == ["body"] and len(loc) > 1 and loc[1] in SPECS:
        del loc[1]  # the tag of the union over kinds is no part of what was posted
    return FieldError(loc=loc, message=_message(item), input=_printable(item.get("input")))


def _message(item: Mapping[str, Any]) -> str:
    """Pydantic's message, in JSON's words."""
    text = str(item["msg"]).removeprefix("Value error, ").removesuffix(" to extract fields from")
    for pythons, jsons in (("a valid dictionary or object", "an object"), ("valid tuple", "list"), ("Tuple", "List")):
        text = text.replace(pythons, jsons)
    if item["type"] == "union_tag_invalid":
        context = item["ctx"]
        return f"kind must be one of {context['expected_tags']}, got '{context['tag']}'"
    return text


def _known_fields(item: Mapping[str, Any]) -> str | None:
    """For an unknown field of a spec: what may stand there, the likeliest name first."""
    loc = item["loc"]
    if item["type"] != "extra_forbidden" or len(loc) < 4 or loc[1] not in SPECS or loc[2] != "spec":
        return None
    known = field_names(SPECS[loc[1]], loc[3:-1])
    likely = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return (f"did you mean {likely[0]}? " if likely else "") + f"known here: {', '.join(known)}"


def _printable(value: Any) -> Any:
    """The value if it is small and JSON can say it, else a shortened text."""
    try:
        text = json.dumps(value, allow_nan=False)
        text.encode()
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        text = repr(value).encode(errors="replace").decode()
        return text if len(text) <= _MAX_INPUT_CHARS else text[:_MAX_INPUT_CHARS] + "…"
    return value if len(text) <= _MAX_INPUT_CHARS else text[:_MAX_INPUT_CHARS] + "…"
