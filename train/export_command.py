"""`glm4v train export`: merge an adapter into its base model."""

import dataclasses
import pathlib
import warnings
from typing import Annotated, Literal

import tyro

from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.options import find_model
from glm4v_jax.console.program import JsonOptions
from glm4v_jax.console.table import printable
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.files import ADAPTER_CONFIG, base_of, doubt_of_base, is_same_file, to_json


@dataclasses.dataclass(kw_only=True)
class Export(JsonOptions):
    """Merge an adapter into its base model: a checkpoint in Hugging Face layout, which transformers loads without PEFT.

    Weights are summed in float32 and rounded once, from file to file; then the result is loaded, and must have the
    logits of the base model with its adapter, or it is removed.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADAPTER", help_behavior_hint="")]
    """Directory of an adapter; or a job file (.toml), whose adapter is exported."""

    model: Annotated[
        str | None,
        tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: that of the job, or that the adapter names)"),
    ] = None
    """Checkpoint to merge the adapter into: the base model that it was trained with, unquantised."""

    out: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: OUT/model of the job)")] = (
        None
    )
    """Output directory."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, tyro.conf.arg(help_behavior_hint="(default: the model's)")
    ] = None
    """Dtype of the result. bfloat16 loses changes of a weight below some 0.2 percent."""

    mesh: Annotated[
        str | None, tyro.conf.arg(metavar="MESH", help_behavior_hint="(default: one device; latency on several hosts)")
    ] = None
    """Devices to verify on: a preset or axes; see `glm4v mesh`."""

    max_shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "5GB"
    """Size limit of each file."""

    overwrite: bool = False
    """Overwrite a checkpoint in the output directory."""

    no_verify: bool = False
    """Do not load the result to compare its logits, which needs devices that hold the model."""

    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)

    def run(self) -> int:
        """Merge, verify, and print the result of the verification."""
        adapter, model, out = self._paths()
        model = find_model(model)
        if not (adapter / ADAPTER_CONFIG).is_file():
            raise CheckpointError(f"{adapter}: found no {ADAPTER_CONFIG}; expected a trained adapter")
        if (note := doubt_of_base(adapter, model)) is not None:
            warnings.warn(note, stacklevel=1)
        from glm4v_jax.config.model import Glm4vConfig
        from glm4v_jax.devices.compilation_cache import use_compilation_cache
        from glm4v_jax.devices.distributed import check_devices, is_first, several
        from glm4v_jax.devices.mesh import use_mesh
        from glm4v_jax.planning.mesh_presets import mesh_for
        from train.export import export_merged

        use_compilation_cache()
        text = self.mesh or ("latency" if several() else None)
        mesh = None if text is None else mesh_for(text, Glm4vConfig.from_pretrained(model))
        if mesh is not None:
            check_devices(mesh)
        with use_mesh(mesh):
            verified = export_merged(
                model, adapter, out, written=self.dtype, overwrite=self.overwrite, verify=not self.no_verify,
                max_shard_size=self.max_shard_size,
            )  # fmt: skip
        if not is_first():
            return 0
        if self.as_json:
            print(to_json({"out": str(out)} | ({} if verified is None else verified._asdict())))
        else:
            print(printable(f"{out}: {'not verified' if verified is None else verified}"))
        return 0

    def _paths(self) -> tuple[pathlib.Path, str, pathlib.Path]:
        """Return adapter, base model and output directory."""
        if self.source.endswith(".toml"):
            from train.config import ADAPTER, MODEL, load_config

            job = load_config(self.source)
            adapter, model, out = pathlib.Path(job.out) / ADAPTER, job.model, pathlib.Path(job.out) / MODEL
            if job.lora is None:
                raise ConfigError(
                    f"{self.source}: found a job without lora, whose result is not an adapter; expected lora"
                )
            return adapter, self.model or model, pathlib.Path(self.out) if self.out else out
        adapter = pathlib.Path(self.source)
        if self.out is None:
            raise ConfigError("--out: found nothing; expected the output directory")
        if is_same_file(adapter, self.out):
            raise ConfigError(f"--out: found the adapter's own directory, {self.out}; expected another")
        return adapter, self.model or base_of(adapter), pathlib.Path(self.out)
