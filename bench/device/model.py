"""What the parts of `bench.device` share: the model made on the device, and how a run is timed.

A figure has the name of its workload (`work.workloads`), and seconds of a run: the median of several, each waited for,
after two that compile and warm up. Runs depend on one another where they are short: the state of decoding is donated
from one to the next, products and attention are loops whose result is their next input. Contents are never zeros, which
some chips multiply faster. A run that fails is a figure with an error, and the next one is measured.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bench.device.work import FULL, TINY, config_of
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.inputs.medium import Medium
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.kernel_order import outputs_first
from glm4v_jax.model.params import leaf_paths
from glm4v_jax.model.quantize import for_inference, quantize_model
from glm4v_jax.model.runtime import Runtime

MAX_RUNS = 8
MAX_SECONDS = 2.0
"""Of the runs of a figure, besides the last."""

UNSTACKED = "unstacked"
"""The layout of layers that `runtime` makes of this name, in the place of a scheme."""

Figures = Iterator[dict[str, Any]]


class Device:
    """What the parts share.

    Attributes:
      sizes, config: of the workloads and of the model.
      deadline: of the part that runs, on `time.monotonic`.
      started: when the process was started, on `time.time`.
    """

    def __init__(self, tiny: bool, started: float):
        self.sizes, self.config = TINY if tiny else FULL, config_of(tiny)
        self.deadline, self.started = float("inf"), started
        self._made: dict[str, Runtime] = {}

    def runtime(self, scheme: str = "none") -> Runtime:
        """Return the model with random weights, made on the device; the one before it is released."""
        if scheme not in self._made:
            with mesh.use_mesh():
                if scheme == UNSTACKED:
                    module = self.runtime().module.unstacked()
                elif (config := for_inference(scheme)) is not None:
                    module = quantize_model(self.runtime().module, config)
                else:
                    module = random_module(self.config, jnp.bfloat16, is_served=True)
                self.release()
                self._made[scheme] = Runtime.of(module)
        return self._made[scheme]

    def release(self) -> None:
        """Free the memory of the model."""
        self._made.clear()
        gc.collect()


def random_module(config: Glm4vConfig, dtype: DTypeLike, *, is_served: bool = False) -> Glm4v:
    """Make a model in the current mesh by one program, of numbers that take little to compile and to make.

    `is_served`: with the order of kernels for generation, which is another one on a TPU.
    """
    abstract = jax.eval_shape(lambda: Glm4v.init(config, dtype=dtype))
    leaves, structure = jax.tree.flatten(abstract)

    def leaf(path: str, abstract: jax.ShapeDtypeStruct) -> Array:
        if path.endswith((".scale", ".bias")):
            values = jnp.full(abstract.shape, path.endswith(".scale"), abstract.dtype)
        else:
            values = 0.02 * noise(abstract.shape).astype(abstract.dtype)
        return jax.sharding.reshard(values, abstract.sharding.spec)

    def make() -> Glm4v:
        made = [leaf(path, one) for path, one in zip(leaf_paths(abstract), leaves, strict=True)]
        module: Glm4v = jax.tree.unflatten(structure, made)
        return outputs_first(module) if is_served and mesh.platform() == "tpu" else module

    return jax.jit(make)()


def noise(shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Numbers of mean 0 and variance 1: the places of an array, hashed as by MurmurHash3's last step."""
    strides = [math.prod(shape[i + 1 :]) % 2**32 for i in range(len(shape))]
    iotas = (jax.lax.broadcasted_iota(jnp.uint32, shape, i) for i in range(len(shape)))
    x = sum((iota * np.uint32(stride) for iota, stride in zip(iotas, strides, strict=True)), np.uint32(1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return (jnp.float32(x ^ (x >> 16)) / 2.0**31 - 1) * 3**0.5


def measured(what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a figure, or the first line of the error that it ended with."""
    try:
        return {"what": what, **measure()}
    except Exception as error:
        figure = {"what": what, "error": one_line(error)}
    gc.collect()  # what the failed run held of the device's memory
    return figure


def run_measured(what: str, make: Callable[[], Callable[[], Any]], per: int = 1) -> dict[str, Any]:
    """Return the figure of the run that `make` prepares; see `timed`."""
    return measured(what, lambda: timed(make(), per))


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its text, cut to 300 characters."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def timed(run: Callable[[], Any], per: int = 1) -> dict[str, Any]:
    """Time a run of the device; `per` divides it into steps.

    Returns:
      seconds: median of a step. least: of any. first: seconds of the first run, compiling included. runs: how many.
    """
    begin = time.perf_counter()
    jax.block_until_ready(run())
    first = time.perf_counter() - begin
    jax.block_until_ready(run())  # what a run returns may have another layout than what the first was given
    times: list[float] = []
    while not times or (sum(times) < MAX_SECONDS and len(times) < MAX_RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(times) / per, "least": min(times) / per, "first": first, "runs": len(times)}


def image(height: int, width: int, patch_dim: int, seed: int) -> Medium:
    """A random image, in patches."""
    values = np.random.default_rng(seed).standard_normal((height * width, patch_dim), np.float32)
    return Medium(values, np.array([1, height, width]))
