"""Ceilings of a device, and its attention kernels."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.device.model import Device, Figures, measured, noise, timed
from bench.device.work import KERNELS
from glm4v_jax.devices import mesh
from glm4v_jax.model.attention import attend, blockwise, cudnn
from glm4v_jax.model.attention.mask import Mask

MAX_ERROR = 1e-2
"""Of attention in bfloat16, relative to the norm of the result in float32."""


def ceilings(device: Device) -> Figures:
    """Copy and read bandwidth, and the rate of matrix products."""
    count, n, times = device.sizes.copied // 4, device.sizes.matrix, 8
    made = jax.jit(lambda: jnp.sin(jnp.arange(count, dtype=jnp.float32)))
    copied = [made()]
    change = jax.jit(lambda x: -x, donate_argnums=0)

    def copy() -> Any:
        copied[0] = change(copied[0])
        return copied[0]

    yield measured("copy", lambda: timed(copy))
    yield measured("read", lambda: timed(functools.partial(jax.jit(jnp.max), copied.pop())))

    def random(key: int, dtype: Any) -> Any:
        x = jax.random.normal(jax.random.key(key), (n, n))
        return (x / n**0.5).astype(dtype) if dtype == jnp.bfloat16 else (30 * x).astype(dtype)

    def product(x: Any, y: Any) -> Any:
        if x.dtype == jnp.bfloat16:
            return x @ y
        return (jax.lax.dot(x, y, preferred_element_type=jnp.int32) >> 8).astype(x.dtype)

    for name in ("bfloat16", "int8"):
        x, y = (jax.jit(random, static_argnums=(0, 1))(key, jnp.dtype(name)) for key in (0, 1))
        chain = jax.jit(lambda x, y: jax.lax.fori_loop(0, times, lambda _, x: product(x, y), x))
        run = functools.partial(chain, x, y)
        yield measured(f"matrix product, {name}", functools.partial(timed, run, times))


def attention(device: Device) -> Figures:
    """The device's attention kernel and the one in blocks: equal to attention in float32, and how long each takes."""
    text, vit = device.config.text_config, device.config.vision_config
    tokens, patches = device.sizes.attention
    groups = text.num_key_value_groups
    for what, shape, causal in (
        (f"{tokens:,} tokens", (1, text.num_attention_heads // groups, groups, tokens, text.head_dim), True),
        (f"{patches:,} patches", (1, vit.num_heads, 1, patches, vit.head_dim), False),
    ):
        for kernel in KERNELS if shape[3] else ():
            yield measured(f"attention, {what}, {kernel}", functools.partial(_attention, kernel, shape, causal))


def _attention(name: str, shape: tuple[int, ...], causal: bool, times: int = 8) -> dict[str, Any]:
    """Figure of a kernel: time, and how far results and gradients are from attention in float32."""

    def inputs(length: int) -> tuple[Any, ...]:
        rng = np.random.default_rng(0)
        sizes = [(*shape[:3], length, shape[4]), *[(*shape[:2], length, shape[4])] * 2]
        q, k, v = (jnp.asarray(rng.standard_normal(size, np.float32), jnp.bfloat16) for size in sizes)
        ones = jnp.ones((shape[0], length), jnp.int32)
        return q, k, v, Mask(ones, ones)

    def local(q: Any, k: Any, v: Any, mask: Mask) -> Any:
        return _kernel(name)(q, k, v, mask, causal=causal)

    def sharded(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.shard_map(function, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)

    def exact(q: Any, k: Any, v: Any, mask: Mask) -> Any:
        q, k, v = (x.astype(jnp.float32) for x in (jnp.moveaxis(q, 3, 1), *(jnp.moveaxis(x, 2, 1) for x in (k, v))))
        return jnp.moveaxis(attend.attend_with_weights(q, k, v, mask, causal=causal)[0], 1, 3)

    def results(function: Callable[..., Any], *arrays: Any) -> Any:
        """The result, and the gradients of a sum of it with weights of both signs."""

        def loss(*arrays: Any) -> tuple[Any, Any]:
            out = function(*arrays).astype(jnp.float32)
            return jnp.sum(out * noise(out.shape)), out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
        return out, *gradients

    def distances(*arrays: Any) -> list[Any]:
        found, expected = (
            [jnp.ravel(x).astype(jnp.float32) for x in results(function, *arrays)]
            for function in (sharded(local), exact)
        )
        return [jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(found, expected, strict=True)]

    def chained(q: Any, *rest: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, q: local(q, *rest), q)

    with mesh.use_mesh():
        of_result, *of_gradients = map(float, jax.jit(distances)(*inputs(min(shape[3], 1024))))
        arrays, chain = inputs(shape[3]), jax.jit(sharded(chained))
        figure = timed(lambda: chain(*arrays), times)
    errors = [of_result, *of_gradients]
    note = f"off by {of_result:.1e}, gradients by {max(of_gradients):.1e}"
    return figure | {"errors": errors, "passed": bool(max(errors) <= MAX_ERROR), "note": note}


def _kernel(name: str) -> Any:
    """Attention of a device; on a CPU, which has no other than blocks, cuDNN's adapter computed by XLA."""
    if name == KERNELS[1]:
        return blockwise.attention
    if mesh.platform() == "cpu":
        return functools.partial(cudnn.attention, implementation="xla")
    return attend._kernel().attention
