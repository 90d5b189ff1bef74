"""What the models return, with the reference's field names."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Array

from glm4v_jax.model.kv_cache import KVCache


@dataclasses.dataclass(frozen=True)
class PastKeyValues:
    """A cache on its way from one call to the next, with the rope deltas of the prompts it holds.

    cache: keys and values, one slot for each column of the tokens given so far, padding included.
    rope_deltas: int [B, 1]; a token at slot s that is not vision has position s + delta.
    length: columns held so far.
    """

    cache: KVCache
    rope_deltas: np.ndarray
    length: int

    def get_seq_length(self) -> int:
        """`length`, by the reference's name."""
        return self.length


class ModelOutput:
    """Fields by name, by key or by number, as the reference's: numbers count the fields that are not None."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        values = (getattr(self, f.name) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def keys(self) -> list[str]:
        """Names of the fields that are not None."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]  # type: ignore[arg-type]

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


@dataclasses.dataclass(frozen=True)
class BaseModelOutputWithPast(ModelOutput):
    """Output of the text model.

    last_hidden_state: [B, T, D], after the last norm.
    past_key_values: what the next call takes.
    hidden_states: N + 1 arrays [B, T, D]: the input of every layer, then `last_hidden_state`.
    attentions: N arrays [B, heads, T, S].
    """

    last_hidden_state: Array
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Glm4vModelOutputWithPast(BaseModelOutputWithPast):
    """As `BaseModelOutputWithPast`, and rope_deltas: int [B, 1]."""

    rope_deltas: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Glm4vCausalLMOutputWithPast(ModelOutput):
    """Output of the whole model.

    loss: float32 [], mean over the tokens that have a label; None without labels.
    logits: [B, T', V] of the positions asked for.
    The other fields are those of `Glm4vModelOutputWithPast`.
    """

    loss: Array | None = None
    logits: Array | None = None
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    rope_deltas: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class GenerateDecoderOnlyOutput(ModelOutput):
    """Output of `generate` with `return_dict_in_generate`, in NumPy.

    sequences: int64 [B, T + new], what `generate` returns otherwise.
    scores: of each new token float32 [B, V], what it was chosen from; zeros for rows that have ended.
    logits: of each new token float32 [B, V], as the model gives them; zeros for rows that have ended.
    """

    sequences: np.ndarray
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None


@dataclasses.dataclass(frozen=True)
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """Output of `generate` with `return_dict_in_generate` and `num_beams`, in NumPy.

    sequences: int64 [B * num_return_sequences, T + new], the best of each prompt first.
    sequences_scores: float32, with `output_scores`: sums of log probabilities, divided by new ** length_penalty.
    scores: of each step float32 [B * num_beams, V], log probabilities of the tokens that continue each running beam.
    logits: of each step float32 [B * num_beams, V], as the model gives them.
    beam_indices: int32 [.., new], the row among B * num_beams that each token continues; -1 after the last.
    """

    sequences: np.ndarray
    sequences_scores: np.ndarray | None = None
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None
    beam_indices: np.ndarray | None = None
