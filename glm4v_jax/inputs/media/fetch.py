"""Bytes of an image or video from wherever they are: a path, a file or http(s) URL, or base64 text."""

import base64
import binascii
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from glm4v_jax.errors import MediaError

MAX_DOWNLOAD_BYTES = 2**30
# An image of more bytes than this would pass the limit of pixels as well, unless it is a bomb.
MAX_IMAGE_BYTES = 2**28
DOWNLOAD_SECONDS = 60.0
_CHUNK_BYTES = 2**16
_USER_AGENT = "glm4v_jax"
# No system takes a longer path, so longer text was not meant as one.
_LONGEST_PATH = 4096
_ADDRESS = re.compile(r"(https?|file)://|data:", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+\Z")


class _HttpRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http and https only; the standard handler follows ftp as well, and names no source."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = headers.get("location") or headers.get("uri") or ""
        scheme = urllib.parse.urlsplit(target).scheme.lower()
        if scheme not in ("", "http", "https"):
            raise MediaError(f"{req.full_url}: found a redirect to {target!r}; expected an http or https address")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opener() -> urllib.request.OpenerDirector:
    """An opener that knows http and https, and neither files nor ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _HttpRedirects,
    ):
        opener.add_handler(handler())
    return opener


def read_url(url: str, *, max_bytes: int = MAX_DOWNLOAD_BYTES, timeout: float = DOWNLOAD_SECONDS) -> bytes:
    """Download an http or https address.

    Args:
        url: the address.
        max_bytes: largest body accepted, announced or received.
        timeout: seconds for connecting, for each wait, and for the body as a whole.

    Raises:
        MediaError: the server is unreachable, answers with an error, redirects elsewhere than to http(s), or passes a
            limit.
    """
    deadline = time.monotonic() + timeout
    try:
        request = urllib.request.Request(url, headers={"User-Agent": _USER_AGENT})
        with _opener().open(request, timeout=timeout) as response:
            announced = response.headers.get("Content-Length")
            if announced is not None and announced.isdigit() and int(announced) > max_bytes:
                raise MediaError(f"{url}: found {announced} bytes; expected at most {max_bytes}")
            body = bytearray()
            # read1() returns after one receive, so that a server which drips bytes meets the deadline.
            while chunk := response.read1(_CHUNK_BYTES):
                body += chunk
                if len(body) > max_bytes:
                    raise MediaError(f"{url}: found more than {max_bytes} bytes; expected no more")
                if time.monotonic() > deadline:
                    raise MediaError(
                        f"{url}: found {len(body)} bytes within {timeout:g} seconds; expected the whole file"
                    )
            if announced is not None and announced.isdigit() and len(body) < int(announced):
                raise MediaError(f"{url}: found the end after {len(body)} bytes; expected {announced} bytes")
            return bytes(body)
    except urllib.error.HTTPError as error:
        raise MediaError(f"{url}: found the status {error.code} {error.reason}; expected a file") from error
    except TimeoutError as error:
        raise MediaError(f"{url}: found no answer within {timeout:g} seconds; expected a file") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise MediaError(f"{url}: found no answer within {timeout:g} seconds; expected a file") from error
        raise MediaError(f"{url}: found an unreachable address ({reason}); expected a file") from error


def is_url(source: Any) -> bool:
    """Whether `source` is text that begins like an http or https address."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def is_address(place: Any) -> bool:
    """Whether `place` is text that begins like an http, https, file or data address, in capitals or not: no path."""
    return isinstance(place, str) and _ADDRESS.match(place) is not None


def is_missing_path(source: Any) -> bool:
    """Whether `source` is text that `open_source` took for base64 and that may have been meant as a path."""
    return (
        isinstance(source, str)
        and len(source) <= _LONGEST_PATH
        and not is_address(source)
        and not _SCHEME.match(source)
        and not os.path.exists(source)
    )


def decode_base64(text: str) -> bytes:
    """Decode base64 text or a base64 data URL, as leniently as the reference (line breaks, missing padding at the end).

    Raises:
        MediaError: the text is not base64.
    """
    name = describe(text)
    if text[:5].lower() == "data:":
        header, comma, payload = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise MediaError(f"{name}: found another form; expected data:<type>;base64,<data>")
    else:
        payload = text
    if not _BASE64.match(payload):
        raise MediaError(f"{name}: found no such file; expected a path, an http(s) address, a data URL or base64 text")
    payload = payload.rstrip("= \t\r\n")
    try:
        return base64.b64decode(payload + "=" * (-len("".join(payload.split())) % 4))
    except (binascii.Error, ValueError) as error:
        found = "no such file, nor valid base64" if is_missing_path(text) else "invalid base64"
        raise MediaError(f"{name}: found {found} ({error}); expected a file or its base64") from error


def file_url_path(url: str) -> Path:
    """The local path of a `file://` address.

    Raises:
        MediaError: the address is malformed or names another machine.
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise MediaError(f"{url}: found an invalid address ({error}); expected file:///path") from error
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{url}: found the machine {parts.netloc!r}; expected a local file, file:///path")
    return Path(urllib.request.url2pathname(parts.path))


def open_source(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview, *, max_bytes: int = MAX_DOWNLOAD_BYTES
) -> Path | bytes:
    """Resolve a source to a local path or to bytes in memory.

    Args:
        source: path, `file://` or http(s) address, data URL, base64 text, or bytes.
        max_bytes: limit for a download.

    Raises:
        MediaError: the source cannot be found, fetched or decoded; the message names it.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, os.PathLike):
        path = Path(source)
        if not path.exists():
            raise MediaError(f"{path}: found no such file; expected an image or a video")
        return path
    if is_url(source):
        return read_url(source, max_bytes=max_bytes)
    if source.lower().startswith("file://"):
        return open_source(file_url_path(source))
    try:
        if os.path.exists(source):
            return Path(source)
    except ValueError:  # A path cannot hold a null character; base64 text neither, so the check below names it.
        pass
    if _SCHEME.match(source):
        raise MediaError(f"{describe(source)}: found another scheme; expected http, https, file or data")
    return decode_base64(source)


def describe(source: Any) -> str:
    """A short name of a source for error messages: long text is cut, bytes and objects are named by kind."""
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    if isinstance(source, str):
        return source if len(source) <= 200 else f"{source[:40]}... ({len(source)} characters)"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    return f"{type(source).__name__} object"
