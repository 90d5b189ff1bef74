"""The errors that a client sees, in the form of OpenAI's interface."""

import re
from collections.abc import Mapping
from typing import Any

from glm4v_jax.errors import Glm4vError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


_NAMES = {
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "max_new_tokens": "max_tokens",
    "think_budget": "thinking_token_budget",
    "sequence_bias": "logit_bias",
    "json_schema": "response_format",
    "regex": "structured_outputs.regex",
    "choices": "structured_outputs.choice",
    "input_ids": "prompt",
}
"""What errors of the engine name -> what the client has called it."""


_PLACE = re.compile(
    r"message (\d+)(?:, item (\d+))?(?:: field '(\w+)')?(?: is (['\"].*['\"])(?=, which the chat template))?", re.S
)
_REWORDED = (
    (re.compile(r" \((?:decord|pyav|pillow): .*\)", re.S), ""),  # what libraries say of a video
    (
        re.compile(r"absolute aspect ratio must be smaller than (\d+), got [\d.]+: (\d+ x \d+ pixels)"),
        r"found \2; expected sides of at most \1 to 1",
    ),
    (re.compile(r"of role ('.*?'|\".*?\")(?=, found)", re.S), "of this role"),
)
"""What errors of the processor say -> what clients read; the reference words the second."""


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


def client_error(error: Glm4vError, param: str | None = None) -> ApiError:
    """An error of the engine as one of the client, by the names of the client's fields, without what it has sent.

    Args:
      error: what the engine says.
      param: the field that it is about, where the message names none.
    """
    message = re.sub(r"^(\w+)(?=: )", lambda match: _NAMES.get(match[1], match[1]), _placed(str(error)))
    for pattern, words in _REWORDED:
        message = pattern.sub(words, message)
    name = re.match(r"[\w.]+(?=: )", message)
    return ApiError(400, without_data(message), param=name[0] if name else param)


def _placed(message: str) -> str:
    """A message about messages with the path of what it is about, as the client's JSON has it."""
    if (found := _PLACE.match(message)) is None:
        return message
    index, item, field, role = found.groups()
    path = f"messages[{index}]" + (f".content[{item}]" if item else "") + (f".{field}" if field else "")
    return path + ("" if role is None else f": found {shown(role[1:-1])}") + message[found.end() :]


def shown(value: Any) -> str:
    """A value as errors show it: what a client has sent may be long, or private.

    >>> shown(2), shown("auto"), shown([1, 2]), shown([]), shown("x" * 1000)
    ('2', "'auto'", 'a list', '[]', 'a string of 1000 characters')
    """
    if isinstance(value, str) and value and not is_plain(value):
        return f"a string of {len(value)} characters"
    if isinstance(value, dict | list) and value:
        return "an object" if isinstance(value, dict) else "a list"
    return "null" if value is None else repr(value)[:60]


def is_plain(text: str) -> bool:
    """Whether a text is a short plain word, as names of paths and types are, which an error may show.

    >>> is_plain("/v1/models"), is_plain("text/plain"), is_plain("my secret"), is_plain("http://a")
    (True, True, False, False)
    """
    return re.fullmatch(r"[A-Za-z0-9_/.-]{1,40}", text) is not None


def field_name(name: str) -> str:
    """The name of a field, as long as it looks like one."""
    return name if is_plain(name) else "a field"


def without_data(message: str) -> str:
    """A message without addresses and data of the request.

    >>> without_data("cannot read data:image/png;base64,AAAA and https://host/a?key=1")
    'cannot read (data) and (address)'
    """
    message = re.sub(r"data:[^\s'\",]*,?[^\s'\"]*", "(data)", message)
    return re.sub(r"\b(?:https?|file|ftp)://[^\s'\"]*", "(address)", message)[:2000]
