"""What a job starts with: its records; and the model, optimizer and step on their mesh."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from glm4v_jax.checkpoints.adapter import load_adapter
from glm4v_jax.checkpoints.load import load_model, resolve_dtype
from glm4v_jax.checkpoints.orbax_read import leaves_of, open_weights
from glm4v_jax.checkpoints.plan import abstract_leaves, check_fits, device_bytes
from glm4v_jax.config.checks import fault, raise_faults
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.quantization import stored_quantization
from glm4v_jax.data.media import file_name, source_of
from glm4v_jax.devices.distributed import agree, check_devices, errors_of_all
from glm4v_jax.errors import ConfigError, DataError, counted, naming, not_there
from glm4v_jax.files import doubt_of_base, encoding_fingerprint
from glm4v_jax.inputs.processor import Glm4vProcessor
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.lora import add_lora, check_modules, is_adapted
from glm4v_jax.model.params import default_dtype
from glm4v_jax.model.quantize import for_training
from glm4v_jax.planning.mesh_presets import mesh_for
from train.checkpoints import DATA_DIGEST, ENCODING_DIGEST, abstract
from train.config import ADAPTER, MODEL, AdapterConfig, DataConfig, DataSetConfig, TrainConfig
from train.data.placement import check_batch, num_lanes
from train.data.records import Record, Records, read_records
from train.data.stream import Draws
from train.evaluate import hold_out
from train.export import check_result, export_adapter, export_model
from train.flops import Work, step_flops
from train.noise import Noise
from train.optimizers import group_of, learning_rate, make_optimizer
from train.state import Layout, Leaves, TrainState, Weights, init_state, split
from train.step import Step, make_step
from train.trackers import check_trackers
from train.verify_export import Verified

_FREE = {
    "model", "out", "steps", "epochs", "mesh", "remat", "dtype", "max_grad_norm", "max_skipped", "log_every",
    "trackers", "tensorboard", "checkpoint", "data.files", "data.levels", "data.media_dir", "data.bad_rows",
    "data.threads", "batch.lanes", "optimizer", "eval", "lora.adapter",
}  # fmt: skip
"""Fields that may change when a job is resumed; `identity` adds what of some must not."""

_LATER: dict[str, Any] = {
    "preference": None,
    "neftune": None,
    "rl": None,
    "rl.min_groups": None,
    "data.sets": {},
    "lora.rslora": False,
    "lora.dora": False,
    "lora.dropout": 0.0,
    "lora.modules_to_save": (),
}
"""Fields that checkpoints of earlier versions lack, with what they stand for there."""

_DIGESTED = 64
"""Records, out of those that are not in files, whose content is compared when a job is resumed."""


class Data(NamedTuple):
    """Records to train on, held-out ones, of which there may be none, and a digest of the former's content.

    `draws` has the numbers of the former's sets, with their shares; none where there are no sets.
    """

    train: Sequence[Record]
    held_out: Sequence[Record]
    digest: str
    draws: Draws = ()


def read_data(config: TrainConfig, records: Sequence[Record] | None) -> Data:
    """Return a job's records; `records` replace those of its files.

    Raises:
      DataError: files cannot be read, or there are too few records.
    """
    options = config.data
    read = functools.partial(
        read_records, format=options.format, media_dir=options.media_dir, is_preference=config.preference is not None
    )
    draws: Draws = ()
    check_media_dir(options)
    if records is None and options.sets:
        sets = {}
        for name, one in options.sets.items():
            with naming(f"data.sets.{name}.files"):
                sets[name] = read(one.files)
        records, draws = Records.joined(list(sets.values())), _draws(options.sets, sets, config.seed)
    elif records is None:
        with naming("data.files"):
            records = read(options.files)
    digest = records.fingerprint() if isinstance(records, Records) else _digest(records)
    if config.eval is None:
        return Data(records, (), digest, draws)
    if not config.eval.files:
        return Data(*hold_out(records, config.eval.share, config.seed), digest)
    with naming("eval.files"):
        return Data(records, read(config.eval.files), digest, draws)


def check_media_dir(data: DataConfig) -> None:
    """Raise a DataError if a job names a directory of images and videos that is not there."""
    if data.media_dir is not None and not Path(data.media_dir).is_dir():
        raise DataError(not_there(data.media_dir, "that of images and videos", "data.media_dir", "directory"))


def _draws(configs: Mapping[str, DataSetConfig], sets: Mapping[str, Records], seed: int) -> Draws:
    """The numbers of each set's rows among all, with its share.

    Raises:
      DataError: a set has fewer rows than are to be taken.
    """
    found = []
    start = 0
    for place, (name, records) in enumerate(sets.items()):
        wanted = configs[name].num_samples
        numbers = np.arange(len(records))
        if wanted is not None:
            if wanted > len(records):
                expected = f"at most the {counted(len(records), 'row')} of its files"
                raise DataError(fault(f"data.sets.{name}.num_samples", wanted, expected))
            numbers = np.sort(np.random.default_rng([seed, place]).permutation(numbers)[:wanted])
        found.append((start + numbers, configs[name].share))
        start += len(records)
    return tuple(found)


def _digest(records: Sequence[Record]) -> str:
    """Digest some of the records that a caller has made: their texts, and the names of their media files."""
    hashed = hashlib.blake2b(digest_size=8)
    for number in np.unique(np.linspace(0, len(records) - 1, _DIGESTED).astype(int)) if len(records) else ():
        try:
            record = records[int(number)]
        except DataError:  # which training skips, or ends with
            continue
        items = [item for message in record.messages for item in (message["role"], *message["content"])]
        keys = ("tool_calls", "reasoning_content")
        more = [message[key] for message in record.messages for key in keys if key in message] + [*record.tools]
        found = [number, record.losses, *map(_essence, items), *more]
        hashed.update(repr(found).encode(errors="surrogatepass"))
    return hashed.hexdigest()


def _essence(item: Any) -> Any:
    """A role, the text of an item, or its kind and the name of its file."""
    if isinstance(item, str) or item["type"] == "text":
        return item if isinstance(item, str) else item.get("text")
    return item["type"], file_name(source_of(item))


def describe_data(config: TrainConfig, data: Data) -> str:
    """Return how many records there are, for a log line."""
    evaluated = 0 if config.eval is None else min(len(data.held_out), config.eval.max_samples)
    held_out = f", {evaluated:,} held out to evaluate" if evaluated else ""
    return f"{counted(len(data.train), 'record')} to train on{held_out}"


def open_model(config: TrainConfig, log: Callable[[str], None]) -> tuple[Glm4vConfig, Mesh, Glm4vProcessor]:
    """Return the configuration of a job's model, the job's mesh, and the model's processor; no weight is read.

    Logs a warning where the adapter that the job starts from names another model as its base.

    Raises:
      ConfigError: a tracker is not installed, or the mesh does not fit the devices, the model or the batches.
      CheckpointError: the model or the adapter is not there, or a file of them is invalid.
    """
    check_trackers(config)
    model = Glm4vConfig.from_pretrained(config.model)
    _note_base(config, log)
    mesh = _make_mesh(config, model)
    processor = Glm4vProcessor.from_pretrained(config.model)
    processor.check_ids(model)
    return model, mesh, processor


def _make_mesh(config: TrainConfig, model: Glm4vConfig) -> Mesh:
    with naming("mesh"):
        mesh = mesh_for(config.mesh, model)
        check_devices(mesh)
    check_batch(config.batch, mesh)
    return mesh


def check_same(config: TrainConfig, data: Data, identity: Mapping[str, Any]) -> None:
    """Check that all processes have the same job and as many records; the directories of their files may differ.

    Otherwise a MessageError.
    """
    sets = {name: dataclasses.replace(one, files=("",)) for name, one in config.data.sets.items()}
    files = dataclasses.replace(config.data, files=(), sets=sets, media_dir=None)
    evaluation = config.eval
    if evaluation is not None and evaluation.files:
        evaluation = dataclasses.replace(evaluation, files=("",))
    same = dataclasses.replace(config, model="", out="", data=files, eval=evaluation)
    agree("the job or its data", (same, identity, len(data.held_out)))


def identity(config: TrainConfig, model: Glm4vConfig, count: int, digest: str) -> dict[str, Any]:
    """Return what a job must keep to resume from its checkpoints, by name: what decides its model and its batches.

    The names are part of the checkpoints' format.
    """
    fields: dict[str, Any] = {
        "config.json of the model": hashlib.blake2b(repr(model).encode(), digest_size=8).hexdigest(),
        "eval.share": config.eval.share if config.eval is not None else 0.0,
        "records to learn from": count,
        DATA_DIGEST: digest,
        ENCODING_DIGEST: encoding_fingerprint(config.model),
        "optimizer.name": config.optimizer.name,
        "batch.lanes": num_lanes(config.batch),
    }
    for name, value in dataclasses.asdict(config).items():
        of_table = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        if name not in _FREE:
            fields |= {key: item for key, item in of_table.items() if key not in _FREE}
    # Files may move.
    fields["data.sets"] = {name: [one.share, one.num_samples] for name, one in config.data.sets.items()}
    if config.lora is not None:
        del fields["freeze"]  # has no effect beside it
    return {name: value for name, value in fields.items() if name not in _LATER or value != _LATER[name]}


def check_output(config: TrainConfig) -> int:
    """Check that the result can be written, before anything slow begins; see `check_result`."""
    name = MODEL if config.lora is None else ADAPTER
    return check_result(config.model, Path(config.out) / name, is_whole=config.lora is None)


def check_step(step: int, config: TrainConfig) -> None:
    """Raise a ConfigError if a job has run more steps than its configuration asks for."""
    if step > config.steps:
        raise ConfigError(f"steps: found {config.steps}; expected at least {step}, the step of the latest checkpoint")


def _note_base(config: TrainConfig, log: Callable[[str], None]) -> None:
    adapter = None if config.lora is None else config.lora.adapter
    if adapter is None:
        return
    with naming("lora.adapter"):
        note = doubt_of_base(adapter, config.model)
    if note is not None:
        log(f"warning: lora.adapter: {note}")


def _adapted(model: Glm4v, config: TrainConfig) -> Glm4v:
    """The model with the adapter that a job trains, if it does: a new one, or the one that it starts from."""
    if config.lora is None:
        return model
    if config.lora.adapter is not None:
        with naming("lora.adapter"):
            model = load_adapter(model, config.lora.adapter, keep_dtype=True)
            check_modules(model)
        return model
    try:
        return add_lora(model, config.lora, config.seed)
    except ConfigError as error:
        raise_faults([f"lora.{line}" for line in error.faults])
        raise


def _noise(config: TrainConfig) -> Noise | None:
    dropout = 0.0 if config.lora is None else config.lora.dropout
    return Noise(config.seed, dropout, config.neftune) if dropout or config.neftune else None


def _is_trained(config: TrainConfig, model: Glm4v) -> Callable[[str], bool]:
    """Whether a job changes the leaf of a path."""
    if config.lora is not None:
        return functools.partial(is_adapted, model)
    return lambda path: group_of(path) not in config.freeze


def check_memory(config: TrainConfig, model_config: Glm4vConfig) -> None:
    """Check that devices have room for weights, gradients and the optimizer's state; all processes call this first.

    Raises:
      MemoryShortageError: those of some process have not.
    """

    def instead() -> dict[str, int]:
        lora = dataclasses.replace(config, lora=config.lora or AdapterConfig())
        kinds: tuple[Literal["int8", "int4"], ...] = (
            ("int8", "int4") if stored_quantization(config.model) is None else ()
        )
        ways = {"lora": lora} | {
            f'lora with quantize = "{kind}"': dataclasses.replace(lora, quantize=kind) for kind in kinds
        }
        return {name: _held_bytes(way, model_config) for name, way in ways.items() if way != config}

    what = "weights, gradients and optimizer state"
    with errors_of_all():
        check_fits(_held_bytes(config, model_config), what, str(config.model), instead, mesh_option="mesh")


def _held_bytes(config: TrainConfig, model_config: Glm4vConfig) -> int:
    """Bytes that a device holds during a job, temporaries apart."""
    state, frozen = abstract_state(config, model_config)
    return device_bytes(jax.tree.leaves((state, frozen, state.params)))  # gradients are as large as the parameters


def abstract_state(config: TrainConfig, model_config: Glm4vConfig) -> tuple[TrainState, Leaves]:
    """Return the shapes of a job's state and of its frozen leaves, sharded over the current mesh; no weight is read.

    Raises:
      ConfigError: integers would be trained.
    """
    files = open_weights(config.model)
    weights, quantize = leaves_of(files, model_config), for_training(config.quantize)
    if weights.stored is not None and config.lora is None:
        raise ConfigError(
            f"model: found {config.model}, which is quantised ({weights.stored}); expected floats, or lora: integers "
            "cannot be trained"
        )
    dtype = resolve_dtype("auto", files)
    leaves, structure = abstract_leaves(model_config, dtype, stacked=True, quantize=quantize, leaves=weights)

    def make(model: Glm4v) -> tuple[TrainState, Leaves]:
        model = _adapted(model, config)
        params, frozen = split(model, _is_trained(config, model))
        return init_state(params, make_optimizer(config.optimizer, config.num_updates, model)), frozen

    return jax.eval_shape(make, structure.unflatten(list(leaves.values())))


@dataclasses.dataclass
class Job:
    """A model that is being trained, in the current mesh.

    config, model: of the job and of its model.
    layout, frozen, dtypes: of the model's leaves; `dtypes` are those they were loaded in.
    shapes: of the trained parameters.
    optimizer: of the trained parameters.
    step: see `make_step`.
    dtype: compute dtype.
    """

    config: TrainConfig
    model: Glm4vConfig
    layout: Layout
    frozen: Leaves
    dtypes: dict[str, np.dtype]
    shapes: dict[str, jax.ShapeDtypeStruct]
    optimizer: optax.GradientTransformation
    step: Step
    dtype: np.dtype

    @classmethod
    def start(
        cls, config: TrainConfig, model_config: Glm4vConfig, progress: Callable[[int, int], None] | None = None
    ) -> tuple["Job", TrainState]:
        """Load the model and make the optimizer.

        `progress` is called with bytes of weights read and bytes in all, after each leaf. The job keeps no array of the
        state that it returns, which is the one before the first step.

        Raises:
          Glm4vError: what is wrong with the model, or with how it is to be trained.
          MemoryShortageError: there is too little memory; nothing has been read.
        """
        quantize = for_training(config.quantize)
        check_memory(config, model_config)
        model = load_model(
            Path(config.model), model_config, dtype="auto", stacked=True, quantize=quantize, progress=progress
        )
        model = _adapted(model, config)
        layout = Layout.of(model)
        dtypes = dict(zip(layout.paths, (leaf.dtype for leaf in jax.tree.leaves(model)), strict=True))
        params, frozen = split(model, _is_trained(config, model))
        optimizer = make_optimizer(config.optimizer, config.num_updates, model)
        dtype = jnp.dtype(config.dtype or default_dtype())
        step = make_step(
            layout, optimizer, dtype=dtype, remat=config.remat, max_grad_norm=config.max_grad_norm,
            learning_rate=learning_rate(config.optimizer, config.num_updates), noise=_noise(config),
            preference=config.preference,
        )  # fmt: skip
        job = cls(config, model_config, layout, frozen, dtypes, abstract(params), optimizer, step, dtype)
        return job, init_state(params, optimizer)

    def describe(self, data: str, mesh: Mesh) -> str:
        """Return a log line: what is trained, on what data and what devices."""
        trained, frozen = (sum(math.prod(leaf.shape) for leaf in part.values()) for part in (self.shapes, self.frozen))
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        devices = f"{mesh.size} devices ({sizes})" if mesh.size > 1 else "one device"
        return (
            f"{trained:,} trained and {frozen:,} frozen parameters; {data}; {devices}, "
            f"{mesh.devices.flat[0].device_kind}"
        )

    def weights(self, params: Leaves) -> Weights:
        """Return the model of these parameters."""
        return Weights(params, self.frozen, self.layout, self.dtype)

    def export(self, params: Leaves, out: Path) -> Verified:
        """Write the result: an adapter for PEFT; or a checkpoint in Hugging Face layout, with all files of the first.

        All processes call this; the first one writes.

        CheckpointError if what was written does not compute the same; OSError if the disk refuses.
        """
        if self.config.lora is not None:
            return export_adapter(self.weights(params).cast(), self.config.model, out / ADAPTER)
        exported = self.layout.exported(params, self.frozen, self.dtypes)
        return export_model(exported, self.dtype, self.config.model, out / MODEL)

    def flops(self, work: Work) -> float:
        """Return the operations that a step needs for this work; see `flops.step_flops`."""
        return step_flops(self.model, self.shapes, self.frozen, work)
