"""Samples -> batches of static shape: several conversations a row, which do not see one another.

A row's samples have the segment ids 1, 2, ... and each its own positions; the pictures and frames of all of them share
the batch's vision rows. What the model computes for a sample is what it computes for it alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from glm4v_jax.batch import Batch, VisionRows
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import DataError
from glm4v_jax.inputs import vision_rows
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.inputs.vision_rows import RowPlace, first_fit
from train.data.samples import IGNORED, Sample

VisionShape = tuple[int, int]
"""(R, L): vision rows of a batch, and patches of each."""


class TrainBatch(NamedTuple):
    """A batch with what is to be learned from it; a JAX pytree.

    batch: the model's input.
    targets: int32 [B, T], the token to predict at each place, -100 where there is none.
    weights: float32 [B, T], of each target in the loss; 0 where there is none.
    """

    batch: Batch
    targets: np.ndarray
    weights: np.ndarray


class PaddingShare(NamedTuple):
    """Shares of a batch, from 0 to 1, that nothing stands in; `patches` is None without vision rows."""

    tokens: float
    patches: float | None


def place(lengths: Sequence[int], rows: int, length: int, per_row: int | None = None) -> list[RowPlace] | None:
    """Places for samples of these lengths, each in the first row that has room; None where they do not fit.

    Args:
      lengths: tokens of each sample, in their order.
      rows, length: of the batch, B and T.
      per_row: the most samples of a row; None is no limit, 1 is no packing.
    """
    places = first_fit(lengths, length, per_row)
    fit = max(lengths, default=0) <= length and max((place.row for place in places), default=-1) < rows
    return places if fit else None


def vision_fits(frames: np.ndarray, shape: VisionShape | None) -> bool:
    """Whether frames int [F, 2] (height, width in patches) fit vision rows of this shape."""
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
    """One batch of samples, such as a `Packer` puts together.

    Args:
      samples: any number that fits, none too; they are placed in their order, each in the first row with room.
      rows, length: B and T of the batch.
      vision_shape: of its vision rows, which are there even if no sample has pictures; None is a batch without.
      config: of the model.
      average: what the loss is an average over: "token" weighs every target 1; "sample" weighs those of a sample 1
        together, however long its answers are.
      per_row: the most samples of a row; 1 is no packing.

    Raises:
      DataError: they do not fit.
    """
    places = place([len(sample) for sample in samples], rows, length, per_row)
    if places is None:
        found = ", ".join(str(len(sample)) for sample in samples)
        raise DataError(f"found samples of {found} tokens, from {_first_source(samples)} on; expected what fits "
                        f"{rows} x {length}")  # fmt: skip
    vision, features = _pack_vision(samples, vision_shape, config)
    input_ids, segment_ids = (np.zeros((rows, length), np.int32) for _ in range(2))
    position_ids = np.ones((3, rows, length), np.int32)
    vision_index, targets = np.full((rows, length), -1, np.int32), np.full((rows, length), IGNORED, np.int32)
    weights = np.zeros((rows, length), np.float32)
    for sample, (row, start, segment) in zip(samples, places, strict=True):
        here = np.s_[row, start : start + len(sample)]
        input_ids[here], segment_ids[here], targets[here] = sample.input_ids, segment, sample.targets
        position_ids[:, row, start : start + len(sample)] = sample.position_ids
        is_target = sample.targets != IGNORED
        weights[here] = is_target / np.float32(1 if average == "token" else max(is_target.sum(), 1))
        vision_index[here] = sample.prompt.vision_index(features)
    batch = Batch(input_ids, segment_ids, position_ids, None if vision is None else vision_index, vision)
    return TrainBatch(batch, targets, weights)


def _first_source(samples: Sequence[Sample]) -> str:
    return samples[0].source if samples else "nowhere"


def _pack_vision(
    samples: Sequence[Sample], shape: VisionShape | None, config: Glm4vConfig
) -> tuple[VisionRows | None, dict[Medium, np.ndarray]]:
    """The vision rows of all samples, and where the merged tokens of each medium are in the encoder's output."""
    vision = config.vision_config
    frames = np.concatenate([np.zeros((0, 2), np.int64), *(sample.frames for sample in samples)])
    if not vision_fits(frames, shape):
        raise DataError(
            f"found {len(frames)} pictures and frames of {int(frames.prod(axis=1).sum())} patches in samples from "
            f"{_first_source(samples)} on; expected what fits vision rows of {shape}"
        )
    if shape is None:
        return None, {}
    rows = vision_rows.empty_rows(*shape, vision.patch_dim, vision.position_grid)
    media = [medium for sample in samples for medium in sample.prompt.media]
    return rows, vision_rows.fill(rows, media, merge_size=vision.spatial_merge_size)


def padding_share(batch: TrainBatch) -> PaddingShare:
    """How much of a batch is padding."""
    vision = batch.batch.vision
    tokens = float(np.mean(batch.batch.segment_ids == 0))
    return PaddingShare(tokens, None if vision is None else vision_rows.padded_share(vision))


def smallest_length(samples: Sequence[Sample], lengths: Iterable[int], rows: int, per_row: int | None = None) -> int:
    """The smallest of some static lengths T at which the samples fit `rows` rows.

    Raises:
      DataError: they fit none.
    """
    tokens = [len(sample) for sample in samples]
    for length in sorted(lengths):
        if place(tokens, rows, length, per_row) is not None:
            return length
    raise DataError(f"found samples of {tokens} tokens, from {_first_source(samples)} on; expected what fits {rows} "
                    f"rows of one of {sorted(lengths)}")  # fmt: skip


def smallest_vision_shape(samples: Sequence[Sample], shapes: Iterable[VisionShape]) -> VisionShape:
    """The smallest of some static shapes of vision rows that holds the samples' pictures and frames.

    Raises:
      DataError: none does.
    """
    frames = np.concatenate([np.zeros((0, 2), np.int64), *(sample.frames for sample in samples)])
    ordered = sorted(shapes, key=_size)
    for shape in ordered:
        if vision_fits(frames, shape):
            return shape
    raise DataError(f"found {int(frames.prod(axis=1).sum())} patches in samples from {_first_source(samples)} on; "
                    f"expected what fits vision rows of one of {ordered}")  # fmt: skip


def _size(shape: VisionShape) -> tuple[int, VisionShape]:
    return shape[0] * shape[1], shape


class _Open:
    """A batch that is being filled; `keys` and `samples` in the order in which they came."""

    def __init__(self) -> None:
        self.keys: list[Any] = []
        self.samples: list[Sample] = []

    @property
    def tokens(self) -> int:
        return sum(map(len, self.samples))


class Packer:
    """Puts a stream of samples together to batches that fit.

    A few batches are open at a time; a sample goes to the first of them that has room for its tokens and its pictures.
    Where none has, and no more may be opened, the fullest is handed out. So a sample waits, but nothing is sorted, and
    the batches depend on the stream alone.

    The state, `get_state`, is JSON: the keys of the samples that wait. It can be taken after any `push`, and a packer
    that gets it with `set_state` goes on as this one does, from the next sample of the stream.
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
        """Start with nothing.

        Args:
          rows, length, vision_shape, per_row: of a batch; see `pack`.
          open_batches: how many are filled at a time: more leave less padding, and let samples wait longer.

        Raises:
          DataError: a number is not positive.
        """
        numbers = {"rows": rows, "length": length, "per_row": per_row, "open_batches": open_batches}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise DataError(f"{name}: found {number}; expected at least 1")
        self._rows, self._length, self._per_row = rows, length, per_row
        self._vision_shape = vision_shape
        self._limit = open_batches
        self._open: list[_Open] = []
        self._pushed = 0

    def push(self, sample: Sample, key: Any = None) -> list[Sample] | None:
        """Take the next sample.

        Args:
          sample: of the stream.
          key: by which it can be found again after a resume, such as its number in the data: something that JSON
            keeps. None is the number of samples pushed before it.

        Returns:
          The samples of a batch that is done, if there is one.

        Raises:
          DataError: it fits no batch, not even alone; the packer stays as it was.
        """
        key = self._pushed if key is None else key
        target = next((batch for batch in self._open if self._fits([*batch.samples, sample])), None)
        done = None
        if target is None:
            self.check(sample)
            if len(self._open) == self._limit:
                # Of equally full ones the oldest.
                done = max(self._open, key=_tokens_of)
                self._open.remove(done)
            target = _Open()
            self._open.append(target)
        target.keys.append(key)
        target.samples.append(sample)
        self._pushed += 1
        return None if done is None else done.samples

    def finish(self) -> Iterator[list[Sample]]:
        """The batches that are not full, oldest first; the packer is empty behind them."""
        while self._open:
            yield self._open.pop(0).samples

    def batches(self, stream: Iterable[Sample]) -> Iterator[list[Sample]]:
        """All batches of a stream, keys being numbers; at each of them `get_state` is that behind its last push."""
        for sample in stream:
            if (done := self.push(sample)) is not None:
                yield done
        yield from self.finish()

    def get_state(self) -> dict[str, Any]:
        """{"pushed": samples so far, "open": the keys of those that wait, a list a batch}."""
        return {"pushed": self._pushed, "open": [list(batch.keys) for batch in self._open]}

    def set_state(self, state: Mapping[str, Any], sample_of: Callable[[Any], Sample]) -> None:
        """Go on where another packer of the same arguments was.

        Args:
          state: its `get_state`.
          sample_of: the sample of a key, made anew.

        Raises:
          DataError: the samples do not fit as they did: the arguments, the data or the options differ.
        """
        opened = []
        for keys in state["open"]:
            batch = _Open()
            batch.keys, batch.samples = list(keys), [sample_of(key) for key in keys]
            if not self._fits(batch.samples):
                raise DataError(
                    f"state of the packer: the samples {list(keys)} do not fit a batch any more; expected the data and "
                    "options with which it was saved"
                )
            opened.append(batch)
        if len(opened) > self._limit:
            raise DataError(f"state of the packer: found {len(opened)} open batches; expected at most {self._limit}")
        self._open, self._pushed = opened, int(state["pushed"])

    def _fits(self, samples: Sequence[Sample]) -> bool:
        lengths = [len(sample) for sample in samples]
        if place(lengths, self._rows, self._length, self._per_row) is None:
            return False
        return vision_fits(np.concatenate([sample.frames for sample in samples]), self._vision_shape)

    def check(self, sample: Sample) -> None:
        """Check that a sample fits a batch, if alone.

        Raises:
          DataError: it does not.
        """
        if len(sample) > self._length:
            raise DataError(f"{sample.source}: found {len(sample)} tokens; expected at most {self._length}, a row")
        if not vision_fits(sample.frames, self._vision_shape):
            sizes = sample.frames.prod(axis=1)
            raise DataError(
                f"{sample.source}: found {len(sizes)} pictures and frames of up to {int(sizes.max())} patches, "
                f"{int(sizes.sum())} together; expected what fits vision rows of {self._vision_shape}"
            )


def _tokens_of(batch: _Open) -> int:
    return batch.tokens
