"""Images and videos of a request: from what a client sends to bytes, so that nothing after this opens an address.

A client is a stranger. What it may send: data URLs always; http and https addresses of allowed hosts; never a path, a
file, base64 without a data URL, or any other address, wherever in a message it stands. `resolve` writes every item that
shows something anew, from bytes that it has looked at; an item that it does not know is refused.
"""

import base64
import binascii
import contextlib
import dataclasses
import io
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn

import PIL.Image
from msgspec import Meta

from glm4v_jax.config.checks import Positive, PositiveNumber, validate
from glm4v_jax.errors import Glm4vError, MediaError, counted
from glm4v_jax.inputs.media.container import head_of, is_animated_image
from glm4v_jax.inputs.media.fetch import is_url, read_url
from glm4v_jax.inputs.media.hosts import AllowedHosts
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.inputs.vision.settings import AREA_OPTIONS
from glm4v_jax.serve.errors import ApiError, field_name, shown

_TEXTS = ("text", "input_text", "output_text", "refusal")
_KINDS = {
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
# Where an item may have its image or video, and all fields that could name one to anybody.
_FIELDS = {"image": ("image_url", "image", "url"), "video": ("video_url", "video", "url")}
_SOURCES = ("image_url", "video_url", "image", "video", "url", "path", "base64", "file", "file_id", "file_data", "data")

# What is decoded: not all that Pillow knows, which includes drawings that start other programs.
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_IMAGE_NAMES = "a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF image"
_VIDEO_NAMES = "an MP4, MOV, WebM or Matroska video, or an animated GIF, WebP or PNG"
# Brands of MP4 that are no videos.
_STILL_BRANDS = (b"jp2 ", b"jpx ", b"jpm ", b"mif1", b"heic", b"heix", b"avif")
_MATROSKA = re.compile(
    rb"\x1a\x45\xdf\xa3(?P<size>[\x81-\xbf]|\x01[\0-\xff]{7}).*?\x42\x82(\x88matroska|\x84webm)", re.S
)
_HEADER_CHARACTERS = 256
# All frames of an animated image are composed to get at any: 43 of 1920 x 1080 pixels, 340 of 512 x 512.
_MAX_ANIMATION_FRAMES, _MAX_ANIMATION_BYTES = 4096, 2**28
# The largest values of an item's options: beyond, they would only cost memory. An area is one of about 10,000 tokens.
_MAX_AREA = 2**23
_MAX_OPTIONS = {
    "image": dict.fromkeys(AREA_OPTIONS, _MAX_AREA),
    "video": {**dict.fromkeys(AREA_OPTIONS, _MAX_AREA), "min_pixels": 2**16, "fps": 120},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaPolicy:
    """What images and videos of a request may be, and where they may come from.

    >>> MediaPolicy().hosts.allows("example.com"), MediaPolicy(hosts=AllowedHosts(("example.com",))).max_images
    (False, 8)

    Attributes:
      hosts: hosts from which addresses are fetched; none by default.
      max_images: images of a request, in all its messages; single frames count too.
      max_videos: videos of a request, in all its messages.
      max_bytes: of an image or a video, as it is sent.
      max_pixels: of an image, and of a frame of a video.
      max_decoded_bytes: of all images of a request, and of the frames taken of a video: three bytes a pixel.
      max_video_seconds: longest video.
      max_download_bytes: of all that is fetched for a request.
      download_seconds: for all that is fetched for a request.
    """

    hosts: AllowedHosts = dataclasses.field(default_factory=AllowedHosts)
    max_images: Annotated[int, Meta(ge=0)] = 8
    max_videos: Annotated[int, Meta(ge=0)] = 1
    max_bytes: Positive = 2**26
    max_pixels: Positive = 2**26
    max_decoded_bytes: Positive = 2**31
    max_video_seconds: PositiveNumber = 600.0
    max_download_bytes: Positive = 2**25
    download_seconds: PositiveNumber = 10.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
          ConfigError: one of them is out of its range.
        """
        validate(self)


def limit_videos(processor: Glm4vProcessor, policy: MediaPolicy, max_tokens: int | None = None) -> None:
    """Have a processor refuse videos that a policy does not allow: how large one is shows when it is opened.

    Args:
      processor: that will prepare them.
      policy: what is allowed.
      max_tokens: of a video in the prompt.
    """
    processor.video_processor.max_tokens = max_tokens
    processor.video_processor.limits = {
        "max_pixels": policy.max_pixels,
        "max_decoded_bytes": policy.max_decoded_bytes,
        "max_seconds": policy.max_video_seconds,
    }


def has_media(messages: Any) -> bool:
    """Whether messages may show images or videos; False for anything but messages.

    >>> has_media([{"role": "user", "content": "Hello"}]), has_media([{"content": [{"type": "image_url"}]}])
    (False, True)
    """
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    items = [item for content in contents if isinstance(content, list) for item in content]
    return any(not isinstance(item, Mapping) or item.get("type") not in _TEXTS for item in items)


def resolve(
    messages: Any, policy: MediaPolicy, processor: Glm4vProcessor | None = None, max_tokens: int | None = None
) -> Any:
    """Replace every image and video of messages by its bytes, in the shape that `Engine.prompt` takes.

    It may take as long as fetching does: call it in a thread. What is not a message at all is left to the engine, which
    says what is wrong with it. With a processor, images of more than `max_tokens` tokens together are refused before
    they are decoded.

    >>> url = "data:image/gif;base64,R0lGODdhAQABAIAAAP///////ywAAAAAAQABAAACAkQBADs="
    >>> message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    >>> item = resolve([message], MediaPolicy())[0]["content"][0]
    >>> item["type"], item["image"][:6]
    ('image', b'GIF87a')

    Raises:
      ApiError: an item is malformed, names what is not allowed, or is not an image or a video within the limits; the
        message says where it stands, and nothing of what it holds.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        return messages
    reader = _Reader(policy, processor, max_tokens)
    return [reader.message(message, f"messages[{index}]") for index, message in enumerate(messages)]


@contextlib.contextmanager
def naming_items(messages: Any) -> Iterator[None]:
    """Put the path of an image or video in a request before media errors of the body, in place of its number.

    >>> with naming_items([{"role": "user", "content": [{"type": "text"}, {"type": "image"}]}]):
    ...     raise MediaError("image 0: 200 bytes: found no readable image; expected one")
    Traceback (most recent call last):
      ...
    glm4v_jax.errors.MediaError: messages[0].content[1]: found no readable image; expected one

    Args:
      messages: what `resolve` returns.
    """
    try:
        yield
    except MediaError as error:
        if (found := re.match(r"(image|video) (\d+)(?:: [\d,]+ bytes)?(?=: )", str(error))) is None:
            raise
        contents = [message.get("content") for message in messages]
        places = [
            f"messages[{index}].content[{position}]"
            for index, content in enumerate(contents)
            for position, item in enumerate(content if isinstance(content, list) else ())
            if item.get("type") == found[1]
        ]
        if (number := int(found[2])) >= len(places):
            raise
        raise MediaError(f"{places[number]}{str(error)[found.end() :]}") from error


def resolve_item(item: Any, policy: MediaPolicy, processor: Glm4vProcessor, max_tokens: int) -> dict[str, Any]:
    """Replace the image or video of an item, which is a body by itself, by its bytes; as `resolve` does, and raises."""
    return _Reader(policy, processor, max_tokens).item(item, "body")


def _refuse(where: str, found: str, expected: str) -> NoReturn:
    param = None if where.startswith("body") else "messages"
    raise ApiError(400, f"{where}: found {found}; expected {expected}", param=param, code="invalid_media")


class _Reader:
    """The images and videos of one request, counted while they are read."""

    def __init__(self, policy: MediaPolicy, processor: Glm4vProcessor | None, max_tokens: int | None) -> None:
        self._policy, self._processor, self._max_tokens = policy, processor, max_tokens
        self._counts = {"image": 0, "video": 0}
        self._decoded_bytes = self._downloaded_bytes = self._tokens = 0
        self._deadline: float | None = None

    def message(self, message: Any, where: str) -> Any:
        """A message whose content has bytes in place of addresses."""
        content = message.get("content") if isinstance(message, Mapping) else None
        if content is None or isinstance(content, str):
            return message
        if isinstance(content, Mapping) or not isinstance(content, Sequence):
            _refuse(f"{where}.content", type(content).__name__, "a string or a list of items")
        items = [self.item(item, f"{where}.content[{index}]") for index, item in enumerate(content)]
        return {**message, "content": items}

    def item(self, item: Any, where: str) -> dict[str, Any]:
        """An item of a message with bytes in place of addresses."""
        if not isinstance(item, Mapping):
            _refuse(where, type(item).__name__, "an object with 'type'")
        given = {key: value for key, value in item.items() if value is not None}
        kind = _kind_of(given, where)
        if any(field_name(name) != name for name in given):
            _refuse(where, "an unknown field", "'type', and a text, an image or a video")
        sources = [key for key in _SOURCES if key in given]
        if kind == "text":
            if sources:
                _refuse(f"{where}.{sources[0]}", f"it in an item of type {given.get('type', 'text')!r}", "two items")
            return given
        if len(sources) != 1 or sources[0] not in _FIELDS[kind]:
            found = " and ".join(map(repr, sources)) or "no source"
            _refuse(where, found, f"{_FIELDS[kind][0]!r} with a data URL, and nothing else")
        field = sources[0]
        source = given[field]
        options = {key: value for key, value in given.items() if key not in ("type", field)}
        if isinstance(source, Mapping):
            options |= {key: value for key, value in source.items() if value is not None and key != "url"}
            source = source.get("url")
            if stray := [key for key in _SOURCES if key in options]:
                _refuse(f"{where}.{field}", repr(stray[0]), "'url'")
        for name, value in options.items():
            if field_name(name) != name:
                _refuse(where, "an unknown field", "'type', and an image or a video")
            if (most := _MAX_OPTIONS[kind].get(name)) is None:
                continue
            if not isinstance(value, int | float):
                _refuse(f"{where}.{name}", shown(value), "a number")
            if not value <= most:
                _refuse(f"{where}.{name}", "too large a number", f"at most {most}")
        self._count(kind)
        place = f"{where}.{field}"
        read: Any
        if kind == "image":
            read = self._image(source, place, options)
        elif isinstance(source, list):
            read = self._frames(source, place)
        else:
            read = self._video(source, place)
        return {**options, "type": kind, kind: read}

    def _count(self, kind: str) -> None:
        self._counts[kind] += 1
        most = self._policy.max_images if kind == "image" else self._policy.max_videos
        if self._counts[kind] > most:
            _refuse("messages", f"more than {counted(most, kind)}", "no more in a request")

    def _frames(self, sources: Sequence[Any], where: str) -> list[bytes]:
        frames = []
        for index, source in enumerate(sources):
            self._count("image")
            if isinstance(source, Mapping):
                source = source.get("url")
            frames.append(self._image(source, f"{where}[{index}]", None))
        return frames

    def _image(self, source: Any, where: str, options: Mapping[str, Any] | None) -> bytes:
        """An image, or with None for its options a frame."""
        data = self._read(source, where)
        try:
            with PIL.Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
                width, height = image.size
        except PIL.Image.DecompressionBombError:
            _refuse(where, "too many pixels", f"at most {self._policy.max_pixels}")
        except Exception:  # Pillow's format readers raise many kinds of errors on broken files.
            _refuse(where, "no readable image", _IMAGE_NAMES)
        if width * height > self._policy.max_pixels:
            _refuse(where, f"{width} x {height} pixels", f"at most {self._policy.max_pixels} pixels")
        self._decoded_bytes += 3 * width * height
        if self._decoded_bytes > self._policy.max_decoded_bytes:
            _refuse("messages", f"images of more than {self._policy.max_decoded_bytes} bytes, decoded", "no more")
        if options is not None:
            self._count_tokens(height, width, options)
        return data

    def _count_tokens(self, height: int, width: int, options: Mapping[str, Any]) -> None:
        if self._processor is None or self._max_tokens is None:
            return
        images = self._processor.image_processor
        with contextlib.suppress(Glm4vError):  # which is said when the image is prepared
            self._tokens += images.get_number_of_image_patches(height, width, options) // images.merge_size**2
        if self._tokens > self._max_tokens:
            raise ApiError(
                400,
                f"messages: found images of {self._tokens:,} tokens; expected at most {self._max_tokens:,} in all, the "
                "length that this server was started with",
                param="messages",
                code="context_length_exceeded",
            )

    def _video(self, source: Any, where: str) -> bytes:
        data = self._read(source, where)
        head = head_of(data)
        if is_animated_image(head):
            self._check_animation(data, where)
        elif not _is_container(head):
            _refuse(where, "no readable video", _VIDEO_NAMES)
        return data

    def _check_animation(self, data: bytes, where: str) -> None:
        """Bound the work of a decoder that has to compose all frames to get at any."""
        try:
            with PIL.Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
                width, height = image.size
                decoded = min(self._policy.max_decoded_bytes, _MAX_ANIMATION_BYTES)
                most = min(_MAX_ANIMATION_FRAMES, decoded // (3 * width * height))
                if width * height <= self._policy.max_pixels:
                    image.seek(most)
        except EOFError:  # It has no such frame.
            return
        except Exception:  # As above.
            _refuse(where, "no readable video", _VIDEO_NAMES)
        _refuse(where, f"more than {most} frames of {width} x {height} pixels", "fewer or smaller ones, or a video")

    def _read(self, source: Any, where: str) -> bytes:
        if not isinstance(source, str):
            _refuse(where, type(source).__name__, "a string, a data URL")
        if source[:5].lower() == "data:":
            return _decode_data_url(source, self._policy.max_bytes, where)
        if not is_url(source):
            _refuse(where, "no data URL", "data:<type>;base64,<data>")
        if not self._policy.hosts.names:
            _refuse(where, "an http or https address, which this server does not fetch", "a data URL")
        now = time.monotonic()
        self._deadline = self._deadline or now + self._policy.download_seconds
        left = self._policy.max_download_bytes - self._downloaded_bytes
        try:
            data = read_url(
                source, max_bytes=left, timeout=max(self._deadline - now, 0.01), hosts=self._policy.hosts, name=where
            )
        except MediaError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_media") from error
        self._downloaded_bytes += len(data)
        return data


def _kind_of(item: Mapping[str, Any], where: str) -> str:
    """What an item is: "text", "image" or "video"."""
    kind = item.get("type")
    if kind is None:
        kinds = [name for name in ("text", *_KINDS) if name in item]
        kind = kinds[0] if len(kinds) == 1 else None
    if kind in _TEXTS:
        return "text"
    if not isinstance(kind, str) or kind not in _KINDS:
        _refuse(f"{where}.type", "none" if kind is None else shown(kind), "'text', 'image_url' or 'video_url'")
    return _KINDS[kind]


def _is_container(head: bytes) -> bool:
    """Whether a file can only be MP4, MOV, WebM or Matroska.

    FFmpeg tries every format it knows, and takes the likeliest; some are lists of files and addresses, which it opens.
    It is sure of these two if their first box or header is whole. A first byte of zero, and a header that ends soon,
    keep it from considering formats of text.
    """
    found = _MATROSKA.match(head)
    if found is not None:
        size = found["size"]
        length = size[0] & 0x7F if len(size) == 1 else int.from_bytes(size[1:], "big")
        return found.end() <= found.end("size") + length <= len(head)
    return head[:1] == b"\0" and head[4:8] in (b"ftyp", b"moov") and head[8:12] not in _STILL_BRANDS


def _decode_data_url(url: str, max_bytes: int, where: str) -> bytes:
    """The content of a base64 data URL, in the strict form: that is what every client writes."""
    if len(url) - _HEADER_CHARACTERS > -(-max_bytes // 3) * 4:
        _refuse(where, "too many bytes", f"at most {max_bytes}")
    comma = url.find(",", 0, _HEADER_CHARACTERS)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        _refuse(where, "another data URL", "data:<type>;base64,<data>")
    try:
        # Copies nothing but the payload.
        data = base64.b64decode(memoryview(url.encode("ascii"))[comma + 1 :], validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        _refuse(where, "invalid base64", "data:<type>;base64,<data>")
    if not data:
        _refuse(where, "no data", "data:<type>;base64,<data>")
    return data
