"""`glm4v train init`: a job file to begin with."""

import dataclasses
from typing import Annotated

import tyro

from glm4v_jax.console.program import Options
from train import JobKind


@dataclasses.dataclass(kw_only=True)
class Init(Options):
    """Print a job file to begin with: every field, what it means, and its default. `glm4v train init lora > job.toml`.

    Lines that a job needs are set; the others are commented out.
    """

    kind: Annotated[tyro.conf.Positional[JobKind], tyro.conf.arg(help_behavior_hint="(default: lora)")] = "lora"
    """Full fine-tuning (sft), an adapter (lora), learning from preferences, or by reward (rl)."""

    def run(self) -> int:
        """Print it."""
        from train.job_file import job_file

        print(job_file(self.kind), end="")
        return 0
