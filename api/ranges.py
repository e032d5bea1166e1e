"""Byte ranges (RFC 9110 §14) over anything that can be read from an offset: files and archives alike.

One range per request; several ranges, other units and malformed headers are ignored, as the RFC allows, and give the whole.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from api.problems import problem_response, request_id_of

_RANGE = re.compile(r"bytes=\s*(\d*)\s*-\s*(\d*)\s*", re.IGNORECASE)
_MAX_DIGITS = 18
IMMUTABLE = "private, max-age=31536000, immutable"


@dataclass(frozen=True)
class Content:
    """Something of known size that can be read from any offset."""

    size: int
    etag: str
    filename: str
    media_type: str
    read: Callable[[int, int], Iterator[bytes]]
    """`read(start, stop)` yields exactly the bytes [start, stop)."""
    sha256: str | None = None


class Unsatisfiable(Exception):
    """The range lies outside the content."""


def parse(header: str | None, size: int) -> tuple[int, int] | None:
    """Return (start, stop) of a single byte range; None when there is none to honour; Unsatisfiable when it lies outside."""
    match = _RANGE.fullmatch(header) if header else None
    if match is None:
        return None
    first, last = match.groups()
    if (not first and not last) or max(len(first), len(last)) > _MAX_DIGITS:
        return None
    if not first:
        length = min(int(last), size)
        if length == 0:
            raise Unsatisfiable
        return size - length, size
    start, stop = int(first), int(last) + 1 if last else size
    if last and stop <= start:
        return None
    if start >= size:
        raise Unsatisfiable
    return start, min(stop, size)


def respond(request: Request, content: Content) -> Response:
    """Answer GET or HEAD for `content`, honouring Range, If-Range and If-None-Match."""
    headers = {
        "ETag": content.etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": IMMUTABLE,
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(content.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    if content.sha256 is not None:
        headers["Repr-Digest"] = f"sha-256=:{b64encode(bytes.fromhex(content.sha256)).decode()}:"
    if _matches(request.headers.get("if-none-match"), content.etag):
        return Response(status_code=304, headers=headers)
    try:
        wanted = _wanted(request, content)
    except Unsatisfiable:
        return problem_response(
            request_id_of(request),
            status=416,
            code="range_not_satisfiable",
            detail=f"Range {request.headers['range']!r} lies outside the {content.size} bytes",
            headers={"Content-Range": f"bytes */{content.size}", "Accept-Ranges": "bytes"},
        )
    start, stop = wanted or (0, content.size)
    headers["Content-Length"] = str(stop - start)
    if wanted is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
    status = 206 if wanted is not None else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=content.media_type)
    return StreamingResponse(
        content.read(start, stop), status_code=status, headers=headers, media_type=content.media_type
    )


def _wanted(request: Request, content: Content) -> tuple[int, int] | None:
    if request.method != "GET":
        return None  # Range means something for GET only
    condition = request.headers.get("if-range")
    if condition is not None and condition != content.etag:
        return None  # another version, or a date, which we give none of
    return parse(request.headers.get("range"), content.size)


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    return header.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in header.split(","))
