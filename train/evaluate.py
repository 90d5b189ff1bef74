"""What is looked at during training: the loss on records that are not learned from, and answers to some of them."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from glm4v_jax.config import Glm4vConfig
from glm4v_jax.distributed import is_first
from glm4v_jax.errors import DataError
from glm4v_jax.generate.config import GenerationConfig
from glm4v_jax.generate.engine import Engine
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.mesh import platform
from glm4v_jax.modeling import Glm4vForConditionalGeneration
from train.config import EvalConfig, TrainConfig
from train.lane import Encoder
from train.loss import Sums
from train.packing import Packer, pack
from train.placement import put, stacked
from train.records import Record
from train.samples import Sample
from train.scoring import score
from train.state import Layout, Leaves
from train.step import loss_sums
from train.stream import encode_options, vision_shape


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Of a model, on records that it has not learned from.

    loss, accuracy: as of a training step, over all of them.
    score: mean of the metric over the answers; None where none were asked for.
    """

    loss: float
    accuracy: float
    score: float | None

    def best_by(self, name: str) -> float:
        """A number that is higher for a better model: by "loss" or by "score"."""
        return -self.loss if name == "loss" else float(self.score or 0.0)


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
          DataError: there is nothing to look at, a record is bad and the job says that this ends it, or what one
            expects is nothing for the metric.
        """
        self.every = options.every
        self._processor, self._config, self._job, self._options, self._mesh = processor, config, job, options, mesh
        encode = Encoder(records, processor, config, encode_options(job.data, job.batch))
        self._samples: list[Sample] = []
        self._questions: list[tuple[Record, list[Mapping[str, Any]], str]] = []
        for number in range(min(len(records), options.max_samples)):
            made = encode(number)
            if made.sample is None:
                if made.error is not None and job.data.bad_rows == "error":
                    raise DataError(made.error)
                tell(f"not looked at: {made.error or f'{records[number].source}: is too long'}")
                continue
            self._samples.append(made.sample)
            if len(self._questions) < options.generate:
                record = records[number]
                messages, expected = _question(record)
                score(options.metric, expected, expected)  # complains now, not during the training
                self._questions.append((record, messages, expected))
        if not self._samples:
            raise DataError(f"eval: found no sample in {len(records)} records; expected at least one")
        self._programs: dict[tuple[Layout, np.dtype], Callable[..., Sums]] = {}

    def loss(self, layout: Layout, params: Leaves, frozen: Leaves, dtype: DTypeLike) -> tuple[float, float]:
        """Mean cross entropy and accuracy of the targets."""
        program = self._programs.setdefault((layout, jnp.dtype(dtype)), _sums_program(layout, dtype))
        sums = Sums(*(jnp.zeros((), jnp.float32) for _ in range(3)))
        for batch in self._batches():
            sums = program(sums, params, frozen, batch)
        weight = float(sums.weight)
        return float(sums.loss) / weight, float(sums.correct) / weight

    def answers(self, layout: Layout, params: Leaves, frozen: Leaves, dtype: DTypeLike) -> Iterator[dict[str, Any]]:
        """What the model answers, each with what was expected and its score, in the records' order."""
        module = jax.jit(layout.model, static_argnums=2)(params, frozen, jnp.dtype(dtype))
        if platform() == "cpu":
            module = module.unstacked()
        generation = GenerationConfig.from_pretrained(self._job.model)
        model = Glm4vForConditionalGeneration(
            self._config, module=module, mesh=self._mesh, generation_config=generation
        )
        engine = Engine(model, self._processor, num_slots=self._options.slots)
        prompts = [messages for _, messages, _ in self._questions]
        completions = engine.generate_many(prompts, do_sample=False, max_new_tokens=self._options.max_new_tokens)
        for completion in sorted(completions, key=_index):
            record, _, expected = self._questions[completion.index]
            value = score(self._options.metric, completion.text, expected)
            yield {"source": record.source, "expected": expected, "answer": completion.text, "score": value}

    def __call__(self, layout: Layout, params: Leaves, frozen: Leaves, dtype: DTypeLike, answers: Path) -> Evaluation:
        """Look at a model; its answers are written to a file, a line of JSON each."""
        loss, accuracy = self.loss(layout, params, frozen, dtype)
        if not self._questions:
            return Evaluation(loss, accuracy, None)
        lines = list(self.answers(layout, params, frozen, dtype))
        if is_first():
            answers.parent.mkdir(parents=True, exist_ok=True)
            aside = answers.with_name(f".{answers.name}.partial")
            aside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
            aside.replace(answers)
        return Evaluation(loss, accuracy, statistics.fmean(line["score"] for line in lines))

    def _batches(self) -> Iterator[Any]:
        batch = self._job.batch
        per_row = None if batch.pack else 1
        packer = Packer(rows=batch.rows, length=batch.length, vision_shape=vision_shape(batch), per_row=per_row)
        for samples in packer.batches(self._samples):
            packed = pack(
                samples, rows=batch.rows, length=batch.length, vision_shape=vision_shape(batch), config=self._config,
                average=batch.average, per_row=per_row,
            )  # fmt: skip
            yield put(stacked([packed]), self._mesh)


class Held(Sequence[Record]):
    """Some of a job's records, by their numbers."""

    def __init__(self, records: Sequence[Record], numbers: np.ndarray):
        self._records, self._numbers = records, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
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


def _question(record: Record) -> tuple[list[Mapping[str, Any]], str]:
    """The messages before the last one of the assistant, and what that says.

    Raises:
      DataError: there is none.
    """
    last = max((i for i, message in enumerate(record.messages) if message["role"] == "assistant"), default=0)
    if not last:
        raise DataError(f"{record.source}: found no answer behind a question; expected one, as eval.generate asks for")
    said = "".join(item.get("text", "") for item in record.messages[last]["content"])
    return list(record.messages[:last]), said


def _index(completion: Any) -> int:
    return completion.index


def _sums_program(layout: Layout, dtype: DTypeLike) -> Callable[..., Sums]:
    def add(sums: Sums, params: Leaves, frozen: Leaves, batches: Any) -> Sums:
        batch = jax.tree.map(_first, batches)
        return jax.tree.map(jnp.add, sums, loss_sums(layout.model(params, frozen, dtype), batch))

    return jax.jit(add)


def _first(array: Any) -> Any:
    return array[0]
