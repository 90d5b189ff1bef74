"""`glm4v serve`: what is said before a model is loaded."""

import importlib.metadata
import logging
import socket
import sys

import pytest
from helpers_checkpoints import RANDOM_CHECKPOINT

from glm4v_jax.cli import main
from glm4v_jax.inputs.media.hosts import AllowedHosts
from glm4v_jax.serve import server
from glm4v_jax.serve.limits import MAX_BODY_BYTES
from glm4v_jax.serve.media import MediaPolicy


@pytest.fixture
def serve(capfd, monkeypatch):
    """Runs `glm4v serve`; returns what it prints, and the service that would have run."""
    services = []
    monkeypatch.setattr(server, "run", lambda service, listener: services.append(service))
    monkeypatch.delenv("GLM4V_API_KEY", raising=False)

    def run(*arguments, status=0):
        logger = logging.getLogger("glm4v_jax")
        before = logger.level, logger.propagate, list(logger.handlers)
        assert main.main(["serve", *arguments]) == status
        assert (logger.level, logger.propagate, logger.handlers) == before
        return capfd.readouterr().err, services[-1] if services else None

    return run


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "nowhere"], "--model: found nowhere, which is not a directory"),
        (["--host", "no.such.host.invalid"], "--host: found 'no.such.host.invalid'; expected a name or an address"),
        (["--host", "192.0.2.1"], "--host: found '192.0.2.1'"),
        (["--port", "70000"], "--port: found 70000; expected an integer from 0 to 65535"),
        (["--api-key", " "], "--api-key: found an empty one"),
        (["--preset", "greed"], "preset: found 'greed'; expected one of"),
        (["--max-model-len", "100000"], "--max-model-len: found 100000; expected at most 65536"),
        (["--max-model-len", "3"], "--max-model-len: found 3; expected an integer of at least 64"),
        (["--max-logprobs", "21"], "--max-logprobs: found 21; expected an integer from -1 to 20"),
        (["--slots", "0"], "--slots: found 0"),
        (["--max-images", "-1"], "--max-images: found -1"),
        (["--allow-media-domain", "http://x"], "--allow-media-domain: found 'http://x'; expected a host such as"),
        (["--served-model-name", ""], "--served-model-name: found an empty one; expected a name"),
        (["--mesh", "data=64"], "--mesh: mesh data=64 needs 64 devices, found"),
        (["--allow-private-media"], "--allow-private-media: found it alone"),
    ],
)
def test_what_is_wrong_is_one_line(serve, arguments, line):
    found, service = serve(*arguments, status=1)
    assert line in found and len(found.splitlines()) == 1 and service is None


def test_a_server_that_starts_is_not_said_to_serve(serve):
    (line,) = serve("--port", "0")[0].splitlines()
    assert line.startswith(f"starting {RANDOM_CHECKPOINT.name} at http://127.0.0.1:") and "/health says" in line


def test_a_port_that_is_taken(serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found, _ = serve("--port", str(port), status=1)
    assert found == f"glm4v: error: --port: found {port}, which is in use; expected a free one, or 0 for any\n"


def test_a_missing_package_is_named_with_its_extra(serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["starlette>=1.10; extra == 'serve'"])
    found, _ = serve("--port", "0", status=1)
    assert "found no package starlette" in found and "pip install 'glm4v_jax[serve]'" in found


def test_others_than_this_machine_need_a_key(serve):
    assert "found 0.0.0.0 without --api-key" in serve("--host", "0.0.0.0", "--port", "0")[0]
    assert "without" not in serve("--host", "0.0.0.0", "--port", "0", "--api-key", "secret")[0]
    assert "without" not in serve("--port", "0")[0]


def test_settings(serve, monkeypatch):
    monkeypatch.setenv("GLM4V_API_KEY", "secret")
    settings = serve("--port", "0", "--slots", "3", "--max-logprobs", "-1", "--no-warmup")[1].settings
    assert (settings.model, settings.api_key, settings.max_model_len) == (RANDOM_CHECKPOINT.name, "secret", 16_384)
    assert settings.max_logprobs is None and not settings.is_warmed
    assert serve("--port", "0", "--served-model-name", "mine")[1].settings.model == "mine"


def test_what_requests_may_send(serve):
    settings = serve("--port", "0")[1].settings
    assert settings.media == MediaPolicy() and settings.max_body_bytes == MAX_BODY_BYTES
    hosts = ("--allow-media-domain", "a.example", "--allow-media-domain", "*.b.example", "--allow-private-media")
    sizes = ("--max-body-mib", "2", "--max-images", "3", "--max-video-seconds", "9")
    settings = serve("--port", "0", *hosts, *sizes)[1].settings
    assert settings.media.hosts == AllowedHosts(("a.example", "*.b.example"), allow_private=True)
    assert (settings.media.max_images, settings.media.max_video_seconds) == (3, 9)
    assert settings.max_body_bytes == settings.media.max_bytes == 2**21
