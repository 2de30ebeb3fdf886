"""Errors in the shape that the openai client understands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def error_body(status: int, message: str) -> dict[str, Any]:
    """What the client reads, in a response or in place of an event."""
    return {"error": {"message": message, "type": KINDS.get(status, "invalid_request_error"), "code": status}}


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """A whole response."""
    # in ASCII: a message may quote half of a surrogate pair, which JSON can say and UTF-8 cannot
    return Response(json.dumps(error_body(status, message)), status, headers, media_type="application/json")
