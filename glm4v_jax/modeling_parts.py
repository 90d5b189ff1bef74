"""The ViT and the decoder in the reference's shapes and names; `modeling` puts them together."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from glm4v_jax import programs
from glm4v_jax.batch import VisionRows
from glm4v_jax.cache import KVCache, grow, init_cache
from glm4v_jax.config import Glm4vTextConfig, Glm4vVisionConfig
from glm4v_jax.decoder import Record, Recorded, TextDecoder
from glm4v_jax.errors import MessageError
from glm4v_jax.inputs.packing import bucket, frames_of, pack
from glm4v_jax.inputs.prepare import MIN_LENGTH
from glm4v_jax.loading import resolve_dtype
from glm4v_jax.mesh import data_shards, use_mesh
from glm4v_jax.nn import Init
from glm4v_jax.outputs import BaseModelOutputWithPast, PastKeyValues
from glm4v_jax.programs import Flat
from glm4v_jax.vision import VisionEncoder

MIN_FEATURES = 64
"""The fewest merged tokens that `encode` returns, padding included."""


class Glm4vVisionModel:
    """The ViT and merger."""

    def __init__(
        self, config: Glm4vVisionConfig, *, seed: int = 0, dtype: Any = None, mesh: Mesh | None = None,
        flat: Flat[VisionEncoder] | None = None,
    ):  # fmt: skip
        self.config = config
        with use_mesh(mesh) as self.mesh:
            self.flat = flat or Flat.of(
                VisionEncoder(config, Init(nnx.Rngs(params=seed), config.initializer_range, resolve_dtype(dtype)))
            )

    @property
    def module(self) -> VisionEncoder:
        """The functional module."""
        return self.flat.module

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype."""
        return self.flat.leaves[0].dtype

    def __call__(self, hidden_states: np.ndarray, grid_thw: np.ndarray) -> Array:
        """Encode pictures or frames.

        Args:
          hidden_states: float [patches, P], flattened patches in the processor's order.
          grid_thw: int [N, 3].

        Returns:
          [patches / merge_size^2, out_hidden_size], in the order of the patches.
        """
        config = self.config
        with use_mesh(self.mesh):
            rows, merged_index = pack(
                np.asarray(hidden_states),
                frames_of(grid_thw),
                merge_size=config.spatial_merge_size,
                position_grid=config.position_grid,
                row_multiple=data_shards(),
            )
            return self.encode(rows)[merged_index]

    def encode(self, rows: VisionRows) -> Array:
        """Packed rows -> [N, D] merged tokens, N the power of two that holds the flattened [R * L / merge_size^2]."""
        cells = rows.segment_ids.size // self.config.spatial_merge_size**2
        num_tokens = max(MIN_FEATURES, 1 << (cells - 1).bit_length())
        return programs.encode(self.flat, rows, num_tokens)


class Glm4vTextModel:
    """The decoder without a head."""

    def __init__(
        self, config: Glm4vTextConfig, *, seed: int = 0, dtype: Any = None, mesh: Mesh | None = None,
        flat: Flat[TextDecoder] | None = None,
    ):  # fmt: skip
        self.config = config
        with use_mesh(mesh) as self.mesh:
            self.flat = flat or Flat.of(
                TextDecoder(config, Init(nnx.Rngs(params=seed), config.initializer_range, resolve_dtype(dtype)))
            )

    @property
    def module(self) -> TextDecoder:
        """The functional module."""
        return self.flat.module

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype."""
        return self.flat.leaves[0].dtype

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache in the layout of this model's layers."""
        return init_cache(self.config, batch, capacity, self.dtype, stacked=self.module.layers.is_stacked)

    def __call__(
        self,
        input_ids: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Array | None = None,
        use_cache: bool | None = None,
        cache_position: np.ndarray | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rope_deltas: np.ndarray | None = None,
        dropout_key: Array | None = None,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
          input_ids: int [B, T]; or
          inputs_embeds: [B, T, D].
          attention_mask: int [B, T], or [B, past + T] with a cache; 0 for padding.
          position_ids: int [B, T] or [3, B, T]; the column's number by default, as in the reference.
          past_key_values: the output of an earlier call; `inputs` are then what follows.
          use_cache: return one; by default as the configuration says.
          cache_position: int [T], columns of the inputs; must be those that follow the cache's.
          output_hidden_states, output_attentions: return these too; attentions take memory that grows with T x S.
          rope_deltas: int [B, 1], handed on in `past_key_values`.
          dropout_key: turns attention dropout on.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise MessageError("input_ids and inputs_embeds: found both or neither; expected exactly one")
        with use_mesh(self.mesh):
            if inputs_embeds is None:
                inputs_embeds = programs.embed(self.flat, np.asarray(input_ids, np.int32), None, None)
            batch, t, _ = inputs_embeds.shape
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            if cache_position is not None and not np.array_equal(cache_position, past + np.arange(t)):
                raise MessageError(f"cache_position: found {cache_position}; expected {past} to {past + t - 1}")
            if position_ids is None:
                position_ids = np.broadcast_to(past + np.arange(t), (batch, t))
            position_ids = np.broadcast_to(np.asarray(position_ids, np.int32), (3, batch, t))
            segments = np.ones((batch, t), np.int32)
            if attention_mask is not None:
                segments = (np.asarray(attention_mask) != 0)[:, -t:].astype(np.int32)
            use_cache = self.config.use_cache if use_cache is None else use_cache
            cache = None
            if past_key_values is not None or use_cache:
                cache = self._cache_for(past_key_values, batch, past, t)
            hidden, cache, recorded = self._forward(
                inputs_embeds,
                position_ids,
                segments,
                cache,
                Record(output_hidden_states, output_attentions),
                dropout_key,
            )
            hidden, hidden_states, attentions = _cut(hidden, recorded, batch, t, past + t)
        kept = None
        if cache is not None and use_cache:
            deltas = np.zeros((batch, 1), np.int32) if rope_deltas is None else np.asarray(rope_deltas)
            kept = PastKeyValues(cache._replace(length=cache.length * 0 + (past + t)), deltas)
        return BaseModelOutputWithPast(hidden, kept, hidden_states, attentions)

    def _cache_for(self, past_key_values: PastKeyValues | None, batch: int, past: int, t: int) -> KVCache:
        capacity = bucket(past + bucket(t, MIN_LENGTH), 2 * MIN_LENGTH)
        if past_key_values is None:
            return self.init_cache(batch + -batch % data_shards(), capacity)
        cache = past_key_values.cache
        return grow(cache, capacity) if cache.capacity < past + bucket(t, MIN_LENGTH) else cache

    def _forward(
        self, embeds: Array, positions: np.ndarray, segments: np.ndarray, cache: KVCache | None, record: Record,
        dropout_key: Array | None,
    ) -> tuple[Array, KVCache | None, Recorded]:  # fmt: skip
        """Pad to the bucket of T and the shards of B, and run. A decoding step (T = 1) stays as it is."""
        batch, t = segments.shape
        columns = 0 if t == 1 else bucket(t, MIN_LENGTH) - t
        rows = -batch % data_shards()
        if rows or columns:
            embeds = jnp.pad(embeds, ((0, rows), (0, columns), (0, 0)))
        positions = np.pad(positions, ((0, 0), (0, rows), (0, columns)), constant_values=1)
        segments = np.pad(segments, ((0, rows), (0, columns)))
        return programs.forward(self.flat, embeds, positions, segments, cache, record, dropout_key)


def _cut(
    hidden: Array, recorded: Recorded, batch: int, t: int, s: int
) -> tuple[Array, tuple[Array, ...] | None, tuple[Array, ...] | None]:
    """Take the padding off: hidden states [B, T, D], all layers' states, weights [B, heads, T, S]."""
    hidden = hidden if hidden.shape[:2] == (batch, t) else hidden[:batch, :t]
    states = attentions = None
    if recorded.hidden_states is not None:
        states = (*(x[:batch, :t] for x in recorded.hidden_states), hidden)
    if recorded.attentions is not None:
        n, b, k, g, tt, ss = recorded.attentions.shape
        weights = jax.sharding.reshard(recorded.attentions, jax.P()).reshape(n, b, k * g, tt, ss)
        attentions = tuple(x[:batch, :, :t, :s] for x in weights)
    return hidden, states, attentions
