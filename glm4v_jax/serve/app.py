"""The server as an ASGI application: a table of routes, the key, and what starts and ends with it."""

import contextlib
import dataclasses
import hmac
import logging
import re
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4v_jax.errors import Glm4vError
from glm4v_jax.serve import endpoints, page
from glm4v_jax.serve.errors import ApiError, client_error, is_plain
from glm4v_jax.serve.limits import RequestLimits
from glm4v_jax.serve.sending import JsonResponse
from glm4v_jax.serve.service import Service

logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclasses.dataclass(frozen=True)
class ApiRoute:
    """One row of the table of routes.

    Attributes:
      path: of the URL.
      endpoint: what answers.
      method: of HTTP.
      is_public: whether it is answered without a key.
    """

    path: str
    endpoint: Endpoint
    method: str = "GET"
    is_public: bool = False


async def _page(request: Request) -> Response:
    path = page.FILES[request.url.path]
    return FileResponse(path, media_type=page.TYPES[path.suffix], headers=page.HEADERS)


ROUTES = (
    ApiRoute("/v1/chat/completions", endpoints.chat, "POST"),
    ApiRoute("/v1/completions", endpoints.text, "POST"),
    ApiRoute("/v1/preview", endpoints.preview, "POST"),
    ApiRoute("/v1/models", endpoints.models),
    ApiRoute("/v1/models/{name:path}", endpoints.model),
    ApiRoute("/tokenize", endpoints.tokenize, "POST"),
    ApiRoute("/metrics", endpoints.metrics),
    ApiRoute("/version", endpoints.version),
    ApiRoute("/health", endpoints.health, is_public=True),
    ApiRoute("/page.json", endpoints.page_info, is_public=True),
    ApiRoute("/ping", endpoints.health, is_public=True),
    *(ApiRoute(path, _page, is_public=True) for path in page.FILES),
)
"""What the server answers."""

PUBLIC = frozenset(place.path for place in ROUTES if place.is_public)


def create_app(service: Service) -> Starlette:
    """Create the application; the service starts and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = Starlette(
        routes=[Route(place.path, place.endpoint, methods=[place.method]) for place in ROUTES],
        middleware=[
            Middleware(AccessLog, service=service),
            Middleware(RequestLimits, max_body_bytes=service.settings.max_body_bytes, hosts=service.settings.hosts),
            Middleware(Key, api_key=service.settings.api_key),
        ],
        exception_handlers={ApiError: _refused, Glm4vError: _refused, HTTPException: _refused},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


async def _refused(request: Request, error: Exception) -> Response:
    return error_response(_as_api_error(request, error))


def _as_api_error(request: Request, error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Glm4vError):
        return client_error(error)
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {})["Allow"]
        found = request.method if is_plain(request.method) else "another method"
        return ApiError(
            405,
            f"method: found {found}; expected {' or '.join(sorted(allowed.split(', ')))}",
            headers={"Allow": allowed},
        )
    if error.status_code == 404:
        found = request.url.path if is_plain(request.url.path) else "another path"
        paths = ", ".join(place.path for place in ROUTES if place.path not in page.FILES)
        return ApiError(404, f"path: found {found}; expected one of /, {paths}", code="unknown_path")
    return ApiError(error.status_code, f"request: found {error.detail}; expected a valid one")


def error_response(error: ApiError) -> Response:
    """The response to a request that is refused."""
    return JsonResponse(error.body(), error.status, error.headers)


class AccessLog:
    """Middleware that logs and counts each response, and answers what nobody else has caught.

    The log has neither queries nor bodies: these hold addresses and data of users.
    """

    def __init__(self, app: ASGIApp, service: Service):
        """See `create_app`."""
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        since, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            status = status or 499
        except Exception:
            _log_exception()
            if status:
                raise
            await error_response(ApiError(500, "server: found an error; expected none"))(scope, receive, noting)
        finally:
            is_public = scope["path"] in PUBLIC
            if not (is_public and status == 503):  # a probe that asks whether the server is ready
                self._service.metrics.answered(status)
            if not is_public:
                path, seconds = _printable(scope["path"]), time.perf_counter() - since
                logger.info("%s %s %s %.3f s", scope["method"], path, status, seconds)


class Key:
    """Middleware that lets only those in who have the key."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        """`api_key`: None lets everybody in."""
        self._app, self._key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        error = self._error(Headers(scope=scope)) if scope["type"] == "http" and scope["path"] not in PUBLIC else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _error(self, headers: Headers) -> ApiError | None:
        if self._key is None:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key.encode()):
            return None
        found = "no key" if not given else "another key" if scheme.lower() == "bearer" else "a scheme other than Bearer"
        return ApiError(
            401,
            f"authorization: found {found}; expected `Authorization: Bearer KEY` with the key of this server",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _log_exception() -> None:
    """Log where the present exception, a bug, comes from, and nothing of what clients have sent."""
    error = sys.exception()
    frames = traceback.extract_tb(error.__traceback__)[-6:] if error is not None else []
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    logger.error("server: %s at %s", type(error).__name__, places)


def _printable(path: str) -> str:
    return re.sub(r"[^\w./{}-]", "?", path)[:80]
