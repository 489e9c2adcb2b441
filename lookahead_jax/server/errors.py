"""What a request gets instead of an answer."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that ends with an error; status and body as OpenAI's clients expect them."""

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
        self._code = code
        self._param = param
        self._headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The error object, which is also what a stream that fails sends."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, kind),
                "param": self._param,
                "code": self._code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self._headers)


class Gone(Exception):
    """The client has left; there is nobody to answer."""
