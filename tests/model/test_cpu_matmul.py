"""Products with narrow kernels: their numbers, and that no program holds such a kernel in floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close

from glm4v_jax.model import cpu_matmul


def drawn(num_tokens, inputs, kind, groups=1):
    """Tokens, kernel and scale as `matmul` takes them; and the product in float64."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_tokens, inputs)).astype(np.float32)
    integers = rng.integers(-7, 8, (inputs, 6)).astype(np.int8)
    if kind == "bfloat16":
        return x, jnp.asarray(integers, jnp.bfloat16), None, np.einsum("tk,kn->tn", x.astype(float), integers)
    scale = rng.random((groups, 6)).astype(np.float32)
    kernel = integers * np.repeat(scale.astype(float), inputs // groups, 0)
    expected = np.einsum("tk,kn->tn", x.astype(float), kernel)
    if kind == "int4":
        return x, cpu_matmul.pack_int4(jnp.asarray(integers), 0), scale, expected
    return x, jnp.asarray(integers), scale[0], expected


@pytest.mark.parametrize("few", [0, 8])
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
@pytest.mark.parametrize(
    ("kind", "inputs", "groups"),
    [("int8", 64, 1), ("int8", 7, 1), ("int8", 300, 1), ("int4", 64, 2), ("int4", 20, 2), ("bfloat16", 40, 1)],
)
def test_products_are_those_of_floats(monkeypatch, few, num_tokens, kind, inputs, groups):
    monkeypatch.setattr(cpu_matmul, "FEW_TOKENS", few)
    x, kernel, scale, expected = drawn(num_tokens, inputs, kind, groups)
    assert_close(jax.jit(lambda *args: cpu_matmul.matmul(*args))(x, kernel, scale), expected, tolerance=1e-5)


def test_packed_integers_are_unpacked_as_they_were():
    values = jnp.arange(-8, 8, dtype=jnp.int8).reshape(2, 4, 2)
    for axis in range(3):
        packed = cpu_matmul.pack_int4(values, axis)
        assert packed.dtype == jnp.uint8 and packed.size == values.size // 2
        np.testing.assert_array_equal(cpu_matmul.unpack_int4(packed, axis), values)


@pytest.mark.parametrize("num_tokens", [1, 8])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_loop_holds_no_copy_of_a_kernel_in_floats(scheme, num_tokens):
    """As that of the decoder, out of which XLA would take the conversion."""
    kernel, scale = jnp.ones((1024, 1024), jnp.int8), jnp.ones(1024)
    if scheme == "int4":
        kernel, scale = cpu_matmul.pack_int4(kernel, 0), jnp.ones((16, 1024))

    def steps(x, kernel, scale):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(cpu_matmul.matmul(x, kernel, scale)), x)

    compiled = jax.jit(steps).lower(jnp.ones((num_tokens, 1024)), kernel, scale).compile()
    # In floats, the kernel has 4 MiB and a block of its rows one.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 << 20
