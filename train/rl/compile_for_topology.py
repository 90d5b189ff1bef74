"""The programs of learning by reward, for `glm4v_jax.planning.compile_for_topology`; what else is on their chips."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import reshaped, use_mesh
from glm4v_jax.generate.device_steps import Variant
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.layers import Remat
from glm4v_jax.model.lora import LoraConfig
from glm4v_jax.planning import compile_for_topology
from glm4v_jax.planning.compile_for_topology import PARTS, Program
from train.compile_for_topology import (
    Shapes,
    StepCost,
    Training,
    abstract_batch,
    abstract_training,
    step_cost,
    trained_text,
)
from train.data.packing import TrainBatch
from train.data.placement import abstract
from train.rl.handover import Handover
from train.rl.loss import Objective
from train.rl.rollouts import media_tokens
from train.rl.step import PolicyStep, nothing

DRAWN = Variant(top=0, of_draws=True)
"""Rollouts return the log probability of each token under the distribution that it was drawn from."""


@dataclasses.dataclass(frozen=True)
class RewardJob:
    """What the programs of a job have in common.

    Attributes:
      config: of the model.
      training, engine: sizes of both meshes, over the same devices.
      lora: train an adapter instead of all weights.
      remat: of the step.
    """

    config: Glm4vConfig
    training: Mapping[str, int]
    engine: Mapping[str, int]
    lora: LoraConfig | None = None
    remat: Remat = "full"

    @property
    def name(self) -> str:
        """What is trained."""
        return trained_text(self.lora)

    def on_training_mesh(self, devices: Mesh) -> Training:
        """Return the state of the training on the devices of any mesh."""
        mesh = reshaped(devices, self.training)
        with use_mesh(mesh):
            model = compile_for_topology.abstract_model(self.config, mesh)
            return abstract_training(model, mesh, lora=self.lora)

    def kept_for_engine(self, devices: Mesh) -> Any:
        """Return the base of an adapter as the engine has it, which stays where it is while the adapter learns."""
        if self.lora is None:
            return ()
        mesh = reshaped(devices, self.engine)
        with use_mesh(mesh):
            return compile_for_topology.abstract_model(self.config, mesh)


def rollout_program(job: RewardJob, batch: int, slots: int) -> Program:
    """A decode step of `batch` answers with the state of the training beside it; for the engine's mesh."""
    program = compile_for_topology.decode_program(job.config, batch, slots, variant=DRAWN)

    def beside(model: Glm4v, devices: Mesh) -> Any:
        training = job.on_training_mesh(devices)
        return training.state, training.frozen

    return dataclasses.replace(program, name=f"rollout {job.name}, B={batch} S={slots:,}", beside=beside)


def policy_program(job: RewardJob, shapes: Shapes, report: Callable[[StepCost], None] | None = None) -> Program:
    """The gradients of a micro-batch, with the optimizer's state beside them; for the training's mesh."""
    config = job.config

    def trace(model: Glm4v, devices: Mesh) -> jax.stages.Traced:
        training = job.on_training_mesh(devices)
        params, frozen = training.state.params, training.frozen
        step = _policy_step(job, training)
        found = compile_for_topology.placed(jax.eval_shape(nothing, params), devices)
        traced: jax.stages.Traced = step.gradients.trace(found, params, frozen, _batch(config, shapes, devices))
        if report is not None:
            report(step_cost(config, training, shapes, job.remat, traced))
        return traced

    return _program(f"policy step {job.name}, {shapes.text}", trace, _without_params(job))


def update_program(job: RewardJob) -> Program:
    """The update after the last micro-batch; for the training's mesh."""

    def trace(model: Glm4v, devices: Mesh) -> jax.stages.Traced:
        training = job.on_training_mesh(devices)
        found = compile_for_topology.placed(jax.eval_shape(nothing, training.state.params), devices)
        count, position = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.int32))
        return _policy_step(job, training).update.trace(training.state, *found, count, position)

    return _program(f"policy update {job.name}", trace, _frozen_of(job))


def handover_program(job: RewardJob) -> Program:
    """The weights from the training's mesh to the engine's, the optimizer's state beside them; for the former.

    Of an adapter, whose own leaves are few, the base, which is handed over once.
    """

    def trace(model: Glm4v, devices: Mesh) -> jax.stages.Traced:
        training = job.on_training_mesh(devices)
        params, engine_mesh = training.state.params, reshaped(devices, job.engine)
        handover = Handover(training.layout, params, training.frozen, jnp.bfloat16, devices, engine_mesh)
        program: Any = handover.program if job.lora is None else handover.once
        return program.trace(params, training.frozen)

    def beside(model: Glm4v, devices: Mesh) -> Any:
        return job.on_training_mesh(devices).state._replace(params={})

    return _program(f"handover {job.name}", trace, beside)


def _program(
    name: str, trace: Callable[[Glm4v, Mesh], jax.stages.Traced], beside: Callable[[Glm4v, Mesh], Any]
) -> Program:
    return Program(name, trace, read=0, flops=0.0, parts=PARTS, loop=1, beside=beside)


def _policy_step(job: RewardJob, training: Training) -> Any:
    objective = Objective(banned=media_tokens(job.config))
    return PolicyStep(training.layout, training.optimizer, objective, remat=job.remat)


def _without_params(job: RewardJob) -> Callable[[Glm4v, Mesh], Any]:
    """What is there besides the trained parameters and the frozen leaves; of the engine, what its handover keeps."""

    def beside(model: Glm4v, devices: Mesh) -> Any:
        state = job.on_training_mesh(devices).state._replace(params={})
        return state, job.kept_for_engine(devices)

    return beside


def _frozen_of(job: RewardJob) -> Callable[[Glm4v, Mesh], Any]:
    return lambda model, devices: (job.on_training_mesh(devices).frozen, job.kept_for_engine(devices))


def _batch(config: Glm4vConfig, shapes: Shapes, devices: Mesh) -> TrainBatch:
    """A micro-batch of sampled answers as `placement.put` places it."""
    batch = abstract_batch(config, shapes)
    return abstract(batch._replace(reference=batch.weights, advantages=batch.weights), devices)
