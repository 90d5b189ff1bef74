"""A server of good and bad answers, an image file, and a clip."""

import base64
import gzip
import http.server
import pathlib
import threading
import time
import urllib.parse

import numpy as np
import pytest
from helpers_media import NAMED, PHOTO, PNG

REDIRECTS = {
    "/to/good": "/good",
    "/to/file": "file:///etc/hostname",
    # Headers are written as Latin-1: these are the bytes of UTF-8.
    "/to/named": NAMED.encode().decode("latin-1"),
}
ENCODED = {
    "/gzip": ("gzip", gzip.compress(PNG)),
    "/bomb": ("gzip", gzip.compress(bytes(10**7))),
    "/unzipped": ("gzip", PNG),
    "/unknown": ("morse", PNG),
}


class Server(http.server.BaseHTTPRequestHandler):
    """Good and bad behaviour, by path."""

    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404, "gone")
            return
        if (
            self.path == "/private"
            and self.headers["Authorization"] != f"Basic {base64.b64encode(b'me:p@ss').decode()}"
        ):
            self.send_error(401)
            return
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", REDIRECTS.get(self.path, self.path))
            self.end_headers()
            return
        body = {"/good": PNG, "/html": b"<html>no image</html>", "/short": PNG, "/private": PNG, NAMED: PNG}.get(
            urllib.parse.unquote(self.path), b""
        )
        if self.path.startswith("http://"):
            body = b"by proxy"
        if self.path.startswith("/file/"):
            body = pathlib.Path(self.path.removeprefix("/file")).read_bytes()
        self.send_response(200)
        if self.path == "/huge":
            self.send_header("Content-Length", str(10**9))
        elif self.path == "/short":
            self.send_header("Content-Length", str(len(PNG) + 10))
        elif self.path in ENCODED:
            encoding, body = ENCODED[self.path]
            self.send_header("Content-Encoding", encoding)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(b"x" * 65536)
            if self.path == "/drip":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            if self.path == "/silent":
                time.sleep(1.0)
            self.wfile.write(body)
        except OSError:  # The client hung up, which is what most of these paths are for.
            pass

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a photo.png"
    path.write_bytes(PNG)
    return path


@pytest.fixture(scope="module")
def clip():
    return np.stack([np.roll(np.kron(PHOTO[:8, :8], np.ones((8, 8, 1), np.uint8)), 3 * i, axis=1) for i in range(20)])
