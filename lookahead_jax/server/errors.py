"""Errors that end a request."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

RETRY = {"Retry-After": "1"}
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Refused(Exception):
    """Ends a request with an error, whose status and body are as OpenAI's clients expect them."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self._param = param
        self._headers = headers

    def copy(self) -> "Refused":
        """An equal error. One that is raised twice would keep the frames of both tracebacks."""
        return Refused(
            self.status, str(self), code=self.code, param=self._param, headers=self._headers
        )

    @property
    def body(self) -> dict[str, Any]:
        """The error object; a stream that fails sends it as its last event."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, kind),
                "param": self._param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The error as a whole answer."""
        return JSONResponse(self.body, self.status, self._headers)


class Gone(Exception):
    """The client has left: no answer is sent."""
