"""Every error that goes over the wire, in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse
from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error's form."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that gets no picture, and why; `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """The answer as clients of the API expect it."""
        detail = ErrorDetail(
            message=self.message, type=_kind(self.status), param=self.param, code=self.code
        )
        body = ErrorAnswer(error=detail).model_dump()
        return JSONResponse(body, status_code=self.status, headers=self.headers)


def _kind(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
