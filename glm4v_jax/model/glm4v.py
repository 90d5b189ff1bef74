"""GLM-4.1V as one functional module on static-shape arrays: what is jitted, differentiated and sharded.

The reference-shaped classes in `modeling` prepare these arrays from a person's inputs.
"""

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glm4v_jax.batch import Batch, VisionRows
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.devices import mesh
from glm4v_jax.model.decoder import NOTHING, Record, Recorded, TextDecoder
from glm4v_jax.model.kv_cache import KVCache
from glm4v_jax.model.layers import Remat, stack, unstack
from glm4v_jax.model.nn import Init, Linear, whole
from glm4v_jax.model.vision import VisionEncoder


def embed_with_vision(
    text: TextDecoder,
    input_ids: Int[Array, "B T"],
    features: Float[Array, "*N D"] | None = None,
    vision_index: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Token embeddings, with vision tokens put in their places.

    Args:
      text: the decoder, for its embedding table.
      input_ids: tokens; what stands in a vision token's place does not matter, but must be in the vocabulary.
      features: merged vision tokens, [R, M, D] or flattened, or None.
      vision_index: -1 for text, otherwise an index into the flattened `features`.
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

    `lm_head` is None where it is tied to the embedding.
    """

    def __init__(
        self, config: Glm4vConfig, visual: VisionEncoder, language_model: TextDecoder, lm_head: Linear | None = None
    ):
        self.config = config
        self.visual = visual
        self.language_model = language_model
        self.lm_head = lm_head

    @classmethod
    def init(cls, config: Glm4vConfig, *, rngs: nnx.Rngs | None = None, dtype: DTypeLike = jnp.float32) -> Self:
        """A randomly initialised model, layers stacked, in the current mesh (`mesh.use_mesh`).

        `jax.eval_shape(lambda: Glm4v.init(config))` gives the abstract, sharded tree.
        """
        text, vision = config.text_config, config.vision_config
        rngs = rngs if rngs is not None else nnx.Rngs(params=0)
        init = Init(rngs, text.initializer_range, dtype)
        tied = text.tie_word_embeddings
        return cls(
            config,
            VisionEncoder(vision, Init(rngs, vision.initializer_range, dtype)),
            TextDecoder(text, init),
            None if tied else Linear({"embed": text.hidden_size}, {"vocab": text.vocab_size}, init),
        )

    def encode(self, vision: VisionRows, **kwargs: Any) -> Float[Array, "R M D"]:
        """Packed patches -> merged vision tokens; see `VisionEncoder.__call__`."""
        return self.visual(vision, **kwargs)

    def embed(
        self,
        input_ids: Int[Array, "B T"],
        features: Float[Array, "*N D"] | None = None,
        vision_index: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Token embeddings, with vision tokens put in their places; see `embed_with_vision`."""
        return embed_with_vision(self.language_model, input_ids, features, vision_index)

    def decode(
        self,
        inputs_embeds: Float[Array, "B T D"],
        position_ids: Int[Array, "3 B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Recorded]:
        """Embeddings -> hidden states; see `TextDecoder.__call__`."""
        return self.language_model(inputs_embeds, position_ids, segment_ids, cache, **kwargs)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Hidden states -> scores over the vocabulary, in the compute dtype."""
        if self.lm_head is None:
            return self.language_model.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

    def __call__(
        self,
        batch: Batch,
        *,
        record: Record = NOTHING,
        dropout_key: Array | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B T D"]:
        """The whole forward pass of a `Batch`, without a cache: hidden states [B, T, D] after the last norm.

        Take logits of the positions that need them: at 151,552 entries each they are most of the memory.
        """
        features = None
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        if batch.vision is not None:
            features = self.encode(batch.vision, dropout_key=keys[0], remat=remat)
        embeds = self.embed(batch.input_ids, features, batch.vision_index)
        hidden, _, _ = self.decode(
            embeds, batch.position_ids, batch.segment_ids, record=record, dropout_key=keys[1], remat=remat
        )
        return whole(hidden)

    def unstacked(self) -> "Glm4v":
        """The same model with one module a layer, as decoding on a CPU wants it; arrays are not shared."""
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
    """`logits`, inside a program."""
    return head(hidden) if head is not None else text.embed_tokens.attend(hidden)
