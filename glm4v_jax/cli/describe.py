"""`glm4v describe`: a caption for every picture of a folder."""

import dataclasses
import errno
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from glm4v_jax.console.console import status
from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.options import LongSamplingOptions, ModelOptions, generation_config, long_answer
from glm4v_jax.errors import GenerationError, MediaError
from glm4v_jax.files import is_same_file, to_json
from glm4v_jax.inputs.media.quiet import unsuspected_pictures
from glm4v_jax.inputs.text.messages import user_messages

if TYPE_CHECKING:
    from glm4v_jax.generate.completion import Completion
    from glm4v_jax.generate.offline.prompts import Row
    from glm4v_jax.inputs.processor import Glm4vProcessor

CAPTIONS = "captions.jsonl"

PROMPT = (
    "Describe this picture for someone who cannot see it: what is shown, where, and what stands out, in one paragraph "
    "of two to four sentences. Quote text that can be read. Leave out guesses and opinions."
)


@dataclasses.dataclass(kw_only=True)
class Describe(LongSamplingOptions, DistributedOptions, ModelOptions):
    """Write a caption for every picture of a folder, as JSON lines.

    Each line has "file", from the folder on, "caption", which is the answer without its thought, "width" and "height",
    and what there is to say of the answer; or "error". A run that ended early goes on when called again. A picture
    whose content has changed meanwhile is not described again: --restart does that.
    """

    directory: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """The folder. Files that are no pictures are skipped, and so are hidden ones."""

    recursive: bool = False
    """Also the folders inside; links to folders are not followed."""

    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint=f"(default: {PROMPT})")] = PROMPT
    """What to ask about each picture."""

    out: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=f"(default: DIR/{CAPTIONS})")] = None
    """Where the captions go, one JSON object a line, as they are completed."""

    slots: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """How many pictures are described at a time."""

    restart: bool = False
    """Do not go on, but replace what is in --out."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the figures of the run as one JSON object."""

    def run(self) -> None:
        """Finds the pictures, and only then loads the weights and describes them."""
        self.check()
        if not os.path.isdir(self.directory):
            raise NotADirectoryError(errno.ENOTDIR, "is no directory, expected one with pictures", self.directory)
        if self.slots < 1:
            raise GenerationError(f"--slots: found {self.slots}, expected at least 1")
        config = generation_config(self.model, self.preset, self.options(long_answer(self.model)))
        out = self.out if self.out is not None else os.path.join(self.directory, CAPTIONS)
        with status("looking for pictures"), unsuspected_pictures():
            names, skipped = self._find(out)
        if not names:
            raise MediaError(
                f"{self.directory}: found no picture among {skipped} files, expected at least one"
                + ("" if self.recursive else "; --recursive looks into the folders inside too")
            )
        if skipped:
            print(f"{skipped} file{'s' * (skipped != 1)} skipped: no pictures", file=sys.stderr)

        from glm4v_jax import Glm4vProcessor
        from glm4v_jax.generate.offline.batch import Batch

        processor = Glm4vProcessor.from_pretrained(self.model)
        batch = Batch(
            [self._row(name) for name in names], out, config, self, self.slots,
            field="file", line=_line, keep_others=True, things="pictures",
            sources=[os.path.join(self.directory, name) for name in names],
        )  # fmt: skip
        summary = batch.run(processor, restart=self.restart)
        if self.as_json:
            print(to_json({**summary.fields(), "skipped": skipped}))
        summary.raise_if_failed()

    def _find(self, out: str) -> tuple[list[str], int]:
        """The pictures by their names from the folder on, sorted; and how many other files there are."""
        names, skipped = [], 0
        for path in self._files():
            name = path.relative_to(self.directory).as_posix()
            if is_picture(path):
                names.append(name)
            elif not is_same_file(path, out):
                skipped += 1
        return sorted(names), skipped

    def _files(self) -> Iterator[pathlib.Path]:
        for directory, inside, files in os.walk(self.directory):
            inside[:] = [name for name in inside if not name.startswith(".")] if self.recursive else []
            for name in files:
                path = pathlib.Path(directory, name)
                if not name.startswith(".") and (path.is_file() or path.is_symlink()):
                    yield path

    def _row(self, name: str) -> "Row":
        from glm4v_jax.generate.offline.prompts import Row

        messages = user_messages(self.prompt, [os.path.join(self.directory, name)], system=self.system)
        return Row(name, messages, {"prompt": self.prompt, "image": name, "system": self.system})


_NOT_ONLY_PICTURES = ("PDF", "MPEG", "HDF5", "GRIB", "BUFR")
"""Formats of Pillow's whose files and names hold other things than pictures."""


def is_picture(path: pathlib.Path) -> bool:
    """Whether a file is a picture by its content; also one by its name that cannot be read, to be told of."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            return image.format not in _NOT_ONLY_PICTURES
    except PIL.Image.DecompressionBombError:
        return True
    except Exception:  # Pillow's format readers raise many kinds of errors on what is no picture.
        kind = PIL.Image.registered_extensions().get(path.suffix.lower())
        return kind in PIL.Image.OPEN and kind not in _NOT_ONLY_PICTURES


def _line(completion: "Completion", processor: "Glm4vProcessor") -> dict[str, Any]:
    from glm4v_jax.generate.completion import completion_fields

    (width, height) = completion.image_sizes[0]
    fields = completion_fields(completion, processor.tokenizer)
    text, answer = fields.pop("text"), fields.pop("answer")
    return {"caption": answer, "width": width, "height": height, "text": text, **fields}
