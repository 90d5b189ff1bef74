"""Samples -> batches of static shape: several conversations in a row, which do not attend to one another.

A row's samples have the segment ids 1, 2, ... and each its own positions; the images and frames of all of them share
the batch's vision rows. The model computes for a sample what it computes for it alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from glm4v_jax.batch import Batch
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError, counted
from glm4v_jax.inputs import vision_rows
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.prompt import Prompt
from glm4v_jax.inputs.vision_rows import FirstFit, RowPlace
from train.data.samples import IGNORED, Sample

VisionShape = tuple[int, int]
"""(R, L): vision rows of a batch, and patches of each."""
_MEDIA = "image or frame", "images and frames"


class TrainBatch(NamedTuple):
    """A batch with its targets; a JAX pytree.

    batch: the model's input.
    targets: int32 [B, T], the token to predict at each position, -100 where there is none.
    weights: float32 [B, T], of each target in the loss; 0 where there is none.
    reference: float32 [B, T], log probabilities that the model's are compared with. Of preference data, each answer's
      under the model before the training, divided among its targets; there the conversations of a pair are segments
      2 n - 1 and 2 n. Of sampled answers, each target's under the distribution that it was drawn from; 0 where none
      was.
    advantages: float32 [B, T], of sampled answers, that of the answer that a target belongs to.
    """

    batch: Batch
    targets: np.ndarray
    weights: np.ndarray
    reference: np.ndarray | None = None
    advantages: np.ndarray | None = None


class Padding(NamedTuple):
    """Fractions of a batch that are padding; `patches` is None without vision rows."""

    tokens: float
    patches: float | None


def place(lengths: Sequence[int], rows: int, length: int, per_row: int | None = None) -> list[RowPlace] | None:
    """Return places for samples of these lengths, each in the first row with room; None if they do not fit.

    `rows`, `length`: B and T; `per_row`: the most samples of a row, None is no limit, 1 is no packing.
    """
    batch, places = FirstFit(rows, length, per_row), list[RowPlace]()
    for size in lengths:
        if (found := batch.add(size)) is None:
            return None
        places.append(found)
    return places


def vision_fits(frames: np.ndarray, shape: VisionShape | None) -> bool:
    """Return whether frames int [F, 2] (height, width in patches) fit vision rows of this shape."""
    sizes = frames.prod(axis=1).tolist()
    return not sizes or (shape is not None and vision_rows.fits(sizes, shape))


def pack(
    samples: Sequence[Sample],
    *,
    rows: int,
    length: int,
    vision_shape: VisionShape | None,
    config: Glm4vConfig,
    average: Literal["token", "sample"] = "token",
    per_row: int | None = None,
) -> TrainBatch:
    """Make one batch of samples, such as a `Packer` puts together.

    Args:
      samples: any number that fits, or none; they are placed in their order, each in the first row with room.
      rows, length: B and T of the batch.
      vision_shape: of its vision rows, which it has even if no sample has images; None is a batch without.
      config: of the model.
      average: what the loss is an average over: with "token" every target has weight 1; with "sample" the targets of a
        sample share a weight of 1, however long its answers are.
      per_row: the most samples of a row; 1 is no packing.

    Raises:
      DataError: they do not fit.
    """
    places = place([len(sample) for sample in samples], rows, length, per_row)
    if places is None:
        found = ", ".join(str(len(sample)) for sample in samples)
        raise DataError(f"{_sources(samples)}: found {found} tokens; expected ones that fit {rows} x {length}")
    frames = np.concatenate([np.zeros((0, 2), np.int64), *(sample.frames for sample in samples)])
    if not vision_fits(frames, vision_shape):
        raise DataError(
            f"{_sources(samples)}: found {counted(len(frames), *_MEDIA)} of {int(frames.prod(axis=1).sum())} patches; "
            f"expected ones that fit vision rows of {vision_shape}"
        )
    media = [medium for sample in samples for medium in sample.prompt.media]
    writer = RowWriter(rows, length, media, vision_shape, config, average)
    reference = np.zeros((rows, length), np.float32)
    for sample, at in zip(samples, places, strict=True):
        is_target = sample.targets != IGNORED
        here = writer.write(at, sample.prompt, sample.targets, is_target)
        if sample.second:
            is_second = np.arange(len(sample)) >= sample.second
            writer.batch.batch.segment_ids[here] = 2 * at.segment - 1 + is_second
            for part, value in zip((is_target & ~is_second, is_target & is_second), sample.reference, strict=True):
                reference[here] += part * np.float32(value / part.sum())
    return writer.batch._replace(reference=reference)


class RowWriter:
    """Writes prompts with their targets into a batch.

    Attributes:
      batch: what has been written so far.
      features: where the merged tokens of each image and video are in the encoder's output.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        media: Sequence[Medium],
        vision_shape: VisionShape | None,
        config: Glm4vConfig,
        average: str,
    ):
        """Start an empty batch with the vision rows of these images and videos, which fit; see `pack`."""
        vision, self.features, self._average = None, dict[Medium, np.ndarray](), average
        if vision_shape is not None:
            settings = config.vision_config
            vision = vision_rows.empty_rows(*vision_shape, settings.patch_dim, settings.position_grid)
            self.features = vision_rows.fill(vision, media, merge_size=settings.spatial_merge_size)
        shape = rows, length
        index = None if vision is None else np.full(shape, -1, np.int32)
        ids, segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.ones((3, *shape), np.int32)
        targets, weights = np.full(shape, IGNORED, np.int32), np.zeros(shape, np.float32)
        self.batch = TrainBatch(Batch(ids, segments, positions, index, vision), targets, weights)

    def write(self, found: RowPlace, prompt: Prompt, targets: np.ndarray, counts: np.ndarray) -> tuple[int, slice]:
        """Write a prompt of T tokens, and return where it is.

        `targets`: int [T], the token to predict after each; `counts`: bool [T], which of them have a weight.
        """
        here = np.s_[found.row, found.start : found.start + len(prompt)]
        batch = self.batch.batch
        batch.input_ids[here], batch.segment_ids[here] = prompt.input_ids, found.segment
        batch.position_ids[:, *here] = prompt.position_ids
        if batch.vision_index is not None:
            batch.vision_index[here] = prompt.vision_index(self.features)
        self.batch.targets[here] = targets
        self.batch.weights[here] = counts / np.float32(1 if self._average == "token" else max(counts.sum(), 1))
        return here


def _sources(samples: Sequence[Sample]) -> str:
    return f"samples from {samples[0].source} on"


def padding_of(batch: TrainBatch) -> Padding:
    """Return how much of a batch is padding."""
    vision = batch.batch.vision
    tokens = float(np.mean(batch.batch.segment_ids == 0))
    return Padding(tokens, None if vision is None else vision_rows.padded_share(vision))


class Packable(Protocol):
    """What a packer knows of a sample, whose `len` is its tokens; see `Sample` for the fields."""

    def __len__(self) -> int: ...

    @property
    def source(self) -> str:
        """Place of the record."""

    @property
    def frames(self) -> np.ndarray:
        """int64 [F, 2]: height and width of its images and frames, in patches."""


P = TypeVar("P", bound=Packable)


class Packer(Generic[P]):
    """Put a stream of samples together to batches that fit.

    A few batches are open at a time; a sample goes to the first of them that has room for its tokens and its images.
    Where none has, and no more may be opened, the fullest is handed out. So a sample waits, but nothing is sorted, and
    the batches depend on the stream alone.

    The state, `get_state`, is JSON: the keys of the samples that wait. It can be taken after any `push`, and a packer
    that gets it with `set_state` continues as this one does, from the next sample of the stream.
    """

    def __init__(
        self,
        *,
        rows: int,
        length: int,
        vision_shape: VisionShape | None = None,
        per_row: int | None = None,
        open_batches: int = 4,
    ) -> None:
        """Start without samples, for batches of these sizes (see `pack`).

        At least one batch is open: more leave less padding, and let samples wait longer.
        """
        self._rows, self._length, self._per_row = rows, length, per_row
        self._vision_shape = vision_shape
        self._limit = open_batches
        self._open: list[_OpenBatch[P]] = []
        self._pushed = 0

    def push(self, sample: P, key: Any = None) -> list[P] | None:
        """Take the next sample; return those of a batch that is complete, if there is one.

        By `key`, as JSON, the sample can be found again after a resume, such as its number in the data; None is the
        number of samples pushed before it. DataError, and no change, if it fits no batch, not even alone.
        """
        key = self._pushed if key is None else key
        done = None
        if not any(batch.add(key, sample) for batch in self._open):
            self.check(sample)
            if len(self._open) == self._limit:
                done = max(self._open, key=_OpenBatch.num_tokens)  # of equally full ones the oldest
                self._open.remove(done)
            self._open.append(self._new())
            self._open[-1].add(key, sample)
        self._pushed += 1
        return None if done is None else done.samples

    def finish(self) -> Iterator[list[P]]:
        """Yield the batches that are not full, oldest first, until the packer is empty."""
        while self._open:
            yield self._open.pop(0).samples

    def batches(self, stream: Iterable[P]) -> Iterator[list[P]]:
        """Yield all batches of a stream, with numbers as keys; `get_state` is that after the last push."""
        for sample in stream:
            if (done := self.push(sample)) is not None:
                yield done
        yield from self.finish()

    def get_state(self) -> dict[str, Any]:
        """Return {"pushed": samples so far, "open": the keys of those that wait, a list per batch}."""
        return {"pushed": self._pushed, "open": [batch.keys for batch in self._open]}

    def set_state(self, state: Mapping[str, Any], sample_of: Callable[[Any], P]) -> None:
        """Continue from the state of another packer with the same arguments; `sample_of` encodes a key's sample again.

        DataError if the samples do not fit as they did: the arguments, the data or the options differ.
        """
        opened = []
        for keys in state["open"]:
            opened.append(self._new())
            if not all(opened[-1].add(key, sample_of(key)) for key in keys):
                raise DataError(
                    f"state of the packer: found samples {keys}, which no longer fit a batch; expected the data and "
                    "options with which it was saved"
                )
        if len(opened) > self._limit:
            raise DataError(f"state of the packer: found {len(opened)} open batches; expected at most {self._limit}")
        self._open, self._pushed = opened, int(state["pushed"])

    def _new(self) -> "_OpenBatch[P]":
        return _OpenBatch(FirstFit(self._rows, self._length, self._per_row), self._vision_shape)

    def check(self, sample: Packable) -> None:
        """Check that a sample fits an empty batch; DataError if it does not."""
        if len(sample) > self._length:
            raise DataError(
                f"{sample.source}: found {counted(len(sample), 'token')}; expected at most {self._length}, a row"
            )
        if not vision_fits(sample.frames, self._vision_shape):
            sizes = sample.frames.prod(axis=1)
            raise DataError(
                f"{sample.source}: found {counted(len(sizes), *_MEDIA)} of up to {int(sizes.max())} patches, "
                f"{int(sizes.sum())} in all; expected ones that fit vision rows of {self._vision_shape}"
            )


class _OpenBatch(Generic[P]):
    """Samples that have places in a batch, by their keys."""

    def __init__(self, rows: FirstFit, vision_shape: VisionShape | None):
        self.samples: list[P] = []
        self.keys: list[Any] = []
        self._rows, self._vision_shape = rows, vision_shape
        self._frames: list[int] = []

    def add(self, key: Any, sample: P) -> bool:
        """Take a sample, if it fits beside the others."""
        if not self._rows.has_room(len(sample)):
            return False
        more = sample.frames.prod(axis=1).tolist()
        if more and (self._vision_shape is None or not vision_rows.fits([*self._frames, *more], self._vision_shape)):
            return False
        self._rows.add(len(sample))
        self.samples.append(sample)
        self.keys.append(key)
        self._frames += more
        return True

    def num_tokens(self) -> int:
        return sum(map(len, self.samples))
