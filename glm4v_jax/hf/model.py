"""The models in the reference's shapes and names: NumPy arrays in, static-shape programs behind.

These classes prepare a `Batch` on the host, run the programs inside their mesh, and cut the results back to the
caller's shapes. For `jax.grad`, custom loops and training take the functional module, `model.module`, and
`make_batch`.
"""

import operator
import warnings
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from glm4v_jax.batch import Batch
from glm4v_jax.checkpoints.hf_write import save_pretrained
from glm4v_jax.checkpoints.load import load_model, resolve_dtype
from glm4v_jax.checkpoints.orbax_write import save_model
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import data_shards, platform, reshard, use_mesh
from glm4v_jax.errors import MessageError
from glm4v_jax.hf import forward
from glm4v_jax.hf.forward import IGNORED_LABEL
from glm4v_jax.hf.generate import generate
from glm4v_jax.hf.outputs import Glm4vCausalLMOutputWithPast, Glm4vModelOutputWithPast, PastKeyValues
from glm4v_jax.hf.submodels import Extent, Glm4vTextModel, Glm4vVisionModel, Run, check_mask
from glm4v_jax.inputs.make_batch import (
    checked_grids,
    checked_patches,
    in_vocabulary,
    make_batch,
    token_array,
    token_ids,
)
from glm4v_jax.inputs.mrope import rope_index
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.nn import Linear
from glm4v_jax.model.params import leaf_paths, num_params
from glm4v_jax.model.quantize import QuantConfig, as_config, is_scale
from glm4v_jax.model.runtime import Flat


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
        """[B, T] tokens -> [B, T, D] embeddings.

        Raises:
          MessageError: the shape is another, or a token is not in the vocabulary.
        """
        with use_mesh(self.mesh):
            input_ids = in_vocabulary(token_array(input_ids), self.config.text_config.vocab_size)
            extent = Extent.of(input_ids.shape)
            return extent.cut(forward.embed(self.language_model.flat, extent.pad(input_ids), None, None))

    def get_rope_index(
        self,
        input_ids: np.ndarray,
        image_grid_thw: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """M-RoPE positions [3, B, T] and rope deltas [B, 1]; see `inputs.mrope.rope_index`."""
        merge = self.config.vision_config.spatial_merge_size
        return rope_index(input_ids, token_ids(self.config), image_grid_thw, video_grid_thw, attention_mask, merge)

    def get_image_features(self, pixel_values: np.ndarray, image_grid_thw: np.ndarray) -> tuple[Array, ...]:
        """Merged tokens of each picture, [tokens, D].

        Raises:
          MessageError: there are no grids, or they count other patches.
        """
        return self._features(pixel_values, image_grid_thw, "pixel_values", "image_grid_thw")

    def get_video_features(self, pixel_values_videos: np.ndarray, video_grid_thw: np.ndarray) -> tuple[Array, ...]:
        """Merged tokens of each video, [tokens, D].

        Raises:
          MessageError: there are no grids, or they count other patches.
        """
        return self._features(pixel_values_videos, video_grid_thw, "pixel_values_videos", "video_grid_thw")

    def _features(self, pixel_values: Any, grid_thw: Any, name: str, grid_name: str) -> tuple[Array, ...]:
        config = self.config.vision_config
        grids = checked_grids(grid_thw, config.spatial_merge_size, grid_name)
        patches = checked_patches(pixel_values, grids, config.patch_dim, name, grid_name)
        sizes = grids.prod(axis=1) // config.spatial_merge_size**2
        return tuple(jnp.split(self.visual(patches, grids), np.cumsum(sizes)[:-1].tolist()))

    def embed(self, batch: Batch, dropout_key: Array | None = None) -> Array:
        """[B, T, D] embeddings of a batch, its pictures and videos in place."""
        features = None if batch.vision is None else self.visual.encode(batch.vision, dropout_key)
        return forward.embed(self.language_model.flat, batch.input_ids, features, batch.vision_index)

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Glm4vModelOutputWithPast | tuple:
        """The reference's forward pass; see `run` for its arguments.

        Returns:
          The output, or with return_dict=False the tuple of its fields that are not None.
        """
        with use_mesh(self.mesh):
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
    ) -> tuple[Run, np.ndarray]:
        """Run the model in the current mesh.

        Pictures and videos may be mixed in one prompt and one batch, and may come with a cache in a later turn.
        Positions follow from the tokens and grids, and with a cache from where it stands (`rope_deltas`, by default the
        cache's own).

        Args:
          input_ids: int [B, T]; or
          inputs_embeds: [B, T, D], with pictures or videos only beside `position_ids`.
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
          What came of it, still padded, and rope deltas [B, 1].

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
        """[rows, columns, D]: the batch's tokens, or the caller's embeddings in their place, with vision put in."""
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
        marker = self.get_input_embeddings(np.full((1, 1), self.config.image_token_id))[0, 0]
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
        quantize: QuantConfig | Literal["int8", "int4"] | None = None,
        progress: Any = None,
        torch_dtype: Any = None,
        attn_implementation: str | None = None,
    ) -> Self:
        """Load a checkpoint, in Hugging Face layout or in Orbax format, the latter from whatever mesh it was saved on.

        Args:
          pretrained_model_name_or_path: a directory (nothing is downloaded) with config.json, safetensors and their
            index if there are several, generation_config.json; or what `convert to-orbax` and `save_orbax` make.
          dtype: float32, bfloat16 or float16; "auto" for the checkpoint's; by default float32 on a CPU, else bfloat16.
          mesh: where it lives (`mesh.make_mesh`); one device by default.
          stacked: layout of the layers (see `layers`); by default per layer on a CPU, stacked elsewhere.
          quantize: keep the decoder's kernels as "int8" or "int4"; a `quantize.QuantConfig` says which, and how. Such a
            model takes less memory and computes in `dtype`; it cannot be saved.
          progress: called with bytes read and bytes in all, after each leaf.
          torch_dtype: the old name of `dtype`.
          attn_implementation: accepted for the reference's sake; there is one attention here.

        Raises:
          CheckpointError: no such checkpoint, or its files or tensors are damaged or do not fit its configuration.
          ConfigError: its configuration is not a GLM-4.1V's, or `quantize` cannot be done.
        """
        directory = Path(pretrained_model_name_or_path)
        config = Glm4vConfig.from_pretrained(directory)
        generation_config = GenerationConfig.from_pretrained(directory)
        with use_mesh(mesh) as mesh:
            dtype = dtype if dtype is not None else torch_dtype
            if stacked is None:
                stacked = platform() != "cpu"
            module = load_model(
                directory, config, dtype=dtype, stacked=stacked, quantize=as_config(quantize), progress=progress
            )
            model = cls(config, mesh=mesh, module=module, generation_config=generation_config)
        if model.dtype == jnp.float16:
            warnings.warn("float16 overflows in GLM-4 models of this size; prefer bfloat16 or float32", stacklevel=2)
        return model

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write a checkpoint in Hugging Face layout, which `from_pretrained` here and in transformers loads.

        Weights in safetensors of this model's dtype, streamed tensor by tensor, config.json and generation_config.json;
        what else is in the directory, such as a processor's files, stays. Weights of an earlier call are replaced once
        the new ones are complete.

        Args:
          save_directory: made if need be.
          max_shard_size: of one file, as "5GB", "200MiB" or a number of bytes.

        Raises:
          CheckpointError: the place is a file, or the model has leaves that a checkpoint has no place for.
          ConfigError: max_shard_size is no size.
          OSError: the disk refuses; the old weights are then untouched.
        """
        with use_mesh(self.mesh):
            save_pretrained(self.module, self.generation_config, save_directory, max_shard_size=max_shard_size)

    def save_orbax(
        self, save_directory: str | Path, *, assets: str | Path | None = None, overwrite: bool = False
    ) -> None:
        """Write an Orbax checkpoint, which `from_pretrained` loads onto any mesh.

        All processes that share the mesh call it, and each writes its own part.

        Args:
          save_directory: the directory to make; it appears under its name when it is complete.
          assets: a checkpoint whose tokenizer and processor files travel along.
          overwrite: replace what is there, once the new checkpoint is complete.

        Raises:
          CheckpointError: the directory is taken, or the disk cannot hold the model.
        """
        save_model(
            self.module, save_directory, assets=assets, generation_config=self.generation_config, overwrite=overwrite
        )

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
        """How many there are; a tied head counts once, and the scales of quantised kernels do not."""
        leaves = zip(leaf_paths(self.module), jax.tree.leaves(self.module), strict=True)
        return num_params([leaf for path, leaf in leaves if not is_scale(path)])

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
        *args: Any,
        logits_to_keep: int | np.ndarray = 0,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Glm4vCausalLMOutputWithPast | tuple:
        """The reference's forward pass.

        Args:
          labels: int [B, T], -100 where there is none; gives `loss`.
          logits_to_keep: the number of last positions to score, 0 for all, or their indices; 0 beside labels.
          return_dict: False for the tuple of the fields that are not None.
          input_ids, ..., *args, **kwargs: see `Glm4vModel.run`.

        Raises:
          MessageError: the inputs contradict each other.
        """
        with use_mesh(self.mesh):
            run, deltas = self.model.run(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, *args, **kwargs
            )
            scores = forward.logits(self.language_model.flat, self.lm_head, _kept(run, logits_to_keep))
            every = np.ndim(logits_to_keep) == 0 and not logits_to_keep
            loss = None
            if labels is not None:
                labels = _checked_labels(labels, run.extent, every, self.config.text_config.vocab_size)
                loss = forward.causal_lm_loss(scores, run.extent.pad(labels, IGNORED_LABEL))
            # Positions picked by the caller have no padding, only rows do.
            extent = run.extent if every else run.extent._replace(t=scores.shape[1])
            out = Glm4vCausalLMOutputWithPast(
                loss, extent.cut(scores), run.past_key_values, run.hidden_states(), run.attentions(), deltas
            )
        return out if return_dict else out.to_tuple()

    def generate(self, input_ids: np.ndarray, **kwargs: Any) -> np.ndarray:
        """Continue prompts; `generate.arrays.generate` has the details.

        Args:
          input_ids: int [B, T], padded on either side where `attention_mask` is 0.
          **kwargs: the processor's other outputs (attention_mask, pixel_values, image_grid_thw, pixel_values_videos,
            video_grid_thw), and options that win over the checkpoint's generation_config.json: max_new_tokens,
            max_length, do_sample, temperature, top_k, top_p, min_p, repetition_penalty, num_return_sequences,
            eos_token_id (-1 never stops), pad_token_id, seed.

        Returns:
          int64 [B * num_return_sequences, T + new]: the prompts as given, and what follows.

        Raises:
          GenerationError, MessageError: before anything is computed.
        """
        return generate(self, input_ids, **kwargs)


def _checked_labels(labels: np.ndarray, extent: Extent, every: bool, vocab_size: int) -> np.ndarray:
    labels = token_array(labels, "labels")
    if not every or labels.shape != (extent.batch, extent.t):
        kept = "" if every else " and some logits left out"
        expected = [extent.batch, extent.t]
        raise MessageError(f"labels: found shape {list(labels.shape)}{kept}; expected {expected} and logits_to_keep=0")
    wrong = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab_size))
    if wrong.any():
        raise MessageError(f"labels: found {labels[wrong][0]}; expected {IGNORED_LABEL} or tokens below {vocab_size}")
    return labels


def _kept(run: Run, logits_to_keep: int | np.ndarray) -> Array:
    """[rows, K, D]: the padded hidden states of the positions to score."""
    t = run.extent.t
    if np.ndim(logits_to_keep):
        indices = np.asarray(logits_to_keep)
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise MessageError(
                f"logits_to_keep: found {indices.dtype} {list(indices.shape)}; expected a count or integers [K]"
            )
        wrong = (indices < -t) | (indices >= t)
        if wrong.any():
            raise MessageError(
                f"logits_to_keep: found index {indices[wrong][0]}; expected indices from {-t} to {t - 1}"
            )
        return forward.positions_at(run.hidden, np.where(indices < 0, indices + t, indices))
    try:
        count = operator.index(logits_to_keep)
    except TypeError:
        count = -1
    if count < 0:
        raise MessageError(f"logits_to_keep: found {logits_to_keep!r}; expected a count >= 0, or indices")
    return forward.last_positions(run.hidden, np.int32(t), min(count, t)) if count else run.hidden
