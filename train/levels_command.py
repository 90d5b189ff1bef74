"""`glm4v train levels`: how hard each problem of a job is for a checkpoint."""

import dataclasses
import pathlib
from typing import Annotated

import tyro
from msgspec import Meta

from glm4v_jax.config.checks import Seed
from glm4v_jax.console.distributed import DistributedOptions
from glm4v_jax.console.options import find_model
from glm4v_jax.console.program import Options
from glm4v_jax.console.progress import Progress
from glm4v_jax.console.table import printable
from glm4v_jax.errors import ConfigError, naming
from glm4v_jax.inputs.media.quiet import quiet_ffmpeg, without_size_warnings

LEVELS = "levels.jsonl"


@dataclasses.dataclass(kw_only=True)
class MeasureLevels(Options):
    """Measure the pass rate of a checkpoint on each problem of a job that learns by reward, for its curriculum.

    The file has a line for each problem, and is read by `levels` in the job's [data]. The same command resumes.
    """

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG", help_behavior_hint="")]
    """The job, a .toml file with [rl]."""

    model: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: that of the job)")] = None
    """Checkpoint to measure."""

    out: Annotated[
        str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: levels.jsonl beside the job)")
    ] = None
    """File of the pass rates."""

    samples: Annotated[Annotated[int, Meta(ge=1)], tyro.conf.arg(metavar="N")] = 8
    """Answers to each problem."""

    seed: Annotated[Seed, tyro.conf.arg(metavar="N")] = 0
    """Random seed."""

    restart: bool = False
    """Measure all problems again instead of resuming."""

    distributed: DistributedOptions = dataclasses.field(default_factory=DistributedOptions)

    def run(self) -> int:
        """Check the job and its problems, then load the model, answer, and score."""
        from train.config import FIELDS, load_config

        job = load_config(self.config)
        if job.rl is None:
            raise ConfigError(f"{self.config}: rl: found no table; expected [rl] with verifiers")
        directory = find_model(self.model or job.model, "--model" if self.model else f"{self.config}: model")
        path = pathlib.Path(self.out) if self.out else pathlib.Path(self.config).parent / LEVELS
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"--out: found {path}; expected a file in a directory that exists")
        from glm4v_jax.inputs.processor import Glm4vProcessor
        from train.data.encoder import encode_options
        from train.data.samples import limited
        from train.rl.judging import Judges
        from train.rl.problems import problems_of
        from train.rl.self_test import self_test
        from train.rl.verifiers import make_verifiers

        processor = limited(Glm4vProcessor.from_pretrained(directory), encode_options(job.data, job.batch))
        with naming(self.config, begins=FIELDS):
            problems = problems_of(job, processor)
        verifiers = make_verifiers(job.rl.verifiers, processor.thinking)
        with naming(self.config, begins=FIELDS), Judges(verifiers) as judges, quiet_ffmpeg(), without_size_warnings():
            judges.start()
            self_test(judges, problems.examples())
            from glm4v_jax.checkpoints.load import load_runtime
            from glm4v_jax.checkpoints.orbax_write import by_first
            from glm4v_jax.config.model import Glm4vConfig
            from glm4v_jax.devices.compilation_cache import use_compilation_cache
            from glm4v_jax.devices.distributed import check_devices, is_first
            from glm4v_jax.files import model_fingerprint
            from glm4v_jax.generate.engine import Engine
            from glm4v_jax.planning.mesh_presets import mesh_for
            from train.rl.levels import Levels
            from train.rl.measure import measure
            from train.rl.rollouts import sampling_options

            levels = Levels(path, model_fingerprint(directory), self.samples)
            if self.restart:
                by_first(lambda: path.unlink(missing_ok=True))
            levels.done()  # fails before the model is loaded
            sampling = job.rl.sampling
            text = job.mesh if sampling.engine_mesh == "same" else sampling.engine_mesh
            model_config = Glm4vConfig.from_pretrained(directory)
            with naming("mesh" if sampling.engine_mesh == "same" else "rl.sampling.engine_mesh"):
                mesh = mesh_for(text, model_config)
                check_devices(mesh)
            use_compilation_cache()
            runtime = load_runtime(directory, mesh=mesh, dtype=job.dtype)
            engine = Engine(runtime, processor, num_slots=sampling.slots)
            options = sampling_options(job.rl, model_config)
            with Progress("measuring", "problems") as progress:
                measure(
                    levels, problems, engine, judges.score, options, truncated=job.rl.truncated, seed=self.seed,
                    progress=progress.update,
                )  # fmt: skip
        if is_first():
            print(printable(f"{path}: pass rates of {len(problems):,} problems"))
        return 0

    def interrupted(self) -> str:
        """Say that nothing is lost."""
        return "train: interrupted; the same command resumes"
