"""The chat page: plain files that a browser runs as they are, without a build step or an outside address.

- `index.html`, `style.css`: what is there, and how it looks.
- `app.js`: the composer, the conversation, and the way of a question to its answer. `exchange.js`: one question with
  its answer.
- `api.js`: requests and streams. `media.js`: files, and boxes over images. `markdown.js`: answers as elements.
- `settings.js`, `preview.js`: the dialogs. `announce.js`: what a screen reader reads out. `elements.js`: helpers.
"""

from pathlib import Path

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
