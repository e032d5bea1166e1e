"""What every error answer looks like."""

from typing import Any

from httpx2 import Response


def problem(answer: Response, status: int, code: str) -> dict[str, Any]:
    """The body of an error answer, whose form is checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["code"] == code
    assert body["detail"]
    assert body["type"] == f"urn:temper:problem:{code}"
    assert body["request_id"] == answer.headers["x-request-id"]
    return body
