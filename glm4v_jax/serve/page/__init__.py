"""The chat page: plain files that a browser runs as they are, without a build step or an outside address.

- `index.html`, `style.css`: what is there, and how it looks.
- `app.js`: the composer, the conversation, and the way of a question to its answer. `exchange.js`: one question with
  its answer.
- `api.js`: requests and streams. `media.js`: files, and boxes over images. `markdown.js`: answers as elements.
- `settings.js`, `preview.js`: the dialogs. `announce.js`: what a screen reader reads out. `elements.js`: helpers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4v_jax.config.presets import PRESETS, Preset
from glm4v_jax.serve.requests import DIRECT
from glm4v_jax.serve.service import ServeSettings

FOLDER = Path(__file__).parent

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".png": "image/png"}

FILES = {
    f"/{path.name}" if path.name != "index.html" else "/": path
    for path in sorted(FOLDER.iterdir())
    if path.suffix in TYPES
}
"""Path of a URL -> file."""

# Scripts, styles and requests are this server's; images and videos are those that the user chose, or drawings of
# `/v1/preview`. No text can become markup: Trusted Types refuse the functions that would do it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)

HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""Of every file of the page."""

EXAMPLE = "Locate the 2."
"""What the page offers to ask about `example.png`, where the model knows digits."""

_BESIDE_FILES = 2**17
"""Bytes of a request that are left for everything but files; these take 4 bytes for 3, as base64."""

_FIELDS = {
    **{option: field for field, option in DIRECT.items()},
    **{name: name for name in ("temperature", "top_k", "answer_budget")},
    "think_budget": "thinking_token_budget",
}
"""Option of a preset -> field of a request. The limit of all tokens is left to the server, which knows its room."""


def info(settings: ServeSettings) -> dict[str, Any]:
    """What the page asks the server for: presets, limits of files, and the example where it is one.

    >>> found = info(ServeSettings(model="tiny", is_tiny=True))
    >>> found["presets"][-1]["name"], found["presets"][-1]["options"], found["limits"]["images"]
    ('greedy', {'temperature': 0}, 8)
    """
    presets = [
        {"name": name, "description": preset.description, "options": _fields(preset)}
        for name, preset in PRESETS.items()
    ]
    media, room = settings.media, settings.max_body_bytes - _BESIDE_FILES
    limits = {
        "body": room,
        "bytes": min(media.max_bytes, room * 3 // 4),
        "pixels": media.max_pixels,
        "images": media.max_images,
        "videos": media.max_videos,
    }
    return {"presets": presets, "limits": limits, "example": {"text": EXAMPLE} if settings.is_tiny else None}


def _fields(preset: Preset) -> Mapping[str, Any]:
    """The fields of a request that ask for what a preset sets."""
    if not preset.options.get("do_sample", True):
        return {"temperature": 0}
    return {_FIELDS[option]: value for option, value in preset.options.items() if option in _FIELDS}
