"""`glm4v serve`: a server with OpenAI's interface and a chat page."""

import contextlib
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import tyro
from msgspec import Meta

from glm4v_jax.config.checks import Natural, NotNegative, Positive, PositiveNumber, fault
from glm4v_jax.config.presets import preset
from glm4v_jax.console.options import ModelOptions
from glm4v_jax.console.program import Options
from glm4v_jax.console.streams import losing_errors
from glm4v_jax.errors import ConfigError, naming
from glm4v_jax.tiny import TINY_CHECKPOINT

if TYPE_CHECKING:
    from glm4v_jax.serve.media import MediaPolicy

KEY = "GLM4V_API_KEY"
"""The environment variable for the key where no option names it."""

_LENGTH, _TINY_LENGTH = 16_384, 1024
_SHORTEST = 64
"""Tokens of a short question, with what the chat template adds, and of a short answer."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(kw_only=True)
class RequestOptions:
    """What requests may send."""

    max_body_mib: Annotated[Positive, tyro.conf.arg(metavar="N")] = 64
    """Size of a request at most, images and videos in it included, in MiB."""

    max_images: Annotated[Natural, tyro.conf.arg(metavar="N")] = 8
    """Images of a request at most, in all its messages; single frames count too."""

    max_videos: Annotated[Natural, tyro.conf.arg(metavar="N")] = 1
    """Videos of a request at most."""

    max_image_pixels: Annotated[Positive, tyro.conf.arg(metavar="N")] = 2**26
    """Pixels of an image, or of a frame of a video, at most; before it is decoded."""

    max_video_seconds: Annotated[PositiveNumber, tyro.conf.arg(metavar="S")] = 600.0
    """Length of a video at most."""

    allow_media_domain: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="HOST")] = ()
    """A host from which http and https addresses of images and videos are fetched, or *.HOST for all hosts below it.
    By default nothing is fetched: images and videos must be data URLs."""

    allow_private_media: bool = False
    """Fetch from --allow-media-domain at private and loopback addresses too."""

    def policy(self) -> "MediaPolicy":
        """The options for images and videos; ConfigError if one of the hosts is invalid."""
        from glm4v_jax.inputs.media.hosts import AllowedHosts
        from glm4v_jax.serve.media import MediaPolicy

        with naming("--allow-media-domain", ConfigError):
            hosts = AllowedHosts(self.allow_media_domain, self.allow_private_media)
        return MediaPolicy(
            hosts=hosts,
            max_images=self.max_images,
            max_videos=self.max_videos,
            max_bytes=self.max_body_mib * 2**20,
            max_pixels=self.max_image_pixels,
            max_video_seconds=self.max_video_seconds,
        )


@dataclasses.dataclass(kw_only=True)
class Serve(Options):
    """Answer over HTTP, with OpenAI's interface and a chat page.

    The port is open at once; GET /health says 503 until the model is loaded and compiled. SIGTERM and Ctrl-C let what
    is running finish.
    """

    host: Annotated[str, tyro.conf.arg(metavar="HOST")] = "127.0.0.1"
    """Address to listen on. By default this machine alone can connect; 0.0.0.0 is for all."""

    port: Annotated[int, Meta(ge=0, lt=2**16), tyro.conf.arg(metavar="N")] = 8000
    """Port to listen on; 0 for one that is free."""

    api_key: Annotated[
        str | None, tyro.conf.arg(metavar="KEY", help_behavior_hint="(default: $GLM4V_API_KEY, or none)")
    ] = None
    """What clients must send as a bearer token."""

    served_model_name: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: that of --model)")
    ] = None
    """The model's name for clients."""

    slots: Annotated[Positive, tyro.conf.arg(metavar="N")] = 8
    """Number of answers that are generated at a time."""

    max_model_len: Annotated[
        Annotated[int, Meta(ge=_SHORTEST)] | None,
        tyro.conf.arg(metavar="N", help_behavior_hint=f"(default: {_LENGTH}, or the model's)"),
    ] = None
    """Tokens of prompt and answer together at most; the KV cache of each slot holds as many."""

    max_waiting: Annotated[Natural, tyro.conf.arg(metavar="N")] = 64
    """Number of answers that may wait for a slot; more get status 429."""

    max_logprobs: Annotated[int, Meta(ge=-1, le=20), tyro.conf.arg(metavar="N")] = 20
    """Log probabilities that a request may ask for at each token; -1 for none, which leaves programs uncompiled."""

    request_timeout: Annotated[PositiveNumber, tyro.conf.arg(metavar="S")] = 600.0
    """Seconds that a request may take."""

    drain_seconds: Annotated[NotNegative, tyro.conf.arg(metavar="S")] = 30.0
    """Seconds for the requests that are running when the server is to end."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    """Published sampling options, as those of `glm4v generate`; requests override them."""

    no_warmup: bool = False
    """Be ready at once; the first requests wait while programs are compiled."""

    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)

    requests: RequestOptions = dataclasses.field(default_factory=RequestOptions)

    def run(self) -> None:
        """Check the options, open the port, and only then load the model."""
        typed = self.model.directory
        self.model.check()
        if self.preset is not None:
            preset(self.preset)
        key = self.api_key if self.api_key is not None else os.environ.get(KEY)
        if key is not None and not key.strip():
            raise ConfigError(f"--api-key: found an empty one; expected some text, or neither it nor ${KEY}")
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise ConfigError("--served-model-name: found an empty one; expected a name")
        if self.requests.allow_private_media and not self.requests.allow_media_domain:
            raise ConfigError("--allow-private-media: found it alone; expected --allow-media-domain beside it")
        from glm4v_jax.config.model import Glm4vConfig
        from glm4v_jax.inputs.processor import Glm4vProcessor

        config = Glm4vConfig.from_pretrained(self.model.directory)
        length = self._length(config.text_config.max_position_embeddings)
        self.model.placed(config)
        processor = Glm4vProcessor.from_pretrained(self.model.directory)

        import starlette  # noqa: F401  # missing ones are named before anything slow
        import uvicorn  # noqa: F401

        from glm4v_jax.serve.server import bind, run
        from glm4v_jax.serve.service import ServeSettings, Service

        settings = ServeSettings(
            model=self.served_model_name or _name(typed),
            api_key=key,
            preset=self.preset,
            max_model_len=length,
            max_waiting=self.max_waiting,
            max_logprobs=None if self.max_logprobs < 0 else self.max_logprobs,
            request_timeout=self.request_timeout,
            drain_seconds=self.drain_seconds,
            is_tiny=self._is_tiny,
            is_warmed=not self.no_warmup,
            max_body_bytes=self.requests.max_body_mib * 2**20,
            media=self.requests.policy(),
            # A web page whose name is made to lead to this server asks under its own name.
            hosts=("localhost", self.host) if key is None else (),
        )
        with bind(self.host, self.port) as listener, losing_errors(), _logging_to_standard_error():
            if key is None and self.host not in _LOOPBACK:
                found = f"{self.host} without --api-key"
                warnings.warn(f"--host: found {found}; everybody who reaches this port can use it", stacklevel=1)
            host = f"[{self.host}]" if ":" in self.host else self.host
            address = f"http://{host}:{listener.getsockname()[1]}"
            print(
                f"starting {settings.model} at {address} (/health says when it is ready)", file=sys.stderr, flush=True
            )
            run(Service(settings, lambda: self.model.load(processor, self.slots, tokens=length)), listener)

    @property
    def _is_tiny(self) -> bool:
        return os.path.samefile(self.model.directory, TINY_CHECKPOINT)

    def _length(self, most: int) -> int:
        if self.max_model_len is not None and self.max_model_len > most:
            expected = f"at most {most}, the max_position_embeddings of the model"
            raise ConfigError(fault("--max-model-len", self.max_model_len, expected))
        default = _TINY_LENGTH if self._is_tiny else _LENGTH
        return self.max_model_len or min(most, default)


def _name(model: str) -> str:
    """What clients call a model: the name in the Hugging Face cache, or that of its directory."""
    if os.path.isdir(model):
        path = os.path.realpath(model)
        return "glm4v-tiny" if path == os.path.realpath(TINY_CHECKPOINT) else os.path.basename(path)
    return model


@contextlib.contextmanager
def _logging_to_standard_error() -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("glm4v_jax")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
