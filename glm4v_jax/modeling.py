"""The models in the reference's shapes and names: NumPy arrays in, static-shape programs behind.

These classes prepare a `Batch` on the host, run the programs inside their mesh, and cut the results back to the
caller's shapes. For `jax.grad`, custom loops and training take the functional module, `model.module`, and
`make_batch`.
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
from glm4v_jax.batch import Batch
from glm4v_jax.config import Glm4vConfig
from glm4v_jax.errors import MessageError
from glm4v_jax.generate.config import GenerationConfig
from glm4v_jax.generate.engine import generate
from glm4v_jax.inputs.positions import rope_index
from glm4v_jax.inputs.prepare import make_batch, token_ids
from glm4v_jax.loading import load_model, resolve_dtype
from glm4v_jax.mesh import data_shards, use_mesh
from glm4v_jax.model import Glm4v
from glm4v_jax.modeling_parts import Glm4vTextModel, Glm4vVisionModel
from glm4v_jax.nn import Linear, num_params
from glm4v_jax.outputs import Glm4vCausalLMOutputWithPast, Glm4vModelOutputWithPast, PastKeyValues
from glm4v_jax.programs import Flat


def _random_module(config: Glm4vConfig, seed: int, dtype: np.dtype) -> Glm4v:
    """One program; run eagerly, every initialiser would be compiled by itself."""
    return jax.jit(lambda key: Glm4v.init(config, rngs=nnx.Rngs(params=key), dtype=dtype))(jax.random.key(seed))


class Glm4vModel:
    """ViT and decoder, without a head."""

    def __init__(
        self, config: Glm4vConfig, *, seed: int = 0, dtype: Any = None, mesh: Mesh | None = None,
        module: Glm4v | None = None,
    ):  # fmt: skip
        self.config = config
        with use_mesh(mesh) as self.mesh:
            if module is None:
                module = _random_module(config, seed, resolve_dtype(dtype))
            self.visual = Glm4vVisionModel(config.vision_config, mesh=self.mesh, flat=Flat.of(module.visual))
            self.language_model = Glm4vTextModel(
                config.text_config, mesh=self.mesh, flat=Flat.of(module.language_model)
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """See `Glm4vForConditionalGeneration.from_pretrained`; the head is read and dropped."""
        whole = Glm4vForConditionalGeneration.from_pretrained(pretrained_model_name_or_path, **kwargs)
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
        has_vision = pixel_values is not None or pixel_values_videos is not None
        if input_ids is not None:
            ids = np.asarray(input_ids)
        elif has_vision:
            ids = self._ids_of(inputs_embeds, position_ids, pixel_values, pixel_values_videos)
        else:
            assert inputs_embeds is not None
            ids = np.zeros(inputs_embeds.shape[:2], np.int32)
        t = ids.shape[-1]
        with use_mesh(self.mesh):
            batch, next_position = make_batch(
                ids, self.config, attention_mask=None if attention_mask is None else np.asarray(attention_mask)[:, -t:],
                pixel_values=pixel_values, image_grid_thw=image_grid_thw, pixel_values_videos=pixel_values_videos,
                video_grid_thw=video_grid_thw, position_ids=position_ids, left_align=False, length=t,
                batch_multiple=data_shards(),
            )  # fmt: skip
            positions, past = batch.position_ids[:, : len(ids)], 0
            if past_key_values is not None:
                past = past_key_values.get_seq_length()
                if position_ids is None:
                    known = past_key_values.rope_deltas if rope_deltas is None else np.asarray(rope_deltas)
                    start = past + known.reshape(-1, 1)
                    positions, next_position = positions + start[None], next_position + start[:, 0]
            embeds = self._embeds(batch, len(ids), inputs_embeds)
        deltas = (next_position - past - t)[:, None]
        out = self.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=positions,
            past_key_values=past_key_values, cache_position=cache_position, rope_deltas=deltas, **kwargs,
        )  # fmt: skip
        return Glm4vModelOutputWithPast(
            out.last_hidden_state, out.past_key_values, out.hidden_states, out.attentions, deltas
        )

    def _embeds(self, batch: Batch, rows: int, inputs_embeds: Array | None) -> Array:
        """[rows, T, D]: the batch's tokens, or the caller's embeddings in their place, with vision put in."""
        if inputs_embeds is None:
            return self.embed(batch)[:rows]
        inputs_embeds = jnp.asarray(inputs_embeds, self.dtype)
        if batch.vision_index is None:
            return inputs_embeds
        return jnp.where((batch.vision_index >= 0)[:rows, :, None], self.embed(batch)[:rows], inputs_embeds)

    def _ids_of(
        self,
        inputs_embeds: Array,
        position_ids: np.ndarray | None,
        pixel_values: np.ndarray | None,
        pixel_values_videos: np.ndarray | None,
    ) -> np.ndarray:
        """Tokens [B, T] that say where `inputs_embeds` holds the image token's embedding; no more of them is needed."""
        if position_ids is None:
            # The reference falls back to one-dimensional positions, and to wrong logits (trap T13).
            raise MessageError(
                "position_ids: found nothing; expected them beside inputs_embeds with pictures or videos"
            )
        if pixel_values is not None and pixel_values_videos is not None:
            raise MessageError(
                "inputs_embeds: found pictures and videos beside it; expected input_ids, to tell them apart"
            )
        marker = self.get_input_embeddings(np.full((1, 1), self.config.image_token_id))
        is_image = np.asarray(jnp.all(inputs_embeds == marker, axis=-1))
        other = self.config.image_start_token_id if pixel_values is not None else self.config.video_start_token_id
        return np.where(is_image, self.config.image_token_id, other)


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
                module = _random_module(config, seed, resolve_dtype(dtype))
            self.model = Glm4vModel(config, mesh=self.mesh, module=module)
            self.lm_head: Flat[Linear] | None = None if module.lm_head is None else Flat.of(module.lm_head)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
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
          pretrained_model_name_or_path: a directory (nothing is downloaded) with config.json, safetensors and their
            index if there are several, generation_config.json.
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
        directory = Path(pretrained_model_name_or_path)
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
        return generate(self, input_ids, **kwargs)
