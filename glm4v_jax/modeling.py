"""The models in the reference's shapes and names: NumPy arrays in, static-shape programs behind.

These classes prepare a `Batch` on the host, run the programs inside their mesh, and cut the results back to the caller's
shapes. For `jax.grad`, custom loops and training take the functional module, `model.module`, and `make_batch`.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from glm4v_jax import programs
from glm4v_jax.cache import KVCache, grow, init_cache
from glm4v_jax.config import Glm4vConfig, Glm4vTextConfig, Glm4vVisionConfig
from glm4v_jax.decoder import Record, Recorded, TextDecoder
from glm4v_jax.errors import MessageError
from glm4v_jax.generate.config import GenerationConfig
from glm4v_jax.inputs.batch import Batch, VisionRows
from glm4v_jax.inputs.packing import bucket, frames_of, pack
from glm4v_jax.inputs.positions import rope_index
from glm4v_jax.inputs.prepare import MIN_LENGTH, make_batch, token_ids
from glm4v_jax.loading import load_model, resolve_dtype
from glm4v_jax.mesh import data_shards, use_mesh
from glm4v_jax.model import Glm4v
from glm4v_jax.nn import Init, Linear, num_params
from glm4v_jax.outputs import (
    BaseModelOutputWithPast,
    Glm4vCausalLMOutputWithPast,
    Glm4vModelOutputWithPast,
    PastKeyValues,
)
from glm4v_jax.programs import Flat
from glm4v_jax.vision import VisionEncoder

MIN_FEATURES = 64


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
        self.training = False
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
                inputs_embeds, position_ids, segments, cache, Record(output_hidden_states, output_attentions), dropout_key
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


class Glm4vModel:
    """ViT and decoder, without a head."""

    def __init__(
        self, config: Glm4vConfig, *, seed: int = 0, dtype: Any = None, mesh: Mesh | None = None,
        module: Glm4v | None = None,
    ):  # fmt: skip
        self.config = config
        with use_mesh(mesh) as self.mesh:
            if module is None:
                module = Glm4v.init(config, rngs=nnx.Rngs(params=seed), dtype=resolve_dtype(dtype))
            self.visual = Glm4vVisionModel(config.vision_config, mesh=self.mesh, flat=Flat.of(module.visual))
            self.language_model = Glm4vTextModel(config.text_config, mesh=self.mesh, flat=Flat.of(module.language_model))

    @classmethod
    def from_pretrained(cls, directory: str | Path, **kwargs: Any) -> Self:
        """See `Glm4vForConditionalGeneration.from_pretrained`; the head is read and dropped."""
        whole = Glm4vForConditionalGeneration.from_pretrained(directory, **kwargs)
        return cls(whole.config, mesh=whole.mesh, module=whole.module)

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype."""
        return self.language_model.dtype

    def get_input_embeddings(self, input_ids: np.ndarray) -> Array:
        """[B, T] tokens -> [B, T, D] embeddings."""
        with use_mesh(self.mesh):
            return programs.embed(self.language_model.flat, np.asarray(input_ids, np.int32), None, None)

    def get_rope_index(
        self,
        input_ids: np.ndarray,
        image_grid_thw: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """M-RoPE positions [3, B, T] and rope deltas [B, 1]; see `inputs.positions.rope_index`."""
        merge = self.config.vision_config.spatial_merge_size
        return rope_index(input_ids, token_ids(self.config), image_grid_thw, video_grid_thw, attention_mask, merge)

    def get_image_features(self, pixel_values: np.ndarray, image_grid_thw: np.ndarray) -> tuple[Array, ...]:
        """Merged tokens of each picture, [tokens, D]."""
        sizes = np.prod(np.asarray(image_grid_thw), axis=1) // self.config.vision_config.spatial_merge_size**2
        return tuple(jnp.split(self.visual(pixel_values, image_grid_thw), np.cumsum(sizes)[:-1].tolist()))

    def get_video_features(self, pixel_values_videos: np.ndarray, video_grid_thw: np.ndarray) -> tuple[Array, ...]:
        """Merged tokens of each video, [tokens, D]."""
        return self.get_image_features(pixel_values_videos, video_grid_thw)

    def embed(self, batch: Batch) -> Array:
        """[B, T, D] embeddings of a batch, its pictures and videos in place."""
        features = None if batch.vision is None else self.visual.encode(batch.vision)
        return programs.embed(self.language_model.flat, batch.input_ids, features, batch.vision_index)

    def __call__(
        self,
        input_ids: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Array | None = None,
        pixel_values: np.ndarray | None = None,
        pixel_values_videos: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
        rope_deltas: np.ndarray | None = None,
        cache_position: np.ndarray | None = None,
        mm_token_type_ids: np.ndarray | None = None,
        **kwargs: Any,
    ) -> Glm4vModelOutputWithPast:
        """The reference's forward pass; pictures and videos may be mixed, and may come with a cache in a later turn.

        Positions follow from the tokens and grids, and with a cache from where it stands (`rope_deltas`, by default the
        cache's own). `mm_token_type_ids` is accepted, as processors make it, and not needed. The other arguments are
        those of `Glm4vTextModel.__call__`.

        Raises:
          MessageError: the inputs contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise MessageError("input_ids and inputs_embeds: found both or neither; expected exactly one")
        media = dict(
            pixel_values=pixel_values, image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos, video_grid_thw=video_grid_thw,
        )  # fmt: skip
        has_vision = pixel_values is not None or pixel_values_videos is not None
        ids = np.asarray(input_ids) if input_ids is not None else None
        if ids is None:
            if has_vision and position_ids is None:
                # The reference falls back to one-dimensional positions, and to wrong logits (trap T13).
                raise MessageError("position_ids: found nothing; expected them beside inputs_embeds with pictures or videos")
            ids = self._ids_of(inputs_embeds, media) if has_vision else np.zeros(inputs_embeds.shape[:2], np.int32)
        t = ids.shape[1]
        mask = None if attention_mask is None else np.asarray(attention_mask)[:, -t:]
        with use_mesh(self.mesh):
            batch, next_position = make_batch(
                ids, self.config, attention_mask=mask, position_ids=position_ids, **media,
                left_align=False, length=t, batch_multiple=data_shards(),
            )  # fmt: skip
            positions, past = batch.position_ids[:, : len(ids)], 0
            if past_key_values is not None:
                past = past_key_values.get_seq_length()
                known = past_key_values.rope_deltas if rope_deltas is None else np.asarray(rope_deltas).reshape(-1, 1)
                if position_ids is None:
                    positions = positions + (past + known)[None]
                    next_position = next_position + past + known[:, 0]
            deltas = (next_position - past - t)[:, None]
            if inputs_embeds is None:
                embeds = self.embed(batch)[: len(ids)]
            elif has_vision:
                features = self.visual.encode(batch.vision)
                placed = programs.embed(self.language_model.flat, batch.input_ids, features, batch.vision_index)
                embeds = jnp.where((batch.vision_index >= 0)[..., None], placed, inputs_embeds)
            else:
                embeds = jnp.asarray(inputs_embeds, self.dtype)
        out = self.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=positions, past_key_values=past_key_values,
            cache_position=cache_position, rope_deltas=deltas, **kwargs,
        )  # fmt: skip
        return Glm4vModelOutputWithPast(
            out.last_hidden_state, out.past_key_values, out.hidden_states, out.attentions, deltas
        )

    def _ids_of(self, inputs_embeds: Array, media: dict[str, np.ndarray | None]) -> np.ndarray:
        """Tokens [B, T] that mark where `inputs_embeds` holds the image token's embedding, which is all that is needed."""
        if media["pixel_values"] is not None and media["pixel_values_videos"] is not None:
            raise MessageError("inputs_embeds: found pictures and videos beside it; expected input_ids, to tell them apart")
        marker = self.get_input_embeddings(np.full((1, 1), self.config.image_token_id))
        is_image = np.asarray(jnp.all(inputs_embeds == marker, axis=-1))
        ids = np.where(is_image, self.config.image_token_id, self.config.image_start_token_id)
        if media["pixel_values_videos"] is not None:
            ids[:, 0] = np.where(is_image[:, 0], ids[:, 0], self.config.video_start_token_id)
        return ids


class Glm4vForConditionalGeneration:
    """GLM-4.1V with its head: logits, loss and generation."""

    def __init__(
        self, config: Glm4vConfig, *, seed: int = 0, dtype: Any = None, mesh: Mesh | None = None,
        module: Glm4v | None = None, generation_config: GenerationConfig | None = None,
    ):  # fmt: skip
        self.config = config
        self.generation_config = generation_config or GenerationConfig()
        with use_mesh(mesh) as self.mesh:
            if module is None:
                module = Glm4v.init(config, rngs=nnx.Rngs(params=seed), dtype=resolve_dtype(dtype))
            self.model = Glm4vModel(config, mesh=self.mesh, module=module)
            self.lm_head: Flat[Linear] | None = None if module.lm_head is None else Flat.of(module.lm_head)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: Any = None,
        mesh: Mesh | None = None,
        stacked: bool | None = None,
        progress: Any = None,
        torch_dtype: Any = None,
        attn_implementation: str | None = None,
    ) -> Self:
        """Load a checkpoint in Hugging Face layout.

        Args:
          directory: config.json, safetensors with their index if there are several, generation_config.json.
          dtype: float32, bfloat16 or float16; "auto" for the checkpoint's; by default float32 on a CPU, else bfloat16.
          mesh: where it lives (`mesh.make_mesh`); one device by default.
          stacked: layout of the layers (see `layers`); by default per layer on a CPU, stacked elsewhere.
          progress: called with bytes read and bytes in all, after each tensor.
          torch_dtype: the old name of `dtype`.
          attn_implementation: accepted for the reference's sake; attention is chosen by platform.

        Raises:
          CheckpointError: no such checkpoint, or its files or tensors are damaged or do not fit its configuration.
          ConfigError: its configuration is not a GLM-4.1V's.
        """
        config = Glm4vConfig.from_pretrained(directory)
        _ = config.text_config.mrope_section  # a contradiction here must not wait until the weights are loaded
        generation_config = GenerationConfig.from_pretrained(directory)
        with use_mesh(mesh) as mesh:
            dtype = dtype if dtype is not None else torch_dtype
            if stacked is None:
                stacked = jax.default_backend() != "cpu"
            module = load_model(directory, config, dtype=dtype, stacked=stacked, progress=progress)
            model = cls(config, mesh=mesh, module=module, generation_config=generation_config)
        if model.dtype == jnp.float16:
            warnings.warn("float16 overflows in GLM-4 models of this size; prefer bfloat16 or float32", stacklevel=2)
        return model

    @property
    def module(self) -> Glm4v:
        """The functional module, around the same arrays: for `jax.jit`, `jax.grad` and training."""
        visual, text = self.model.visual.module, self.model.language_model.module
        head = None if self.lm_head is None else self.lm_head.module
        return Glm4v(self.config, visual, text, head)

    @property
    def visual(self) -> Glm4vVisionModel:
        """The vision part."""
        return self.model.visual

    @property
    def language_model(self) -> Glm4vTextModel:
        """The decoder."""
        return self.model.language_model

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype."""
        return self.model.dtype

    def num_parameters(self) -> int:
        """How many there are; a tied head counts once."""
        return num_params(self.module)

    def get_image_features(self, pixel_values: np.ndarray, image_grid_thw: np.ndarray) -> tuple[Array, ...]:
        """Merged tokens of each picture, [tokens, D]."""
        return self.model.get_image_features(pixel_values, image_grid_thw)

    def get_video_features(self, pixel_values_videos: np.ndarray, video_grid_thw: np.ndarray) -> tuple[Array, ...]:
        """Merged tokens of each video, [tokens, D]."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw)

    def __call__(
        self,
        input_ids: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Array | None = None,
        labels: np.ndarray | None = None,
        pixel_values: np.ndarray | None = None,
        pixel_values_videos: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
        rope_deltas: np.ndarray | None = None,
        cache_position: np.ndarray | None = None,
        logits_to_keep: int | np.ndarray = 0,
        **kwargs: Any,
    ) -> Glm4vCausalLMOutputWithPast:
        """The reference's forward pass.

        Args:
          labels: int [B, T], -100 where there is none; gives `loss`.
          logits_to_keep: the number of last positions to score, 0 for all, or their indices.
          The others are those of `Glm4vModel.__call__`.
        """
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos, image_grid_thw=image_grid_thw, video_grid_thw=video_grid_thw,
            rope_deltas=rope_deltas, cache_position=cache_position, **kwargs,
        )  # fmt: skip
        hidden = out.last_hidden_state
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, np.asarray(logits_to_keep)]
        with use_mesh(self.mesh):
            scores = programs.logits(self.language_model.flat, self.lm_head, hidden)
            loss = None if labels is None else programs.causal_lm_loss(scores, np.asarray(labels, np.int32))
        fields = {f.name: getattr(out, f.name) for f in dataclasses.fields(out) if f.name != "last_hidden_state"}
        return Glm4vCausalLMOutputWithPast(loss=loss, logits=scores, **fields)

    def generate(self, input_ids: np.ndarray, **kwargs: Any) -> np.ndarray:
        """Generate tokens; see `generate.engine.generate`."""
        from glm4v_jax.generate.engine import generate

        return generate(self, input_ids, **kwargs)
