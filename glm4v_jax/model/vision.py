"""The ViT and its merger (`Glm4vVisionModel`, `GlmOcrVisionModel`), on packed rows of static shape.

Attention stays inside an image or frame through segment ids. The learned position table is sampled with bicubic weights
that the host has computed (`inputs.vision_rows`). Convolutions whose stride is their kernel are matrix products.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from glm4v_jax.batch import VisionRows
from glm4v_jax.config.model import Glm4vVisionConfig
from glm4v_jax.devices import mesh
from glm4v_jax.model import rope
from glm4v_jax.model.attention.attend import Dropout, Mask, attend
from glm4v_jax.model.layers import Layers, Remat
from glm4v_jax.model.nn import GatedMlp, Init, LayerNorm, Linear, RMSNorm, activation, precision

MERGER_NORM_EPS = 1e-5  # torch's LayerNorm default, which the reference's merger uses


class VisionAttention(nnx.Module):
    """Multi-head attention with 2-D rope, inside segments; queries and keys may be normed before they rotate."""

    def __init__(self, config: Glm4vVisionConfig, init: Init):
        def norm() -> RMSNorm | None:
            return RMSNorm(config.head_dim, config.rms_norm_eps, init) if config.structure.qk_norm else None

        self.dropout_rate = config.attention_dropout
        heads: dict[str | None, int] = {"heads": config.num_heads, "head_dim": config.head_dim}
        self.qkv = Linear({"embed": config.hidden_size}, {None: 3, **heads}, init, bias=config.attention_bias)
        self.q_norm, self.k_norm = norm(), norm()
        self.proj = Linear(heads, {"embed": config.hidden_size}, init, bias=config.mlp_bias)

    def __call__(
        self,
        x: Float[Array, "R L D"],
        cos_sin: tuple[Float[Array, "R L F"], Float[Array, "R L F"]],
        mask: Mask,
        dropout_key: Array | None = None,
    ) -> Float[Array, "R L D"]:
        """Attend inside the segments of a row."""
        qkv = self.qkv(x)

        def rotated(x: Array, norm: RMSNorm | None) -> Array:
            return rope.apply_half(x if norm is None else norm(x), *cos_sin)

        q, k = rotated(qkv[:, :, 0], self.q_norm), rotated(qkv[:, :, 1], self.k_norm)
        dropout = Dropout(dropout_key, self.dropout_rate) if dropout_key is not None else None
        out = attend(q[:, :, :, None], k, qkv[:, :, 2], mask, causal=False, dropout=dropout)
        return self.proj(out[:, :, :, 0])


class VisionBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: Glm4vVisionConfig, init: Init):
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps, init)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps, init)
        self.attn = VisionAttention(config, init)
        self.mlp = GatedMlp(config.hidden_size, config.mlp_width, config.hidden_act, init, bias=config.mlp_bias)

    def __call__(
        self,
        x: Float[Array, "R L D"],
        cos_sin: tuple[Float[Array, "R L F"], Float[Array, "R L F"]],
        mask: Mask,
        dropout_key: Array | None = None,
    ) -> Float[Array, "R L D"]:
        """Run one block."""
        x = x + self.attn(self.norm1(x), cos_sin, mask, dropout_key)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """Projection, LayerNorm, exact GELU and a gated MLP into the decoder's embedding space."""

    def __init__(self, config: Glm4vVisionConfig, init: Init):
        dim = config.out_hidden_size
        self.proj = Linear({"embed": dim}, {None: dim}, init)
        self.post_projection_norm = LayerNorm(dim, MERGER_NORM_EPS, init)
        self.mlp = GatedMlp(dim, config.merger_width, config.hidden_act, init)

    def __call__(self, x: Float[Array, "R M D"]) -> Float[Array, "R M D"]:
        """Project downsampled patches."""
        return self.mlp(activation("gelu", self.post_projection_norm(self.proj(x))))


class VisionEncoder(nnx.Module):
    """Encode patches as merged tokens in the decoder's embedding space."""

    def __init__(self, config: Glm4vVisionConfig, init: Init):
        self.config = config
        d, m, structure = config.hidden_size, config.spatial_merge_size, config.structure
        self.patch_embed = Linear({None: config.patch_dim}, {"embed": d}, init, bias=True)
        cells = config.position_grid**2
        self.position_embedding = init.normal((cells, d), (None, "embed")) if structure.position_table else None
        self.post_conv_layernorm = RMSNorm(d, config.rms_norm_eps, init) if structure.post_conv_norm else None
        self.blocks = Layers.init(lambda init: VisionBlock(config, init), config.depth, init)
        self.post_layernorm = RMSNorm(d, config.rms_norm_eps, init)
        self.downsample = Linear({None: m * m * d}, {"embed": config.out_hidden_size}, init, bias=True)
        self.merger = PatchMerger(config, init)

    def __call__(
        self, rows: VisionRows, *, dropout_key: Array | None = None, remat: Remat = "none"
    ) -> Float[Array, "R M O"]:
        """Encode packed rows.

        Args:
          rows: R rows of L patches.
          dropout_key: enables attention dropout, for training.
          remat: what the backward pass recomputes of a block.

        Returns:
          [R, L / merge_size^2, out_hidden_size]; padding gives values without meaning. Tokens may be sharded over the
          tensor axis, as patches were.

        Raises:
          ConfigError: rows do not divide by the mesh, or `remat` is unknown.
        """
        config = self.config
        mesh.check_divides(rows.patches.shape[:1], ("rows",))
        patches = config.spatial_merge_size**2
        length = "length" if rows.patches.shape[1] % (patches * mesh.shards("patches")) else "patches"
        rows = VisionRows(*(mesh.reshard(x, "rows", length, *(None,) * (x.ndim - 2)) for x in rows))
        dtype = self.post_layernorm.scale[...].dtype
        x = self.patch_embed(rows.patches.astype(dtype))
        if self.post_conv_layernorm is not None:
            x = self.post_conv_layernorm(x)
        if self.position_embedding is not None:
            x = x + self._positions(rows).astype(dtype)
        cos_sin = rope.vision_cos_sin(rows.coords, config.head_dim, config.rope_theta)
        mask = Mask(rows.segment_ids, rows.segment_ids)

        def step(block: VisionBlock, index: Array | int, x: Array) -> tuple[Array, None]:
            key = jax.random.fold_in(dropout_key, index) if dropout_key is not None else None
            return block(x, cos_sin, mask, key), None

        x, _ = self.blocks.run(step, x, remat=remat)
        x = self.post_layernorm(x)
        r, n, d = x.shape
        blocks = x.reshape(r, n // patches, patches * d, out_sharding=mesh.spec("rows", length, None))
        return self.merger(self.downsample(blocks))

    def _positions(self, rows: VisionRows) -> Float[Array, "R L D"]:
        """Sample the position table at each patch, float32.

        The outer product of the weights comes first: contracting one of them with the table would make L x S x D.
        """
        assert self.position_embedding is not None
        weights = rows.weights_h[..., :, None] * rows.weights_w[..., None, :]
        weights = weights.reshape(*weights.shape[:2], -1)
        table = jax.sharding.reshard(self.position_embedding[...], mesh.gathered(None, "embed")).astype(jnp.float32)
        return jnp.einsum("rls,sd->rld", weights, table, precision=precision(jnp.float32))
