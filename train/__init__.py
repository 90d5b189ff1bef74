"""Fine-tuning: `glm4v train`, and its training loop.

- config.py: the job file. loop.py: a job from its file to its result; job.py: what it starts with; output.py: where it
  writes.
- data/: from files to batches. step.py, loss.py, optimizers.py, state.py: the training step.
- preference.py: losses of preferences; references.py: log probabilities of the model before the training, kept in a
  file. noise.py: dropout of adapters, NEFTune.
- checkpoints.py, damage.py, log.py, trackers.py, plot.py, preemption.py, profiler.py, flops.py: what a job keeps,
  reports and measures.
- evaluate.py: held-out loss and scored answers. export.py, verify_export.py: the result, verified by its logits.
- compile_for_topology.py: the step on a TPU slice that is not there.
- rl/: learning by reward.
- commands.py (with job_file.py), export_command.py, levels_command.py: the command line.
"""

from typing import Literal

JobKind = Literal["sft", "lora", "preference", "rl"]
"""Kinds of job files that `glm4v train init` prints; here, because the command line must not import what a job is."""
