"""Evaluation during training: the loss on held-out records, and scored answers to some of them."""

import contextlib
import dataclasses
import functools
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

from eval.metrics import METRICS
from eval.parse_answer import final_answer
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.console.progress import seldom
from glm4v_jax.devices.distributed import agree, errors_of_all, is_first
from glm4v_jax.devices.mesh import platform
from glm4v_jax.errors import DataError, counted
from glm4v_jax.files import replacing, to_json
from glm4v_jax.generate.engine import Engine, Request
from glm4v_jax.generate.text.boxes import find_boxes
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import outputs_first
from glm4v_jax.model.lora import fix_magnitudes
from glm4v_jax.model.runtime import Runtime
from train.config import EvalConfig, TrainConfig
from train.data.encoder import TOO_LONG, Encoder, encode_options, make_encoder
from train.data.packing import TrainBatch
from train.data.placement import packed, packer_of, put, stacked
from train.data.records import Record, question_of
from train.data.samples import Sample, limited
from train.loss import Sums
from train.preference import PreferenceConfig
from train.references import compute
from train.state import Weights
from train.step import loss_sums


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of a model on held-out records.

    loss, accuracy: as of a training step, over all of them.
    score: mean of the metric over the answers; None where none were asked for.
    margin: of preferences, as of a training step.
    """

    loss: float
    accuracy: float
    score: float | None
    margin: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """What models can be compared by, "loss" and "score", as far as they are finite."""
        found = {"loss": self.loss, "score": self.score}
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


class Evaluator:
    """The held-out records, encoded once; every process has all of them."""

    def __init__(
        self,
        records: Sequence[Record],
        processor: Glm4vProcessor,
        config: Glm4vConfig,
        job: TrainConfig,
        options: EvalConfig,
        mesh: Mesh,
        log: Callable[[str], None],
    ):
        """Encode the first `options.max_samples` records.

        `log` is called with one message for every record that is skipped, and with how far an evaluation is.

        Raises:
          DataError: no record can be evaluated; or a record is bad or fits no batch and the job says that this ends it;
            or its reference answer does not suit the metric.
          MessageError: other processes have other records.
        """
        self._config, self._job, self._options, self._mesh = config, job, options, mesh
        self._log, self._note = log, seldom(log)
        encoder = make_encoder(records, processor, config, job.data, job.batch, lanes=1)
        self._processor = limited(processor, encode_options(job.data, job.batch))
        self._samples: list[Sample] = []
        self._questions: list[tuple[Record, list[Mapping[str, Any]], str]] = []
        with errors_of_all():
            self._encode(records, encoder)
        # The processes make batches of them together: one that could not read an image would leave the others waiting.
        # The directories of their files may differ.
        agree(
            "the records of eval",
            [(os.path.basename(one.source), one.input_ids.tobytes(), one.frames.tobytes()) for one in self._samples],
        )

    def _encode(self, records: Sequence[Record], encoder: Encoder) -> None:
        """Encode the records, and find out which of them are questions to answer."""
        options, log = self._options, self._log
        for number in range(min(len(records), options.max_samples)):
            _, found = encoder(number)
            if not isinstance(found, Sample):
                if found is not None and self._job.data.bad_rows == "error":
                    raise found
                log(f"skipped in the evaluation: {found or f'{records[number].source}: {TOO_LONG}'}")
                continue
            self._samples.append(found)
            if len(self._questions) >= options.generate:
                continue
            record = records[number]
            if record.ends_in_call:
                log(f"not answered in the evaluation: {record.source}: ends with a call of a tool, which has no score")
            else:
                messages, expected = question_of(record, self._processor.video_processor.fps)
                score(options.metric, expected, expected)  # fails now, not during the training
                self._questions.append((record, messages, expected))
        if not self._samples:
            raise DataError(f"eval: found no sample in {counted(len(records), 'record')}; expected at least one")

    def compare_with(self, weights: Weights) -> None:
        """Compare pairs with this model, that before the training; all processes call this."""
        samples, batch = self._samples, self._job.batch
        for number, found in compute(weights, enumerate(samples), batch, self._config, self._mesh):
            samples[number] = dataclasses.replace(samples[number], reference=found)

    def loss(self, weights: Weights, is_stopped: Callable[[], bool]) -> Evaluation | None:
        """Evaluate what a training step minimises, without answers; None if stopped between two batches."""
        preference = self._job.preference
        sums = Sums.zero(preference is not None)
        number = 0
        for batch, count in self._batches():
            if is_stopped():
                return None
            number += count
            sums = evaluation_loss(sums, weights, batch, preference)
            self._note(f"evaluating: {number} of {len(self._samples)} samples")
        weight = float(sums.weight)
        margin = None if sums.margin is None else float(sums.margin) / weight
        return Evaluation(float(sums.loss) / weight, float(sums.correct) / weight, None, margin)

    def answers(self, weights: Weights) -> Generator[tuple[int, dict[str, Any]]]:
        """Yield the number of a question, and a line with the answer, the reference and the score, as answers end."""
        module = _module(weights)
        if platform() == "cpu":
            module = module.unstacked()
        runtime = Runtime.of(module, self._mesh, GenerationConfig.from_pretrained(self._job.model))
        engine = Engine(runtime, self._processor, num_slots=self._options.slots)
        prompts = [Request(messages, {"tools": list(record.tools)}) for record, messages, _ in self._questions]
        completions = engine.generate_many(prompts, do_sample=False, max_new_tokens=self._options.max_new_tokens)
        for completion in completions:
            record, _, expected = self._questions[completion.index]
            value = score(self._options.metric, completion.text, expected)
            line = {"source": record.source, "expected": expected, "answer": completion.text, "score": value}
            yield completion.index, line

    def __call__(self, weights: Weights, answers: Path, is_stopped: Callable[[], bool]) -> Evaluation | None:
        """Evaluate a model, and write its answers to a file, one JSON line each, in the records' order.

        `is_stopped` is called between batches and between answers, in all processes alike; None if it was.
        """
        self._note = seldom(self._log)
        found = self.loss(weights, is_stopped)
        if found is None or not self._questions:
            return found
        lines: dict[int, dict[str, Any]] = {}
        with contextlib.closing(self.answers(weights)) as answered:
            for number, line in answered:
                lines[number] = line
                self._note(f"evaluating: {len(lines)} of {len(self._questions)} answers")
                if is_stopped():
                    return None
        if is_first():
            answers.parent.mkdir(parents=True, exist_ok=True)
            with replacing(answers) as aside:
                text = "".join(to_json(lines[number], ensure_ascii=False) + "\n" for number in sorted(lines))
                # Half a surrogate pair, which a model may generate, is written as JSON's escape.
                aside.write_text(text, encoding="utf-8", errors="backslashreplace")
        return dataclasses.replace(found, score=statistics.fmean(line["score"] for line in lines.values()))

    def _batches(self) -> Iterator[tuple[Any, int]]:
        """Batches, and how many samples each has."""
        batch = self._job.batch
        for samples in packer_of(batch).batches(self._samples):
            yield put(stacked([packed(samples, batch, self._config)]), self._mesh), len(samples)


@jax.jit
def _module(weights: Weights) -> Glm4v:
    """The model in its compute dtype, on a TPU with its kernels as that decodes with them."""
    model = fix_magnitudes(weights.model())
    return outputs_first(model) if platform() == "tpu" else model


class Subset(Sequence[Record]):
    """Some of a job's records, by their numbers."""

    def __init__(self, records: Sequence[Record], numbers: np.ndarray):
        self._records, self._numbers = records, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._records[int(number)] for number in self._numbers[index]]
        return self._records[int(self._numbers[index])]


def hold_out(records: Sequence[Record], fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Divide records into those to train on and those held out, at least one of each, drawn by a seed.

    Raises:
      DataError: there are fewer than two.
    """
    if len(records) < 2:
        raise DataError(f"eval.share: found {counted(len(records), 'record')}; expected at least two")
    count = min(max(1, round(fraction * len(records))), len(records) - 1)
    numbers = np.random.default_rng(seed).permutation(len(records))
    return Subset(records, np.sort(numbers[count:])), Subset(records, np.sort(numbers[:count]))


def score(metric: str, answer: str, expected: str) -> float:
    """Return the score of an answer, from 0 to 1, by a metric of `config.MetricName`.

    `answer` and `expected` are whole texts, thought and tags included; DataError if the latter has no reference.
    """
    found = final_answer(expected)
    if found is None:
        raise DataError(f"{metric}: found no answer in {expected!r}; expected one")
    item = {"answer": found, "boxes": [list(box) for box in find_boxes(expected)], "width": 1000, "height": 1000}
    return METRICS[metric].score(answer, item).value


@functools.partial(jax.jit, static_argnames="preference")
def evaluation_loss(
    sums: Sums, weights: Weights, batches: TrainBatch, preference: PreferenceConfig | None = None
) -> Sums:
    """Add the sums of a step's one micro-batch."""
    batch = jax.tree.map(lambda x: x[0], batches)
    return jax.tree.map(jnp.add, sums, loss_sums(weights.model(), batch, preference=preference))
