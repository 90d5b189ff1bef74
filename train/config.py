"""A training job as a TOML file: typed dataclasses, and the way from a file to them."""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from glm4v_jax.errors import ConfigError
from glm4v_jax.model.layers import Remat
from glm4v_jax.model.lora import LoraConfig
from glm4v_jax.model.lora import check_config as check_lora
from train.optimizers import GROUPS, OptimizerConfig, check_optimizer

MODEL, ADAPTER = "model", "adapter"
"""The result of a job, in its directory."""
_LARGEST_SEED = 2**32 - 1
"""An adapter is drawn by a JAX key, which has 32 bits of a seed."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learned from.

    Attributes:
      files: see `records.read_records`; relative to the file of the job.
      format: of their rows; each row is looked at by default.
      media_dir: what paths in them are relative to; the data file's directory by default.
      shuffle: the order changes with every pass; otherwise it is that of the files.
      max_length: the most tokens of a sample; `batch.length` by default.
      too_long: "drop" leaves longer ones out, "cut" cuts them behind, "error" ends the job.
      keep_thoughts: "last", "all" or "none"; see `samples.EncodeOptions`.
      bad_rows: "skip" leaves out rows that cannot be read or do not fit, tells of each once and counts them, "error"
        ends the job.
      image_max_pixels, video_max_pixels, video_fps: see `samples.EncodeOptions`.
      threads: that make samples ready.
    """

    files: tuple[str, ...]
    format: str | None = None
    media_dir: str | None = None
    shuffle: bool = True
    max_length: int | None = None
    too_long: Literal["error", "drop", "cut"] = "drop"
    keep_thoughts: Literal["last", "all", "none"] = "last"
    bad_rows: Literal["skip", "error"] = "skip"
    image_max_pixels: int | None = None
    video_max_pixels: int | None = None
    video_fps: float | None = None
    threads: int = 4


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """What a step takes; all shapes are static.

    Attributes:
      rows: B of a micro-batch, over all devices.
      length: T of a row, in tokens.
      vision_rows, vision_length: R and L of its vision rows, in patches; 0 rows for text alone.
      micro_batches: whose gradients make a step.
      pack: several samples a row; otherwise one.
      open_batches: how many a lane fills at a time: more leave less padding, and let samples wait longer.
      lanes: into how many parts of whole rows and vision rows a batch is divided, each with a reader of its own, so
        that a process makes only the samples that its devices take; as many as both allow by default. The batches
        depend on it, and on no mesh. Each keeps the patches of its `open_batches` in the memory of its host.
      average: the loss is an average over all targets ("token"), or over samples.
    """

    rows: int = 1
    length: int = 8192
    vision_rows: int = 1
    vision_length: int = 8192
    micro_batches: int = 1
    pack: bool = True
    open_batches: int = 4
    lanes: int | None = None
    average: Literal["token", "sample"] = "token"

    @property
    def per_row(self) -> int | None:
        """The most samples of a row; None is no limit."""
        return None if self.pack else 1

    @property
    def vision_shape(self) -> tuple[int, int] | None:
        """(R, L) of the vision rows; None for text alone."""
        return (self.vision_rows, self.vision_length) if self.vision_rows else None

    @property
    def tokens(self) -> int:
        """Of a step, padding included."""
        return self.micro_batches * self.rows * self.length

    @property
    def patches(self) -> int:
        """Of a step, padding included."""
        return self.micro_batches * self.vision_rows * self.vision_length


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a job besides its result.

    Attributes:
      every: steps between two checkpoints; there is one behind the last step, too.
      keep: how many of the latest stay.
      best: what to keep the best one by, besides those, and to make the result of: "loss" or "score" of the
        evaluation; the result is that of the last step by default.
    """

    every: int = 100
    keep: int = 2
    best: Literal["loss", "score"] | None = None


MetricName = Literal["exact_match", "box_iou", "anls", "relaxed_accuracy", "cer"]
"""Metrics that need no more than the right answer."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is looked at during training.

    Attributes:
      files: other data than those learned from, of the same format.
      share: in their place, the share of the data that is held back, drawn by the job's seed.
      every: steps between two evaluations; there is one behind the last step, too. With `checkpoint.best`, each is
        followed by a checkpoint.
      max_samples: the first so many are looked at; every process keeps the patches of them all in memory, 4.7 kB each
        for the 9B (39 MB for a picture of 8,192).
      generate: how many of them are answered, too, greedily, and compared with what their last message says. That
        takes a copy of the weights, in the dtype that the model computes in, while it lasts.
      metric: of the answers, see `eval.metrics`; what they are compared with is what the last message says.
      max_new_tokens: of an answer.
      slots: how many are answered at a time.
    """

    files: tuple[str, ...] = ()
    share: float = 0.0
    every: int = 100
    max_samples: int = 64
    generate: int = 0
    metric: MetricName = "exact_match"
    max_new_tokens: int = 512
    slots: int = 8


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A job.

    Attributes:
      model: directory of the checkpoint to begin with, in either format.
      out: directory of the job: checkpoints, metrics, and the trained model.
      data, batch, optimizer, checkpoint, eval: see there.
      steps: of the whole training.
      freeze: parts of the model that stay as they are: "vision", "merger", "llm"; not with `lora`.
      lora: train an adapter instead, and leave the whole model as it is.
      quantize: with `lora`, keep the decoder's kernels as "int8" or "int4"; see `glm4v_jax.model.quantize`.
      dtype: that the model computes in; float32 on a CPU and bfloat16 elsewhere by default. Weights are float32.
      remat: what of a layer is made again in the backward pass: "full", all but its input; "attention" and "dots"
        keep more, and "none" all.
      max_grad_norm: steps with larger gradients are left out.
      max_skipped: the job ends after so many of them one after another.
      mesh: a preset or axes; see `glm4v mesh`.
      seed: of everything that is drawn.
      log_every: steps between two lines for a person; every step is a line of metrics.jsonl.
      tensorboard: write the metrics for TensorBoard, too.
    """

    model: str
    out: str
    data: DataConfig
    steps: int
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig | None = None
    freeze: tuple[str, ...] = ("vision",)
    lora: LoraConfig | None = None
    quantize: Literal["int8", "int4"] | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: Remat = "full"
    max_grad_norm: float = float("inf")
    max_skipped: int = 10
    mesh: str = "train"
    seed: int = 0
    log_every: int = 1
    tensorboard: bool = False


def load_config(path: str | Path) -> TrainConfig:
    """Read a job; relative paths in it are relative to the file.

    Raises:
      ConfigError: it cannot be read, a field is unknown, missing or of another type, or a number is out of its range.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        config = _made(TrainConfig, content, "")
        if "freeze" in content and config.lora is not None:
            raise ConfigError(
                f"freeze: found {list(config.freeze)} beside lora; expected one of them: an adapter leaves the whole "
                "model as it is, and lora.target chooses its layers"
            )
        _check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    here = path.absolute().parent
    data = dataclasses.replace(
        config.data,
        files=tuple(str(here / file) for file in config.data.files),
        media_dir=None if config.data.media_dir is None else str(here / config.data.media_dir),
    )
    evaluation = config.eval
    if evaluation is not None:
        evaluation = dataclasses.replace(evaluation, files=tuple(str(here / file) for file in evaluation.files))
    return dataclasses.replace(
        config, model=str(here / config.model), out=str(here / config.out), data=data, eval=evaluation
    )


def _made(kind: Any, content: Mapping[str, Any], where: str) -> Any:
    """A dataclass of a table."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(content) - set(fields)):
        raise ConfigError(f"{where}{unknown[0]}: found an unknown field; expected some of {', '.join(fields)}")
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in content:
            raise ConfigError(f"{where}{name}: found nothing; expected a value")
    return kind(**{name: _value(hints[name], value, f"{where}{name}") for name, value in content.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _value(next(kind for kind in arguments if kind is not types.NoneType), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: found {value!r}; expected one of {', '.join(map(repr, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: found {value!r}; expected a table")
        return _made(hint, value, f"{where}.")
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: found {value!r}; expected a list")
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: found {value!r}; expected a table")
        return {name: _value(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: found {value!r}; expected {hint.__name__}")
    return value


def _check(config: TrainConfig) -> None:
    batch = config.batch
    positive = {
        "steps": config.steps, "log_every": config.log_every, "max_skipped": config.max_skipped,
        "max_grad_norm": config.max_grad_norm, "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep, "data.threads": config.data.threads,
        "batch.rows": batch.rows, "batch.length": batch.length, "batch.vision_length": batch.vision_length,
        "batch.micro_batches": batch.micro_batches, "batch.open_batches": batch.open_batches,
    }  # fmt: skip
    if config.eval is not None:
        numbers = ("every", "max_samples", "max_new_tokens", "slots")
        positive |= {f"eval.{name}": getattr(config.eval, name) for name in numbers}
    if batch.lanes is not None:
        positive["batch.lanes"] = batch.lanes
    for name in ("max_length", "image_max_pixels", "video_max_pixels", "video_fps"):
        if (given := getattr(config.data, name)) is not None:
            positive[f"data.{name}"] = given
    for name, number in positive.items():
        if not number > 0:
            raise ConfigError(f"{name}: found {number}; expected a number above 0")
    if not 0 <= config.seed <= _LARGEST_SEED:
        raise ConfigError(f"seed: found {config.seed}; expected a number from 0 to {_LARGEST_SEED}")
    if batch.vision_rows < 0:
        raise ConfigError(f"batch.vision_rows: found {batch.vision_rows}; expected a number from 0 on")
    if batch.lanes is not None and (batch.rows % batch.lanes or batch.vision_rows % batch.lanes):
        raise ConfigError(
            f"batch.lanes: found {batch.lanes}; expected a divisor of rows, {batch.rows}, and of vision_rows, "
            f"{batch.vision_rows}"
        )
    if not config.data.files:
        raise ConfigError("data.files: found none; expected at least one")
    if unknown := set(config.freeze) - set(GROUPS):
        raise ConfigError(f"freeze: found {unknown.pop()!r}; expected some of {', '.join(GROUPS)}")
    if config.quantize is not None and config.lora is None:
        raise ConfigError(
            f"quantize: found {config.quantize!r} without lora; expected both: integers cannot be trained"
        )
    _check_part("optimizer", lambda: check_optimizer(config.optimizer, config.steps))
    if (lora := config.lora) is not None:
        _check_part("lora", lambda: check_lora(lora))
    _check_evaluation(config)


def _check_part(name: str, check: Callable[[], None]) -> None:
    """What is wrong with a table, under its name."""
    try:
        check()
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None


def _check_evaluation(config: TrainConfig) -> None:
    found, best = config.eval, config.checkpoint.best
    if found is None:
        if best is not None:
            raise ConfigError(f"checkpoint.best: found {best!r} without [eval]; expected both")
        return
    if bool(found.files) == bool(found.share):
        raise ConfigError(
            f"eval: found files of {len(found.files)} names and a share of {found.share}; expected one of them"
        )
    if not 0 <= found.share < 1:
        raise ConfigError(f"eval.share: found {found.share}; expected a number from 0 to below 1")
    if found.generate < 0:
        raise ConfigError(f"eval.generate: found {found.generate}; expected a number from 0 on")
    if best == "score" and not found.generate:
        raise ConfigError("checkpoint.best: found 'score' with eval.generate = 0; expected some answers to score")
