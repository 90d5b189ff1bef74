"""GLM-4.1V as one functional module on static-shape arrays: what is jitted, differentiated and sharded.

The reference-shaped classes in `modeling` prepare these arrays from a person's inputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glm4v_jax import mesh
from glm4v_jax.cache import KVCache
from glm4v_jax.config import Glm4vConfig
from glm4v_jax.decoder import Record, Recorded, TextDecoder
from glm4v_jax.layers import stack, unstack
from glm4v_jax.nn import Init, Linear
from glm4v_jax.vision import VisionEncoder, VisionInputs


class Glm4v(nnx.Module):
    """ViT, decoder and head. A pytree: `jax.jit`, `jax.grad`, `jax.eval_shape` take it as it is.

    Construct it inside a mesh (`mesh.use_mesh`); `jax.eval_shape(lambda: Glm4v(config))` gives the abstract, sharded tree.
    """

    def __init__(self, config: Glm4vConfig, *, rngs: nnx.Rngs | None = None, dtype: DTypeLike = jnp.float32):
        text = config.text_config
        rngs = rngs if rngs is not None else nnx.Rngs(params=0)
        self.config = config
        self.visual = VisionEncoder(config.vision_config, Init(rngs, config.vision_config.initializer_range, dtype))
        init = Init(rngs, text.initializer_range, dtype)
        self.language_model = TextDecoder(text, init)
        tied = text.tie_word_embeddings
        self.lm_head = None if tied else Linear({"embed": text.hidden_size}, {"vocab": text.vocab_size}, init)

    def encode(self, vision: VisionInputs | Any, **kwargs: Any) -> Float[Array, "R M D"]:
        """Packed patches -> merged vision tokens; see `VisionEncoder.__call__`."""
        return self.visual(vision, **kwargs)

    def embed(
        self,
        input_ids: Int[Array, "B T"],
        features: Float[Array, "R M D"] | None = None,
        vision_index: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Token embeddings, with vision tokens put in their places.

        Args:
          input_ids: tokens; what stands in a vision token's place does not matter, but must be in the vocabulary.
          features: merged vision tokens, or None.
          vision_index: -1 for text, otherwise an index into `features` flattened to [R * M, D].
        """
        embeds = self.language_model.embed_tokens(input_ids)
        if features is None:
            return embeds
        flat = mesh.reshard(features, None, None, None).reshape(-1, features.shape[-1]).astype(embeds.dtype)
        vision_index = mesh.reshard(vision_index, "batch", "length")
        placed = flat.at[jnp.maximum(vision_index, 0)].get(out_sharding=mesh.spec("batch", "length", None))
        return jnp.where((vision_index >= 0)[..., None], placed, embeds)

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
        batch: Any,
        *,
        record: Record = Record(),
        dropout_key: Array | None = None,
        remat: bool = False,
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
        return hidden

    def unstacked(self) -> "Glm4v":
        """The same model with one module a layer, as decoding on a CPU wants it; arrays are not shared."""
        return self._with_layers(unstack)

    def stacked(self) -> "Glm4v":
        """The same model with scanned layers."""
        return self._with_layers(stack)

    def _with_layers(self, change: Any) -> "Glm4v":
        model = jax.tree.map(lambda x: x, self)
        model.visual.blocks = change(model.visual.blocks)
        model.language_model.layers = change(model.language_model.layers)
        return model
