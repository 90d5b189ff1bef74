"""`Glm4vForConditionalGeneration`, in the reference's shapes and names.

The classes of this package prepare a `Batch` on the host, run static-shape programs in their mesh, and cut the results
back to the caller's shapes. For `jax.grad`, custom loops and training take the functional module, `model.module`, and
`make_batch`.
"""

import inspect
import operator
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from glm4v_jax.checkpoints.hf_write import save_pretrained
from glm4v_jax.checkpoints.load import load_runtime
from glm4v_jax.checkpoints.merge_adapter import extra_tensors
from glm4v_jax.checkpoints.orbax_write import save_model
from glm4v_jax.config.checks import refuse_unknown
from glm4v_jax.config.generation import GenerationConfig
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import MessageError
from glm4v_jax.hf import forward
from glm4v_jax.hf.forward import IGNORED_LABEL
from glm4v_jax.hf.generate import generate
from glm4v_jax.hf.multimodal import Glm4vModel, runtime_around
from glm4v_jax.hf.outputs import Glm4vCausalLMOutputWithPast, PastKeyValues
from glm4v_jax.hf.submodels import Extent, Glm4vTextModel, Glm4vVisionModel, PaddedOutput
from glm4v_jax.inputs.prompt import token_array
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.params import leaf_paths, num_params
from glm4v_jax.model.quantize import QuantConfig, is_scale
from glm4v_jax.model.runtime import Runtime


class Glm4vForConditionalGeneration:
    """GLM-4.1V with its head: logits, loss and generation.

    >>> from glm4v_jax import Glm4vConfig, Glm4vForConditionalGeneration
    >>> model = Glm4vForConditionalGeneration(Glm4vConfig.tiny(), dtype="float32")
    >>> model(np.array([[5, 6, 7]])).logits.shape
    (1, 3, 320)
    >>> model.generate(np.array([[5, 6, 7]]), max_new_tokens=4).shape
    (1, 7)

    Attributes:
      runtime: the weights on their mesh; `Engine(model, processor)` answers with the same.
      model, lm_head: its parts.
    """

    def __init__(
        self, config: Glm4vConfig, *, seed: int = 0, dtype: Any = None, mesh: Mesh | None = None,
        module: Glm4v | None = None, generation_config: Any = None, runtime: Runtime | None = None,
    ):  # fmt: skip
        """Hold a runtime; or make one around a module, or around random weights."""
        self.config = config
        defaults = GenerationConfig().overridden(generation_config)
        self.runtime = runtime or runtime_around(
            config, module, seed=seed, dtype=dtype, mesh=mesh, generation_config=defaults
        )
        self.mesh, self.lm_head = self.runtime.mesh, self.runtime.head
        self.model = Glm4vModel(config, runtime=self.runtime)
        self.name_or_path = ""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: Any = None,
        mesh: Mesh | None = None,
        stacked: bool | None = None,
        quantize: QuantConfig | Literal["int8", "int4"] | None = None,
        adapter: str | Path | None = None,
        progress: Any = None,
        torch_dtype: Any = None,
        attn_implementation: str | None = None,
        **unknown: Any,
    ) -> Self:
        """Load a checkpoint, in Hugging Face layout or in Orbax format, the latter from whatever mesh it was saved on.

        Args:
          pretrained_model_name_or_path: a directory with config.json, safetensors and their index if there are several,
            generation_config.json; or what `convert to-orbax` and `save_orbax` make; or the name of a model in the
            local Hugging Face cache. Nothing is downloaded.
          dtype: float32, bfloat16 or float16; "auto" for the checkpoint's; by default float32 on a CPU, else bfloat16.
          mesh: where it lives (`mesh.make_mesh`); one device by default.
          stacked: layout of the layers (see `layers`); by default per layer on a CPU, stacked elsewhere.
          quantize: keep all that is large as "int8", or the decoder's kernels as "int4" and the rest as "int8"; a
            `quantize.QuantConfig` says which, and how. Such a model computes in `dtype`; it cannot be saved.
          adapter: directory of an adapter in PEFT's format, which is applied beside the weights.
          progress: called with bytes read and bytes in all, after each leaf.
          torch_dtype: the old name of `dtype`.
          attn_implementation: accepted for the reference's sake; there is one attention here.
          **unknown: refused by name.

        Raises:
          CheckpointError: no such checkpoint, or its files or tensors are damaged or do not fit its configuration.
          ConfigError: its configuration is not a GLM-4.1V's, or `quantize` cannot be done.
        """
        known = inspect.signature(cls.from_pretrained).parameters.keys() - {"pretrained_model_name_or_path", "unknown"}
        refuse_unknown("from_pretrained", unknown, known)
        runtime = load_runtime(
            pretrained_model_name_or_path, dtype=dtype if dtype is not None else torch_dtype, mesh=mesh,
            stacked=stacked, quantize=quantize, adapter=adapter, progress=progress,
        )  # fmt: skip
        model = cls(runtime.config, runtime=runtime)
        model.name_or_path = str(pretrained_model_name_or_path)
        return model

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write a checkpoint in Hugging Face layout, which `from_pretrained` here and in transformers loads.

        Weights in safetensors of this model's dtype, streamed tensor by tensor, config.json and generation_config.json;
        other files of the directory, such as a processor's, stay. Weights of an earlier call are replaced once the new
        ones are complete. GLM-OCR's layer that predicts a further token, which is not run here, is copied from the
        checkpoint that was loaded (`name_or_path`).

        Args:
          save_directory: made if need be.
          max_shard_size: of one file, as "5GB", "200MiB" or a number of bytes.

        Raises:
          CheckpointError: the directory is a file, or the model has leaves that a checkpoint cannot hold.
          ConfigError: max_shard_size is not a size.
          OSError: writing failed; the old weights are then untouched.
        """
        with self.runtime.on_mesh():
            # Looked for where they can be only: the checkpoint may be gone.
            has_extras = self.name_or_path and self.config.text_config.extra_layers
            save_pretrained(
                self.module, self.generation_config, save_directory, max_shard_size=max_shard_size,
                extras=extra_tensors(self.name_or_path, self.config) if has_extras else None,
            )  # fmt: skip

    def save_orbax(
        self, save_directory: str | Path, *, assets: str | Path | None = None, overwrite: bool = False
    ) -> None:
        """Write an Orbax checkpoint, which `from_pretrained` loads onto any mesh.

        All processes that share the mesh call it, and each writes its own shards.

        Args:
          save_directory: the directory to make; it appears under its name when it is complete.
          assets: a checkpoint whose tokenizer and processor files are copied.
          overwrite: replace an existing checkpoint, once the new one is complete.

        Raises:
          CheckpointError: the directory exists, or the disk cannot hold the model.
        """
        save_model(
            self.module, save_directory, assets=assets, generation_config=self.generation_config, overwrite=overwrite
        )

    @property
    def module(self) -> Glm4v:
        """The functional module, around the same arrays: for `jax.jit`, `jax.grad` and training."""
        return self.runtime.module

    @property
    def generation_config(self) -> GenerationConfig:
        """Default options of `generate`: the checkpoint's, unless set."""
        return self.runtime.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.runtime.generation_config = GenerationConfig().overridden(config)

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
        """Number of parameters; a tied head counts once, and the scales of quantised kernels do not."""
        leaves = zip(leaf_paths(self.module), jax.tree.leaves(self.module), strict=True)
        return num_params([leaf for path, leaf in leaves if not is_scale(path)])

    def get_input_embeddings(self, input_ids: np.ndarray | None = None) -> Any:
        """See `Glm4vTextModel.get_input_embeddings`."""
        return self.model.get_input_embeddings(input_ids)

    def get_image_features(self, pixel_values: np.ndarray, image_grid_thw: np.ndarray) -> tuple[Array, ...]:
        """Merged tokens of each image, [tokens, D]."""
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
          labels: int [B, T], -100 where a position does not count; `loss` is returned.
          logits_to_keep: the number of last positions to score, 0 for all, or their indices; 0 beside labels.
          return_dict: False for the tuple of the fields that are not None.
          input_ids, ..., *args, **kwargs: see `Glm4vModel.run`.

        Raises:
          MessageError: the inputs contradict each other.
        """
        with self.runtime.on_mesh():
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

    def generate(self, input_ids: np.ndarray, **kwargs: Any) -> Any:
        """Continue prompts; `hf.generate.generate` has the details.

        Args:
          input_ids: int [B, T], padded on either side where `attention_mask` is 0.
          **kwargs: the processor's other outputs (attention_mask, pixel_values, image_grid_thw, pixel_values_videos,
            video_grid_thw); `streamer`; `tokenizer`, for stop_strings; `cache_dtype`; and options that override the
            checkpoint's generation_config.json, the fields of `GenerationConfig`.

        Returns:
          int64 [B * num_return_sequences, T + new]: the prompts as given, then the new tokens; with
          return_dict_in_generate a `GenerateDecoderOnlyOutput`.

        Raises:
          GenerationError, MessageError: before anything is computed.
        """
        return generate(self.runtime, input_ids, **kwargs)


def _checked_labels(labels: np.ndarray, extent: Extent, every: bool, vocab_size: int) -> np.ndarray:
    labels = token_array(labels, "labels")
    if not every or labels.shape != (extent.batch, extent.t):
        kept = "" if every else " and logits_to_keep"
        expected = [extent.batch, extent.t]
        raise MessageError(f"labels: found shape {list(labels.shape)}{kept}; expected {expected} and logits_to_keep=0")
    wrong = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab_size))
    if wrong.any():
        raise MessageError(f"labels: found {labels[wrong][0]}; expected {IGNORED_LABEL} or tokens below {vocab_size}")
    return labels


def _kept(run: PaddedOutput, logits_to_keep: int | np.ndarray) -> Array:
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
