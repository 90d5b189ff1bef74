"""A training job as a TOML file: typed dataclasses that check themselves, and `load_config`, which reads the file."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from glm4v_jax.config.checks import (
    AnyNumber,
    Natural,
    Positive,
    PositiveNumber,
    Seed,
    fault,
    from_mapping,
    raise_faults,
    validate,
)
from glm4v_jax.errors import ConfigError, counted, not_there
from glm4v_jax.files import is_hub_name
from glm4v_jax.model.layers import Remat
from glm4v_jax.model.lora import LoraConfig
from train.data import FormatName
from train.data.samples import EncodeOptions
from train.optimizers import Group, OptimizerConfig, warmup_steps
from train.preference import PreferenceConfig
from train.rl.config import RLConfig

MODEL, ADAPTER = "model", "adapter"
"""The result of a job, in its output directory."""

TrackerName = Literal["tensorboard", "wandb", "trackio"]
"""What metrics can be written to beside the files of a job; see `train.trackers`."""

MetricName = Literal["exact_match", "box_iou", "anls", "relaxed_accuracy", "cer"]
"""Metrics that need no more than the reference answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSetConfig:
    """One of several data sets.

    Attributes:
      files: as those of `DataConfig`.
      share: of the samples, relative to the shares of the others; each set is repeated in an order of its own.
      num_samples: take only this many of its rows, drawn by the job's seed.
    """

    files: tuple[str, ...]
    share: PositiveNumber = 1.0
    num_samples: Positive | None = None

    def __post_init__(self) -> None:
        validate(self)
        if not self.files:
            raise_faults([fault("files", [], "a list of at least one path")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(EncodeOptions):
    """The training data, and how it is encoded; see `EncodeOptions` for the fields that are not listed here.

    Attributes:
      files: data files, directories of them, or patterns such as "data/*.jsonl"; relative to the job file. Empty only
        beside `sets`, or where `loop.train` gets records.
      sets: name -> a data set, instead of `files`, for shares that are not those of their rows.
      format: format of all rows; by default that of each row is found from its fields.
      media_dir: directory that paths in the rows are relative to; by default that of the data file.
      shuffle: draw a new order for every epoch; otherwise keep the order of the files.
      max_length: the most tokens of a sample; by default `batch.length`.
      too_long: "drop" skips longer samples, "cut" truncates them, "error" ends the job.
      bad_rows: "skip" skips rows that cannot be read or do not fit, logs each once and counts them; "error" ends the
        job.
      threads: how many encode samples.
      levels: with `rl`, pass rates of the problems, files that `glm4v train levels` has written; of several the mean.
    """

    files: tuple[str, ...] = ()
    sets: dict[str, DataSetConfig] = dataclasses.field(default_factory=dict)
    format: FormatName | None = None
    media_dir: str | None = None
    shuffle: bool = True
    too_long: Literal["error", "drop", "cut"] = "drop"
    bad_rows: Literal["skip", "error"] = "skip"
    threads: Positive = 4
    levels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        validate(self)
        if self.files and self.sets:
            raise_faults([fault("files", list(self.files), "none beside sets")])


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The batch of a step; all shapes are static.

    Attributes:
      rows: B of a micro-batch, over all devices.
      length: T of a row, in tokens.
      vision_rows, vision_length: R and L of its vision rows, in patches; 0 rows for text alone.
      micro_batches: how many a step accumulates gradients over.
      pack: several samples a row; otherwise one.
      open_batches: how many a lane fills at a time: more leave less padding, and let samples wait longer.
      lanes: into how many parts of rows and vision rows a batch is divided, each with a reader of its own, so that a
        process encodes only the samples that its devices take; by default as many as both allow. The batches depend
        on it, and on no mesh. Each lane keeps the patches of its `open_batches` in host memory.
      average: the loss is an average over all targets ("token"), or over samples ("sample").
    """

    rows: Positive = 1
    length: Positive = 8192
    vision_rows: Natural = 1
    vision_length: Positive = 8192
    micro_batches: Positive = 1
    pack: bool = True
    open_batches: Positive = 4
    lanes: Positive | None = None
    average: Literal["token", "sample"] = "token"

    def __post_init__(self) -> None:
        validate(self)
        if self.lanes is not None and (self.rows % self.lanes or self.vision_rows % self.lanes):
            expected = f"a divisor of rows, {self.rows}, and of vision_rows, {self.vision_rows}"
            raise_faults([fault("lanes", self.lanes, expected)])

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
        """Tokens of a step, padding included."""
        return self.micro_batches * self.rows * self.length

    @property
    def patches(self) -> int:
        """Patches of a step, padding included."""
        return self.micro_batches * self.vision_rows * self.vision_length


@dataclasses.dataclass(frozen=True)
class AdapterConfig(LoraConfig):
    """An adapter to train; see `LoraConfig` for the fields that are not listed here.

    Attributes:
      dropout: fraction of the adapter's inputs that is set to zero, drawn again in every step.
      adapter: directory of an adapter to start from, of this package's or PEFT's. Rank, alpha, layers and
        whole modules are its own, and must not be set beside it.
    """

    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    adapter: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is not None:
            given = {name: getattr(self, name) for name in _OF_LORA}
            given = {name: value for name, value in given.items() if value != _OF_LORA[name]}
            raise_faults(_beside_adapter(given))


_OF_LORA = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
"""Fields of an adapter that one to start from has itself, and their defaults."""


def _beside_adapter(given: Mapping[str, Any], table: str = "") -> list[str]:
    """Faults of fields that an adapter to start from has itself; `table` goes before their names."""
    return [
        f"{table}{name}: found {value!r} beside {table}adapter; expected one of them: the adapter has its own"
        for name, value in given.items()
    ]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints a job keeps besides its result.

    Attributes:
      every: steps between two checkpoints; there is one after the last step, too, but none after a step that was
        skipped (`max_grad_norm`). With `rl` they are numbered by updates, of which a step without a group to learn from
        counts as one; there is none while groups wait (`rl.min_groups`).
      keep: how many of the latest are kept.
      best: keep also the best checkpoint by "loss" or "score" of the evaluation, of equal scores that of the smallest
        loss, and export that one; by default the result is that of the last step.
    """

    every: Positive = 100
    keep: Positive = 2
    best: Literal["loss", "score"] | None = None

    def __post_init__(self) -> None:
        validate(self)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out records during training.

    Attributes:
      files: held-out data, of the same format as the training data.
      share: instead of `files`, the fraction of the training data that is held out, drawn by the job's seed.
      every: steps between two evaluations; there is one after the last step, too. With `checkpoint.best`, a checkpoint
        is saved before each.
      patience: the job ends after this many evaluations in a row without a better model by `checkpoint.best`, which is
        then "loss" unless it says otherwise; the result is the best.
      max_samples: evaluate the first N records; every process keeps all their patches in memory, 4.7 kB each for the
        9B (39 MB for an image of 8,192).
      generate: how many of them to answer as well, greedily, and to compare with their last message. That takes a copy
        of the weights, in the compute dtype, while it lasts.
      metric: of the answers, see `eval.metrics`; the reference is what the last message says.
      max_new_tokens: of an answer.
      slots: how many are answered at a time.
    """

    files: tuple[str, ...] = ()
    share: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    every: Positive = 100
    patience: Positive | None = None
    max_samples: Positive = 64
    generate: Natural = 0
    metric: MetricName = "exact_match"
    max_new_tokens: Positive = 512
    slots: Positive = 8

    def __post_init__(self) -> None:
        validate(self)
        if bool(self.files) == bool(self.share):
            beside = f"beside {counted(len(self.files), 'file')}" if self.files else "and no files"
            raise_faults([f"share: found {self.share} {beside}; expected either share or files"])


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training job.

    Attributes:
      model: directory of the checkpoint to start from, in either format; or its name in the local Hugging Face cache.
      out: output directory of the job: checkpoints, metrics, and the trained model.
      data, batch, optimizer, checkpoint, eval: see there.
      rl: learn by reward instead of from answers; see `train.rl`.
      steps: of the whole training. Either these or `epochs`.
      epochs: how often each record is seen. Before the first step all records are encoded once, to count the steps;
        the last batches are partly filled.
      preference: learn which of two answers is preferred, from data with both.
      freeze: parts of the model that are not trained: "vision", "merger", "llm"; not with `lora`.
      lora: train an adapter instead; the whole model is frozen.
      quantize: with `lora`, keep the decoder's kernels as "int8" or "int4"; see `glm4v_jax.model.quantize`.
      dtype: compute dtype; float32 on a CPU and bfloat16 elsewhere by default. Trained weights are float32.
      remat: what of a layer is recomputed in the backward pass: "full", all but its input; "attention" and "dots" keep
        more, and "none" all.
      max_grad_norm: steps whose gradients have a larger norm are skipped.
      max_skipped: the job ends after this number of skipped steps in a row; nothing is saved meanwhile.
      neftune: add noise to the embeddings of text, uniform up to `neftune / sqrt(tokens x hidden size)` of a sample
        (arXiv 2310.05914; 5 is usual).
      mesh: a preset or axes; see `glm4v mesh`.
      seed: of everything that is drawn.
      log_every: steps between two log lines; every step is a line of metrics.jsonl.
      trackers: write the metrics to "tensorboard", "wandb" or "trackio", too; to Weights & Biases offline, unless the
        environment's WANDB_MODE says otherwise.
      tensorboard: the same as "tensorboard" among the trackers.
    """

    model: str
    out: str
    data: DataConfig
    steps: Annotated[Natural, Meta(description="an integer of at least 1")] = 0
    epochs: Annotated[Natural, Meta(description="an integer of at least 1")] = 0
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig | None = None
    rl: RLConfig | None = None
    freeze: Annotated[tuple[Group, ...], Meta(description="a list of some of 'vision', 'merger', 'llm'")] = ("vision",)
    lora: AdapterConfig | None = None
    preference: PreferenceConfig | None = None
    quantize: Literal["int8", "int4"] | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: Remat = "full"
    max_grad_norm: Annotated[AnyNumber, Meta(gt=0)] = float("inf")
    max_skipped: Positive = 10
    neftune: PositiveNumber | None = None
    mesh: str = "train"
    seed: Seed = 0
    log_every: Positive = 1
    trackers: Annotated[
        tuple[TrackerName, ...], Meta(description="a list of some of 'tensorboard', 'wandb', 'trackio'")
    ] = ()
    tensorboard: bool = False

    def __post_init__(self) -> None:
        validate(self)
        faults = []
        if bool(self.steps) == bool(self.epochs):
            beside = f" beside epochs = {self.epochs}" if self.epochs else ""
            faults.append(f"steps: found {self.steps}{beside}; expected an integer of at least 1, or epochs")
        if self.quantize is not None and self.lora is None:
            faults.append(f"quantize: found {self.quantize!r} without lora; expected both: integers cannot be trained")
        try:
            if self.steps:
                warmup_steps(self.optimizer, self.num_updates)
        except ConfigError as error:
            faults.append(f"optimizer.{error}")
        if self.eval is not None and self.eval.patience is not None and self.checkpoint.best is None:
            object.__setattr__(self, "checkpoint", dataclasses.replace(self.checkpoint, best="loss"))
        best = self.checkpoint.best
        if best is not None and self.eval is None:
            faults.append(f"checkpoint.best: found {best!r} without eval; expected both")
        elif best == "score" and self.eval is not None and not self.eval.generate:
            faults.append("checkpoint.best: found 'score' with eval.generate = 0; expected some answers to score")
        if self.preference is not None and self.data.too_long == "cut":
            faults.append("data.too_long: found 'cut' beside preference; expected 'drop' or 'error'")
        if self.data.sets and self.eval is not None and self.eval.share:
            faults.append(f"eval.share: found {self.eval.share} beside data.sets; expected eval.files")
        if self.data.sets and self.epochs:
            faults.append(f"epochs: found {self.epochs} beside data.sets; expected steps: sets end at different times")
        if self.data.sets and self.rl is not None:
            faults.append("data.sets: found some beside rl; expected data.files: the curriculum decides the shares")
        raise_faults(faults + self._faults_of_rl())

    def _faults_of_rl(self) -> list[str]:
        """What of `rl` does not fit the rest."""
        faults = [] if self.rl or not self.data.levels else ["data.levels: found some without rl; expected both"]
        if self.rl is None:
            return faults
        others = {"eval": self.eval, "neftune": self.neftune, "preference": self.preference}
        others |= {"lora.dropout": (self.lora and self.lora.dropout) or None, "epochs": self.epochs or None}
        faults += [fault(name, value, "none beside rl") for name, value in others.items() if value is not None]
        if (longest := self.rl.sampling.longest) >= self.batch.length:
            budgets = "rl.sampling.think_budget + answer_budget"
            expected = f"less than batch.length, {self.batch.length}: a row has a prompt, too"
            faults.append(fault(budgets, longest, expected))
        return faults

    @property
    def tracked(self) -> tuple[TrackerName, ...]:
        """The trackers, each once."""
        return tuple(dict.fromkeys((*self.trackers, *(("tensorboard",) if self.tensorboard else ()))))

    @property
    def num_updates(self) -> int:
        """Updates of the optimizer in the whole training."""
        return self.steps * (1 if self.rl is None else self.rl.updates)

    def is_evaluated(self, step: int) -> bool:
        """Return whether a step is followed by an evaluation."""
        return self.eval is not None and (step % self.eval.every == 0 or step == self.steps)

    def is_saved(self, step: int) -> bool:
        """Return whether a step is followed by a checkpoint: also one whose evaluation may find it to be the best."""
        is_candidate = self.checkpoint.best is not None and self.is_evaluated(step)
        return step % self.checkpoint.every == 0 or step == self.steps or is_candidate


FIELDS = tuple(f"{field.name}{end}" for field in dataclasses.fields(TrainConfig) for end in ":.")
"""What errors about a field of a job begin with."""


def load_config(path: str | Path) -> TrainConfig:
    """Read a job file; relative paths in it are relative to the file.

    Raises:
      ConfigError: the file cannot be read; or all fields that are unknown, missing or invalid.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(not_there(path, "a job's TOML file")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: found an unreadable file ({error}); expected a job's TOML file") from error
    except tomllib.TOMLDecodeError as error:
        found = f"found invalid TOML: {str(error)[:1].lower()}{str(error)[1:]}"
        raise ConfigError(f"{path}: {found}; expected fields as `glm4v train init` writes them") from error
    config = _checked(path, content)
    here = path.absolute().parent
    data = dataclasses.replace(
        config.data,
        files=tuple(str(here / file) for file in config.data.files),
        sets={
            name: dataclasses.replace(one, files=tuple(str(here / file) for file in one.files))
            for name, one in config.data.sets.items()
        },
        levels=tuple(str(here / file) for file in config.data.levels),
        media_dir=None if config.data.media_dir is None else str(here / config.data.media_dir),
    )
    evaluation = config.eval
    if evaluation is not None:
        evaluation = dataclasses.replace(evaluation, files=tuple(str(here / file) for file in evaluation.files))
    lora = config.lora
    if lora is not None and lora.adapter is not None:
        lora = dataclasses.replace(lora, adapter=str(here / lora.adapter))
    model = here / config.model
    if not model.exists() and is_hub_name(config.model):
        model = Path(config.model)
    return dataclasses.replace(
        config, model=str(model), out=str(here / config.out), data=data, eval=evaluation, lora=lora
    )


def _checked(path: Path, content: dict[str, Any]) -> TrainConfig:
    faults = []
    if "freeze" in content and "lora" in content:
        faults.append(
            f"freeze: found {content['freeze']!r} beside lora; expected one of them: an adapter freezes the whole "
            "model, and lora.target chooses its layers"
        )
    if isinstance(lora := content.get("lora"), dict) and "adapter" in lora:
        given = {name: value for name, value in lora.items() if name in _OF_LORA}
        faults += _beside_adapter(given, "lora.")
        content = content | {"lora": {name: value for name, value in lora.items() if name not in given}}
    if isinstance(data := content.get("data"), dict) and not data.get("files") and not data.get("sets"):
        found = "[]" if "files" in data else "nothing"
        faults.append(f"data.files: found {found}; expected a list of at least one path, or data.sets")
    if "steps" not in content and "epochs" not in content:
        faults.append("steps: found nothing; expected an integer of at least 1, or epochs")
        content = content | {"steps": 1 << 31}  # the rest is checked, too
    try:
        config = from_mapping(TrainConfig, content)
    except ConfigError as error:
        faults += error.faults
    raise_faults(faults, where=str(path))
    return config
