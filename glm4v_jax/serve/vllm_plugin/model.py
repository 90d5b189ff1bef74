"""The class that tpu-inference's runner loads and calls, with its names and argument orders (0.32.0).

Source of the contract: tpu_inference/models/common/model_loader.py, runner/{tpu_runner,multimodal_manager}.py.

Dimensions: T tokens of all sequences of a step, one after the other and padded; N query heads, K key and value heads
of size H; D hidden size; V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from glm4v_jax.checkpoints.load import load_runtime
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices.mesh import REPLICATED, explicit, placed_on, use_rules
from glm4v_jax.files import model_directory
from glm4v_jax.model import rope
from glm4v_jax.model.decoder import Attention, TextDecoder
from glm4v_jax.model.glm4v import score
from glm4v_jax.model.lora import has_lora, merge_in_place
from glm4v_jax.model.nn import Linear
from glm4v_jax.model.quantize import is_quantized
from glm4v_jax.model.rules import rules_for
from glm4v_jax.serve.vllm_plugin.media import VllmVision, media_in, positions_of, shapes_of
from glm4v_jax.serve.vllm_plugin.settings import VllmSettings, check_heads, check_same_model, refuse


class _Engine:
    """What of its engine the model keeps besides arrays of a step; compared by identity, as a static attribute is.

    Attributes:
      vllm_config: vLLM's configuration.
      mesh: tpu-inference's mesh, of automatic axes.
      settings: this package's part of `--additional-config`.
      config: of the model, once it is loaded; and so `vision`, the ViT.
    """

    config: Glm4vConfig
    vision: VllmVision

    def __init__(self, vllm_config: Any, mesh: Mesh):
        refuse(vllm_config, mesh)
        self.vllm_config, self.mesh = vllm_config, mesh
        self.settings = VllmSettings.read(vllm_config.additional_config)


class Glm4vForVllm(nnx.Module):
    """A model of the family, as tpu-inference's runner sees one.

    The decoder runs in the engine's mesh of automatic axes, where XLA partitions it as its weights are. The ViT is not
    part of the step: it runs when images come, on a mesh of explicit axes, so that its attention is sharded too.

    Raises:
      ConfigError: vLLM's options ask for what is not built.
    """

    def __init__(self, vllm_config: Any, rng_key: Any, mesh: Mesh):
        self.engine = nnx.static(_Engine(vllm_config, mesh))
        self.text: TextDecoder | None = nnx.data(None)
        self.head: Linear | None = nnx.data(None)

    def load_weights(self, rng_key: Any) -> None:
        """Read the weights onto the devices of the engine's mesh.

        Raises:
          CheckpointError: there is no checkpoint, or it is damaged.
          ConfigError: it is another model's than vLLM has planned for, or does not divide by the devices.
        """
        engine, model = self.engine, self.engine.vllm_config.model_config
        planned = model_directory(model.model)
        directory = model_directory(engine.settings.glm4v_checkpoint or planned)
        engine.config = config = Glm4vConfig.from_pretrained(directory)
        check_heads(config, engine.mesh)
        check_same_model(config, Glm4vConfig.from_pretrained(planned), str(directory))
        rules = rules_for(config, engine.mesh)
        module = load_runtime(
            directory, dtype=model.dtype, mesh=explicit(engine.mesh), rules=rules, stacked=False,
            quantize=engine.settings.glm4v_quantize, adapter=engine.settings.glm4v_adapter,
        ).module  # fmt: skip
        if has_lora(module) and not is_quantized(module):  # beside integers it stays what it is
            with use_rules(rules):
                merge_in_place(module)
        engine.vision = VllmVision(module.visual, config.vision_config, engine.mesh, rules)
        self.text, self.head = placed_on((module.language_model, module.lm_head), engine.mesh)

    def __call__(
        self,
        kv_caches: list[Array],
        input_ids: Int[Array, " T"],
        attention_metadata: Any,
        inputs_embeds: Float[Array, "T D"] | None = None,
        input_positions: Any = None,
        layer_name_to_kvcache_index: Sequence[tuple[str, int]] = (),
        lora_metadata: Any = None,
        intermediate_tensors: Any = None,
        is_first_rank: bool = True,
        is_last_rank: bool = True,
    ) -> tuple[list[Array], Float[Array, "T D"], list[Array], None]:
        """Run a step: tokens of several sequences, whose earlier keys and values are in pages.

        Args:
          kv_caches: pages of each layer; they are donated.
          input_ids: of the step; None where there are `inputs_embeds`.
          attention_metadata: positions [3, T], and where which sequence's pages are.
          inputs_embeds: what `embed_input_ids` has made.
          input_positions: unused: those of the metadata are M-RoPE's.
          layer_name_to_kvcache_index: which of `kv_caches` is a layer's.
          lora_metadata, intermediate_tensors, is_first_rank, is_last_rank: of what `settings` refuses.

        Returns:
          kv_caches, hidden states after the last norm, and two results of features that are not built.
        """
        assert self.text is not None
        paged, caches, places = _paged_attention(), list(kv_caches), dict(layer_name_to_kvcache_index)

        def attention_of_layer(layer: int) -> Attention:
            place = places.get(f"layer.{layer}", layer)

            def attention(q: Array, k: Array, v: Array) -> tuple[Array, None]:
                # A key head's queries stand together in N, as they do in [K, G].
                flat = q.reshape(q.shape[1], -1, q.shape[-1])
                caches[place], out = paged(caches[place], flat, k[0], v[0], attention_metadata, self.engine.mesh)
                return out.reshape(q.shape), None

            return attention

        with use_rules(REPLICATED):
            x = self.embed_input_ids(input_ids)[None] if inputs_embeds is None else inputs_embeds[None]
            cos_sin = rope.mrope_cos_sin(attention_metadata.input_positions[:, None], self.text.config)
            hidden, _ = self.text.run(x, cos_sin, attention_of_layer)
        return caches, hidden[0], [], None

    def compute_logits(self, hidden_states: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """Score the vocabulary."""
        assert self.text is not None
        with use_rules(REPLICATED):
            return score(self.text, self.head, hidden_states[None])[0]

    def embed_input_ids(
        self,
        input_ids: Int[Array, " T"],
        mm_embeds: Float[Array, "T D"] | None = None,
        *,
        is_multimodal: Bool[Array, " T"] | None = None,
    ) -> Float[Array, "T D"]:
        """Embed tokens, and put vision features in their places.

        Args:
          input_ids: of the step.
          mm_embeds: features of the step's images and videos, in order and padded.
          is_multimodal: which tokens they stand for; ids do not say that, as video frames have those of images.
        """
        assert self.text is not None
        with use_rules(REPLICATED):
            embeds = self.text.embed_tokens(input_ids[None])[0]
        if mm_embeds is None or is_multimodal is None:
            return embeds
        placed = mm_embeds.astype(embeds.dtype)[jnp.maximum(jnp.cumsum(is_multimodal) - 1, 0)]
        return jnp.where(is_multimodal[:, None], placed, embeds)

    def embed_multimodal(self, **kwargs: Any) -> tuple[Float[Array, "M D"], ...]:
        """Encode images or videos of one step; called outside `jax.jit`, with tensors on the CPU (`media.media_in`)."""
        return tuple(self.engine.vision.encode(media_in(kwargs, self.engine.config)))

    def precompile_vision_encoder(self, run_compilation_fn: Callable[..., Any]) -> None:
        """Hand the runner what to run before the server is ready: the ViT, once for each shape that images can have."""
        engine = self.engine
        directory = model_directory(engine.vllm_config.model_config.model)
        for shape in shapes_of(directory, engine.config.vision_config, engine.vllm_config):
            run_compilation_fn("glm4v_vision", engine.vision.warm, shape, rows=shape[0], patches=shape[1])

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[np.ndarray, int]:
        """Compute the positions of a prompt (`media.positions_of`); called outside `jax.jit`."""
        return positions_of(input_tokens, mm_features, self.engine.config)

    def modules(self) -> list[Any]:
        """Nothing: vLLM looks for layers of PyTorch when it shuts down."""
        return []


def _paged_attention() -> Callable[..., tuple[Array, Array]]:
    """tpu-inference's attention over pages; imported here alone."""
    from tpu_inference.layers.common.attention_interface import attention

    return attention
