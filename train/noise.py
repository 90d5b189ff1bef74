"""What a training step draws so that a model does not learn its data by heart: dropout of adapters, and NEFTune."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm4v_jax.batch import Batch
from glm4v_jax.devices import mesh
from glm4v_jax.model.glm4v import Glm4v
from glm4v_jax.model.layers import Remat
from glm4v_jax.model.lora import with_dropout


class Noise(NamedTuple):
    """What is drawn in every step.

    seed: of the job; with the number of the step it decides what is drawn, on any mesh and after a restart.
    dropout: of an adapter's inputs; see `lora.with_dropout`.
    neftune: see `add_noise`; None adds none.
    """

    seed: int
    dropout: float = 0.0
    neftune: float | None = None

    def keys(self, step: Array, micro_batches: int) -> Array:
        """A key for each micro-batch of a step."""
        return jax.random.split(jax.random.fold_in(jax.random.key(self.seed), step), micro_batches)

    def hidden(self, model: Glm4v, batch: Batch, key: Array, remat: Remat) -> Float[Array, "B T D"]:
        """Hidden states after the last norm, with the noise of one micro-batch."""
        of_dropout, of_embeddings = jax.random.split(key)
        if self.dropout:
            model = with_dropout(model, of_dropout, self.dropout)
        if self.neftune is None:
            return model(batch, remat=remat)
        change = functools.partial(add_noise, batch=batch, key=of_embeddings, alpha=self.neftune)
        return model(batch, remat=remat, change_embeds=change)


def add_noise(embeds: Float[Array, "B T D"], batch: Batch, key: Array, alpha: float) -> Float[Array, "B T D"]:
    """Add noise to the embeddings of text, uniform in +-alpha / sqrt(L D) (NEFTune, arXiv 2310.05914).

    L is the number of tokens of each sample; vision features get none.
    """
    segments = mesh.reshard(batch.segment_ids, "batch", "length")
    lengths = jnp.sum(segments[:, :, None] == segments[:, None, :], axis=-1)
    size = alpha / jnp.sqrt(lengths * embeds.shape[-1])
    is_text = segments > 0
    if batch.vision_index is not None:
        is_text &= mesh.reshard(batch.vision_index, "batch", "length") < 0
    drawn = jax.random.uniform(key, embeds.shape, jnp.float32, -1, 1, out_sharding=mesh.spec("batch", "length", None))
    return embeds + (drawn * jnp.where(is_text, size, 0.0)[..., None]).astype(embeds.dtype)
