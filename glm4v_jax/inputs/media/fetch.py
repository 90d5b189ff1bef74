"""Bytes of an image or video from wherever they are: a path, a file or http(s) URL, or base64 text."""

import base64
import binascii
import contextlib
import http.client
import os
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4v_jax.errors import MediaError, not_there
from glm4v_jax.inputs.media.hosts import AllowedHosts, normalised

if TYPE_CHECKING:
    import urllib3

MAX_DOWNLOAD_BYTES = 2**30
# An image of more bytes than this would pass the limit of pixels as well, unless it is a bomb.
MAX_IMAGE_BYTES = 2**28
DOWNLOAD_SECONDS = 60.0
_CHUNK_BYTES = 2**16
_MAX_REDIRECTS = 10
_HEADERS = {"User-Agent": "glm4v_jax", "Accept-Encoding": "identity"}
# No system takes a longer path, so longer text was not meant as one.
_LONGEST_PATH = 4096
_ADDRESS = re.compile(r"(https?|file)://|data:", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+\Z")


def read_url(
    url: str,
    *,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
    timeout: float = DOWNLOAD_SECONDS,
    hosts: AllowedHosts | None = None,
    name: str | None = None,
) -> bytes:
    """Download an http or https address.

    Addresses may be written as people see them, with spaces and letters of any script; proxies and certificates are
    those of the system.

    Args:
        url: the address.
        max_bytes: largest body accepted, announced or received, compressed or not.
        timeout: seconds for connecting, for each wait, and for the body as a whole.
        hosts: for addresses of strangers. The address and those it is redirected to must name one of these hosts,
            without a user; each is looked up once, and what is connected to is what was checked, never a proxy.
        name: what to call the address in errors, which then say nothing of it.

    Raises:
        MediaError: the server is unreachable, answers with an error, redirects elsewhere than to http(s), or passes a
            limit; or the address is not allowed.
    """
    import urllib3

    deadline = time.monotonic() + timeout
    address, named = url.strip(), url if name is None else name
    try:
        for _ in range(_MAX_REDIRECTS + 1):
            with _answered(address, hosts, deadline) as response:
                target = response.get_redirect_location()
                if not target:
                    return _body(response, named, max_bytes, timeout, deadline)
            address = _redirected(address, target, named)
        raise MediaError(f"{named}: found more than {_MAX_REDIRECTS} redirects; expected a file")
    except _RefusedError as error:
        raise MediaError(f"{named}: {error}") from error
    except MediaError:
        raise
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        # An unreachable host is a timeout too, to this client.
        is_late = isinstance(error, urllib3.exceptions.TimeoutError | TimeoutError)
        if is_late and not isinstance(error, urllib3.exceptions.NewConnectionError):
            raise MediaError(f"{named}: found no answer within {timeout:g} seconds; expected a file") from error
        reason = re.sub(r"^\w+\(.*?\): ", "", str(error.args[-1] if error.args else error))
        is_damaged = isinstance(error, urllib3.exceptions.DecodeError)
        found = "a body that does not decompress" if is_damaged else "an unreachable address"
        details = f" ({reason})" if name is None else ""
        raise MediaError(f"{named}: found {found}{details}; expected a file") from error


class _RefusedError(MediaError):
    """An address that is not allowed; the message does not name it."""


@contextlib.contextmanager
def _answered(address: str, hosts: AllowedHosts | None, deadline: float) -> Iterator["urllib3.BaseHTTPResponse"]:
    """The answer to one request, with its body still to be read."""
    import urllib3

    clients: Sequence[tuple[urllib3.PoolManager | urllib3.HTTPConnectionPool, str]]
    clients = [(_client(address), address)] if hosts is None else _pinned_clients(address, hosts, deadline)
    for index, (client, target) in enumerate(clients):
        with client:
            try:
                # The client would read the body of a redirect to its end before it follows.
                response = client.request(
                    "GET", target, timeout=max(deadline - time.monotonic(), 0.01), retries=False, redirect=False,
                    preload_content=False, enforce_content_length=False,
                )  # fmt: skip
            except urllib3.exceptions.NewConnectionError:
                if index == len(clients) - 1:
                    raise
                continue
            try:
                yield response
            finally:
                response.close()
            return


def _client(address: str) -> "urllib3.PoolManager":
    """A client for one request, through the proxy that the environment names for the address, if it names one."""
    import urllib3

    parts = urllib3.util.parse_url(address)
    headers = dict(_HEADERS)
    if parts.auth:
        headers |= urllib3.make_headers(basic_auth=urllib.parse.unquote(parts.auth))
    proxy = urllib.request.getproxies().get(parts.scheme or "")
    if not proxy or urllib.request.proxy_bypass(parts.netloc or ""):
        return urllib3.PoolManager(headers=headers)
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    auth = urllib3.util.parse_url(proxy).auth
    credentials = urllib3.make_headers(proxy_basic_auth=urllib.parse.unquote(auth)) if auth else None
    return urllib3.ProxyManager(proxy, headers=headers, proxy_headers=credentials)


def _pinned_clients(
    address: str, hosts: AllowedHosts, deadline: float
) -> list[tuple["urllib3.HTTPConnectionPool", str]]:
    """Clients that connect to the IP addresses of an allowed host, the next if one does not answer, and their target.

    Raises:
        _RefusedError: the address is not allowed.
    """
    import urllib3

    parts = urllib3.util.parse_url(address)
    if parts.scheme not in ("http", "https") or not parts.host:
        raise _RefusedError("found another kind of address; expected http or https")
    if parts.auth is not None:
        raise _RefusedError("found an address with a user; expected one without")
    is_secure = parts.scheme == "https"
    port = parts.port or (443 if is_secure else 80)
    try:
        found = hosts.addresses(parts.host, port, max(deadline - time.monotonic(), 0.01))
    except MediaError as error:
        raise _RefusedError(str(error)) from error
    headers = {**_HEADERS, "Host": parts.netloc or ""}
    host = normalised(parts.host)
    clients: list[urllib3.HTTPConnectionPool] = [
        # The certificate is to be that of the name.
        urllib3.HTTPSConnectionPool(ip, port, headers=headers, server_hostname=host, assert_hostname=host)
        if is_secure
        else urllib3.HTTPConnectionPool(ip, port, headers=headers)
        for ip in found
    ]
    return [(client, parts.request_uri) for client in clients]


def _redirected(address: str, target: str, name: str) -> str:
    """The address that a redirect leads to; MediaError if it is neither http nor https."""
    with contextlib.suppress(UnicodeError):
        # Servers send bytes of UTF-8, which headers are not decoded as.
        target = target.encode("latin-1").decode()
    scheme = urllib.parse.urlsplit(target).scheme.lower()
    if scheme not in ("", "http", "https"):
        raise MediaError(f"{name}: found a redirect to {scheme[:20]!r}; expected an http or https address")
    return urllib.parse.urljoin(address, target)


def _body(response: "urllib3.BaseHTTPResponse", name: str, max_bytes: int, timeout: float, deadline: float) -> bytes:
    """The body of an answer, decompressed, within the limits.

    Raises:
        MediaError: the answer is an error or is compressed in an unknown way, or the body passes a limit.
    """
    if not 200 <= response.status < 300:
        # In our words: what a server says may name whatever it likes.
        phrase = http.client.responses.get(response.status, "")
        raise MediaError(f"{name}: found the status {f'{response.status} {phrase}'.strip()}; expected a file")
    encodings = [name.strip() for name in response.headers.get("Content-Encoding", "").lower().split(",")]
    unknown = [name for name in encodings if name not in ("", "identity", *response.CONTENT_DECODERS)]
    if unknown:
        known = ", ".join(response.CONTENT_DECODERS)
        raise MediaError(f"{name}: found the content encoding {unknown[0][:20]!r}; expected none, or one of {known}")
    announced = response.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise MediaError(f"{name}: found {announced} bytes; expected at most {max_bytes}")
    body = bytearray()
    # read1() returns after one receive, so that a server which drips bytes meets the deadline; and it decompresses no
    # more than it returns, so that a bomb meets the limit.
    while chunk := response.read1(_CHUNK_BYTES, decode_content=True):
        body += chunk
        if len(body) > max_bytes:
            raise MediaError(f"{name}: found more than {max_bytes} bytes; expected no more")
        if time.monotonic() > deadline:
            raise MediaError(f"{name}: found {len(body)} bytes within {timeout:g} seconds; expected the whole file")
    if announced.isdigit() and response.tell() < int(announced):
        raise MediaError(f"{name}: found the end after {response.tell()} bytes; expected {announced} bytes")
    return bytes(body)


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
        raise MediaError(not_there(name, "a path, an http(s) address, a data URL or base64 text"))
    payload = payload.rstrip("= \t\r\n")
    try:
        return base64.b64decode(payload + "=" * (-len("".join(payload.split())) % 4))
    except (binascii.Error, ValueError) as error:
        found = "no such file, nor valid base64" if is_missing_path(text) else "invalid base64"
        raise MediaError(f"{name}: found {found} ({error}); expected a file or its base64") from error


def file_url_path(url: str) -> Path:
    """The local path of a `file://` address; MediaError if the address is malformed or names another machine."""
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
    """Resolve a source, a path, `file://` or http(s) address, data URL, base64 text, or bytes, to a path or to bytes.

    MediaError, which names it, if it cannot be found, fetched or decoded, or passes the limit of a download or a pipe.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, os.PathLike):
        path = Path(source)
        if not path.exists():
            raise MediaError(not_there(path, "an image or a video"))
        return _read_once(path, max_bytes)
    if is_url(source):
        return read_url(source, max_bytes=max_bytes)
    if source.lower().startswith("file://"):
        return open_source(file_url_path(source), max_bytes=max_bytes)
    try:
        if os.path.exists(source):
            return _read_once(Path(source), max_bytes)
    except ValueError:  # A path cannot hold a null character; base64 text neither, so the check below names it.
        pass
    if _SCHEME.match(source):
        raise MediaError(f"{describe(source)}: found another scheme; expected http, https, file or data")
    return decode_base64(source)


def _read_once(path: Path, max_bytes: int) -> Path | bytes:
    """A path, or the content of a pipe, which cannot be read again from its beginning."""
    if not path.is_fifo():
        return path
    with path.open("rb") as pipe:
        content = pipe.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise MediaError(f"{path}: found more than {max_bytes} bytes; expected no more")
    return content


def describe(source: Any) -> str:
    """A short name of a source for error messages: long text is cut, bytes and objects are named by kind."""
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    if isinstance(source, str):
        return source if len(source) <= 200 else f"{source[:40]}... ({len(source)} characters)"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    return f"{type(source).__name__} object"
