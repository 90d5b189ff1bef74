"""What is looked at during training: the loss on records that are not learned from, and answers to some of them."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.data.media import source_of
from glm4v_jax.devices.distributed import agree, is_first
from glm4v_jax.devices.mesh import platform
from glm4v_jax.errors import DataError
from glm4v_jax.files import replacing, to_json
from glm4v_jax.generate.engine import Engine
from glm4v_jax.hf.model import Glm4vForConditionalGeneration
from glm4v_jax.inputs.media.load import is_path_like
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.model.glm4v import Glm4v
from train.config import EvalConfig, TrainConfig
from train.data.lane import Encoder, Made
from train.data.packing import Packer, TrainBatch
from train.data.placement import put, stacked
from train.data.records import Record
from train.data.samples import Sample, limited
from train.data.stream import encode_options, packed, packer_of
from train.loss import Sums
from train.scoring import score
from train.state import Layout, Leaves
from train.step import loss_sums


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Of a model, on records that it has not learned from.

    loss, accuracy: as of a training step, over all of them.
    score: mean of the metric over the answers; None where none were asked for.
    """

    loss: float
    accuracy: float
    score: float | None

    @property
    def metrics(self) -> dict[str, float]:
        """What models can be compared by, "loss" and "score", as far as they are numbers."""
        found = {"loss": self.loss, "score": self.score}
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


class Evaluator:
    """The records that are held back, made ready once; every process has all of them.

    every: steps between two evaluations.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: Glm4vProcessor,
        config: Glm4vConfig,
        job: TrainConfig,
        options: EvalConfig,
        mesh: Mesh,
        tell: Callable[[str], None],
    ):
        """Encode them.

        Args:
          records: the first `options.max_samples` are looked at.
          processor, config: of the model.
          job: for its batches.
          options: see there.
          mesh: of the model.
          tell: called with what is wrong with a record that is left out.

        Raises:
          DataError: there is nothing to look at, a record is bad or fits no batch and the job says that this ends it,
            or what one expects is nothing for the metric.
          MessageError: other processes have other records.
        """
        self.every = options.every
        self._config, self._job, self._options, self._mesh = config, job, options, mesh
        encoding = encode_options(job.data, job.batch)
        encode, packer = Encoder(records, processor, config, encoding), packer_of(job.batch)
        self._processor = limited(processor, encoding)
        self._samples: list[Sample] = []
        self._questions: list[tuple[Record, list[Mapping[str, Any]], str]] = []
        for number in range(min(len(records), options.max_samples)):
            made = _fitting(encode(number), packer)
            if made.sample is None:
                if made.error is not None and job.data.bad_rows == "error":
                    raise DataError(made.error)
                tell(f"not looked at: {made.error or f'{records[number].source}: is too long'}")
                continue
            self._samples.append(made.sample)
            if len(self._questions) < options.generate:
                record = records[number]
                messages, expected = question_of(record, self._processor.video_processor.fps)
                score(options.metric, expected, expected)  # complains now, not during the training
                self._questions.append((record, messages, expected))
        if not self._samples:
            raise DataError(f"eval: found no sample in {len(records)} records; expected at least one")
        # They make batches of them together: one that could not read a picture would leave the others waiting.
        agree("the records of eval", _digest(self._samples))

    def loss(
        self, layout: Layout, params: Leaves, frozen: Leaves, dtype: DTypeLike, is_stopped: Callable[[], bool]
    ) -> tuple[float, float] | None:
        """Mean cross entropy and accuracy of the targets; None where it was stopped between two batches."""
        sums = Sums(*(jnp.zeros((), jnp.float32) for _ in range(3)))
        for batch in self._batches():
            if is_stopped():
                return None
            sums = _added(sums, layout, params, frozen, jnp.dtype(dtype), batch)
        weight = float(sums.weight)
        return float(sums.loss) / weight, float(sums.correct) / weight

    def answers(
        self, layout: Layout, params: Leaves, frozen: Leaves, dtype: DTypeLike
    ) -> Generator[tuple[int, dict[str, Any]]]:
        """What the model answers, each with its number, what was expected and its score, as they end."""
        module = _model(layout, params, frozen, jnp.dtype(dtype))
        if platform() == "cpu":
            module = module.unstacked()
        generation = GenerationConfig.from_pretrained(self._job.model)
        model = Glm4vForConditionalGeneration(
            self._config, module=module, mesh=self._mesh, generation_config=generation
        )
        engine = Engine(model, self._processor, num_slots=self._options.slots)
        prompts = [messages for _, messages, _ in self._questions]
        completions = engine.generate_many(prompts, do_sample=False, max_new_tokens=self._options.max_new_tokens)
        for completion in completions:
            record, _, expected = self._questions[completion.index]
            value = score(self._options.metric, completion.text, expected)
            line = {"source": record.source, "expected": expected, "answer": completion.text, "score": value}
            yield completion.index, line

    def __call__(
        self,
        layout: Layout,
        params: Leaves,
        frozen: Leaves,
        dtype: DTypeLike,
        answers: Path,
        is_stopped: Callable[[], bool],
    ) -> Evaluation | None:
        """Look at a model; its answers are written to a file, a line of JSON each, in the records' order.

        Args:
          layout, params, frozen, dtype: of the model.
          answers: the file.
          is_stopped: asked between batches and between answers, by all processes alike.

        Returns:
          What was found; None where it was stopped.
        """
        found = self.loss(layout, params, frozen, dtype, is_stopped)
        if found is None or not self._questions:
            return None if found is None else Evaluation(*found, None)
        lines: dict[int, dict[str, Any]] = {}
        with contextlib.closing(self.answers(layout, params, frozen, dtype)) as answered:
            for number, line in answered:
                lines[number] = line
                if is_stopped():
                    return None
        if is_first():
            answers.parent.mkdir(parents=True, exist_ok=True)
            with replacing(answers) as aside:
                text = "".join(to_json(lines[number], ensure_ascii=False) + "\n" for number in sorted(lines))
                # Half of a character, which a model may say, is written as JSON can write it.
                aside.write_text(text, encoding="utf-8", errors="backslashreplace")
        return Evaluation(*found, statistics.fmean(line["score"] for line in lines.values()))

    def _batches(self) -> Iterator[Any]:
        batch = self._job.batch
        for samples in packer_of(batch).batches(self._samples):
            yield put(stacked([packed(samples, batch, self._config)]), self._mesh)


class Held(Sequence[Record]):
    """Some of a job's records, by their numbers."""

    def __init__(self, records: Sequence[Record], numbers: np.ndarray):
        self._records, self._numbers = records, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._records[int(number)] for number in self._numbers[index]]
        return self._records[int(self._numbers[index])]


def hold_back(records: Sequence[Record], share: float, seed: int) -> tuple[Held, Held]:
    """Records to learn from and records to look at, at least one of each, drawn by a seed.

    Raises:
      DataError: there are fewer than two.
    """
    if len(records) < 2:
        raise DataError(f"eval.share: found {len(records)} records; expected at least two")
    count = min(max(1, round(share * len(records))), len(records) - 1)
    numbers = np.random.default_rng(seed).permutation(len(records))
    return Held(records, np.sort(numbers[count:])), Held(records, np.sort(numbers[:count]))


def _fitting(made: Made, packer: Packer) -> Made:
    """What came of a record, if it fits a batch; else what is wrong with it."""
    if made.sample is None:
        return made
    try:
        packer.check(made.sample)
    except DataError as error:
        return Made(made.number, None, str(error))
    return made


def _digest(samples: Sequence[Sample]) -> bytes:
    """Of what processes must have alike; where their files lie may differ."""
    found = [
        (os.path.basename(sample.source), sample.input_ids.tobytes(), sample.frames.tobytes()) for sample in samples
    ]
    return hashlib.blake2b(repr(found).encode(), digest_size=16).digest()


def question_of(record: Record, fps: float) -> tuple[list[Mapping[str, Any]], str]:
    """The messages before the last one of the assistant, and what that says; `fps` is of frames that do not say it.

    Raises:
      DataError: there is none.
    """
    last = max((i for i, message in enumerate(record.messages) if message["role"] == "assistant"), default=0)
    if not last:
        raise DataError(f"{record.source}: found no answer behind a question; expected one, as eval.generate asks for")
    said = "".join(item.get("text", "") for item in record.messages[last]["content"])
    messages: list[Mapping[str, Any]] = [
        {**message, "content": [_timed(item, fps) for item in message["content"]]} for message in record.messages[:last]
    ]
    return messages, said


def _timed(item: Mapping[str, Any], fps: float) -> Mapping[str, Any]:
    is_frames = item["type"] == "video" and "fps" not in item and not is_path_like(source_of(item))
    return {**item, "fps": fps} if is_frames else item


@functools.partial(jax.jit, static_argnames=("layout", "dtype"))
def _model(layout: Layout, params: Leaves, frozen: Leaves, dtype: np.dtype) -> Glm4v:
    return layout.model(params, frozen, dtype)


@functools.partial(jax.jit, static_argnames=("layout", "dtype"))
def _added(sums: Sums, layout: Layout, params: Leaves, frozen: Leaves, dtype: np.dtype, batches: TrainBatch) -> Sums:
    """The sums, and those of a step's one batch."""
    batch = jax.tree.map(_first, batches)
    return jax.tree.map(jnp.add, sums, loss_sums(layout.model(params, frozen, dtype), batch))


def _first(array: Any) -> Any:
    return array[0]
