"""What answers each route."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from glm4v_jax import __version__
from glm4v_jax.serve import page
from glm4v_jax.serve.call import Call
from glm4v_jax.serve.errors import ApiError
from glm4v_jax.serve.limits import parse_body
from glm4v_jax.serve.media import has_media, resolve_item
from glm4v_jax.serve.metrics import CONTENT_TYPE
from glm4v_jax.serve.preview import preview as preview_of
from glm4v_jax.serve.requests import ApiRequest, Served, chat_request, text_request, tokenize_request
from glm4v_jax.serve.sending import EventStream, JsonResponse, unless_gone
from glm4v_jax.serve.service import SHORT_BYTES, Service

_MESSAGES = {
    "starting": "The server is starting.",
    "ready": "The server is ready.",
    "draining": "The server is ending.",
    "failed": "The engine has failed.",
    "closed": "The server has ended.",
}


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await _generate(request, chat_request)


async def text(request: Request) -> Response:
    """POST /v1/completions."""
    return await _generate(request, text_request)


async def _generate(request: Request, read: Callable[[Mapping[str, Any], Served], ApiRequest]) -> Response:
    service, since = _service(request), time.perf_counter()
    seconds = service.settings.request_timeout
    deadline = asyncio.get_running_loop().time() + seconds
    late = ApiError(
        504, f"request: found it running after {seconds:g} s; expected an answer within them", type="timeout_error"
    )

    async def call() -> Call:
        is_short = len(raw) <= SHORT_BYTES
        asked = await service.prepare(lambda: read(parse_body(raw), service.served), is_short=is_short)
        return await service.call(asked, since)

    try:
        async with asyncio.timeout_at(deadline):
            raw = await request.body()
            made = await unless_gone(request.receive, call())
            if made.reply.request.is_stream:
                return EventStream(made, deadline, late)
            completions = await unless_gone(request.receive, made.completions())
    except TimeoutError:
        raise late from None
    return JsonResponse(made.reply.body(completions))


async def tokenize(request: Request) -> Response:
    """POST /tokenize: the tokens of a prompt, or of messages with those of their images and videos."""
    service, raw = _service(request), await request.body()
    asked, variables = await service.prepare(lambda: tokenize_request(parse_body(raw), service.served))

    def tokens() -> dict[str, Any]:
        tokenizer = service.engine.processor.tokenizer
        if asked.messages is not None:
            found = service.prompt_of(asked.messages, variables).input_ids.tolist()
        else:
            service.check_length(asked.prompt)
            found = tokenizer.encode(asked.prompt or "", add_special_tokens=asked.add_special_tokens)
        strings = tokenizer.convert_ids_to_tokens(found) if asked.return_token_strs else None
        length = service.settings.max_model_len
        return {"count": len(found), "max_model_len": length, "tokens": found, "token_strs": strings}

    return JsonResponse(await service.prepare(tokens, with_media=has_media(asked.messages or ())))


async def preview(request: Request) -> Response:
    """POST /v1/preview: what the model sees of an image or a video, given as an item of a message."""
    service, raw = _service(request), await request.body()

    def seen() -> dict[str, Any]:
        settings, processor = service.settings, service.engine.processor
        item = resolve_item(parse_body(raw), settings.media, processor, settings.max_model_len)
        return preview_of(item, processor)

    return JsonResponse(await service.prepare(seen, with_media=True))


async def models(request: Request) -> Response:
    """GET /v1/models."""
    return JsonResponse({"object": "list", "data": [_model(_service(request))]})


async def model(request: Request) -> Response:
    """GET /v1/models/NAME."""
    found = _model(_service(request))
    if request.path_params["name"] != found["id"]:
        raise ApiError(404, f"model: found another; expected {found['id']!r}", param="model", code="model_not_found")
    return JsonResponse(found)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model,
        "object": "model",
        "created": service.created,
        "owned_by": "glm4v_jax",
        "root": service.settings.model,
        "parent": None,
        "max_model_len": service.settings.max_model_len,
    }


async def page_info(request: Request) -> Response:
    """GET /page.json: what the chat page has to know."""
    return JsonResponse(page.info(_service(request).settings))


async def health(request: Request) -> Response:
    """GET /health and /ping: 200 once requests are answered, and 503 before and after that."""
    service = _service(request)
    body = {"status": service.state, "message": _MESSAGES[service.state]}
    if service.state == "starting":
        body |= {"message": f"{body['message'][:-1]}: {service.progress}."}
    return JsonResponse(body, 200 if service.state == "ready" else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics."""
    return Response(_service(request).metrics.text(), headers={"content-type": CONTENT_TYPE})


async def version(request: Request) -> Response:
    """GET /version."""
    return JsonResponse({"version": __version__})


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
