"""The one form into which all adapters bring the questions of data sets, and the items that a task makes of them."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.sandbox
import numpy as np
import PIL.Image

from eval.data.items import Item
from glm4v_jax.config.checks import fault, raise_faults
from glm4v_jax.data.media import MediaItem, image_size, is_remote, located, source_of
from glm4v_jax.errors import DataError, counted, not_there
from glm4v_jax.files import fingerprint
from glm4v_jax.inputs.media.fetch import file_url_path, is_address

_MARKER = re.compile(r"<(image|video)(?: ([0-9]{1,3}))?>")


class Origin(NamedTuple):
    """Where a row was read from: its number in the file, and in all files together; both from 0."""

    path: Path
    number: int
    total: int

    @property
    def name(self) -> str:
        """The id of a row that has none: "test_human:12"."""
        return f"{self.path.stem}:{self.number}"

    @property
    def split(self) -> str:
        """The name of the file without the number of its shard: "testA" of testA-00000-of-00001.parquet."""
        return re.sub(r"-[0-9]{5}-of-[0-9]{5}$", "", self.path.stem)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question as a data set has it, before a task's template makes a prompt of it.

    Attributes:
      id: unique in its data.
      fields: for the template, "question" among them.
      reference: what metrics read; only what JSON can hold.
      media: images and videos, with paths as they were written, relative to the file.
      group: see `eval.data.items.Item`.
      is_marked: whether the prompt says where images go, as `<image>` or `<video>`, the next one, or `<image 2>`, the
        second; else they stand before the text.
    """

    id: str
    fields: Mapping[str, Any]
    reference: Mapping[str, Any]
    media: Sequence[MediaItem] = ()
    group: str | None = None
    is_marked: bool = False


@functools.cache
def template(source: str) -> jinja2.Template:
    """Compile a prompt's template, in which undefined fields are errors; ConfigError if it is not a template."""
    # Not the package's environment for chat templates: that one renders undefined fields as nothing.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise_faults([fault("prompt", source, f"a jinja2 template ({error})")])
        raise


def make_item(question: Question, prompt: str, system: str | None, directory: Path, place: str) -> Item:
    """Make the item of a question; `prompt` is the template of its text.

    Paths of images and videos are relative to `directory`. Where the reference has "boxes" but no "width" and "height",
    they are those of the first image, in pixels.

    Raises:
      DataError: the template uses an undefined field, or a marker has no image.
      MediaError: a file does not exist, or an image's header cannot be read.
      ConfigError: see `template`.
    """
    compiled = template(prompt)
    try:
        text = compiled.render(question.fields)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:  # of what the template does with fields
        fields = ", ".join(question.fields)
        raise DataError(f"prompt: found an error ({error}); expected a template over {fields}") from error
    media = [located(item, directory) for item in question.media]
    sizes = [_checked(item) for item in media]
    messages = [{"role": "user", "content": _content(text, media, question.is_marked)}]
    # As it was written, with digests of the files: wherever they are now, it is the same prompt.
    digested = [_digested(item, there) for item, there in zip(question.media, media, strict=True)]
    written = _content(text, digested, question.is_marked)
    asked: dict[str, Any] = {"content": [_as_json(part) for part in written]}
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        asked["system"] = system
    reference = dict(question.reference)
    size = next((size for size in sizes if size is not None), None)
    if "boxes" in reference and size is not None:
        reference = {"width": size[0], "height": size[1], **reference}
    return Item(question.id, messages, reference, asked, question.group, place)


def digest(value: Any) -> str:
    """Digest an image or the frames of a video: equal for equal pixels or bytes."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in value if isinstance(value, list | tuple) else [value]:
        if isinstance(part, PIL.Image.Image):
            part = np.asarray(part)
        if isinstance(part, np.ndarray):
            hashed.update(str(part.shape).encode())
            part = np.ascontiguousarray(part).tobytes()
        hashed.update(part.encode() if isinstance(part, str) else bytes(part))
    return hashed.hexdigest()


def _content(text: str, media: Sequence[MediaItem], is_marked: bool) -> list[dict[str, Any]]:
    """The parts of the prompt, images and videos at their positions."""
    if not is_marked or not _MARKER.search(text):
        return [*media, {"type": "text", "text": text}]
    by_kind = {kind: [item for item in media if item["type"] == kind] for kind in ("image", "video")}
    pending = {kind: iter(items) for kind, items in by_kind.items()}
    content: list[dict[str, Any]] = []
    end = 0
    for marker in _MARKER.finditer(text):
        content.append({"type": "text", "text": text[end : marker.start()]})
        kind, number = marker.groups()
        items = by_kind[kind]
        found = next(pending[kind], None) if number is None else dict(enumerate(items, 1)).get(int(number))
        if found is None:
            raise DataError(f"prompt: found {marker[0]} with {counted(len(items), kind)} in the row; expected as many")
        content.append(found)
        end = marker.end()
    content.append({"type": "text", "text": text[end:]})
    return [part for part in content if part.get("text") != ""]


def _checked(item: MediaItem) -> tuple[int, int] | None:
    """Check that an image or video exists; return the size (width, height) of an image in pixels."""
    if item["type"] == "image":
        return None if is_remote(item) else image_size(item)
    source = source_of(item)
    for one in source if isinstance(source, list) else [source]:
        file = _file(one)
        if file is not None and not file.exists():
            raise DataError(not_there(one, "a video or a frame", "video"))
    return None


def _digested(item: MediaItem, located: MediaItem) -> MediaItem:
    """An image or video as it was written, with the digest of its file; frames that are files as their digests."""
    source = source_of(located)
    if isinstance(source, list):
        return {**item, item["type"]: [one if (file := _file(one)) is None else fingerprint(file) for one in source]}
    file = _file(source)
    return item if file is None else {**item, "digest": fingerprint(file)}


def _file(source: Any) -> Path | None:
    """The file that a path or a file address names; None for web addresses and what is in memory.

    Raises:
      MediaError: the address names no local file.
    """
    if not isinstance(source, str):
        return None
    if source.lower().startswith("file://"):
        return file_url_path(source)
    return None if is_address(source) else Path(source)


def _as_json(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return dict(part)
    key, source = next((key, part[key]) for key in ("path", "url", "image", "video") if key in part)
    is_short = isinstance(source, str) and not source.lower().startswith("data:")
    return {"type": part["type"], key: source if is_short else digest(source)} | {
        name: part[name] for name in ("fps", "digest") if name in part
    }
