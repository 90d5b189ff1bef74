"""The errors that a client sees, in the form of OpenAI's interface."""

from collections.abc import Mapping
from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An error that is answered with a status and an object that says what is wrong.

    >>> error = ApiError(400, "temperature: found -1; expected a finite number of at least 0", param="temperature")
    >>> error.body()["error"]["type"], error.body()["error"]["param"]
    ('invalid_request_error', 'temperature')

    Attributes:
      status: of HTTP.
      message: what was found, and what was expected; never an address or data of the request.
      type: the kind of error; by default that of the status.
      param: the field of the request that it is about.
      code: a short name of the error, for programs.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The body of the response, as OpenAI's clients read it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
