"""What a client is told when something is wrong: the API's own error object.

{"error": {"message": …, "type": …, "param": the field's name or null, "code": … or null}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from lora_drop_runtime.errors import InputError, LoraDropError

WRONG, SERVER = "invalid_request_error", "server_error"  # types


def _writable(text: str) -> str:
    """What a client has sent may hold halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode()


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people, one paragraph.
        param: the field of the request that is wrong.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        message, param = _writable(message), None if param is None else _writable(param)
        self.status, self.headers = status, dict(headers or {})
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, WRONG if status < 500 else SERVER)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def reason(self) -> bytes:
        """Of the status, as HTTP's first line has it."""
        return HTTPStatus(self.status).phrase.encode()


def _sentences(*parts: str) -> str:
    return " ".join(part if part.endswith((".", "!", "?")) else f"{part}." for part in parts if part)


def refused(error: LoraDropError, param: str | None = None, code: str | None = None) -> ApiError:
    """What the runtime refuses, as an error of the request."""
    hint = "" if "--" in error.hint else error.hint  # those that name an option are for commands
    return ApiError(400, _sentences(error.fact, error.note, hint), param=param, code=code)


def unavailable(error: LoraDropError) -> ApiError:
    """What the machine lacks for this request alone; the others go on."""
    said = _sentences(error.fact, error.note)
    return ApiError(503, said, code="unavailable", headers={"Retry-After": "5"})


def closing() -> ApiError:
    return ApiError(503, "The server is closing.", code="closing", headers={"Retry-After": "5"})


def queue_full(rows: int, most: int) -> ApiError:
    message = f"The queue is full: {rows} more would be beyond the {most} that may run and wait. Try again later."
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def malformed() -> ApiError:
    return ApiError(400, "The request is no HTTP, or its head is too long.", code="malformed")


def too_slow(part: str, seconds: float) -> ApiError:
    """`part` of a request did not come in time."""
    said = f"The {part} of the request did not come within {seconds:g} s."
    return ApiError(408, said, code="too_slow", headers={"Connection": "close"})


def row_failed(error: BaseException | None, param: str | None) -> ApiError:
    """A row that the engine could not go on with, or whose schema, that of the field `param`, led beyond a limit; the
    others go on."""
    if isinstance(error, InputError):
        return refused(error, param)
    said = error.fact if isinstance(error, LoraDropError) else "The tokens of this request could not be computed."
    return ApiError(500, said, code="failed")


def engine_failed(error: BaseException) -> ApiError:
    said = error.fact if isinstance(error, LoraDropError) else f"The engine has failed ({type(error).__name__})."
    return ApiError(503, said, code="engine_failed")


def stalled() -> ApiError:
    return ApiError(503, "A step of the engine does not come to its end.", code="stalled")


_OBJECT = "it has to be an object"
_SAID = {"model_type": _OBJECT, "model_attributes_type": _OBJECT}  # in place of pydantic's own words


_PYDANTICS = re.compile(r"\[|^constrained-")  # its own names in places of errors


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that pydantic found wrong with a body."""
    error = errors[0]
    place = [part for part in map(str, error["loc"]) if part != "body" and not _PYDANTICS.search(part)]
    for form in (["response_format"], ["text", "format"]):
        if place[: len(form)] == form and len(place) > len(form) + 1:
            del place[len(form)]  # its type, which the formats are told apart by
    if error["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON: {error.get('ctx', {}).get('error', error['msg'])}.", code="json")
    param = error.get("ctx", {}).get("param") or (place[0] if place else None)
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"There is no parameter {'.'.join(place)!r:.80}.", param=param, code="unknown_parameter")
    if not place and not error.get("ctx"):
        needed = "It has to be a JSON object with text as keys, sent with Content-Type: application/json."
        said = _SAID.get(error["type"], error["msg"])
        return ApiError(400, f"The body cannot be read: {said}. {needed}")
    said = _SAID.get(error["type"], error["msg"].removeprefix("Value error, "))
    return ApiError(400, f"{'.'.join(place) or param or 'The body'}: {said}."[:500], param=param, code=error["type"])
