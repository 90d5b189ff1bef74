"""Floating point operations of a training step, and the peak of devices: together the model FLOPs utilisation (MFU).

Only matrix products count, 2 operations for a multiplication and an addition: of every token with every kernel that it
goes through, and of queries with the keys that they attend to. Padding does not count, and neither does what the
backward pass recomputes (arXiv 2204.02311, appendix B).
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glm4v_jax.checkpoints.hf_mapping import LAYER_GROUPS
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.model.layers import Remat
from train.optimizers import group_of

# The parts of a model in the order of the forward pass; gradients go down to the first that has something trained.
_STAGES = {"vision": 0, "merger": 1, "llm": 2}
_FIRST_OF_STAGE = {0: "visual.patch_embed.", 1: "visual.merger.proj."}
_ONLY_ADDED = re.compile(r"visual\.blocks\..*mlp\.down\.")
"""Their result is only added to something: no gradient needs it."""


class Work(NamedTuple):
    """What of a batch is not padding; see `attended`.

    tokens, patches: how many there are.
    pairs: of a token with itself or an earlier one of its sample.
    patch_pairs: of two patches of a frame, or a patch with itself, in either order.
    """

    tokens: float | Float[Array, ""]
    pairs: float | Float[Array, ""]
    patches: float | Float[Array, ""] = 0.0
    patch_pairs: float | Float[Array, ""] = 0.0


def attended(segment_ids: Int[Array, "*B T"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Count positions that are not padding, and pairs of one with itself or an earlier one of its segment; float32.

    Segments are contiguous. Without a causal mask there are `2 * pairs - positions` pairs.
    """
    index = jnp.arange(segment_ids.shape[-1])
    # Not a concatenation, whose slices have different partitions in jax 0.11; what stands before the first is not used.
    shift = [(0, 0, 0)] * (segment_ids.ndim - 1) + [(1, -1, 0)]
    before = jax.lax.pad(segment_ids, jnp.zeros((), segment_ids.dtype), shift)
    start = jax.lax.cummax(jnp.where(segment_ids != before, index, 0), axis=segment_ids.ndim - 1)
    is_real = segment_ids > 0
    return jnp.sum(is_real, dtype=jnp.float32), jnp.sum(jnp.where(is_real, index - start + 1, 0), dtype=jnp.float32)


def work_of(segment_ids: Int[Array, "*B T"], vision_segment_ids: Int[Array, "*R L"] | None = None) -> Work:
    """Return the work of a batch, of one or several micro-batches, from its segment ids; can be traced."""
    tokens, pairs = attended(jnp.asarray(segment_ids))
    if vision_segment_ids is None:
        return Work(tokens, pairs, jnp.zeros(()), jnp.zeros(()))
    patches, earlier = attended(jnp.asarray(vision_segment_ids))
    return Work(tokens, pairs, patches, 2 * earlier - patches)


def step_flops(config: Glm4vConfig, params: Mapping[str, Any], frozen: Mapping[str, Any], work: Work) -> float:
    """Return the operations of a step: forward, and backward as far as something is trained.

    `params` and `frozen` are path -> leaf with a shape, as from `state.split`; adapters are among the first.
    """
    first = _first_stage(params)
    total = 0.0
    for path, leaf in {**params, **frozen}.items():
        passes = 1 + has_input_gradient(path, params) + (path in params)
        total += passes * _product(config, path, leaf, work)
    for stage, flops in _attention(config, work).items():
        total += flops * (3 if stage >= first else 1)
    return total


def recomputed_flops(
    config: Glm4vConfig, params: Mapping[str, Any], frozen: Mapping[str, Any], work: Work, remat: Remat
) -> float:
    """Return the operations of the forward pass that the backward pass recomputes, besides those of `step_flops`.

    Logits are always recomputed. Scores that attention kernels recompute do not count.
    """
    first, total = _first_stage(params), 0.0
    for path, leaf in {**params, **frozen}.items():
        if path.startswith(LAYER_GROUPS):
            again = remat in ("full", "attention") and not _ONLY_ADDED.match(path)
        else:
            again = _is_head(config, path)
        total += _product(config, path, leaf, work) if again and _stage(path) >= first else 0
    if remat == "full":
        total += sum(flops for stage, flops in _attention(config, work).items() if stage >= first)
    return total


def kernel_flops(config: Glm4vConfig, params: Mapping[str, Any], work: Work, remat: Remat) -> float:
    """Return the operations of attention kernels in a step: two products forward, and seven backward, in two kernels.

    As `step_flops` has them, but with what the kernels recompute.
    """
    first = _first_stage(params)
    backward = 3.5 + (remat == "full")
    return sum(flops * (1 + backward * (stage >= first)) for stage, flops in _attention(config, work).items())


def has_input_gradient(path: str, params: Iterable[str]) -> bool:
    """Return whether the gradient goes through a kernel, on its way to some of the trained parameters."""
    first = _first_stage(params)
    return _stage(path) >= first and not path.startswith(_FIRST_OF_STAGE.get(first, "\n"))


def _first_stage(params: Iterable[str]) -> int:
    return min(map(_stage, params))


def _stage(path: str) -> int:
    return 3 if path.startswith("lm_head.") else _STAGES[group_of(path)]


def _is_head(config: Glm4vConfig, path: str) -> bool:
    if config.text_config.tie_word_embeddings:
        return path.startswith("language_model.embed_tokens.")
    return path.startswith("lm_head.")


def _product(config: Glm4vConfig, path: str, leaf: Any, work: Work) -> float:
    """Operations of all tokens or patches with a kernel, forward."""
    if not path.endswith((".kernel", ".lora_a", ".lora_b")) and not _is_head(config, path):
        return 0.0
    count = work.tokens
    if path.startswith(("visual.merger.", "visual.downsample.")):
        count = work.patches / config.vision_config.spatial_merge_size**2
    elif path.startswith("visual."):
        count = work.patches
    return 2.0 * math.prod(leaf.shape) * float(count)


def _attention(config: Glm4vConfig, work: Work) -> dict[int, float]:
    """Stage -> operations of attention scores and weighted sums, forward."""
    text, vision = config.text_config, config.vision_config
    heads = text.num_hidden_layers * text.num_attention_heads * text.head_dim
    return {
        _STAGES["vision"]: 4.0 * vision.depth * vision.hidden_size * float(work.patch_pairs),
        _STAGES["llm"]: 4.0 * heads * float(work.pairs),
    }
