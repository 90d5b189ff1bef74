"""`glm4v train export`: an adapter merged into the model that it was trained beside."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.options import check_model
from glm4v_jax.console.program import JsonOptions
from glm4v_jax.console.table import printable
from glm4v_jax.errors import CheckpointError, ConfigError
from glm4v_jax.files import is_same_file, to_json


@dataclasses.dataclass(kw_only=True)
class Export(JsonOptions):
    """Merge an adapter into its model: a checkpoint in Hugging Face layout, which transformers loads without PEFT.

    The sums are made in float32 and rounded once, from file to file; then the result is loaded, and must say the same
    about a picture as the model with its adapter, or nothing is kept.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADAPTER", help_behavior_hint="")]
    """Directory of an adapter; or a job, a .toml file, which has written one."""

    model: Annotated[
        str | None,
        tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: that of the job, or that the adapter names)"),
    ] = None
    """Checkpoint to merge it into: that which it was trained beside, in floats even if it was quantised."""

    out: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: that of the job)/model")] = (
        None
    )
    """Directory to make."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, tyro.conf.arg(help_behavior_hint="(default: the model's)")
    ] = None
    """Of the result. bfloat16 loses what training has changed by less than some 0.2 percent."""

    mesh: Annotated[
        str | None, tyro.conf.arg(metavar="MESH", help_behavior_hint="(default: one device; latency on several hosts)")
    ] = None
    """Devices to verify on: a preset or axes; see `glm4v mesh`."""

    max_shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "5GB"
    """Of one file."""

    overwrite: bool = False
    """Replace a checkpoint that is at --out."""

    no_verify: bool = False
    """Keep the result without loading it and comparing its logits, which takes devices that hold the model."""

    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)

    def run(self) -> int:
        """Merges, verifies and says how well it came out."""
        adapter, model, out = self._places()
        check_model(model)
        if not (adapter / "adapter_config.json").is_file():
            raise CheckpointError(f"{adapter}: has no adapter_config.json; expected a trained adapter")
        from glm4v_jax.config.model import Glm4vConfig
        from glm4v_jax.devices.compilation_cache import use_compilation_cache
        from glm4v_jax.devices.distributed import check_devices, is_first, several
        from glm4v_jax.devices.mesh import use_mesh
        from glm4v_jax.planning.mesh_presets import mesh_for
        from train.export import export_merged

        use_compilation_cache()
        asked = self.mesh or ("latency" if several() else None)
        mesh = None if asked is None else mesh_for(asked, Glm4vConfig.from_pretrained(model))
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

    def _places(self) -> tuple[pathlib.Path, str, pathlib.Path]:
        """Adapter, model, and where the result goes."""
        if self.source.endswith(".toml"):
            from train.config import ADAPTER, MODEL, load_config

            job = load_config(self.source)
            adapter, model, out = pathlib.Path(job.out) / ADAPTER, job.model, pathlib.Path(job.out) / MODEL
            if job.lora is None:
                raise ConfigError(f"{self.source}: found a job without lora; its result is a checkpoint already")
            return adapter, self.model or model, pathlib.Path(self.out) if self.out else out
        adapter = pathlib.Path(self.source)
        if self.out is None:
            raise ConfigError("--out: found nothing; expected the directory to make")
        if is_same_file(adapter, self.out):
            raise ConfigError(f"--out: found the adapter's own directory, {self.out}; expected another")
        return adapter, self.model or _base_of(adapter), pathlib.Path(self.out)


def _base_of(adapter: pathlib.Path) -> str:
    """The model that an adapter names."""
    from glm4v_jax.files import read_json_object

    named = read_json_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not pathlib.Path(named).is_dir():
        raise ConfigError(f"--model: found nothing, and the adapter names {named!r}; expected the model's directory")
    return named
