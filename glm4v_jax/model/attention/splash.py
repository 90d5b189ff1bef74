"""Attention on TPU: JAX's splash kernels, with the masks of `mask.Mask`.

The kernels take masks that NumPy computes when they are traced. Here the program computes what such a mask is turned
into: which blocks to visit, from segments and `q_start`, and the slot of each query. So one kernel serves prompts,
prefill chunks after a cache, and rows of images; keys that no query of a block can see are neither multiplied nor read
from memory; and the host makes no mask of a long prompt.

The kernels cannot handle rows that see nothing; a sink can: a score without a value, so low that it does not count
beside any other.

Every array is local to a device: call these within `jax.shard_map` (with `check_vma=False`, because the kernels do not
declare how their results vary over a mesh).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from glm4v_jax.model.attention.blockwise import SAVED, pad
from glm4v_jax.model.attention.mask import FLOOR, Mask, reachable
from glm4v_jax.model.kv_cache import QuantizedSide, dequantize_side

# Scores of 512 x 1,024 fit the 16 MiB that a v5e kernel may use (float32 and backward too), and 512 queries a key are
# enough work to hide reading it: 512 FLOPs a byte, where a v5e does 240.
QUERY_BLOCKS = (512, 384, 256, 128)
KEY_BLOCKS = (1024, 768, 512, 384, 256, 128)
KEYS_AT_ONCE = 512
"""Larger blocks of keys are multiplied in two halves, so that one's products run beside the other's exponentials."""
BLOCK_COST = 128
"""Overhead of a block, in rows: starting it, and filling and draining the pipeline."""


def attention(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Mask,
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B K G T H"]:
    """Softmax attention, scaled by 1 / sqrt(H), in q's dtype; rows that see no key give zeros.

    A query sees a key if both are of the same segment > 0 and, where it is causal, the key's slot is not after
    `q_start + t`. `mask.q_start` None is zeros; it may be negative or beyond S. Differentiable in q, k and v.
    `interpret` runs the kernel as a plain program, on any platform and slowly.
    """
    return _over_rows(functools.partial(_differentiable, causal, interpret), q, k, v, mask)


def partial(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"] | QuantizedSide,
    v: Float[Array, "B K S H"] | QuantizedSide,
    mask: Mask,
    *,
    causal: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
    """`attention` to some of the keys, to be merged with that to the others: (out, log_total), float32, forward only.

    `out` is normalised over these keys (and went through q's dtype); `log_total` is the logarithm of the sum of their
    exponentials, `FLOOR` where a row sees none. Integers become floats of q's dtype a row of the batch at a time: the
    kernel takes no scales.
    """

    def row(q: Array, k: Array | QuantizedSide, v: Array | QuantizedSide, *masks: Array) -> tuple[Array, Array]:
        k, v = dequantize_side(k, q.dtype), dequantize_side(v, q.dtype)
        out, (log_total,) = _call(q, k, v, *masks, causal=causal, residuals=True, interpret=interpret)
        return out.astype(jnp.float32), log_total

    return _over_rows(row, q, k, v, mask)


def _out(causal, interpret, *args):  # type: ignore[no-untyped-def]
    return _call(*args, causal=causal, residuals=False, interpret=interpret)


def _forward(causal, interpret, q, k, v, *masks):  # type: ignore[no-untyped-def]
    return jax.vjp(lambda *qkv: _out(causal, interpret, *qkv, *masks), q, k, v)


def _backward(causal, interpret, pull, d_out):  # type: ignore[no-untyped-def]
    # The kernels' backward rules are traced here, outside the precision that the forward one was traced with.
    with jax.default_matmul_precision(_precision(d_out)):
        return *pull(d_out), None, None, None


_differentiable = jax.custom_vjp(_out, nondiff_argnums=(0, 1))
_differentiable.defvjp(_forward, _backward)


def _over_rows(row: Callable[..., Any], q: Array, k: Any, v: Any, mask: Mask) -> Any:
    """Run rows one after the other, as a TPU core does anyway: each has its own blocks to visit."""
    start = jnp.zeros_like(mask.q_segments[:, 0]) if mask.q_start is None else mask.q_start
    args = (q, k, v, mask.q_segments, mask.kv_segments, start)
    if q.shape[0] == 1:
        return jax.tree.map(lambda x: x[None], row(*jax.tree.map(lambda x: x[0], args)))
    return jax.lax.map(lambda args: row(*args), args)


def _call(
    q: Float[Array, "K G T H"],
    k: Float[Array, "K S H"],
    v: Float[Array, "K S H"],
    q_segments: Int[Array, " T"],
    kv_segments: Int[Array, " S"],
    q_start: Int[Array, ""],
    *,
    causal: bool,
    residuals: bool,
    interpret: bool,
) -> Any:
    """Run the kernel on one row of the batch: [K, G, T, H], and with `residuals` ([K, G, T],) as well."""
    kv_heads, groups, t, head_dim = q.shape
    block_q, block_kv = _block_size(t, QUERY_BLOCKS), _block_size(k.shape[-2], KEY_BLOCKS)
    # Padding of the queries is segment 0, which no key is of: keys' padding is -1.
    q_segments = pad(q_segments, 0, block_q)
    kv_segments = pad(jnp.where(kv_segments > 0, kv_segments, -1), 0, block_kv, -1)
    q_slots = q_start + jnp.arange(q_segments.shape[0], dtype=jnp.int32)

    row = Mask(q_segments[None], kv_segments[None], q_start[None])
    visited = reachable(row, (block_q, block_kv), causal)[0]
    by_query = MaskInfo(
        data_next=_next_visited(visited)[None],
        mask_next=None,
        block_mask=visited.astype(jnp.int32)[None],
        partial_mask_blocks=None,
        q_sequence=q_slots if causal else None,
    )
    compute = block_kv if block_kv <= KEYS_AT_ONCE else block_kv // 2
    kernel = SplashAttentionKernel(
        by_query,
        by_query,
        by_query._replace(data_next=_next_visited(visited.T).T[None]),
        block_sizes=BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=compute,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=compute,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        is_mqa=False,
        save_residuals=residuals,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=SAVED,
        mask_function=_not_after if causal else None,
        interpret=interpret,
    )
    q = pad((q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype), -2, block_q)
    k, v = pad(k, -2, block_kv), pad(v, -2, block_kv)
    heads = kv_heads * groups
    segments, sinks = SegmentIds(q_segments, kv_segments), jnp.full(heads, FLOOR, jnp.float32)
    with jax.default_matmul_precision(_precision(q)):
        result = kernel(q.reshape(heads, *q.shape[2:]), k, v, segments, sinks)
    return jax.tree.map(lambda x: x[:, :t].reshape(kv_heads, groups, t, *x.shape[2:]), result)


def _precision(x: Array) -> str:
    """As `nn.precision`, by the name that a context takes."""
    return "highest" if x.dtype == jnp.float32 else "default"


def _not_after(q_slots: Array, kv_slots: Array) -> Array:
    return q_slots >= kv_slots


def _next_visited(visited: Bool[Array, "N M"]) -> Int[Array, "N M"]:
    """The block to hold at each step of a loop over N and, within, M: the step's own, or the next that is visited.

    The kernel starts reading a block as soon as it is named, and never reads the same one twice in a row.
    """
    n = visited.size
    steps = jnp.where(visited.reshape(-1), jnp.arange(n, dtype=jnp.int32), n)
    steps = jax.lax.cummin(steps, reverse=True)
    steps = jnp.where(steps == n, steps[0], steps)
    return (steps % visited.shape[1]).reshape(visited.shape)


def _block_size(n: int, blocks: tuple[int, ...]) -> int:
    """The block that covers n rows most cheaply, padding included; of equals the first."""
    return min(blocks, key=lambda block: -(-n // block) * (block + BLOCK_COST))
