"""`glm4v describe`: a caption for every image of a directory."""

import dataclasses
import errno
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from glm4v_jax.config.checks import Positive
from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.options import LongSamplingOptions, ModelOptions, generation_config, long_answer
from glm4v_jax.console.program import JsonOptions
from glm4v_jax.console.progress import run_batch, status
from glm4v_jax.errors import GenerationError, MediaError, counted
from glm4v_jax.files import is_same_file, to_json
from glm4v_jax.inputs.media.quiet import without_size_warnings

if TYPE_CHECKING:
    from glm4v_jax.generate.completion import Completion
    from glm4v_jax.generate.offline.prompts import BatchPrompt
    from glm4v_jax.inputs.processor import Glm4vProcessor

CAPTIONS = "captions.jsonl"

PROMPT = (
    "Describe this picture for someone who cannot see it: what is shown, where, and what stands out, in one paragraph "
    "of two to four sentences. Quote text that can be read. Leave out guesses and opinions."
)


@dataclasses.dataclass(kw_only=True)
class Describe(JsonOptions):
    """Write a caption for every image of a directory, as JSON lines.

    A line has "file", "caption" (the answer without its thought), "width", "height", and counts of tokens; or "error".
    The same command resumes an interrupted run. An image that has changed since keeps its caption unless --restart.
    """

    directory: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """The directory. Hidden files, and files that are not images, are skipped."""

    recursive: bool = False
    """Include subdirectories; links to directories are not followed."""

    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint=f"(default: {PROMPT})")] = PROMPT
    """The prompt for every image."""

    out: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=f"(default: DIR/{CAPTIONS})")] = None
    """The file of captions, one JSON object per line, in the order of completion."""

    slots: Annotated[Positive, tyro.conf.arg(metavar="N")] = 8
    """Number of images that are described at a time."""

    restart: bool = False
    """Overwrite the file of captions instead of resuming it."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the figures of the run as one JSON object."""

    sampling: LongSamplingOptions = dataclasses.field(default_factory=LongSamplingOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)

    def run(self) -> None:
        """Find the images, and only then load the weights and describe them."""
        self.model.check()
        if not self.prompt.strip():
            raise GenerationError(f"--prompt: found {self.prompt!r}; expected some text")
        if not os.path.isdir(self.directory):
            kind = errno.ENOTDIR if os.path.exists(self.directory) else errno.ENOENT
            raise OSError(kind, os.strerror(kind), self.directory)
        model = self.model.directory
        config = generation_config(model, self.sampling.preset, self.sampling.given(long_answer(model)))
        out = self.out if self.out is not None else os.path.join(self.directory, CAPTIONS)
        with status("looking for images"), without_size_warnings():
            names, skipped = self._find(out)
        if not names:
            recursive = "" if self.recursive else ", or --recursive for its subdirectories"
            raise MediaError(
                f"{self.directory}: found no image among {counted(skipped, 'file')}; expected at least one{recursive}"
            )
        if skipped:
            print(f"skipped {counted(skipped, 'file')} that are not images", file=sys.stderr)

        from glm4v_jax.generate.offline.batch import PromptBatch
        from glm4v_jax.inputs.processor import Glm4vProcessor

        processor = Glm4vProcessor.from_pretrained(model)
        batch = PromptBatch(
            [self._prompt(name) for name in names], out, config, self.model.sources, dtype=self.model.precision,
            name_field="file", answer_fields=_caption_fields, keep_others=True, things="images",
            sources=[os.path.join(self.directory, name) for name in names],
        )  # fmt: skip
        summary = run_batch(
            batch, processor, lambda: self.model.load(processor, self.slots), restart=self.restart, verbose=self.verbose
        )
        if self.as_json:
            print(to_json({**summary.fields(), "skipped": skipped}))
        summary.raise_if_failed()

    def _find(self, out: str) -> tuple[list[str], int]:
        """The paths of the images in the directory, sorted; and the number of other files."""
        names, skipped = [], 0
        for path in self._files():
            name = path.relative_to(self.directory).as_posix()
            if is_image(path):
                names.append(name)
            elif not is_same_file(path, out):
                skipped += 1
        return sorted(names), skipped

    def _files(self) -> Iterator[pathlib.Path]:
        def refuse(error: OSError) -> None:
            raise error  # a directory that cannot be read is not an empty one

        for directory, inside, files in os.walk(self.directory, onerror=refuse):
            inside[:] = [name for name in inside if not name.startswith(".")] if self.recursive else []
            for name in files:
                path = pathlib.Path(directory, name)
                if not name.startswith(".") and (path.is_file() or path.is_symlink()):
                    yield path

    def _prompt(self, name: str) -> "BatchPrompt":
        from glm4v_jax.generate.offline.prompts import BatchPrompt
        from glm4v_jax.inputs.text.messages import user_messages

        system = self.sampling.system
        item = {"type": "image", "path": os.path.join(self.directory, name)}
        messages = user_messages(self.prompt, [item], system)
        return BatchPrompt(name, messages, {"prompt": self.prompt, "image": name, "system": system})


_NOT_ONLY_IMAGES = ("PDF", "MPEG", "HDF5", "GRIB", "BUFR")
"""Pillow's formats whose files also hold other things than images."""


def is_image(path: pathlib.Path) -> bool:
    """Whether a file is an image by its content; or by its name where it cannot be read, so that it gets an error."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            return image.format not in _NOT_ONLY_IMAGES
    except PIL.Image.DecompressionBombError:
        return True
    except Exception:  # Pillow's format readers raise many kinds of errors on other files.
        kind = PIL.Image.registered_extensions().get(path.suffix.lower())
        return kind in PIL.Image.OPEN and kind not in _NOT_ONLY_IMAGES


def _caption_fields(completion: "Completion", processor: "Glm4vProcessor") -> dict[str, Any]:
    from glm4v_jax.generate.completion import completion_fields

    (width, height) = completion.image_sizes[0]
    fields = completion_fields(completion, processor.tokenizer)
    text, answer = fields.pop("text"), fields.pop("answer")
    return {"caption": answer, "width": width, "height": height, "text": text, **fields}
