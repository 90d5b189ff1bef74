"""Optimisers by name, learning rates over time and by part of the model; parameters are a flat dict, path -> array."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax

from glm4v_jax.errors import ConfigError
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.nn import Linear

GROUPS = ("vision", "merger", "llm")
"""Parts of the model that are frozen, or have a learning rate, of their own. The ViT's position table, norms and
downsampling are of "vision", the head is of "llm"."""

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are changed.

    Attributes:
      name: "adamw", "adafactor" or "muon" (for kernels; Adam for the rest).
      learning_rate: the highest; users of LoRA begin with 1e-4, of full fine-tuning with 1e-5.
      group_learning_rates: of parts of the model (`GROUPS`) that differ.
      schedule: "cosine" to `final_share` of it, "linear" likewise, or "constant".
      warmup: steps, or if below 1 the share of all steps, in which it rises from 0.
      final_share: of the learning rate, at the end.
      weight_decay: of kernels and tables; norms and biases have none.
      b1, b2, eps: Adam's.
      clip_norm: gradients are scaled down to this norm, over all parameters; None leaves them.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-5
    group_learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    final_share: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0


def group_of(path: str) -> str:
    """The part of the model (`GROUPS`) that a parameter is of."""
    if path.startswith("visual.merger."):
        return "merger"
    return "vision" if path.startswith("visual.") else "llm"


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Step -> learning rate.

    Raises:
      ConfigError: the warm-up is longer than the training, or a name is unknown.
    """
    warmup = round(config.warmup * num_steps) if config.warmup < 1 else int(config.warmup)
    if not 0 <= warmup <= num_steps:
        raise ConfigError(f"warmup: found {config.warmup}; expected up to {num_steps} steps, or a share below 1")
    rest, end = max(num_steps - warmup, 1), config.final_share
    after: dict[str, Callable[[], optax.Schedule]] = {
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest, end),
        "linear": lambda: optax.linear_schedule(config.learning_rate, end * config.learning_rate, rest),
        "constant": lambda: optax.constant_schedule(config.learning_rate),
    }
    if config.schedule not in after:
        raise ConfigError(f"schedule: found {config.schedule!r}; expected one of {', '.join(after)}")
    # The first step is not thrown away: it has the first share of the warm-up, not 0.
    rising = optax.linear_schedule(config.learning_rate / max(warmup, 1), config.learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([rising, after[config.schedule]()], [warmup])


def make_optimizer(config: OptimizerConfig, num_steps: int, model: Glm4v) -> optax.GradientTransformation:
    """The optimiser of a model's parameters, by path.

    Args:
      config: see there.
      num_steps: of the whole training.
      model: for the dimensions of its kernels; abstract will do.

    Raises:
      ConfigError: a name is unknown, or a number out of its range.
    """
    check_optimizer(config, num_steps)
    rate = learning_rate(config, num_steps)
    chain = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    adam = dict(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.name == "adamw":
        chain.append(optax.adamw(rate, **adam, weight_decay=config.weight_decay, mask=_decays))
    elif config.name == "adafactor":
        chain.append(optax.adafactor(rate, weight_decay_rate=config.weight_decay or None, weight_decay_mask=_decays))
    else:
        dims = kernel_dimensions(model)
        muon = (
            optax.contrib.muon(
                rate, adam_b1=config.b1, adam_b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
                weight_decay_mask=_decays, adam_weight_decay=config.weight_decay,
                # The size of Adam's steps, so that one learning rate serves both.
                consistent_rms=0.2, muon_weight_dimension_numbers=lambda params: {p: dims.get(p) for p in params},
            )
        )  # fmt: skip
        chain.append(_partitioned_by_xla(muon))
    shares = {group: lr / config.learning_rate for group, lr in config.group_learning_rates.items()}
    if shares:
        chain.append(_scaled(shares))
    return optax.chain(*chain)


def kernel_dimensions(model: Glm4v) -> dict[str, Any]:
    """Path of each kernel of a `Linear` -> which of its dimensions are inputs and which outputs; layers are neither."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        names = [str(key.name) for key in path if getattr(key, "name", "value") != "value"]
        module: Any = model
        for name in names[:-1]:
            module = getattr(module, name)
        if isinstance(module, Linear) and names[-1] == "kernel":
            first = leaf.ndim - len(module.in_axes) - len(module.out_axes)
            middle = first + len(module.in_axes)
            dims = tuple(range(first, middle)), tuple(range(middle, leaf.ndim))
            found[".".join(names)] = optax.contrib.MuonDimensionNumbers(*dims)
    return found


def _decays(params: Params) -> dict[str, bool]:
    return {path: path.endswith(("kernel", "embedding", "lora_a", "lora_b")) for path in params}


def _scaled(shares: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies what the learning rate has made of the updates of some parts of the model."""

    def update(updates: Params, params: Params | None = None) -> dict[str, Any]:
        del params
        return {path: shares.get(group_of(path), 1.0) * value for path, value in updates.items()}

    return optax.stateless(update)


def _partitioned_by_xla(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser that multiplies matrices, and leaves it to XLA how to do that in shards."""

    def update(updates: Params, state: Any, params: Params | None = None) -> Any:
        out = jax.tree.map(lambda x: jax.typeof(x).sharding, (dict(updates), state))
        return jax.sharding.auto_axes(optimizer.update, out_sharding=out)(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def check_optimizer(config: OptimizerConfig, num_steps: int) -> None:
    """Check names and numbers, without a model.

    Raises:
      ConfigError: one is unknown or out of its range.
    """
    learning_rate(config, num_steps)
    if config.name not in (names := ("adamw", "adafactor", "muon")):
        raise ConfigError(f"name: found {config.name!r}; expected one of {', '.join(names)}")
    if not config.learning_rate > 0:
        raise ConfigError(f"learning_rate: found {config.learning_rate}; expected a number above 0")
    for group, value in config.group_learning_rates.items():
        if group not in GROUPS or not value >= 0:
            raise ConfigError(
                f"group_learning_rates: found {group}: {value}; expected {', '.join(GROUPS)}, and numbers from 0 on"
            )
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise ConfigError(f"clip_norm: found {config.clip_norm}; expected a number above 0, or none")
    if config.weight_decay < 0:
        raise ConfigError(f"weight_decay: found {config.weight_decay}; expected a number from 0 on")
