"""Optimizers by name, learning rates over time and by part of the model; parameters are a flat dict, path -> array."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

import jax
import optax
from msgspec import Meta

from glm4v_jax.config.checks import NotNegative, PositiveNumber, validate
from glm4v_jax.errors import ConfigError, counted
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.nn import Linear

Group = Literal["vision", "merger", "llm"]
GROUPS: tuple[Group, ...] = get_args(Group)
"""Parts of the model that can be frozen, or have a learning rate of their own. The position table, norms and
downsampling of the ViT belong to "vision", the head to "llm"."""

Params = Mapping[str, Any]

KEPT = 8
"""Of how many jobs a process keeps schedule, optimizer and step: one more that is equal traces and compiles nothing."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule.

    Attributes:
      name: "adamw", "adafactor" or "muon" (for kernels; Adam for the rest).
      learning_rate: the highest; users of LoRA begin with 1e-4, of full fine-tuning with 1e-5.
      group_learning_rates: of parts of the model (`GROUPS`) that differ.
      schedule: "cosine" to `final_share` of it, "linear" likewise, or "constant".
      warmup: steps, or if below 1 the fraction of all steps, in which the learning rate rises from 0.
      final_share: fraction of the learning rate that is left at the end.
      weight_decay: of kernels and tables; norms and biases have none.
      b1, b2, eps: Adam's.
      clip_norm: gradients are scaled down to this norm, over all parameters; None never scales them.

    Raises:
      ConfigError: a field is invalid.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: PositiveNumber = 1e-5
    group_learning_rates: Annotated[
        Mapping[Group, NotNegative], Meta(description="numbers of at least 0 for some of vision, merger, llm")
    ] = dataclasses.field(default_factory=dict)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: NotNegative = 0.1
    final_share: float = 0.0
    weight_decay: NotNegative = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: PositiveNumber | None = 1.0

    def __post_init__(self) -> None:
        validate(self)

    def __hash__(self) -> int:
        """Without the learning rates of groups: a mapping has no hash."""
        return hash((self.name, self.learning_rate, self.schedule, self.warmup))


def group_of(path: str) -> Group:
    """Return the part of the model that a parameter belongs to."""
    if path.startswith("visual.merger."):
        return "merger"
    return "vision" if path.startswith("visual.") else "llm"


def warmup_steps(config: OptimizerConfig, num_steps: int) -> int:
    """Return the steps of the warm-up; ConfigError if it is longer than the training."""
    steps = round(config.warmup * num_steps) if config.warmup < 1 else int(config.warmup)
    if steps > num_steps:
        raise ConfigError(
            f"warmup: found {config.warmup}; expected at most {counted(num_steps, 'step')}, or a fraction below 1"
        )
    return steps


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Return the schedule, step -> learning rate; ConfigError if the warm-up is longer than the training.

    For equal arguments it is the same one.
    """
    warmup = warmup_steps(config, num_steps)
    return _schedule(config, warmup, 0 if config.schedule == "constant" else max(num_steps - warmup, 1))


@functools.lru_cache(maxsize=KEPT)
def _schedule(config: OptimizerConfig, warmup: int, rest: int) -> optax.Schedule:
    peak, end = config.learning_rate, config.final_share
    after: dict[str, Callable[[], optax.Schedule]] = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, end),
        "linear": lambda: optax.linear_schedule(peak, end * peak, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }
    # The first step is not wasted: it has the first fraction of the warm-up, not 0.
    rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rising, after[config.schedule]()], [warmup])


def make_optimizer(config: OptimizerConfig, num_steps: int, model: Glm4v) -> optax.GradientTransformation:
    """Return the optimizer of a model's parameters, by path: for equal arguments the same one.

    The model, which may be abstract, says the dimensions of its kernels. ConfigError as in `learning_rate`.
    """
    dimensions = tuple(kernel_dimensions(model).items()) if config.name == "muon" else ()
    return _optimizer(config, learning_rate(config, num_steps), dimensions)


@functools.lru_cache(maxsize=KEPT)
def _optimizer(
    config: OptimizerConfig, rate: optax.Schedule, dimensions: tuple[tuple[str, Any], ...]
) -> optax.GradientTransformation:
    chain = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    adam = dict(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.name == "adamw":
        chain.append(optax.adamw(rate, **adam, weight_decay=config.weight_decay, mask=_decays))
    elif config.name == "adafactor":
        chain.append(optax.adafactor(rate, weight_decay_rate=config.weight_decay or None, weight_decay_mask=_decays))
    else:
        dims = dict(dimensions)
        muon = (
            optax.contrib.muon(
                rate, adam_b1=config.b1, adam_b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
                weight_decay_mask=_decays, adam_weight_decay=config.weight_decay,
                # The size of Adam's steps, so that one learning rate serves both.
                consistent_rms=0.2, muon_weight_dimension_numbers=lambda params: {p: dims.get(p) for p in params},
            )
        )  # fmt: skip
        chain.append(_partitioned_by_xla(muon))
    factors: dict[str, float] = {group: lr / config.learning_rate for group, lr in config.group_learning_rates.items()}
    if factors:
        chain.append(_scaled(factors))
    return optax.chain(*chain)


def kernel_dimensions(model: Glm4v) -> dict[str, Any]:
    """Return path of a `Linear`'s kernel -> which dimensions are inputs and which are outputs; layers are neither."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        names = [str(key.name) for key in path if getattr(key, "name", "value") != "value"]
        module: Any = model
        for name in names[:-1]:
            module = getattr(module, name)
        if isinstance(module, Linear) and names[-1] == "kernel":
            first = leaf.ndim - len(module.axes) + module.leading
            inputs = range(first, first + len(module.in_axes))
            outputs = (i for i in range(leaf.ndim - len(module.axes), leaf.ndim) if i not in inputs)
            found[".".join(names)] = optax.contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))
    return found


def _decays(params: Params) -> dict[str, bool]:
    return {path: path.endswith(("kernel", "embedding", "lora_a", "lora_b")) for path in params}


def _scaled(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Scale the updates of some parts of the model, after the learning rate."""

    def update(updates: Params, params: Params | None = None) -> dict[str, Any]:
        del params
        return {path: factors.get(group_of(path), 1.0) * value for path, value in updates.items()}

    return optax.stateless(update)


def _partitioned_by_xla(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let XLA partition the matrix products of an optimizer."""

    def update(updates: Params, state: Any, params: Params | None = None) -> Any:
        out = jax.tree.map(lambda x: jax.typeof(x).sharding, (dict(updates), state))
        return jax.sharding.auto_axes(optimizer.update, out_sharding=out)(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)
