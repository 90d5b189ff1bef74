"""The training step for `glm4v_jax.planning.compile_for_topology`; the least that it must compute and communicate."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from glm4v_jax.batch import Batch
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.layers import Remat
from glm4v_jax.model.lora import LoraConfig, add_lora, is_adapted
from glm4v_jax.planning import compile_for_topology
from train.data.packing import TrainBatch
from train.data.placement import abstract
from train.flops import Work, has_input_gradient, kernel_flops, recomputed_flops, step_flops
from train.optimizers import OptimizerConfig, group_of, make_optimizer
from train.state import Layout, Leaves, TrainState, init_state, split
from train.step import make_step

STEPS = 1000
"""Of the schedule; it does not change the program."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes of a step: B rows of T tokens, R vision rows of L patches, and how many micro-batches of them."""

    rows: int
    length: int
    vision_rows: int = 0
    vision_length: int = 0
    micro_batches: int = 1

    @property
    def text(self) -> str:
        """For the name of a program."""
        found = f"{self.rows} x {self.length:,}"
        found += f" + {self.vision_rows} x {self.vision_length:,}" if self.vision_rows else ""
        return found + (f" x {self.micro_batches}" if self.micro_batches > 1 else "")

    @property
    def work(self) -> Work:
        """The most work there can be: rows without padding, each of one sample and each vision row of one frame."""
        tokens = self.micro_batches * self.rows * self.length
        patches = self.micro_batches * self.vision_rows * self.vision_length
        return Work(tokens, tokens * (self.length + 1) / 2, patches, patches * self.vision_length)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a step computes and communicates; operations are floating point ones of matrix products.

    Attributes:
      model_flops: `flops.step_flops`.
      recomputed_flops: `flops.recomputed_flops`.
      dot_flops: of all products in the traced program, those in attention kernels excluded.
      kernels: name of an attention kernel -> how often it runs.
      kernel_flops: `flops.kernel_flops`.
      least_sent: bytes that a device has to receive from others; see `least_sent`.
    """

    model_flops: float
    recomputed_flops: float
    dot_flops: float
    kernels: dict[str, int]
    kernel_flops: float
    least_sent: float


def trained_text(lora: LoraConfig | None) -> str:
    """Return what is trained, for the name of a program."""
    return "full" if lora is None else f"LoRA r={lora.rank}"


class Training(NamedTuple):
    """What a job holds on its devices: abstract arrays, sharded as a job has them; AdamW."""

    state: TrainState
    frozen: Leaves
    layout: Layout
    optimizer: optax.GradientTransformation


def abstract_training(
    model: Glm4v, devices: Mesh, *, lora: LoraConfig | None = None, freeze: tuple[str, ...] = ()
) -> Training:
    """Make the abstract state of a training of `model` on a mesh, within which this is called; see `step_program`."""
    if lora is not None:
        model = compile_for_topology.placed(jax.eval_shape(lambda model: add_lora(model, lora), model), devices)

    def is_trained(path: str) -> bool:
        return is_adapted(model, path) if lora is not None else group_of(path) not in freeze

    params, frozen = compile_for_topology.placed(jax.eval_shape(lambda model: split(model, is_trained), model), devices)
    optimizer = make_optimizer(OptimizerConfig(), STEPS, model)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    return Training(compile_for_topology.placed(state, devices), frozen, Layout.of(model), optimizer)


def step_program(
    config: Glm4vConfig,
    shapes: Shapes,
    *,
    remat: Remat = "full",
    lora: LoraConfig | None = None,
    freeze: tuple[str, ...] = (),
    report: Callable[[StepCost], None] | None = None,
) -> compile_for_topology.Program:
    """Return the step that a job runs, with AdamW and bfloat16; all of its state is abstract.

    `remat` is that of `step.make_step`, `lora` trains an adapter instead, parts of the model in `freeze`
    (`optimizers.GROUPS`) are not trained, and `report` is called with the cost of the traced step.
    """

    def trace(model: Glm4v, devices: Mesh) -> jax.stages.Traced:
        training = abstract_training(model, devices, lora=lora, freeze=freeze)
        step: Any = make_step(training.layout, training.optimizer, remat=remat)
        batch = abstract(abstract_batch(config, shapes), devices)
        traced: jax.stages.Traced = step.trace(training.state, training.frozen, batch)
        if report is not None:
            report(step_cost(config, training, shapes, remat, traced))
        return traced

    return compile_for_topology.Program(
        name=f"{trained_text(lora)}, {shapes.text}, remat {remat}",
        trace=trace,
        read=0,
        flops=0.0,
        parts=compile_for_topology.PARTS,
        loop=1,
    )


def step_cost(
    config: Glm4vConfig, training: Training, shapes: Shapes, remat: Remat, traced: jax.stages.Traced
) -> StepCost:
    """Return what a traced step computes and communicates."""
    params, frozen, work = training.state.params, training.frozen, shapes.work
    dots, kernels = count_products(traced.jaxpr)
    return StepCost(
        step_flops(config, params, frozen, work), recomputed_flops(config, params, frozen, work, remat), dots, kernels,
        kernel_flops(config, params, work, remat), least_sent(config, params, frozen, shapes),
    )  # fmt: skip


def least_sent(config: Glm4vConfig, params: Leaves, frozen: Leaves, shapes: Shapes) -> float:
    """Return the bytes that a device of the leaves' mesh has to receive in a step, in bfloat16.

    Sharded weights are gathered for the forward pass, and again for the backward pass as far as it goes through them,
    except the head, which both passes need one right after the other, and the embedding table; the gradients of trained
    leaves are reduced into their shards. Where devices share a layer, each of its two blocks gathers the tokens' states
    and reduces its results, forward and backward. The ViT's blocks are not counted there.
    """
    leaves = {**params, **frozen}
    sizes, rules = next(iter(leaves.values())).sharding.mesh.shape, mesh.current_rules()
    gathered = mesh.names_of(rules["embed"])
    fsdp, data, tensor = (
        math.prod(sizes[name] for name in mesh.names_of(rules[axis])) for axis in ("embed", "batch", "tokens")
    )
    replicas = data // fsdp
    total = 0.0
    for path, leaf in leaves.items():
        split_by = [name for entry in leaf.sharding.spec for name in mesh.names_of(entry)]
        kept = math.prod(leaf.shape) / math.prod(sizes[name] for name in split_by if name not in gathered)
        if set(gathered) & set(split_by):
            is_once = path.startswith(("lm_head.", "language_model.embed_tokens."))
            passes = 1 + (has_input_gradient(path, params) and not is_once) + (path in params)
            total += 2 * kept * passes * (fsdp - 1) / fsdp
            total += 2 * 2 * kept / fsdp * (replicas - 1) / replicas * (path in params)
    text = config.text_config
    states = 2 * shapes.rows * shapes.length * text.hidden_size / data * shapes.micro_batches
    return shapes.micro_batches * total + 8 * text.num_hidden_layers * states * (tensor - 1) / tensor


def count_products(jaxpr: Any) -> tuple[float, dict[str, int]]:
    """Count the operations of matrix products in a traced program, all devices together, but those in kernels.

    Also returns kernel name -> how often it runs.
    """
    flops, kernels = 0.0, collections.Counter[str]()
    for equation, runs in _equations(jaxpr, 1):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            flops += 2.0 * runs * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        elif equation.primitive.name == "pallas_call":
            kernels[str(equation.params["name"] or "kernel")] += runs
    return flops, dict(kernels)


def _equations(jaxpr: Any, runs: int) -> Iterator[tuple[Any, int]]:
    """Yield all equations, and how often each runs; of a conditional's branches those of the last."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation, runs
        if equation.primitive.name == "pallas_call":
            continue
        if equation.primitive.name == "cond":
            yield from _equations(equation.params["branches"][-1], runs)
            continue
        inner = runs * equation.params["length"] if equation.primitive.name == "scan" else runs
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _equations(value, inner)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def abstract_batch(config: Glm4vConfig, shapes: Shapes) -> TrainBatch:
    """Make the abstract arrays of a batch, with the first dimension of micro-batches."""
    count, tokens = shapes.micro_batches, (shapes.rows, shapes.length)
    ids: Any = jax.ShapeDtypeStruct((count, *tokens), jnp.int32)
    positions: Any = jax.ShapeDtypeStruct((count, 3, *tokens), jnp.int32)
    weights: Any = jax.ShapeDtypeStruct((count, *tokens), jnp.float32)
    index, vision = None, None
    if shapes.vision_rows:
        index = ids
        vision = compile_for_topology.abstract_vision_rows(config, count, shapes.vision_rows, shapes.vision_length)
    return TrainBatch(Batch(ids, ids, positions, index, vision), ids, weights)
