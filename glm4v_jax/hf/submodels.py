"""The ViT and the decoder in the reference's shapes and names; `multimodal` puts them together.

An `Extent` maps the caller's shapes to those of the programs: rows are padded to the shards of a batch and columns to a
bucket, everything runs on padded arrays, and results are cut at the very end.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from glm4v_jax.batch import VisionRows
from glm4v_jax.checkpoints.load import resolve_dtype
from glm4v_jax.config.model import Glm4vTextConfig, Glm4vVisionConfig
from glm4v_jax.devices.mesh import current_rules, data_shards, reshard, round_up, use_mesh
from glm4v_jax.errors import MessageError, counted
from glm4v_jax.generate.encode_media import encode_media
from glm4v_jax.hf import forward
from glm4v_jax.hf.outputs import BaseModelOutputWithPast, PastKeyValues
from glm4v_jax.inputs.make_batch import MIN_LENGTH, checked_positions
from glm4v_jax.inputs.medium import split_media
from glm4v_jax.inputs.prompt import in_vocabulary, token_array
from glm4v_jax.inputs.vision_rows import bucket
from glm4v_jax.model.decoder import Capture, Captured, TextDecoder
from glm4v_jax.model.kv_cache import KVCache, grow, init_cache
from glm4v_jax.model.nn import Init
from glm4v_jax.model.runtime import Flat, compute_dtype, encode_rows
from glm4v_jax.model.vision import VisionEncoder

ConfigT = TypeVar("ConfigT", bound=Glm4vVisionConfig | Glm4vTextConfig)
ModuleT = TypeVar("ModuleT", bound=VisionEncoder | TextDecoder)


class Extent(NamedTuple):
    """The caller's [batch, t], and the [rows, columns] that it is padded to."""

    batch: int
    t: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Extent":
        """For arrays [B, T, ...] in the current mesh. A decoding step, T = 1, has a bucket of its own."""
        if len(shape) < 2:
            raise MessageError(f"found an array of shape {list(shape)}; expected [B, T, ...]")
        batch, t = shape[:2]
        return cls(batch, t, batch + -batch % data_shards(), 1 if t == 1 else bucket(t, MIN_LENGTH))

    def pad(self, x: np.ndarray, fill: int = 0) -> np.ndarray:
        """int [..., B, T] -> int32 [..., rows, columns]."""
        widths = [(0, 0)] * (x.ndim - 2) + [(0, self.rows - self.batch), (0, self.columns - self.t)]
        return np.pad(x, widths, constant_values=fill).astype(np.int32)

    def cut(self, x: Array) -> Array:
        """[rows, columns, ...] -> [B, T, ...]."""
        if x.shape[:2] == (self.batch, self.t):
            return x
        return forward.cut(x, (self.batch, self.t))


@dataclasses.dataclass(frozen=True)
class PaddedOutput:
    """Padded result of the decoder, and the caller's shapes to cut it to."""

    extent: Extent
    hidden: Array
    past_key_values: PastKeyValues | None
    recorded: Captured
    num_keys: int

    def hidden_states(self) -> tuple[Array, ...] | None:
        """Input of every layer, then the result: arrays [B, T, D]."""
        if self.recorded.hidden_states is None:
            return None
        return tuple(self.extent.cut(x) for x in (*self.recorded.hidden_states, self.hidden))

    def attentions(self) -> tuple[Array, ...] | None:
        """Weights of every layer, [B, heads, T, S]."""
        if self.recorded.attentions is None:
            return None
        extent = self.extent
        return forward.attention_weights(self.recorded.attentions, (extent.batch, extent.t, self.num_keys))


class _Submodel(Generic[ConfigT, ModuleT]):
    """A part of the model with its mesh and rules; `flat` has its module, which is made of `seed` if there is none."""

    _made: Callable[[ConfigT, Init], ModuleT]

    def __init__(
        self, config: ConfigT, *, seed: int = 0, dtype: Any = None, mesh: Mesh | None = None,
        flat: Flat[ModuleT] | None = None,
    ):  # fmt: skip
        self.config, self.rules = config, current_rules()
        with use_mesh(mesh) as self.mesh:
            if flat is None:
                init = Init(nnx.Rngs(params=seed), config.initializer_range, resolve_dtype(dtype))
                flat = Flat.of(self._made(config, init))
            self.flat = flat

    @property
    def module(self) -> ModuleT:
        """The functional module."""
        return self.flat.module

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype."""
        return compute_dtype(self.flat)


class Glm4vVisionModel(_Submodel[Glm4vVisionConfig, VisionEncoder]):
    """The ViT and merger.

    >>> from glm4v_jax import Glm4vConfig, Glm4vVisionModel
    >>> vision = Glm4vVisionModel(Glm4vConfig.tiny().vision_config, dtype="float32")
    >>> vision(np.zeros((16, vision.config.patch_dim)), [[1, 4, 4]]).shape
    (4, 64)
    """

    _made = VisionEncoder

    def __call__(self, hidden_states: np.ndarray, grid_thw: np.ndarray) -> Array:
        """Encode images or frames.

        Args:
          hidden_states: float [patches, P], flattened patches in the processor's order.
          grid_thw: int [N, 3].

        Returns:
          [patches / merge_size^2, out_hidden_size], in the order of the patches.

        Raises:
          MessageError: there are no grids, or they count other patches.
        """
        return jnp.concatenate(self.features(hidden_states, grid_thw, "hidden_states", "grid_thw"))

    def features(self, pixel_values: Any, grid_thw: Any, name: str, grid_name: str) -> list[Array]:
        """Merged tokens of each image or video; errors as `__call__` has them, which say `name` and `grid_name`."""
        media = split_media(pixel_values, grid_thw, self.config, name, grid_name)
        if not media:
            raise MessageError(f"{grid_name}: found no grids; expected at least one")
        with use_mesh(self.mesh, self.rules):
            return encode_media(self.flat, self.config, media)

    def encode(self, rows: VisionRows, dropout_key: Array | None = None) -> Array:
        """See `runtime.encode_rows`."""
        return encode_rows(self.flat, self.config.spatial_merge_size, rows, dropout_key)


class Glm4vTextModel(_Submodel[Glm4vTextConfig, TextDecoder]):
    """The decoder without a head.

    >>> from glm4v_jax import Glm4vConfig, Glm4vTextModel
    >>> decoder = Glm4vTextModel(Glm4vConfig.tiny().text_config, dtype="float32")
    >>> decoder(np.array([[5, 6, 7]])).last_hidden_state.shape
    (1, 3, 64)
    """

    _made = TextDecoder

    def get_input_embeddings(self, input_ids: np.ndarray | None = None) -> Any:
        """[B, T] tokens -> [B, T, D] embeddings; without tokens the function that does so, as the reference returns it.

        Raises:
          MessageError: the shape is another, or a token is not in the vocabulary.
        """
        if input_ids is None:
            return self.get_input_embeddings
        with use_mesh(self.mesh, self.rules):
            input_ids = in_vocabulary(token_array(input_ids), self.config.vocab_size)
            extent = Extent.of(input_ids.shape)
            return extent.cut(forward.embed(self.flat, extent.pad(input_ids), None, None))

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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
          input_ids: int [B, T]; or
          inputs_embeds: [B, T, D].
          attention_mask: int [B, T], or [B, past + T] with a cache; 0 for padding.
          position_ids: int [B, T] or [3, B, T]; the column's number by default, as in the reference.
          past_key_values: the output of an earlier call; the inputs are then what follows.
          **kwargs: see `run`.

        Raises:
          MessageError: a shape is wrong, or a token is not in the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise MessageError("input_ids and inputs_embeds: found both or neither; expected exactly one")
        with use_mesh(self.mesh, self.rules):
            if inputs_embeds is not None:
                extent = Extent.of(np.shape(inputs_embeds))
                embeds = self.pad_embeds(extent, inputs_embeds)
            else:
                input_ids = in_vocabulary(token_array(input_ids), self.config.vocab_size)
                extent = Extent.of(input_ids.shape)
                embeds = forward.embed(self.flat, extent.pad(input_ids), None, None)
            past = 0 if past_key_values is None else past_key_values.length
            if position_ids is None:
                position_ids = past + np.arange(extent.t)[None]
            positions = extent.pad(checked_positions(position_ids, extent.batch, extent.t), 1)
            run = self.run(extent, embeds, positions, attention_mask, past_key_values, **kwargs)
            return BaseModelOutputWithPast(
                extent.cut(run.hidden), run.past_key_values, run.hidden_states(), run.attentions()
            )

    def pad_embeds(self, extent: Extent, inputs_embeds: Array) -> Array:
        """[B, T, D] -> [rows, columns, D], in the compute dtype.

        Raises:
          MessageError: the shape is another.
        """
        if np.ndim(inputs_embeds) != 3 or np.shape(inputs_embeds)[2] != self.config.hidden_size:
            expected = ["B", "T", self.config.hidden_size]
            raise MessageError(f"inputs_embeds: found shape {list(np.shape(inputs_embeds))}; expected {expected}")
        widths = ((0, extent.rows - extent.batch), (0, extent.columns - extent.t), (0, 0))
        return reshard(jnp.pad(jnp.asarray(inputs_embeds, self.dtype), widths), "batch", "length", None)

    def run(
        self,
        extent: Extent,
        embeds: Array,
        positions: np.ndarray,
        attention_mask: np.ndarray | None,
        past_key_values: PastKeyValues | None,
        *,
        use_cache: bool | None = None,
        cache_position: np.ndarray | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rope_deltas: np.ndarray | None = None,
        dropout_key: Array | None = None,
    ) -> PaddedOutput:
        """Run the decoder on padded arrays, in the current mesh.

        Args:
          extent: what they are padded from.
          embeds: [rows, columns, D].
          positions: int32 [3, rows, columns].
          attention_mask: see `__call__`; not padded.
          past_key_values: see `__call__`.
          use_cache: return one; by default as the configuration says.
          cache_position: int [T], columns of the inputs; must be those that follow the cache's.
          output_hidden_states, output_attentions: return these too; attentions take memory that grows with T x S.
          rope_deltas: int [B, 1], handed on in the result's cache.
          dropout_key: turns attention dropout on.
        """
        past = 0 if past_key_values is None else past_key_values.length
        if cache_position is not None and not np.array_equal(cache_position, past + np.arange(extent.t)):
            raise MessageError(f"cache_position: found {cache_position}; expected {past} to {past + extent.t - 1}")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = self._cache_for(extent, past_key_values) if past_key_values is not None or use_cache else None
        mask = check_mask(attention_mask, extent, past)
        segments = np.ones((extent.batch, extent.t), np.int32) if mask is None else mask[:, -extent.t :]
        if cache is not None and mask is not None and mask.shape[1] > extent.t:
            # The mask may have changed for columns that the cache holds; the reference applies that, so do we.
            known = np.zeros(cache.segments.shape, np.int32)
            known[: extent.batch, :past] = mask[:, :past]
            cache = cache._replace(segments=jax.device_put(known, cache.segments.sharding))
        record = Capture(output_hidden_states, output_attentions)
        hidden, cache, recorded = forward.forward(
            self.flat, embeds, positions, extent.pad(segments), cache, record, dropout_key
        )
        kept = None
        if cache is not None and use_cache:
            length = past + extent.t
            full = jax.device_put(np.full(extent.rows, length, np.int32), cache.length.sharding)
            deltas = np.zeros((extent.batch, 1), np.int32) if rope_deltas is None else np.asarray(rope_deltas)
            kept = PastKeyValues(cache._replace(length=full), deltas, length)
        return PaddedOutput(extent, hidden, kept, recorded, past + extent.t)

    def _cache_for(self, extent: Extent, past_key_values: PastKeyValues | None) -> KVCache:
        past = 0 if past_key_values is None else past_key_values.length
        capacity = round_up(bucket(past + extent.columns, 2 * MIN_LENGTH), "slots")
        if past_key_values is None:
            return self.init_cache(extent.rows, capacity)
        cache = past_key_values.cache
        if len(past_key_values.rope_deltas) != extent.batch:
            raise MessageError(
                f"past_key_values: found {counted(len(past_key_values.rope_deltas), 'row')}; expected {extent.batch}"
            )
        return grow(cache, capacity) if cache.capacity < past + extent.columns else cache


def check_mask(attention_mask: np.ndarray | None, extent: Extent, past: int) -> np.ndarray | None:
    """The mask as int32 zeros and ones, [B, T] or [B, past + T].

    Raises:
      MessageError: it has another shape.
    """
    if attention_mask is None:
        return None
    mask = (np.asarray(attention_mask) != 0).astype(np.int32)
    expected = [[extent.batch, extent.t], [extent.batch, past + extent.t]]
    if list(mask.shape) not in expected:
        wanted = " or ".join(map(str, expected if past else expected[:1]))
        raise MessageError(f"attention_mask: found shape {list(mask.shape)}; expected {wanted}")
    return mask
