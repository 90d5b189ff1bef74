"""ViT and decoder put together, in the reference's shapes and names."""

from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from glm4v_jax.batch import Batch
from glm4v_jax.checkpoints.load import load_runtime, resolve_dtype
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import data_shards, reshard, use_mesh
from glm4v_jax.errors import MessageError
from glm4v_jax.hf import forward
from glm4v_jax.hf.outputs import Glm4vModelOutputWithPast, PastKeyValues
from glm4v_jax.hf.submodels import Extent, Glm4vTextModel, Glm4vVisionModel, PaddedOutput, check_mask
from glm4v_jax.inputs.make_batch import make_batch
from glm4v_jax.inputs.mrope import rope_index
from glm4v_jax.inputs.prompt import token_array
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.runtime import Runtime, random_module


def runtime_around(
    config: Glm4vConfig,
    module: Glm4v | None,
    *,
    seed: int = 0,
    dtype: Any = None,
    mesh: Mesh | None = None,
    generation_config: GenerationConfig | None = None,
) -> Runtime:
    """A runtime around a module, or around random weights."""
    with use_mesh(mesh) as mesh:
        if module is None:
            module = random_module(config, seed, resolve_dtype(dtype))
        return Runtime.of(module, mesh, generation_config)


class Glm4vModel:
    """ViT and decoder, without a head.

    >>> from glm4v_jax import Glm4vConfig, Glm4vModel
    >>> model = Glm4vModel(Glm4vConfig.tiny(), dtype="float32")
    >>> model(np.array([[5, 6, 7]])).last_hidden_state.shape
    (1, 3, 64)
    """

    def __init__(
        self, config: Glm4vConfig, *, seed: int = 0, dtype: Any = None, mesh: Mesh | None = None,
        module: Glm4v | None = None, runtime: Runtime | None = None,
    ):  # fmt: skip
        """Hold a runtime; or make one around a module, or around random weights."""
        runtime = runtime or runtime_around(config, module, seed=seed, dtype=dtype, mesh=mesh)
        self.config, self.mesh, self.rules = config, runtime.mesh, runtime.rules
        with runtime.on_mesh():
            self.visual = Glm4vVisionModel(config.vision_config, flat=runtime.visual)
            self.language_model = Glm4vTextModel(config.text_config, flat=runtime.text)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """See `checkpoints.load.load_runtime`; the head is read and dropped."""
        runtime = load_runtime(pretrained_model_name_or_path, **kwargs)
        return cls(runtime.config, runtime=runtime)

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype."""
        return self.language_model.dtype

    def get_input_embeddings(self, input_ids: np.ndarray | None = None) -> Any:
        """See `Glm4vTextModel.get_input_embeddings`."""
        return self.language_model.get_input_embeddings(input_ids)

    def get_rope_index(
        self,
        input_ids: np.ndarray,
        image_grid_thw: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """M-RoPE positions [3, B, T] and rope deltas [B, 1]; see `inputs.mrope.rope_index`."""
        merge = self.config.vision_config.spatial_merge_size
        return rope_index(input_ids, self.config, image_grid_thw, video_grid_thw, attention_mask, merge)

    def get_image_features(self, pixel_values: np.ndarray, image_grid_thw: np.ndarray) -> tuple[Array, ...]:
        """Merged tokens of each image, [tokens, D].

        Raises:
          MessageError: there are no grids, or they count other patches.
        """
        return tuple(self.visual.features(pixel_values, image_grid_thw, "pixel_values", "image_grid_thw"))

    def get_video_features(self, pixel_values_videos: np.ndarray, video_grid_thw: np.ndarray) -> tuple[Array, ...]:
        """Merged tokens of each video, [tokens, D].

        Raises:
          MessageError: there are no grids, or they count other patches.
        """
        return tuple(self.visual.features(pixel_values_videos, video_grid_thw, "pixel_values_videos", "video_grid_thw"))

    def embed(self, batch: Batch, dropout_key: Array | None = None) -> Array:
        """[B, T, D] embeddings of a batch, with its images and videos in place."""
        features = None if batch.vision is None else self.visual.encode(batch.vision, dropout_key)
        return forward.embed(self.language_model.flat, batch.input_ids, features, batch.vision_index)

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Glm4vModelOutputWithPast | tuple:
        """The reference's forward pass; see `run` for its arguments.

        Returns:
          The output, or with return_dict=False the tuple of its fields that are not None.
        """
        with use_mesh(self.mesh, self.rules):
            run, deltas = self.run(*args, **kwargs)
            out = Glm4vModelOutputWithPast(
                run.extent.cut(run.hidden), run.past_key_values, run.hidden_states(), run.attentions(), deltas
            )
        return out if return_dict else out.to_tuple()

    def run(
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
        *,
        mm_token_type_ids: np.ndarray | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_key: Array | None = None,
    ) -> tuple[PaddedOutput, np.ndarray]:
        """Run the model in the current mesh.

        Images and videos may be mixed in one prompt and one batch, and may come with a cache in a later turn.
        Positions follow from the tokens and grids, and with a cache from where it stands (`rope_deltas`, by default the
        cache's own).

        Args:
          input_ids: int [B, T]; or
          inputs_embeds: [B, T, D], with images or videos only together with `position_ids`.
          attention_mask: int [B, T], or [B, past + T] with a cache; 0 for padding.
          position_ids: int [3, B, T] or [B, T].
          past_key_values: the output of an earlier call; the inputs are then what follows.
          pixel_values, pixel_values_videos: float [patches, P].
          image_grid_thw, video_grid_thw: int [N, 3].
          rope_deltas: int [B, 1].
          cache_position: int [T], columns of the inputs; must be those that follow the cache's.
          mm_token_type_ids: accepted, as processors make it, and not needed.
          use_cache: return a cache; by default as the configuration says.
          output_hidden_states, output_attentions: return these too; attentions take memory that grows with T x S.
          dropout_key: turns attention dropout on, in both parts.

        Returns:
          The padded result, and rope deltas [B, 1].

        Raises:
          MessageError: the inputs contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise MessageError("input_ids and inputs_embeds: found both or neither; expected exactly one")
        has_vision = pixel_values is not None or pixel_values_videos is not None
        if input_ids is not None:
            ids = token_array(input_ids)
        elif has_vision:
            ids = self._ids_of(inputs_embeds, position_ids, pixel_values, pixel_values_videos)
        else:
            assert inputs_embeds is not None
            ids = np.zeros(Extent.of(np.shape(inputs_embeds))[:2], np.int32)
        extent = Extent.of(ids.shape)
        past = 0 if past_key_values is None else past_key_values.length
        mask = check_mask(attention_mask, extent, past)
        batch, next_position = make_batch(
            ids, self.config, attention_mask=None if mask is None else mask[:, -extent.t :], pixel_values=pixel_values,
            image_grid_thw=image_grid_thw, pixel_values_videos=pixel_values_videos, video_grid_thw=video_grid_thw,
            position_ids=position_ids, left_align=False, length=extent.columns, batch_multiple=data_shards(),
        )  # fmt: skip
        positions = batch.position_ids
        if past_key_values is not None and position_ids is None:
            known = past_key_values.rope_deltas if rope_deltas is None else np.asarray(rope_deltas).reshape(-1, 1)
            start = past + known
            next_position = next_position + start[:, 0]
            positions = positions + np.pad(start, ((0, extent.rows - extent.batch), (0, 0))).astype(np.int32)
        deltas = (next_position - past - extent.t)[:, None]
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        run = self.language_model.run(
            extent, self._embeds(batch, extent, inputs_embeds, keys[0]), positions, mask, past_key_values,
            use_cache=use_cache, cache_position=cache_position, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions, rope_deltas=deltas, dropout_key=keys[1],
        )  # fmt: skip
        return run, deltas

    def _embeds(self, batch: Batch, extent: Extent, inputs_embeds: Array | None, dropout_key: Array | None) -> Array:
        """[rows, columns, D]: embeddings of the batch's tokens, or the caller's, with vision features in place."""
        if inputs_embeds is None:
            return self.embed(batch, dropout_key)
        embeds = self.language_model.pad_embeds(extent, inputs_embeds)
        if batch.vision_index is None:
            return embeds
        is_vision = reshard(jnp.asarray(batch.vision_index >= 0), "batch", "length")
        return jnp.where(is_vision[..., None], self.embed(batch, dropout_key), embeds)

    def _ids_of(
        self,
        inputs_embeds: Array,
        position_ids: np.ndarray | None,
        pixel_values: np.ndarray | None,
        pixel_values_videos: np.ndarray | None,
    ) -> np.ndarray:
        """Tokens [B, T] that mark where `inputs_embeds` holds the image token's embedding."""
        if position_ids is None:
            # The reference falls back to one-dimensional positions, and to wrong logits (trap T13).
            raise MessageError("position_ids: found None; expected them with inputs_embeds and images or videos")
        if pixel_values is not None and pixel_values_videos is not None:
            raise MessageError("inputs_embeds: found images and videos with it; expected input_ids, to tell them apart")
        marker = self.get_input_embeddings(np.full((1, 1), self.config.image_token_id))[0, 0]
        is_image = np.asarray(jnp.all(inputs_embeds == marker, axis=-1))
        other = self.config.image_start_token_id if pixel_values is not None else self.config.video_start_token_id
        return np.where(is_image, self.config.image_token_id, other)
