"""GLM-4.1V as one functional module (`Glm4vForConditionalGeneration`): what is jitted, differentiated and sharded.

`inputs` makes its arrays from text and media; the classes of `hf` have the reference's names and call shapes.
"""

from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glm4v_jax.batch import Batch, VisionRows
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.model.decoder import NOTHING, Capture, Captured, TextDecoder
from glm4v_jax.model.kv_cache import KVCache
from glm4v_jax.model.layers import Remat, stack, unstack
from glm4v_jax.model.nn import Init, Linear, gather_tokens
from glm4v_jax.model.vision import VisionEncoder


def embed_with_vision(
    text: TextDecoder,
    input_ids: Int[Array, "B T"],
    features: Float[Array, "*N D"] | None = None,
    vision_index: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Look up token embeddings, and put vision features in the places of image and video tokens.

    Args:
      text: the decoder, for its embedding table.
      input_ids: int32 [B, T]; any token of the vocabulary may stand in the place of a vision token.
      features: merged vision tokens, [R, M, D] or flattened; None for text alone.
      vision_index: int32 [B, T], -1 for text, otherwise an index into the flattened `features`.
    """
    embeds = text.embed_tokens(input_ids)
    if features is None:
        return embeds
    flat = mesh.reshard(features, *(None,) * features.ndim).reshape(-1, features.shape[-1]).astype(embeds.dtype)
    vision_index = mesh.reshard(vision_index, "batch", "length")
    placed = flat.at[jnp.maximum(vision_index, 0)].get(out_sharding=mesh.spec("batch", "length", None))
    return jnp.where((vision_index >= 0)[..., None], placed, embeds)


class Glm4v(nnx.Module):
    """ViT, decoder and head. A pytree: `jax.jit`, `jax.grad`, `jax.eval_shape` take it as it is.

    >>> import jax
    >>> import numpy as np
    >>> from glm4v_jax import Glm4v, Glm4vConfig, make_batch, use_mesh
    >>> config = Glm4vConfig.tiny()
    >>> with use_mesh():
    ...     model = Glm4v.init(config)
    ...     batch, _ = make_batch(np.array([[5, 6, 7]]), config)
    ...     hidden = jax.jit(lambda model, batch: model(batch))(model, batch)
    ...     print(hidden.shape, model.logits(hidden).shape)  # tokens are padded to 32
    (1, 32, 64) (1, 32, 320)

    `lm_head` is None where it is tied to the embedding.
    """

    def __init__(
        self, config: Glm4vConfig, visual: VisionEncoder, language_model: TextDecoder, lm_head: Linear | None = None
    ):
        self.config = config
        self.visual = visual
        self.language_model = language_model
        self.lm_head = lm_head
        self.modules_to_save: tuple[str, ...] = ()  # what an adapter has as whole modules; see `lora`

    @classmethod
    def init(cls, config: Glm4vConfig, *, rngs: nnx.Rngs | None = None, dtype: DTypeLike = jnp.float32) -> Self:
        """Make a randomly initialised model, layers stacked, in the current mesh (`mesh.use_mesh`).

        `jax.eval_shape(lambda: Glm4v.init(config))` gives the abstract, sharded tree, as `zeros` does sooner.
        """
        return cls._init(config, rngs if rngs is not None else nnx.Rngs(params=0), dtype)

    @classmethod
    def zeros(cls, config: Glm4vConfig, dtype: DTypeLike = jnp.float32) -> Self:
        """Make a model of zeros, otherwise like that of `init`.

        For `jax.eval_shape`, which takes a seventh of the time: random numbers are much to trace.
        """
        return cls._init(config, None, dtype)

    @classmethod
    def _init(cls, config: Glm4vConfig, rngs: nnx.Rngs | None, dtype: DTypeLike) -> Self:
        text, vision = config.text_config, config.vision_config
        init = Init(rngs, text.initializer_range, dtype)
        tied = text.tie_word_embeddings
        return cls(
            config,
            VisionEncoder(vision, Init(rngs, vision.initializer_range, dtype)),
            TextDecoder(text, init),
            None if tied else Linear({"embed": text.hidden_size}, {"vocab": text.vocab_size}, init),
        )

    def encode(self, vision: VisionRows, **kwargs: Any) -> Float[Array, "R M D"]:
        """Encode packed patches as vision features; see `VisionEncoder.__call__`."""
        return self.visual(vision, **kwargs)

    def embed(
        self,
        input_ids: Int[Array, "B T"],
        features: Float[Array, "*N D"] | None = None,
        vision_index: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Embed tokens, with vision features in their places; see `embed_with_vision`."""
        return embed_with_vision(self.language_model, input_ids, features, vision_index)

    def decode(
        self,
        inputs_embeds: Float[Array, "B T D"],
        position_ids: Int[Array, "3 B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Captured]:
        """Run the decoder on embeddings; see `TextDecoder.__call__`."""
        return self.language_model(inputs_embeds, position_ids, segment_ids, cache, **kwargs)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Score the vocabulary for hidden states, in the compute dtype."""
        return score(self.language_model, self.lm_head, hidden)

    def __call__(
        self,
        batch: Batch,
        *,
        record: Capture = NOTHING,
        dropout_key: Array | None = None,
        remat: Remat = "none",
        change_embeds: Callable[[Array], Array] | None = None,
    ) -> Float[Array, "B T D"]:
        """Run the forward pass of a `Batch` without a cache; hidden states after the last norm.

        Take `logits` of the positions that need them alone: at 151,552 entries each they are most of the memory.

        Args:
          batch: see `glm4v_jax.batch`.
          record: intermediates to compute as well (`TextDecoder.__call__` returns them).
          dropout_key: enables attention dropout, for training.
          remat: what the backward pass recomputes (`layers.Remat`).
          change_embeds: called with embedded tokens, vision features in their places; returns others, as with noise.
        """
        features = None
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        if batch.vision is not None:
            features = self.encode(batch.vision, dropout_key=keys[0], remat=remat)
        embeds = self.embed(batch.input_ids, features, batch.vision_index)
        if change_embeds is not None:
            embeds = change_embeds(embeds)
        hidden, _, _ = self.decode(
            embeds, batch.position_ids, batch.segment_ids, record=record, dropout_key=keys[1], remat=remat
        )
        return gather_tokens(hidden)

    def unstacked(self) -> "Glm4v":
        """The same model with one module per layer, the layout that decodes fastest on a CPU; arrays are copied."""
        return self._with_layers(unstack)

    def stacked(self) -> "Glm4v":
        """The same model with scanned layers."""
        return self._with_layers(stack)

    def _with_layers(self, change: Any) -> "Glm4v":
        model = jax.tree.map(lambda x: x, self)  # new modules around the same arrays
        model.visual.blocks = change(model.visual.blocks)
        model.language_model.layers = change(model.language_model.layers)
        return model


def score(text: TextDecoder, head: Linear | None, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Score the vocabulary with a head, or with the embedding table that it is tied to."""
    return head(hidden) if head is not None else text.embed_tokens.attend(hidden)
