"""A server as a process, and clients that put load on it: closed loops, open loops, streams that are timed."""

import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import pathlib
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx2
import msgspec
import PIL.Image

from bench import report

START_SECONDS = 1800.0
"""What a server may take until it is ready: it compiles."""
Body = dict[str, Any]
_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: %s:%d\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


class Answer(NamedTuple):
    """What a client got.

    Attributes:
      status: of HTTP; 0 where the client left first, or the connection broke.
      text: thought and answer.
      tokens: as the server counts them.
      first: seconds until the first text.
      gaps: seconds between two pieces of text.
      seconds: until the end.
      error: the server's message.
    """

    status: int
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    first: float = 0.0
    gaps: tuple[float, ...] = ()
    seconds: float = 0.0
    error: str = ""


class Client:
    """Sends chats to a server and times the answers.

    Streams are read from sockets: clients share the machine's cores with the server, and httpx takes as long for a
    request as the server's event loop does.
    """

    def __init__(self, url: str):
        """`url`: of the server."""
        address = urllib.parse.urlsplit(url)
        self._host, self._port = str(address.hostname), address.port
        self._idle = list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
        self._http = httpx2.AsyncClient(
            base_url=url,
            timeout=START_SECONDS,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def __aenter__(self) -> "Client":
        """Open nothing yet."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()
        await self._http.aclose()

    async def chat(
        self, body: Mapping[str, Any], *, leave_after: int | None = None, begun: Callable[[], None] | None = None
    ) -> Answer:
        """Send a chat and read the answer as a stream, which is closed after `leave_after` pieces of text.

        `begun` is called with the first.
        """
        since = time.perf_counter()
        content = msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}})
        texts, times = list[str](), list[float]()
        tokens, reason, is_whole = 0, None, False
        try:
            reader, writer = await self._connection()
        except OSError as error:
            return Answer(0, error=repr(error))
        try:
            async with asyncio.timeout(START_SECONDS):
                writer.write(_HEAD % (self._host.encode(), self._port, len(content)) + content)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if (status := int(head.split(b" ", 2)[1])) != 200:
                    [length] = (line[15:] for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
                    return Answer(status, error=_message(await reader.readexactly(int(length))))
                async for event in _events(reader):
                    chunk = msgspec.json.decode(event)
                    if "error" in chunk:
                        return Answer(500, "".join(texts), error=chunk["error"]["message"])
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                    for choice in chunk["choices"]:
                        reason = choice.get("finish_reason") or reason
                        delta = choice["delta"]
                        if text := (delta.get("reasoning_content") or "") + (delta.get("content") or ""):
                            texts.append(text)
                            times.append(time.perf_counter())
                            if len(times) == 1 and begun is not None:
                                begun()
                    if leave_after is not None and len(texts) > leave_after:
                        return Answer(0, "".join(texts))
                is_whole = True
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            return Answer(0, "".join(texts), error=repr(error))
        finally:
            if is_whole:
                self._idle.append((reader, writer))
            else:
                writer.close()
        ended = time.perf_counter()
        first = (times[0] if times else ended) - since
        gaps = tuple(later - sooner for sooner, later in itertools.pairwise(times))
        return Answer(200, "".join(texts), tokens, reason, first, gaps, ended - since)

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One that is idle, or a new one."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port, limit=2**22)

    async def send(self, body: Mapping[str, Any] | bytes) -> Answer:
        """Send a chat, or bytes in the place of one, and wait for the whole answer."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        begun = time.perf_counter()
        headers = {"content-type": "application/json"}
        response = await self._http.post("/v1/chat/completions", content=content, headers=headers)
        if response.status_code != 200:
            return Answer(response.status_code, error=_message(response.content))
        found = response.json()
        message, seconds = found["choices"][0]["message"], time.perf_counter() - begun
        text = (message.get("reasoning_content") or "") + (message.get("content") or "")
        tokens, reason = found["usage"]["completion_tokens"], found["choices"][0]["finish_reason"]
        return Answer(200, text, tokens, reason, seconds, (), seconds)

    async def metrics(self) -> dict[str, float]:
        """Name -> value, of all labels together."""
        return read_metrics((await self._http.get("/metrics")).text)


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of the events in a body that comes in chunks, the last one `[DONE]` left out."""
    rest = b""
    while size := int(await reader.readline(), 16):
        *events, rest = (rest + (await reader.readexactly(size + 2))[:-2]).split(b"\n\n")
        for event in events:
            if event != b"data: [DONE]":
                yield event.removeprefix(b"data: ")
    await reader.readexactly(2)


def read_metrics(text: str) -> dict[str, float]:
    r"""Name without labels -> the sum of its values; without the buckets of histograms and times of creation.

    >>> read_metrics('# HELP a\na{x="1"} 2.0\na{x="2"} 3\n')
    {'a': 5.0}
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, value = line.split("{", 1)[0].split(" ", 1)[0], line.rsplit(" ", 1)[-1]
        if line and not line.startswith("#") and not name.endswith(("_bucket", "_created")):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")[:200]


async def closed_loop(client: Client, bodies: Sequence[Body], concurrency: int) -> tuple[list[Answer], float]:
    """Have this many clients each send one request after the other; returns the answers, in order, and the seconds."""
    answers: dict[int, Answer] = {}
    work = iter(enumerate(bodies))

    async def loop() -> None:
        for i, body in work:
            answers[i] = await client.chat(body)

    begun = time.perf_counter()
    await asyncio.gather(*(loop() for _ in range(concurrency)))
    return [answers[i] for i in range(len(bodies))], time.perf_counter() - begun


async def open_loop(
    client: Client, bodies: Sequence[Body], per_second: float, seed: int = 0
) -> tuple[list[Answer], float]:
    """Send at random times (a Poisson process), whether or not answers have come."""
    rng, begun = random.Random(seed), time.perf_counter()
    sent = []
    for body in bodies:
        sent.append(asyncio.create_task(client.chat(body)))
        await asyncio.sleep(rng.expovariate(per_second))
    return list(await asyncio.gather(*sent)), time.perf_counter() - begun


def gaps_after_all_began(answers: Sequence[Answer]) -> list[float]:
    """Seconds between two pieces of text of answers asked for at the same time, from when each of them has begun.

    >>> gaps_after_all_began([Answer(200, first=1.0, gaps=(0.5, 2.0, 0.25)), Answer(200, first=2.0, gaps=(0.25,))])
    [0.25, 0.25]
    """
    begun = max((answer.first for answer in answers), default=0.0)
    return [
        gap
        for answer in answers
        for gap, since in zip(answer.gaps, itertools.accumulate((answer.first, *answer.gaps)), strict=False)
        if since >= begun
    ]


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds; the nearest value above, so that few values give the largest.

    >>> quantiles([0.001, 0.002, 0.5])
    {'p50': 2.0, 'p99': 500.0}
    """
    ordered = sorted(seconds) or [float("nan")]
    return {f"p{percent}": 1e3 * ordered[max(0, -(-len(ordered) * percent // 100) - 1)] for percent in (50, 99)}


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Of the answers of a loop."""
    wrong = [answer for answer in answers if answer.status != 200]
    return {
        "requests": len(answers),
        "failed": len(wrong),
        "requests_per_second": len(answers) / seconds,
        "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
        "first_ms": quantiles([answer.first for answer in answers if answer.status == 200]),
        "between_ms": quantiles([gap for answer in answers for gap in answer.gaps]),
        "errors": sorted({answer.error for answer in wrong})[:3],
    }


class Server:
    """A server that runs as a process, from its start until the block ends."""

    def __init__(self, command: Sequence[str], log: pathlib.Path, port: int, **environment: str):
        """Start it; see `ready`."""
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self._file = log.open("wb")
        self.process = subprocess.Popen(
            command, cwd=report.ROOT, stdout=self._file, stderr=subprocess.STDOUT, env=os.environ | environment
        )

    def __enter__(self) -> "Server":
        """Wait until it is ready."""
        self.ready()
        return self

    def __exit__(self, *error: object) -> None:
        """End it, and wait for that."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._file.close()

    def ready(self) -> float:
        """Wait until it is ready; returns the seconds; SystemExit if it ended, or takes too long."""
        begun = time.perf_counter()
        while time.perf_counter() - begun < START_SECONDS:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(self.url + "/health"):
                return time.perf_counter() - begun
            time.sleep(0.1)
        self.process.kill()
        said = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        raise SystemExit(f"the server did not start:\n{said[-2000:]}")

    def resident_bytes(self) -> int:
        """Of the process, as Linux counts."""
        pages = pathlib.Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def logged(self, text: str) -> int:
        """How often the log has a text so far."""
        return self.log.read_text(encoding="utf-8", errors="replace").count(text)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def serve(
    directory: pathlib.Path, log: pathlib.Path, *options: object, main: str = "glm4v_jax", **environment: str
) -> Server:
    """`glm4v serve` for a checkpoint."""
    port = free_port()
    command = [sys.executable, "-m", main, "serve", "--model", directory, "--port", port, *options]
    return Server(list(map(str, command)), log, port, **environment)


def data_url(image: PIL.Image.Image) -> str:
    """An image as a PNG in a URL."""
    png = io.BytesIO()
    image.save(png, "png")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def message(text: str, *images: str) -> dict[str, Any]:
    """A user's message."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def run(work: Callable[[Client], Awaitable[Any]], server: Server) -> Any:
    """Run a client's work against a server."""

    async def main() -> Any:
        async with Client(server.url) as client:
            return await work(client)

    return asyncio.run(main())


def median_first(answers: Sequence[Answer]) -> float:
    """Milliseconds to the first text."""
    return 1e3 * statistics.median(answer.first for answer in answers)
